"""Σ = (1/T) Σ_t x_t x_tᵀ of a layer's inputs over T tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from warp_ds.method.products import add_bf16

BLOCK, GPU_BLOCK = 256, 1024
"""Rows of Σ that one product fills. Only what lies right of the diagonal block is formed: 1/2 + BLOCK / 2n of n²."""
TOKENS = 1024
"""Tokens that are put together, in one buffer, before they are multiplied: Σ is read and written once for so many.
(On a CPU twice as many are no faster, and hold twice the memory; on a GPU they add up with less accuracy.)"""
HALVES = (torch.bfloat16, torch.float16)


class Covariance:
    """The running sum Σ_t x_t x_tᵀ, [n, n] in fp32, of which only the upper block triangle is kept.

    ``add`` takes any float dtype: products of low-precision activations are exact in fp32, and add up in it. A GPU
    multiplies those as they are, an order of magnitude faster. Its tensor cores cut sums where fp32 rounds: an entry is
    off by some 3e-6 of the standard deviations of its two inputs, instead of 6e-7 (8,192 tokens, on an H200).
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
        kind = x.dtype if self.sum.is_cuda and x.dtype in HALVES else torch.float32
        if self._waiting is None or self._waiting.dtype != kind:
            self.flush()
            self._waiting = torch.empty(TOKENS, self.n, dtype=kind, device=self.sum.device)
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
            total, left, right = self.sum[: block.stop, block], x[:, : block.stop].T, x[:, block]
            if x.dtype == torch.float32:
                total.addmm_(left, right)
            else:
                add_bf16(total, left, right)

    def blocks(self) -> list[slice]:
        """The row blocks; of each, the columns from its start on are kept."""
        size = GPU_BLOCK if self.sum.is_cuda else BLOCK
        return [slice(first, min(first + size, self.n)) for first in range(0, self.n, size)]

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


def kept_entries(n: int, device: str = "cpu") -> float:
    """Entries of Σ [n, n] that are formed, and sent where it is reduced: the upper triangle of blocks."""
    return n * (n + (BLOCK if device == "cpu" else GPU_BLOCK)) / 2


def covariance_flops(tokens: int, n: int) -> float:
    """Operations of Σ with its symmetric products counted once."""
    return float(tokens) * n * (n + 1)
