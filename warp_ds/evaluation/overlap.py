"""Masks beside one another: what two of them freeze alike, layer by layer, and what chance would give.

Entries are compared as sets where both masks have one basis, and as subspaces of the weights always: other safety sets
give other eigenvectors, and entry (i, j) of two bases is not the same coefficient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.method import overlap as mathematics
from warp_ds.method.mask import unpack_bits
from warp_ds.method.rotation import Rotation
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import find_artifact

FORMAT = "warp_ds.overlap"


@dataclass(frozen=True)
class Shared:
    """What two masks share, in one layer or over all."""

    layer: str
    frozen: tuple[int, int]
    """Entries that each freezes."""
    iou: float | None
    """Intersection over union of the frozen entries; None where the bases differ, or neither freezes any."""
    iou_by_chance: float | None
    """Of two sets of these sizes, drawn at random."""
    subspace: float | None
    """tr(P P') / min(k, k'): 1 where the smaller frozen subspace lies in the other, 0 where they are orthogonal; None where one
    freezes nothing."""
    subspace_by_chance: float | None
    """Of two masks of these sizes, drawn at random, in any bases."""
    subspace_by_columns: float | None
    """Of two masks that freeze as much of every column, the rows drawn at random."""
    angles: tuple[float, float, float] | None = None
    """Least, median and largest principal angle in degrees, of masks of whole columns."""


@dataclass(frozen=True)
class Pair:
    """Two masks."""

    first: int
    second: int
    """Their numbers in the list of masks."""
    same_basis: bool
    over_all: Shared
    layers: Sequence[Shared]


@dataclass(frozen=True)
class _Sums:
    """The counts behind ``Shared``, which add up over layers."""

    k: int
    other: int
    common: int | None
    chance: float
    trace: float
    by_columns: float

    @classmethod
    def total(cls, parts: Sequence[_Sums]) -> _Sums:
        common = None if any(part.common is None for part in parts) else sum(part.common or 0 for part in parts)
        k, other = sum(part.k for part in parts), sum(part.other for part in parts)
        # Chance is a layer's: a mask of one threshold over all layers freezes more of some.
        sums = [math.fsum(getattr(part, name) for part in parts) for name in ("chance", "trace", "by_columns")]
        return cls(k, other, common, *sums)

    def shared(self, layer: str, angles: tuple[float, float, float] | None = None) -> Shared:
        alike = by_chance = None
        if self.common is not None:
            found = [mathematics.iou(common, self.k, self.other) for common in (self.common, self.chance)]
            alike, by_chance = (None if math.isnan(value) else value for value in found)
        least = min(self.k, self.other)
        parts = [part / least if least else None for part in (self.trace, self.chance, self.by_columns)]
        return Shared(layer, (self.k, self.other), alike, by_chance, parts[0], parts[1], parts[2], angles)


def overlap(directories: Sequence[str | Path]) -> dict[str, Any]:
    """The content of overlap.json: the masks, and every pair of them. One layer's bases are in memory at a time.

    Raises ConfigError for fewer than two masks, ArtifactError where one is missing, broken, or of other layers.
    """
    if len(directories) < 2:
        raise ConfigError("overlap compares masks: give two or more masks directories, or runs of phase 2")
    stores = [MaskStore(find_artifact(str(directory), "masks", ".")) for directory in directories]
    bases = [store.find_basis() for store in stores]
    for store, basis in zip(stores, bases, strict=True):
        store.check(basis, None, store.metadata.model_name)
        _check_layers(stores[0], store)
    pairs = []
    for i, j in combinations(range(len(stores)), 2):
        same = stores[i].metadata.basis_fingerprint == stores[j].metadata.basis_fingerprint
        parts = [_of_layer(layer, (stores[i], stores[j]), (bases[i], bases[j]), same) for layer in stores[0].layers]
        pairs.append(Pair(i, j, same, _Sums.total([sums for sums, _ in parts]).shared("all"), [shared for _, shared in parts]))
    return {
        "format": FORMAT,
        "version": 1,
        "masks": [_about(store) for store in stores],
        "pairs": [asdict(pair) for pair in pairs],
    }


def _about(store: MaskStore) -> dict[str, Any]:
    meta = store.metadata
    names = ("basis", "unit", "score", "scope", "keep_ratio", "model_name", "model_fingerprint", "data_fingerprint")
    return {"directory": str(store.directory), **{name: getattr(meta, name) for name in names}}


def _check_layers(first: MaskStore, other: MaskStore) -> None:
    ours, theirs = ({layer.name: layer.shape for layer in store.layers} for store in (first, other))
    if ours != theirs:
        differs = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        raise ArtifactError(
            f"the masks in {first.directory} and {other.directory} are of different layers ({', '.join(differs[:3])}"
            f"{', …' if len(differs) > 3 else ''}): masks of the same layers of one architecture can be compared"
        )


def _of_layer(
    layer: TargetLayer, stores: tuple[MaskStore, MaskStore], bases: tuple[Any, Any], same: bool
) -> tuple[_Sums, Shared]:
    first, second = (unpack_bits(store.packed(layer.name), layer.n) for store in stores)
    columns = first.any(0), second.any(0)
    product = _product(layer, bases, columns, same)
    squares, parts = product.square(), (first[:, columns[0]], second[:, columns[1]])
    # Of the outputs' directions, (Vᵀ V')² of F' in place of F': with no output basis, and with one basis, F' itself.
    turned = parts[1].float()
    if not same and any(basis is not None and basis.two_sided for basis in bases):
        turned = _left_product(layer, bases).square() @ turned
    common = mathematics.common_entries(first, second) if same else None
    k, other = int(first.sum()), int(second.sum())
    sums = _Sums(
        k,
        other,
        common,
        mathematics.chance_common(k, other, first.numel()),
        mathematics.trace_overlap(parts[0], turned, squares),
        mathematics.trace_by_columns(*parts, squares),
    )
    whole = all(store.metadata.unit == "column" for store in stores) and product.numel()
    angles = mathematics.principal_angles(product) if whole else None
    ends = None if angles is None else (float(angles[0]), float(angles.median()), float(angles[-1]))
    return sums, sums.shared(layer.stem, ends)


def _product(layer: TargetLayer, bases: tuple[Any, Any], columns: tuple[Tensor, Tensor], same: bool) -> Tensor:
    """Uᵀ U' of the columns in which each mask freezes anything, fp32 [a, b]."""
    eye = torch.eye(layer.n)
    if same:
        return eye[columns[0]][:, columns[1]]
    rotations = [Rotation(None, layer.n) if basis is None else basis.right_rotation(layer.name) for basis in bases]
    rows = rotations[0].unrotate(eye[columns[0]])  # of Uᵀ
    return rotations[1].rotate(rows)[:, columns[1]]


def _left_product(layer: TargetLayer, bases: tuple[Any, Any]) -> Tensor:
    """Vᵀ V' of complete output bases, fp32 [m, m]; the identity stands for none."""
    sides = []
    for basis in bases:
        columns = basis.output_columns(layer.name)[0] if basis is not None and basis.two_sided else None
        sides.append(Rotation(columns, layer.m))
    return sides[1].rotate(sides[0].unrotate(torch.eye(layer.m)))
