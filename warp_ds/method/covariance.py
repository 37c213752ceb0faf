"""Σ = (1/T) Σ_t x_t x_tᵀ of a layer's inputs over T tokens (section 2.1 of the method)."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
"""Rows of Σ that one product fills. Only what lies right of the diagonal block is formed: 1/2 + BLOCK / 2n of n²."""
TOKENS = 1024
"""Tokens that are put together, in one fp32 buffer, before they are multiplied: Σ is read and written once for so many.
(Twice as many are no faster, and hold twice the memory.)"""


class Covariance:
    """The running sum Σ_t x_t x_tᵀ, [n, n] in fp32, of which only the upper block triangle is kept.

    ``add`` takes any float dtype: products of low-precision activations are exact in fp32, and add up in it.
    """

    def __init__(self, n: int, device: torch.device | str = "cpu"):
        self.n = n
        self.tokens = 0
        self.sum = torch.zeros(n, n, device=device)
        self._waiting: Tensor | None = None
        self._filled = 0

    def add(self, x: Tensor) -> None:
        """Adds the tokens x [t, n], which are copied; the sum may hold them only after ``flush``."""
        self.tokens += x.shape[0]
        if self._waiting is None:
            self._waiting = torch.empty(TOKENS, self.n, device=self.sum.device)
        while len(x):
            taken = x[: TOKENS - self._filled]
            self._waiting[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            if self._filled == TOKENS:
                self.flush()
            x = x[len(taken) :]

    def flush(self) -> None:
        """Brings ``sum`` up to date."""
        if self._waiting is None or not self._filled:
            return
        x, self._filled = self._waiting[: self._filled], 0
        for block in self.blocks():  # tall products, by columns: a tenth faster on a CPU than wide ones, by rows
            self.sum[: block.stop, block].addmm_(x[:, : block.stop].T, x[:, block])

    def blocks(self) -> list[slice]:
        """The row blocks; of each, the columns from its start on are kept."""
        return [slice(first, min(first + BLOCK, self.n)) for first in range(0, self.n, BLOCK)]

    def result(self, tokens: int | None = None) -> Tensor:
        """Σ [n, n], symmetric to the bit; divides by ``tokens`` (default: those added). Uses up the running sum.

        Raises ValueError where no token was counted.
        """
        self.flush()
        self._waiting = None
        count = self.tokens if tokens is None else tokens
        if count < 1:
            raise ValueError("no token was counted, so there is no covariance: give samples with tokens in scope")
        sigma = self.sum.div_(count)
        for block in self.blocks():
            diagonal = sigma[block, block]
            diagonal.copy_(torch.triu(diagonal) + torch.triu(diagonal, 1).T)
            sigma[block.stop :, block].copy_(sigma[block, block.stop :].T)
        return sigma


def covariance_flops(tokens: int, n: int) -> float:
    """Operations of Σ with its symmetric products counted once."""
    return float(tokens) * n * (n + 1)
