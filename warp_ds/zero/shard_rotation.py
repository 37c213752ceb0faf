"""Rotating weights that lie in ZeRO-3 shards: C = W U and back, on any number of ranks.

Row i of C needs row i of W alone, so where every rank holds the basis each one rotates the rows of its own shard. A
basis that is too large for that lies on one rank, its owner, and the layer's shards go there and back: with the full
bases of a 70B model's down_proj (263 GB in fp32) on every rank, nothing would fit; and moving the shards takes fewer
bytes than moving the bases (by the ratio of world size x n to 2 m).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from warp_ds.artifacts import TargetLayer
from warp_ds.method.mask import unpack_bits
from warp_ds.method.rotation import Rotation
from warp_ds.zero.partition import RowPartition

#: Rows are rotated in pieces of at most this many elements: bounds temporary memory to 64 MB of fp32 a matrix.
CHUNK = 1 << 24
#: Where bases lie in training: see ``place_bases``.
PLACEMENTS = ("auto", "replicated", "owner")


@dataclass
class ProtectedLayer:
    """One masked layer's share on this rank."""

    target: TargetLayer
    param: nn.Parameter
    rotation: Rotation | None
    """None on the ranks that do not hold the basis."""
    partition: RowPartition
    whole_frozen: Tensor
    """Packed bits uint8 [whole rows here, ceil(n / 8)]."""
    cut_frozen: Tensor
    """Packed bits uint8 [rows cut between ranks, ceil(n / 8)], the same on every rank."""
    frozen_count: int
    """Frozen entries of the whole layer, all ranks."""
    owner: int | None = None
    """The one rank that holds the basis; None where every rank does."""

    def frozen_pieces(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """(slice of the local partition, which of its entries are frozen: bool), a bounded piece at a time."""
        n, whole = self.target.n, self.partition.whole
        for rows in row_chunks(len(self.partition.rows), n):
            bits = unpack_bits(self.whole_frozen[rows].to(device), n)
            yield slice(whole.start + rows.start * n, whole.start + rows.stop * n), bits.reshape(-1)
        if self.partition.fragments:
            cut = unpack_bits(self.cut_frozen.to(device), n)
            for fragment in self.partition.fragments:
                yield fragment.local, cut[fragment.cut, fragment.columns]


class ShardRotation:
    """Rotates layers' shards, wherever their bases lie, and counts what that sends."""

    def __init__(self, device: torch.device):
        self.device = device
        self._sent = 0

    def __call__(
        self, layers: list[ProtectedLayer], source: Callable[[ProtectedLayer], Tensor],
        apply: Callable[[Rotation, Tensor], Tensor], fast: bool = False,
    ) -> Iterator[tuple[ProtectedLayer, Tensor]]:
        """(layer, its local partition rotated: new fp32 tensor [partition.length], padding 0), in any order.

        Collective, with the same layers on every rank; one layer's whole result, over all ranks, exists at a time.
        ``source`` gives a layer's flat partition, and is asked twice. ``fast``: the result is a gradient or is rounded
        to the weights' dtype, so TF32 products will do where that dtype is coarser (see ``matmul_precision``).
        """
        yield from self._in_place([layer for layer in layers if layer.owner is None], source, apply, fast)
        yield from self._at_owners([layer for layer in layers if layer.owner is not None], source, apply, fast)

    def take_sent(self) -> int:
        """Bytes that this rank sent to others since last asked (an all-reduce counted as a ring's)."""
        sent, self._sent = self._sent, 0
        return sent

    def _in_place(
        self, layers: list[ProtectedLayer], source: Callable[[ProtectedLayer], Tensor],
        apply: Callable[[Rotation, Tensor], Tensor], fast: bool,
    ) -> Iterator[tuple[ProtectedLayer, Tensor]]:
        cuts = self._join_cut_rows(layers, source)
        for layer, cut in zip(layers, cuts, strict=True):
            assert layer.rotation is not None
            flat = source(layer).to(self.device, torch.float32)
            result = torch.zeros_like(flat)
            rows, target = layer.partition.whole_rows(flat), layer.partition.whole_rows(result)
            with matmul_precision(layer.param.dtype if fast else torch.float32):
                for chunk in row_chunks(rows.shape[0], layer.target.n):
                    target[chunk] = apply(layer.rotation, rows[chunk])
                if layer.partition.fragments:
                    rotated = apply(layer.rotation, cut)
                    for fragment in layer.partition.fragments:
                        result[fragment.local] = rotated[fragment.cut, fragment.columns]
            yield layer, result

    def _join_cut_rows(self, layers: list[ProtectedLayer], source: Callable[[ProtectedLayer], Tensor]) -> list[Tensor]:
        """The rows of each layer that are cut between ranks, fp32 [cut rows, n], whole, on every rank.

        One all-reduce for all layers: each rank adds its pieces to zeros, which is exact even for a row on all ranks.
        """
        sizes = [len(layer.partition.cut_rows) * layer.target.n for layer in layers]
        joined = torch.zeros(sum(sizes), device=self.device)
        cuts = [part.view(-1, layer.target.n) for part, layer in zip(joined.split(sizes), layers, strict=True)]
        for layer, cut in zip(layers, cuts, strict=True):
            if layer.partition.fragments:
                flat = source(layer)
                for fragment in layer.partition.fragments:
                    cut[fragment.cut, fragment.columns] = flat[fragment.local].to(self.device, torch.float32)
        if joined.numel():
            dist.all_reduce(joined)
            ranks = dist.get_world_size()
            self._sent += 2 * joined.nbytes * (ranks - 1) // ranks
        return cuts

    def _at_owners(
        self, layers: list[ProtectedLayer], source: Callable[[ProtectedLayer], Tensor],
        apply: Callable[[Rotation, Tensor], Tensor], fast: bool,
    ) -> Iterator[tuple[ProtectedLayer, Tensor]]:
        """In waves of one layer an owner, so that all of them rotate at once.

        Shards are whole in order of rank, so that an owner receives the matrix row after row, and the padding last.
        """
        if not layers:
            return
        ranks, rank = dist.get_world_size(), dist.get_rank()
        for wave in zip_longest(*([layer for layer in layers if layer.owner == owner] for owner in range(ranks))):
            lengths = [0 if layer is None else layer.partition.length for layer in wave]
            mine = wave[rank]
            shards = torch.cat([source(layer).to(self.device, torch.float32) for layer in wave if layer is not None])
            whole = shards.new_empty(ranks * lengths[rank])
            self._exchange(whole, shards, [lengths[rank]] * ranks, lengths)
            if mine is not None:
                assert mine.rotation is not None
                m, n = mine.target.m, mine.target.n
                rows = whole[: m * n].view(m, n)
                with matmul_precision(mine.param.dtype if fast else torch.float32):
                    for chunk in row_chunks(m, n):
                        rows[chunk] = apply(mine.rotation, rows[chunk])
                whole[m * n :] = 0.0
            self._exchange(shards, whole, lengths, [lengths[rank]] * ranks)
            del whole
            for layer, result in zip(wave, shards.split(lengths), strict=True):
                if layer is not None:
                    yield layer, result

    def _exchange(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes)
        self._sent += sent.element_size() * (sum(sent_sizes) - sent_sizes[dist.get_rank()])


def place_bases(
    placement: str, layers: Iterable[TargetLayer], bases: Mapping[str, tuple[str, int]], world_size: int
) -> dict[str, int | None]:
    """Which rank holds each basis, by the basis's key; None where every rank does.

    ``bases`` gives for each layer's name the key of its basis and the bytes that one stored copy takes. 'replicated'
    and 'owner' are taken at their word. 'auto' replicates while all bases together take no more than a rank's fp32
    master weights and moments of the masked layers (12 bytes a weight, over world_size), and gives each basis to one
    owner beyond that. Owners are dealt in the order of the layers, to whoever has least to rotate: neighbours, which
    share an optimizer sub-group, then lie on different ranks. Raises ValueError for another ``placement``.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"basis_placement is {placement!r}: choose one of {', '.join(PLACEMENTS)}")
    layers = list(layers)
    sizes = dict(bases[layer.name] for layer in layers)
    state = 12 * sum(layer.m * layer.n for layer in layers) / world_size
    if world_size == 1 or placement == "replicated" or (placement == "auto" and sum(sizes.values()) <= state):
        return dict.fromkeys(sizes)
    work: dict[str, int] = dict.fromkeys(sizes, 0)
    for layer in layers:
        key, nbytes = bases[layer.name]
        work[key] += layer.m * nbytes
    load = [0] * world_size
    owners: dict[str, int | None] = {}
    for key in sizes:
        owner = load.index(min(load))
        owners[key] = owner
        load[owner] += work[key]
    return owners


def row_chunks(rows: int, n: int) -> Iterator[slice]:
    """Slices of at most CHUNK elements of n columns."""
    step = max(1, CHUNK // n)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


@contextmanager
def matmul_precision(weights: torch.dtype) -> Iterator[None]:
    """TF32 products where what they make is rounded to bf16, which keeps 8 bits to TF32's 11; full fp32 elsewhere.

    fp16 keeps 11 bits itself, so TF32's error would be as large as its rounding.
    """
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if weights == torch.bfloat16 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # Asking the older setting would fail where the newer has been used, as transformers' tf32 argument does.
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    befores = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32" if weights == torch.bfloat16 else "ieee"
    try:
        yield
    finally:
        for backend, value in zip(backends, befores, strict=True):
            backend.fp32_precision = value
