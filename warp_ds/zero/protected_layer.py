"""What the masked step works on: rows of one parameter that have one basis and one mask, and this rank's share of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from warp_ds.method.mask import unpack_bits
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.partition import RowPartition

#: Rows are rotated in pieces of at most this many elements: bounds temporary memory to 64 MB of fp32 a matrix.
CHUNK = 1 << 24
#: What bf16's rounding of an adapter's A leaves in frozen directions is 2^-9 of its size; a few times that in the worst entry.
ADAPTER_ROUNDING = 2.0**-5


@dataclass(eq=False)
class ProtectedLayer:
    """Rows of one parameter with one basis and one mask: all rows of a weight [m, n], some rows of a fused or stacked one
    (several of these then share ``param``), or the A [r, n] of a LoRA adapter, whose mask freezes whole columns of A U, or its
    B [m, r], of whose Vᵀ B whole rows are frozen. Compared by identity.

    With an output basis, C = Vᵀ W U, rows of the mask are the outputs' directions; the rotation of ``basis`` then takes a whole
    layer (``whole_layers``). This rank's share of C lies where its share of W does.
    """

    target: TargetLayer
    param: nn.Parameter
    basis: str
    """The key of its basis in the ``Placement``; layers with one basis have one key."""
    partition: RowPartition
    whole_frozen: Tensor
    """Packed bits uint8 [whole rows here, ceil(n / 8)]."""
    cut_frozen: Tensor
    """Packed bits uint8 [rows cut between ranks, ceil(n / 8)], the same on every rank."""
    frozen_count: int
    """Frozen entries of the whole layer, all ranks."""
    device: torch.device
    """Where it is rotated."""
    adapter_b: nn.Parameter | None = None
    """B [m, r], where ``param`` is the A or B of an adapter W' = W + s B A: its frozen coefficients are then 0, whatever it
    started as, so that W' U = W U in the frozen columns, or Vᵀ W' = Vᵀ W in the frozen rows."""
    dtype: torch.dtype = field(init=False)
    """Of the weights: while a plain optimizer steps, ``param`` is its fp32 master."""

    def __post_init__(self) -> None:
        self.dtype = self.param.dtype

    def frozen_pieces(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """(slice of this rank's share, which of its entries are frozen: bool), a bounded piece at a time."""
        n, whole = self.target.n, self.partition.whole
        for rows in row_chunks(len(self.partition.rows), n):
            bits = unpack_bits(self.whole_frozen[rows].to(device), n)
            yield slice(whole.start + rows.start * n, whole.start + rows.stop * n), bits.reshape(-1)
        if self.partition.fragments:
            cut = unpack_bits(self.cut_frozen.to(device), n)
            for fragment in self.partition.fragments:
                yield fragment.local, cut[fragment.cut, fragment.columns]

    def clear(self, share: Tensor) -> Tensor:
        """Puts the frozen entries of this rank's share of something (a gradient, a moment) to 0, in place."""
        for piece, frozen in self.frozen_pieces(share.device):
            share[piece].masked_fill_(frozen, 0.0)
        return share

    def start(self, coefficients: Tensor) -> tuple[float, float]:
        """Puts the frozen entries of an adapter's C, this rank's share, to 0 in place; any other layer's stay as they are.

        (the largest of what was there, the squares of the free ones added up)
        """
        if self.adapter_b is None:
            return 0.0, 0.0
        lost = 0.0
        for piece, frozen in self.frozen_pieces(coefficients.device):
            part = coefficients[piece]
            lost = max(lost, float(part.masked_select(frozen).abs().max()) if bool(frozen.any()) else 0.0)
            part.masked_fill_(frozen, 0.0)
        return lost, float(coefficients.double().square().sum())

    def lost(self, largest: float, squares: float) -> str:
        """What is wrong with an adapter that has been trained already, in words, if more than rounding was there to be lost:
        what ``start`` found, of all ranks, since one may hold nothing but frozen entries."""
        size = (squares / (self.target.m * self.target.n)) ** 0.5
        if largest <= ADAPTER_ROUNDING * size:
            return ""
        does = "writes into" if self.adapter_b is self.param else "reads"
        return (
            f"the adapter of {self.target.name} has been trained (B is not 0) and {does} frozen directions (a coefficient of "
            f"{largest:.1e} among others of {size:.1e}): taking that out would change what it does; start from a new adapter"
        )


def compute_device(param: nn.Parameter) -> torch.device:
    """Where a parameter is worked on: its own device, or this rank's accelerator where DeepSpeed has sharded it."""
    if hasattr(param, "ds_id"):
        from deepspeed.accelerator import get_accelerator

        return torch.device(get_accelerator().current_device_name())
    return param.device


def row_chunks(rows: int, n: int) -> Iterator[slice]:
    """Slices of at most CHUNK elements of n columns."""
    step = max(1, CHUNK // n)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))
