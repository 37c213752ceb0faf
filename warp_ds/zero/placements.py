"""Where the bases of a model lie, and how the shards of its layers meet them: C = W U and back, on any number of ranks.

Row i of C needs row i of W alone, so where every rank holds the basis each one rotates the rows of its own shard
(``Replicated``). A basis that is too large for that is either sharded itself, and gathered for the moment of its use
(``Sharded``), or lies on one rank, and the layer's shards go there and back (``Owner``). Which of them is fastest is
arithmetic, which each says of itself: ``Placement.cost``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby, zip_longest
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from warp_ds.cluster.dealing import LeastLoaded
from warp_ds.method.products import EXACT, Products, products
from warp_ds.method.rotation import Rotation
from warp_ds.store.layers import Ranges, TargetLayer
from warp_ds.zero.partition import RowPartition
from warp_ds.zero.placement_costs import FP32, GPU, Cost, Dtypes, Machine
from warp_ds.zero.protected_layer import ProtectedLayer, row_chunks

Source = Callable[[ProtectedLayer], Tensor]
"""Gives this rank's share of a layer, flat and without padding; may be asked twice."""
Apply = Callable[[Rotation, Tensor, Products], Tensor]
"""``Rotation.rotate`` or ``Rotation.unrotate``."""
Ends = tuple[torch.dtype, torch.dtype]
"""(what a source's shares are taken as and sent in, what the caller rounds results to, and they are sent back in)"""
EXACT_ENDS = torch.float32, torch.float32
Rotated = Iterator[tuple[ProtectedLayer, Tensor]]
"""(layer, this rank's share of it rotated: a new fp32 tensor)"""


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


@lru_cache(maxsize=1024)
def _spread(layer: tuple[int, int, Ranges, int], world_size: int) -> tuple[int, Tensor]:
    m, n, ranges, height = layer
    partition = RowPartition(m, n, world_size, 0, ranges, height)
    return len(partition.cut_rows), torch.tensor(partition.shares)


def spread(layer: TargetLayer, world_size: int) -> tuple[int, Tensor]:
    """(rows that are cut, elements of each rank's share) of a layer; remembered for layers of the same rows."""
    return _spread((layer.m, layer.n, layer.rows, layer.height), world_size)


def _as_it_comes(flat: Tensor) -> Tensor:
    """What is not sent is not rounded: halves as they are, all else fp32."""
    return flat if flat.dtype in (torch.bfloat16, torch.float16) else flat.float()


class Placement(ABC):
    """Where the bases of some layers lie on a number of ranks, and what that costs; once ``keep`` has been given them, how
    the layers are rotated.

    Args:
        layers: the masked layers.
        bases: for each layer's name the key of its basis and the bytes that its fp32 rotation takes, which stand for r
            too: m rows take m x bytes / 4 multiply-adds, dense or as reflectors.
        world_size, rank: the ranks, and this one; costs and bytes are those of the rank that has most.
        dtypes: of what a step rotates.
    """

    name: ClassVar[str]
    rotates: ClassVar[bool] = True
    """Whether C is anything but W."""

    def __init__(
        self,
        layers: Iterable[TargetLayer],
        bases: Mapping[str, tuple[str, int]],
        world_size: int,
        rank: int = 0,
        dtypes: Dtypes = FP32,
    ):
        self.layers, self.bases, self.dtypes = list(layers), bases, dtypes
        self.world_size, self.rank = world_size, rank
        self.sizes = dict(bases[layer.name] for layer in self.layers)
        self.products = "auto"
        """How products of what is rounded anyway are taken (``method.products``)."""
        self.sent = 0
        """Bytes that this rank has sent to others for rotations (an all-reduce counted as a ring's)."""

    @abstractmethod
    def kept(self) -> float:
        """Bytes of bases that a rank keeps."""

    @abstractmethod
    def holds(self) -> float:
        """Bytes that a rank holds: ``kept``, and what is brought together to use it."""

    @abstractmethod
    def cost(self) -> Cost:
        """What a step costs, by arithmetic from sizes alone. Every step rotates twice."""

    def readers(self, key: str) -> range:
        """The ranks that read a basis."""
        return range(self.world_size)

    @abstractmethod
    def keep(self, key: str, make: Callable[[], Rotation]) -> None:
        """Keeps this rank's part of a basis; ``make`` reads all of it, and is not called where there is none."""

    def rotate(self, layers: Sequence[ProtectedLayer], source: Source, fast: bool = False) -> Rotated:
        """C = W U of each layer, in any order. Collective, with the same layers on every rank.

        One layer's whole result, over all ranks, exists at a time. ``fast``: these are a step's gradients, of the dtype
        that ``dtypes`` says, and the products are taken as ``products`` says; else fp32 weights, exactly.
        """
        ends = (self.dtypes.gradients, self.dtypes.gradients) if fast else EXACT_ENDS
        return self.apply(layers, source, lambda rotation, w, products: rotation.rotate(w, products), fast, ends)

    def rotate_back(self, layers: Sequence[ProtectedLayer], source: Source, fast: bool = False) -> Rotated:
        """W = C Uᵀ of each layer, C fp32; as ``rotate``. ``fast``: W will be rounded to its dtype."""
        ends = (torch.float32, self.dtypes.weights) if fast else EXACT_ENDS
        return self.apply(layers, source, lambda rotation, c, products: rotation.unrotate(c, products), fast, ends)

    @abstractmethod
    def apply(
        self, layers: Sequence[ProtectedLayer], source: Source, apply: Apply, fast: bool, ends: Ends = EXACT_ENDS
    ) -> Rotated:
        """What ``rotate`` and ``rotate_back`` are."""

    def products_of(self, layer: ProtectedLayer, fast: bool) -> Products:
        """How a layer's products are taken."""
        return products(self.products, layer.dtype, layer.device) if fast else EXACT


