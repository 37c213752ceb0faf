"""How far each layer's outputs on the safety inputs moved: ‖(W′ - W) x‖ / ‖W x‖, a measure that no judge can be fooled by.

With Σ = U Λ Uᵀ the covariance of the layer's inputs x (phase 1), E‖A x‖² = tr(A Σ Aᵀ) = Σ_i λ_i ‖A u_i‖². So the ratio
over all safety tokens comes from the stored basis and two model directories, without running either model. The inputs
are those of the model before training: what its own layers do to them, not what earlier layers have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from warp_ds.cluster import consensus, processes
from warp_ds.errors import ArtifactError
from warp_ds.evaluation.drift import layer_drift, relative_drift
from warp_ds.models.directory import ModelDirectory
from warp_ds.store.bases import BasisStore
from warp_ds.store.fingerprints import Contents, fingerprint_model, model_contents
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore
from warp_ds.zero.shared_reading import read_together

T = TypeVar("T")


def relative_movement(before: Tensor, after: Tensor, columns: Tensor, values: Tensor) -> float:
    """(E‖(W′ - W) x‖² / E‖W x‖²)^½ of one layer; W, W′ [m, n]; U [n, r] and eigenvalues [r] of Σ. nan for W x = 0."""
    u, s = columns.double(), values.double()
    w = before.double()
    moved = ((after.double() - w) @ u).square() @ s
    size = (w @ u).square() @ s
    return float((moved.sum() / size.sum()).sqrt())


def open_basis(before: Path, after: Path, basis_dir: str | Path) -> BasisStore:
    """The basis; ArtifactError where it is of another kind, not of ``before``, or of other shapes than ``after``."""
    basis = BasisStore(basis_dir)
    if basis.metadata.basis != "activation":
        raise ArtifactError(
            f"the basis in {basis.directory} is {basis.metadata.basis}: movement on the safety inputs "
            "needs their covariance, so a basis of phase 1 with --basis activation"
        )
    basis.check(basis.layers, fingerprint_model(before), str(before))
    ModelDirectory.of(after, basis.layers).weight(basis.layers[0])
    return basis


def movement(before: Path, after: Path, basis_dir: str | Path) -> dict[str, float]:
    """Layer name -> ``relative_movement`` between two model directories, on the inputs that the basis was made from.

    ``basis_dir``: of phase 1 with --basis activation on ``before``. Collective: the layers are dealt out over the ranks,
    one at a time on each. ArtifactError as ``open_basis``.
    """
    read_together(lambda: [model_contents(before)], "reading the model")
    with consensus.on_every_rank_or_none("opening the basis"):
        basis = open_basis(before, after, basis_dir)
        old, new = ModelDirectory.of(before, basis.layers), ModelDirectory.of(after, basis.layers)
    moved = layer_by_layer(
        basis.layers,
        lambda layer: relative_movement(old.weight(layer), new.weight(layer), *basis.columns(layer.name)),
        "measuring the movement",
    )
    return {layer.name: value for layer, value in zip(basis.layers, moved, strict=True)}


def frozen_drift(before: Path, after: Path, masks_dir: str | Path, basis_dir: str | Path) -> float:
    """How far the coefficients that the masks freeze moved, ‖ΔC‖ / ‖C‖, as ``certify`` has it. Collective.

    ``basis_dir`` is the one that the masks were made with, on ``before``; ArtifactError where it is not.
    """

    def covered() -> Iterator[Contents]:
        yield model_contents(before)
        yield MaskStore(masks_dir).contents()
        yield BasisStore(basis_dir).contents()

    read_together(covered, "reading the model, the masks and the basis")
    with consensus.on_every_rank_or_none("opening the masks"):
        masks, basis = MaskStore(masks_dir), BasisStore(basis_dir)
        masks.check(basis, fingerprint_model(before), str(before))
        old, new = ModelDirectory.of(before, masks.layers), ModelDirectory.of(after, masks.layers)
    return relative_drift(
        layer_by_layer(masks.layers, lambda layer: layer_drift(layer, old, new, masks, basis), "measuring the drift")
    )


def layer_by_layer(layers: Sequence[TargetLayer], measure: Callable[[TargetLayer], T], what: str) -> list[T]:
    """``measure`` of every layer, on every rank; each rank takes its share of the layers. Collective.

    The ranks meet after every layer, so that none waits for another longer than one layer takes.
    """
    measured: list[T] = []
    for first in range(0, len(layers), processes.world_size()):
        mine = layers[first + processes.rank() : first + processes.rank() + 1]
        with consensus.on_every_rank_or_none(what):
            values = [measure(layer) for layer in mine]
        measured += [value for part in processes.all_gather_object(values) for value in part]
    return measured


def mean_movement(of_layers: dict[str, float]) -> float:
    """Root mean square over layers."""
    return float(torch.tensor(list(of_layers.values()), dtype=torch.float64).square().mean().sqrt())
