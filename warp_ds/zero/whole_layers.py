"""Where bases of both sides lie: C = Vᵀ W U mixes the rows of W, so no rank can rotate its own rows alone.

Each layer goes whole to the rank that keeps its V and U, and back, as ``Owner`` has it. V is the layer's own, so each layer has
an owner of its own: layers that share U may lie on several ranks, each of which then keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from warp_ds.cluster.dealing import LeastLoaded
from warp_ds.errors import UnsupportedSetting
from warp_ds.method.rotation import Rotation
from warp_ds.method.two_sided import TwoSided
from warp_ds.store.bases import BasisStore
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.masked_parameters import MaskedParameter
from warp_ds.zero.placement_costs import FP32, GPU, Dtypes, Machine
from warp_ds.zero.placements import EXACT_ENDS, Apply, Ends, Owner, Placement, Rotated, Source, place_bases
from warp_ds.zero.protected_layer import ProtectedLayer


class WholeLayers(Owner):
    """``Owner`` of rotations that take a whole layer; on one rank nothing is sent."""

    def __init__(
        self,
        layers: Iterable[TargetLayer],
        bases: Mapping[str, tuple[str, int]],
        world_size: int,
        rank: int = 0,
        dtypes: Dtypes = FP32,
        *,
        left: Mapping[str, int],
        right: Mapping[str, str],
    ):
        """``left``: of the bytes in ``bases``, those of each layer's V; ``right``: key -> the file of its U; the rest as of
        ``Placement``."""
        super().__init__(layers, bases, world_size, rank, dtypes)
        self.left, self.right = left, right
        self._rights: dict[str, Rotation] = {}
        owners = LeastLoaded(world_size)
        # Block by block, since neighbours share an optimizer sub-group; in each the largest first.
        by_block = sorted(self.layers, key=lambda layer: (layer.layer, -self.work(layer)[0]))
        self.owners = {bases[layer.name][0]: owners.next(self.work(layer)[0]) for layer in by_block}

    def work(self, layer: TargetLayer) -> tuple[float, float]:
        """m rows with U, n columns with V, which come first."""
        left = self.left[layer.name]
        by_left, by_right = layer.n * left / 4, layer.m * (self.bases[layer.name][1] - left) / 4
        # What V has made of a gradient is fp32; where there is no V, U meets the gradient itself.
        first, size, order = (by_left, left, layer.m) if left else (by_right, self.bases[layer.name][1], layer.n)
        return by_left + by_right, first * self.dtypes.by_bf16(size, order)

    def kept(self) -> float:
        of_owner = [0.0] * self.world_size
        rights: set[tuple[int, str]] = set()
        for layer in self.layers:
            key, size = self.bases[layer.name]
            owner, left = self.owners[key], self.left[layer.name]
            of_owner[owner] += left if (owner, self.right[key]) in rights else size
            rights.add((owner, self.right[key]))
        return max(of_owner)

    def keep(self, key: str, make: Callable[[], Rotation]) -> None:
        super().keep(key, make)
        if isinstance(kept := self.own.get(key), TwoSided):
            kept.right = self._rights.setdefault(self.right[key], kept.right)  # what layers share is held once

    @staticmethod
    def chunks(m: int, n: int) -> Iterator[slice]:
        return iter([slice(0, m)])

    def apply(
        self, layers: Sequence[ProtectedLayer], source: Source, apply: Apply, fast: bool, ends: Ends = EXACT_ENDS
    ) -> Rotated:
        if self.world_size > 1:
            # In waves of one layer an owner, each as long as its largest: alike ones go together.
            yield from super().apply(sorted(layers, key=lambda x: -self.work(x.target)[0]), source, apply, fast, ends)
            return
        for layer in layers:
            share = source(layer).to(layer.device, ends[0])
            whole = apply(self.own[layer.basis], share.view(layer.target.shape), self.products_of(layer, fast))
            yield layer, whole.reshape(-1).float()


def place_rotations(
    basis: BasisStore | None,
    asked: str,
    masked: Sequence[MaskedParameter],
    world_size: int,
    machine: Machine = GPU,
    rank: int = 0,
    dtypes: Dtypes = FP32,
) -> tuple[Placement, str]:
    """``place_bases``; of what mixes rows the only placement that it has, whatever it costs."""
    layers, bases = [each.target for each in masked], {each.target.name: each.held(basis) for each in masked}
    if basis is None or not any(each.mixes_rows(basis) for each in masked):
        return place_bases(asked, layers, bases, world_size, machine, rank=rank, dtypes=dtypes)
    refuse_without_rows(basis, asked, world_size)
    left = {each.target.name: each.held_left(basis) for each in masked}
    right = {bases[each.target.name][0]: each.shared(basis) for each in masked}
    placement = WholeLayers(layers, bases, world_size, rank, dtypes, left=left, right=right)
    cost = placement.cost()
    return placement, (
        f"an output basis mixes rows. Predicted for a rank: holds {cost.held / 1e9:.3g} GB, sends {cost.sent / 1e9:.3g} GB a "
        f"step, takes {cost.seconds(machine):.3g} s"
    )


def refuse_without_rows(
    basis: BasisStore | None, asked: str, world_size: int, left_projection: bool = False, of_inputs: bool = False
) -> None:
    """UnsupportedSetting for what cannot be done with an output basis. ``of_inputs``: nothing but inputs is rotated, as an
    adapter's A."""
    if basis is None or not basis.two_sided:
        return
    of = f"the basis in {basis.directory} is of both sides (--output_basis)"
    if asked not in ("auto", Owner.name) and world_size > 1 and not of_inputs:
        raise UnsupportedSetting(
            f"--basis_placement {asked}: {of}, which mixes the rows of a weight, so that a rank cannot rotate its own rows: "
            "give owner or auto"
        )
    if left_projection:
        raise UnsupportedSetting(f"--left_projection: {of}: leave one of them out")