class InPlace(Placement):
    """Each rank rotates the rows of its own shard; rows that are cut between ranks are brought together on all of them."""

    def _in_place(self) -> tuple[float, float, float]:
        """(bytes, multiply-adds, those of them with a bf16 factor) of a step: a ring's all-reduce of cut rows of gradients and
        of C, all of which every rank rotates."""
        joined = multiply_adds = by_bf16 = 0.0
        for layer in self.layers:
            cut, _ = spread(layer, self.world_size)
            size, width = self.bases[layer.name][1], self.dtypes.gradients.itemsize + 4
            joined += 2 * width * cut * layer.n * (self.world_size - 1) / self.world_size
            once = (layer.m / self.world_size + cut) * size / 4
            multiply_adds += 2 * once
            by_bf16 += once * self.dtypes.by_bf16(size, layer.n)
        return joined, multiply_adds, by_bf16

    @abstractmethod
    def rotations(self, layers: Sequence[ProtectedLayer]) -> Iterator[Rotation]:
        """Each layer's whole rotation; the caller drops each before it asks for the next."""

    def apply(
        self, layers: Sequence[ProtectedLayer], source: Source, apply: Apply, fast: bool, ends: Ends = EXACT_ENDS
    ) -> Rotated:
        cuts = self._join_cut_rows(layers, source, ends[0])
        rotations = self.rotations(layers)
        for layer, cut in zip(layers, cuts, strict=True):
            rotation = next(rotations)
            flat = _as_it_comes(source(layer).to(layer.device))
            result = torch.zeros_like(flat, dtype=torch.float32)
            rows, target = layer.partition.whole_rows(flat), layer.partition.whole_rows(result)
            taken = self.products_of(layer, fast)
            for chunk in row_chunks(rows.shape[0], layer.target.n):
                target[chunk] = apply(rotation, rows[chunk], taken)
            if layer.partition.fragments:
                rotated = apply(rotation, cut, taken)
                for fragment in layer.partition.fragments:
                    result[fragment.local] = rotated[fragment.cut, fragment.columns]
            del rotation  # Or a gathered one would live on while the next but one is gathered.
            yield layer, result

    def _join_cut_rows(self, layers: Sequence[ProtectedLayer], source: Source, dtype: torch.dtype) -> list[Tensor]:
        """The rows of each layer that are cut between ranks, [cut rows, n], whole, on every rank.

        One all-reduce for all layers: each rank adds its pieces to zeros, which is exact even for a row on all ranks.
        """
        sizes = [len(layer.partition.cut_rows) * layer.target.n for layer in layers]
        joined = torch.zeros(sum(sizes), dtype=dtype, device=layers[0].device if layers else None)
        cuts = [part.view(-1, layer.target.n) for part, layer in zip(joined.split(sizes), layers, strict=True)]
        for layer, cut in zip(layers, cuts, strict=True):
            if layer.partition.fragments:
                flat = source(layer)
                for fragment in layer.partition.fragments:
                    cut[fragment.cut, fragment.columns] = flat[fragment.local].to(layer.device, dtype)
        if joined.numel():
            dist.all_reduce(joined)
            self.sent += 2 * joined.nbytes * (self.world_size - 1) // self.world_size
        return cuts


