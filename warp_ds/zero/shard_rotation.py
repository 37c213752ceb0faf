"""Rotating weights that lie in ZeRO-3 shards: C = W U and back, on any number of ranks.

Row i of C needs row i of W alone, so where every rank holds the basis each one rotates the rows of its own shard. A
basis that is too large for that either lies on one rank, its owner, and the layer's shards go there and back; or it is
sharded itself, and gathered for the moment of its use. Which of them is fastest is arithmetic: ``predict_costs``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from warp_ds.method.mask import unpack_bits
from warp_ds.method.rotation import Rotation
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.partition import RowPartition

#: Rows are rotated in pieces of at most this many elements: bounds temporary memory to 64 MB of fp32 a matrix.
CHUNK = 1 << 24
#: Where bases lie in training: see ``place_bases``.
PLACEMENTS = ("auto", "replicated", "sharded", "owner")


class BasisShard:
    """This rank's piece of a rotation that no rank keeps whole."""

    def __init__(self, rotation: Rotation, world_size: int, rank: int):
        """Copies one of ``world_size`` equal flat pieces of all that ``rotation`` holds, with zeros after its end."""
        packed = rotation.packed()
        length = -(-packed.numel() // world_size)
        mine = packed[rank * length : (rank + 1) * length]
        self.piece = mine.new_zeros(length)
        self.piece[: mine.numel()] = mine
        self.world_size = world_size
        self.form = rotation.to("meta")

    def gather(self) -> tuple[Tensor, Any]:
        """Starts bringing the pieces together: the buffer that they come into, and the work to wait for. Collective."""
        buffer = self.piece.new_empty(self.world_size * self.piece.numel())
        return buffer, dist.all_gather_into_tensor(buffer, self.piece, async_op=True)


@dataclass
class ProtectedLayer:
    """One masked layer's share on this rank."""

    target: TargetLayer
    param: nn.Parameter
    rotation: Rotation | None
    """None on the ranks that do not hold the whole basis."""
    partition: RowPartition
    whole_frozen: Tensor
    """Packed bits uint8 [whole rows here, ceil(n / 8)]."""
    cut_frozen: Tensor
    """Packed bits uint8 [rows cut between ranks, ceil(n / 8)], the same on every rank."""
    frozen_count: int
    """Frozen entries of the whole layer, all ranks."""
    owner: int | None = None
    """The one rank that holds the basis; None where every rank does, or a piece of it."""
    sharded: BasisShard | None = None
    """This rank's piece, where no rank holds the basis whole."""

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
        self,
        layers: list[ProtectedLayer],
        source: Callable[[ProtectedLayer], Tensor],
        apply: Callable[[Rotation, Tensor], Tensor],
        fast: bool = False,
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
        self,
        layers: list[ProtectedLayer],
        source: Callable[[ProtectedLayer], Tensor],
        apply: Callable[[Rotation, Tensor], Tensor],
        fast: bool,
    ) -> Iterator[tuple[ProtectedLayer, Tensor]]:
        cuts = self._join_cut_rows(layers, source)
        rotations = self._whole_rotations(layers)
        for layer, cut in zip(layers, cuts, strict=True):
            rotation = next(rotations)
            flat = source(layer).to(self.device, torch.float32)
            result = torch.zeros_like(flat)
            rows, target = layer.partition.whole_rows(flat), layer.partition.whole_rows(result)
            with matmul_precision(layer.param.dtype if fast else torch.float32):
                for chunk in row_chunks(rows.shape[0], layer.target.n):
                    target[chunk] = apply(rotation, rows[chunk])
                if layer.partition.fragments:
                    rotated = apply(rotation, cut)
                    for fragment in layer.partition.fragments:
                        result[fragment.local] = rotated[fragment.cut, fragment.columns]
            del rotation  # Or a gathered one would live on while the next but one is gathered.
            yield layer, result

    def _whole_rotations(self, layers: list[ProtectedLayer]) -> Iterator[Rotation]:
        """Each layer's rotation. A sharded one is gathered while the one before it is used, and dropped after its last use.

        So two whole ones exist at most, if the caller drops each before it asks for the next.
        """
        shards = [shard for shard, _ in groupby(layer.sharded for layer in layers) if shard is not None]
        ahead = iter(shards)
        coming = self._start(next(ahead, None))
        for shard, members in groupby(layers, key=lambda layer: layer.sharded):
            if shard is None:
                for layer in members:
                    assert layer.rotation is not None
                    yield layer.rotation
                continue
            assert coming is not None
            buffer, work = coming
            work.wait()
            whole = shard.form.unpacked(buffer)
            coming = self._start(next(ahead, None))
            for _ in members:
                yield whole
            del whole, buffer, work

    def _start(self, shard: BasisShard | None) -> tuple[Tensor, Any] | None:
        if shard is None:
            return None
        self._sent += shard.piece.nbytes * (shard.world_size - 1)
        return shard.gather()

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
        self,
        layers: list[ProtectedLayer],
        source: Callable[[ProtectedLayer], Tensor],
        apply: Callable[[Rotation, Tensor], Tensor],
        fast: bool,
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


@dataclass(frozen=True)
class Machine:
    """What ``auto`` reckons with: fixed, not measured at the start, so that a resumed run chooses as the first one did."""

    multiply_adds: float
    """A second and rank, in the products of a rotation."""
    bandwidth: float
    """Bytes a second that a rank sends while all do."""
    overlaps: bool
    """Whether sending leaves the processor that computes alone."""


#: An H100 (half its peak of dense TF32 products) on 200 Gb/s of network a GPU; a few CPU cores on 10 Gb/s.
GPU, CPU = Machine(1.2e14, 2.5e10, True), Machine(5e10, 1.25e9, False)


