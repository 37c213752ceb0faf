"""How far each layer's outputs on the safety inputs moved: ‖(W′ - W) x‖ / ‖W x‖, a measure that no judge can be fooled by.

With Σ = U Λ Uᵀ the covariance of the layer's inputs x (phase 1), E‖A x‖² = tr(A Σ Aᵀ) = Σ_i λ_i ‖A u_i‖². So the ratio
over all safety tokens comes from the stored basis and two model directories, without running either model. The inputs
are those of the model before training: what its own layers do to them, not what earlier layers have changed.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from warp_ds.artifacts import ArtifactError, BasisStore, fingerprint_model
from warp_ds.report.verify import layer_weight


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
        raise ArtifactError(f"the basis in {basis.directory} is {basis.metadata.basis}: movement on the safety inputs "
                            "needs their covariance, so a basis of phase 1 with --basis activation")
    basis.check(basis.layers, fingerprint_model(before), str(before))
    layer_weight(after, basis.layers[0])
    return basis


def movement(before: Path, after: Path, basis_dir: str | Path) -> dict[str, float]:
    """Layer name -> ``relative_movement`` between two model directories, on the inputs that the basis was made from.

    ``basis_dir``: of phase 1 with --basis activation on ``before``. One layer is in memory at a time. ArtifactError as
    ``open_basis``.
    """
    basis = open_basis(before, after, basis_dir)
    return {layer.name: relative_movement(layer_weight(before, layer), layer_weight(after, layer),
                                          *basis.columns(layer.name)) for layer in basis.layers}


def mean_movement(found: dict[str, float]) -> float:
    """Root mean square over layers."""
    return float(torch.tensor(list(found.values()), dtype=torch.float64).square().mean().sqrt())
