"""Which rotated coefficients are frozen: packed bits, 1 = frozen.

A mask file holds ``frozen`` uint8 [m, ceil(n / 8)], most significant bit first, as ``numpy.packbits(axis=1)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)


def frozen_count(keep_ratio: float, entries: int) -> int:
    """round(keep_ratio * entries), halves to even as Python rounds; ValueError outside [0, 1]."""
    if not 0.0 <= keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio is the share of coefficients to freeze, between 0 and 1, not {keep_ratio}")
    return round(keep_ratio * entries)


def pack_bits(frozen: Tensor) -> Tensor:
    """bool [m, n] -> uint8 [m, ceil(n / 8)], as ``numpy.packbits(axis=1)``."""
    m, n = frozen.shape
    padded = torch.zeros(m, (n + 7) // 8 * 8, dtype=torch.uint8, device=frozen.device)
    padded[:, :n] = frozen
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=frozen.device)
    return (padded.view(m, (n + 7) // 8, 8) * weights).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """uint8 [m, ceil(n / 8)] -> bool [m, n]."""
    weights = torch.tensor(_WEIGHTS, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) & weights).ne(0).flatten(1)[:, :n]
