"""Σ = (1/T) Σ_t x_t x_tᵀ of a layer's inputs over T tokens (section 2.1 of the method)."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1024
"""Columns of Σ that one product fills: a symmetric product costs (1 + BLOCK / n) / 2 of the full one."""


class Covariance:
    """The running sum Σ_t x_t x_tᵀ, [n, n] in fp32 (fp64 on request), of which only the upper block triangle is kept.

    ``add`` takes any float dtype: products of low-precision activations accumulate in ``dtype``.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.n = n
        self.tokens = 0
        self.sum = torch.zeros(n, n, dtype=dtype, device=device)

    def add(self, x: Tensor) -> None:
        """Adds the tokens x [t, n]."""
        self.tokens += x.shape[0]
        x = x.to(self.sum.dtype)
        for begin in range(0, self.n, BLOCK):
            end = min(begin + BLOCK, self.n)
            self.sum[begin:end, begin:].addmm_(x[:, begin:end].T, x[:, begin:])

    def result(self, tokens: int | None = None) -> Tensor:
        """Σ [n, n], symmetric to the bit; divides by ``tokens`` (default: those added). Uses up the running sum.

        Raises ValueError where no token was counted.
        """
        count = self.tokens if tokens is None else tokens
        if count < 1:
            raise ValueError("no token was counted, so there is no covariance: give samples with tokens in scope")
        sigma = self.sum.div_(count)
        for begin in range(0, self.n, BLOCK):
            end = min(begin + BLOCK, self.n)
            diagonal = sigma[begin:end, begin:end]
            diagonal.copy_(torch.triu(diagonal) + torch.triu(diagonal, 1).T)
            sigma[end:, begin:end].copy_(sigma[begin:end, end:].T)
        return sigma