class Replicated(InPlace):
    """Every rank holds every basis: only rows that are cut between ranks are sent."""

    name = "replicated"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.whole: dict[str, Rotation] = {}

    def kept(self) -> float:
        return sum(self.sizes.values())

    def holds(self) -> float:
        return self.kept()

    def cost(self) -> Cost:
        joined, multiply_adds, by_bf16 = self._in_place()
        return Cost(joined, self.holds(), multiply_adds, by_bf16=by_bf16)

    def keep(self, key: str, make: Callable[[], Rotation]) -> None:
        self.whole[key] = make()

    def rotations(self, layers: Sequence[ProtectedLayer]) -> Iterator[Rotation]:
        return (self.whole[layer.basis] for layer in layers)


class Sharded(InPlace):
    """Every rank holds a piece of every basis; they are gathered a layer ahead of use."""

    name = "sharded"

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pieces: dict[str, BasisShard] = {}

    def _piece(self, key: str) -> int:
        return 4 * -(-self.sizes[key] // (4 * self.world_size))

    def kept(self) -> float:
        return sum(map(self._piece, self.sizes))

    def holds(self) -> float:
        return self.kept() + 2 * max(self.sizes.values(), default=0)

    def cost(self) -> Cost:
        joined, multiply_adds, by_bf16 = self._in_place()
        used = (key for key, _ in groupby(self.bases[layer.name][0] for layer in self.layers))
        gathered = sum(self._piece(key) * (self.world_size - 1) for key in used)
        return Cost(joined + 2 * gathered, self.holds(), multiply_adds, ahead=True, by_bf16=by_bf16)

    def keep(self, key: str, make: Callable[[], Rotation]) -> None:
        self.pieces[key] = BasisShard(make(), self.world_size, self.rank)

    def rotations(self, layers: Sequence[ProtectedLayer]) -> Iterator[Rotation]:
        """A basis is gathered while the one before it is used, and dropped after its last use: two whole ones exist at most."""
        ahead = iter([key for key, _ in groupby(layer.basis for layer in layers)])
        coming = self._start(next(ahead, None))
        for key, members in groupby(layers, key=lambda layer: layer.basis):
            assert coming is not None
            buffer, work = coming
            work.wait()
            whole = self.pieces[key].form.unpacked(buffer)
            coming = self._start(next(ahead, None))
            for _ in members:
                yield whole
            del whole, buffer, work

    def _start(self, key: str | None) -> tuple[Tensor, Any] | None:
        if key is None:
            return None
        self.sent += self.pieces[key].piece.nbytes * (self.world_size - 1)
        return self.pieces[key].gather()


class Owner(Placement):
    """Each basis lies on one rank, its owner, to which all ranks send the shards of its layers."""

    name = "owner"
    chunks = staticmethod(row_chunks)
    """Which rows are rotated at once."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.owners = deal_owners(self.layers, self.bases, self.world_size)
        """Which rank owns each basis, by its key."""
        self.own: dict[str, Rotation] = {}

    def readers(self, key: str) -> range:
        return range(self.owners[key], self.owners[key] + 1)

    def kept(self) -> float:
        of_owner = [0.0] * self.world_size
        for key, owner in self.owners.items():
            of_owner[owner] += self.sizes[key]
        return max(of_owner)

    def holds(self) -> float:
        return self.kept() + 2 * 4 * max((layer.m * layer.n for layer in self.layers), default=0)

    def work(self, layer: TargetLayer) -> tuple[float, float]:
        """(multiply-adds of one rotation, those of them that have a bf16 factor where it is a gradient's)"""
        size = self.bases[layer.name][1]
        return layer.m * size / 4, layer.m * size / 4 * self.dtypes.by_bf16(size, layer.n)

    def cost(self) -> Cost:
        ranks = self.world_size
        gradient, weight = self.dtypes.gradients.itemsize, self.dtypes.weights.itemsize
        multiply_adds, sent = [(0.0, 0.0)] * ranks, torch.zeros(ranks, dtype=torch.int64)
        for layer in self.layers:
            owner, shares = self.owners[self.bases[layer.name][0]], spread(layer, ranks)[1]
            once, by_bf16 = self.work(layer)
            multiply_adds[owner] = multiply_adds[owner][0] + 2 * once, multiply_adds[owner][1] + by_bf16
            # Everybody sends its share to the owner, a gradient's and C's, which gives all others theirs, rotated.
            sent += (gradient + 4) * shares
            back = (gradient + weight) * (layer.m * layer.n - int(shares[owner]))
            sent[owner] += back - (gradient + 4) * shares[owner]
        most, by_bf16 = max(multiply_adds, key=lambda work: (work[0], -work[1]))
        return Cost(int(sent.max()), self.holds(), most, by_bf16=by_bf16)

    def keep(self, key: str, make: Callable[[], Rotation]) -> None:
        if self.owners[key] == self.rank:
            self.own[key] = make()

    def apply(
        self, layers: Sequence[ProtectedLayer], source: Source, apply: Apply, fast: bool, ends: Ends = EXACT_ENDS
    ) -> Rotated:
        """In waves of one layer an owner, so that all of them rotate at once.

        Shares are whole in order of rank, so that an owner receives the matrix row after row. What the caller rounds is
        rounded before it is sent back.
        """
        ranks = self.world_size
        for wave in zip_longest(*([x for x in layers if self.owners[x.basis] == owner] for owner in range(ranks))):
            lengths = [0 if layer is None else layer.partition.stop - layer.partition.start for layer in wave]
            mine = wave[self.rank]
            of_ranks = [0] * ranks if mine is None else mine.partition.shares
            shards = torch.cat([source(layer).to(layer.device, ends[0]) for layer in wave if layer is not None])
            whole = shards.new_empty(sum(of_ranks))
            self._exchange(whole, shards, of_ranks, lengths)
            # In place where the dtype stays.
            shards, result = (each if ends[0] == ends[1] else torch.empty_like(each, dtype=ends[1]) for each in (shards, whole))
            if mine is not None:
                rows, target = (each.view(mine.target.m, mine.target.n) for each in (whole, result))
                taken = self.products_of(mine, fast)
                for chunk in self.chunks(mine.target.m, mine.target.n):
                    target[chunk] = apply(self.own[mine.basis], rows[chunk], taken)
                del rows, target
            del whole
            self._exchange(shards, result, lengths, of_ranks)
            del result
            for layer, share in zip(wave, shards.split(lengths), strict=True):
                if layer is not None:
                    yield layer, share.float()

    def _exchange(self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]) -> None:
        dist.all_to_all_single(received, sent, received_sizes, sent_sizes)
        self.sent += sent.element_size() * (sum(sent_sizes) - sent_sizes[self.rank])


CLASSES: tuple[type[Placement], ...] = (Replicated, Sharded, Owner)
#: What ``--basis_placement`` may say.
PLACEMENTS = ("auto", *(each.name for each in CLASSES))


def predict_costs(
    layers: Iterable[TargetLayer], bases: Mapping[str, tuple[str, int]], world_size: int, dtypes: Dtypes = FP32
) -> dict[str, Cost]:
    """The cost of each placement, by its name; arguments as of ``Placement``."""
    layers = list(layers)
    return {each.name: each(layers, bases, world_size, dtypes=dtypes).cost() for each in CLASSES}


def place_bases(
    placement: str,
    layers: Iterable[TargetLayer],
    bases: Mapping[str, tuple[str, int]],
    world_size: int,
    machine: Machine = GPU,
    memory: float | None = None,
    rank: int = 0,
    dtypes: Dtypes = FP32,
) -> tuple[Placement, str]:
    """(the placement asked for, or for 'auto' the fastest of those that fit into ``memory``; why, in words). The same on
    every rank.

    ``memory`` is what a rank may spend on bases, in bytes: if not given, as much as on fp32 masters and moments of the
    masked layers (12 bytes a weight, over world_size). Where none fits, the one that holds least. On one rank all are
    one. The rest as for ``Placement``. Raises ValueError for another ``placement``.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"basis_placement is {placement!r}: choose one of {', '.join(PLACEMENTS)}")
    layers = list(layers)
    all_of_them = {each.name: each(layers, bases, world_size, rank, dtypes) for each in CLASSES}
    costs = {name: each.cost() for name, each in all_of_them.items()}
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
    return all_of_them[chosen], f"{why}. Predicted for a rank: {predictions}"


def deal_owners(layers: list[TargetLayer], bases: Mapping[str, tuple[str, int]], world_size: int) -> dict[str, int]:
    """An owner for each basis, by the basis's key: in the order of the layers, whoever has least to rotate.

    Neighbours, which share an optimizer sub-group, then lie on different ranks.
    """
    work: dict[str, int] = {}
    for layer in layers:
        key, nbytes = bases[layer.name]
        work[key] = work.get(key, 0) + layer.m * nbytes
    owners = LeastLoaded(world_size)
    return {key: owners.next(cost) for key, cost in work.items()}