@dataclass(frozen=True)
class Cost:
    """What a placement costs the rank that it costs most."""

    sent: float
    """Bytes a step, to other ranks."""
    held: float
    """Bytes: bases, and what is brought together to use them."""
    multiply_adds: float
    """A step."""
    ahead: bool = False
    """Whether what is sent can be sent ahead of its use."""

    def seconds(self, machine: Machine) -> float:
        """A step's."""
        parts = self.multiply_adds / machine.multiply_adds, self.sent / machine.bandwidth
        return max(parts) if self.ahead and machine.overlaps else sum(parts)


def predict_costs(layers: Iterable[TargetLayer], bases: Mapping[str, tuple[str, int]], world_size: int) -> dict[str, Cost]:
    """The cost of each placement, from the layers' sizes alone: no process group, the same on every rank.

    ``bases`` gives for each layer's name the key of its basis and the bytes that its fp32 rotation takes, which stand
    for r too: m rows take m x bytes / 4 multiply-adds, dense or as reflectors. Every step rotates twice.
    """
    layers, ranks = list(layers), world_size
    sizes = dict(bases[layer.name] for layer in layers)
    owners = deal_owners(layers, bases, ranks)
    pieces = {key: 4 * -(-size // (4 * ranks)) for key, size in sizes.items()}
    gathered = sum(pieces[key] * (ranks - 1) for key, _ in groupby(bases[layer.name][0] for layer in layers))
    joined = in_place = 0.0
    at_owner, of_owner, sent = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
    parts = {(layer.m, layer.n): RowPartition(layer.m, layer.n, ranks, 0) for layer in layers}
    everybody = 4 * sum(parts[layer.m, layer.n].length for layer in layers)
    for key, owner in owners.items():
        of_owner[owner] += sizes[key]
    for layer in layers:
        key, size = bases[layer.name]
        part = parts[layer.m, layer.n]
        # A ring's all-reduce of the rows that are cut between ranks, all of which rotate them.
        joined += 2 * 4 * len(part.cut_rows) * layer.n * (ranks - 1) / ranks
        in_place += (layer.m / ranks + len(part.cut_rows)) * size / 4
        at_owner[owners[key]] += layer.m * size / 4
        # Everybody sends a shard to the owner, which gives all others theirs.
        sent[owners[key]] += 4 * part.length * (ranks - 2)
    moved = 2 * 4 * max((layer.m * layer.n for layer in layers), default=0)
    gathering = 2 * max(sizes.values(), default=0)
    return {
        "replicated": Cost(2 * joined, sum(sizes.values()), 2 * in_place),
        "sharded": Cost(2 * (joined + gathered), sum(pieces.values()) + gathering, 2 * in_place, ahead=True),
        "owner": Cost(2 * (everybody + max(sent)), max(of_owner) + moved, 2 * max(at_owner)),
    }


@dataclass(frozen=True)
class Placed:
    """Where the bases of a model lie."""

    placement: str
    """'replicated', 'sharded' or 'owner'."""
    owners: dict[str, int | None]
    """Which rank holds each basis, by the basis's key; None where every rank does, or a piece of it."""
    why: str
    """In words, with the costs predicted for each placement."""


def place_bases(
    placement: str,
    layers: Iterable[TargetLayer],
    bases: Mapping[str, tuple[str, int]],
    world_size: int,
    machine: Machine = GPU,
    memory: float | None = None,
) -> Placed:
    """Places them as asked, or for 'auto' in the way that is fastest of those that fit into ``memory``.

    ``memory`` is what a rank may spend on bases, in bytes: if not given, as much as on fp32 masters and moments of the
    masked layers (12 bytes a weight, over world_size). Where none fits, the one that holds least. On one rank all are
    one. ``bases`` as for ``predict_costs``. Raises ValueError for another ``placement``.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"basis_placement is {placement!r}: choose one of {', '.join(PLACEMENTS)}")
    layers = list(layers)
    costs = predict_costs(layers, bases, world_size)
    room = 12 * sum(layer.m * layer.n for layer in layers) / world_size if memory is None else memory
    fitting = [name for name, cost in costs.items() if cost.held <= room]
    if world_size == 1:
        chosen, why = "replicated", "one rank"
    elif placement != "auto":
        chosen, why = placement, "as asked"
    elif fitting:
        chosen, why = min(fitting, key=lambda name: costs[name].seconds(machine)), f"fastest within {room / 1e9:.3g} GB"
    else:
        chosen, why = min(costs, key=lambda name: costs[name].held), f"holds least; none fits {room / 1e9:.3g} GB"
    predictions = "; ".join(
        f"{name} holds {cost.held / 1e9:.3g} GB, sends {cost.sent / 1e9:.3g} GB a step, takes {cost.seconds(machine):.3g} s"
        for name, cost in costs.items()
    )
    owners = {key: owner if chosen == "owner" else None for key, owner in deal_owners(layers, bases, world_size).items()}
    return Placed(chosen, owners, f"{why}. Predicted for a rank: {predictions}")


def deal_owners(layers: list[TargetLayer], bases: Mapping[str, tuple[str, int]], world_size: int) -> dict[str, int]:
    """An owner for each basis, by the basis's key: in the order of the layers, whoever has least to rotate.

    Neighbours, which share an optimizer sub-group, then lie on different ranks.
    """
    work: dict[str, int] = {}
    for layer in layers:
        key, nbytes = bases[layer.name]
        work[key] = work.get(key, 0) + layer.m * nbytes
    load = [0] * world_size
    owners: dict[str, int] = {}
    for key in work:
        owners[key] = load.index(min(load))
        load[owners[key]] += work[key]
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
