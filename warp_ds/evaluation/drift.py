"""How far the coefficients of one layer moved between two models, and how far rounding lets them (the certificate's
mathematics).

One layer is in memory at a time and no model is built. With Δ = (W_after - W_before) U, a frozen coefficient may have
moved by what rounding W_after to its stored dtype allows and no more. With e_ik the largest rounding error of entry
(i, k): |Δ_ij| <= Σ_k |U_kj| e_ik in the worst case, and, the errors being independent, at most SIGMAS standard
deviations, (Σ_k U_kj² e_ik² / 3)^½ each. The smaller of the two is allowed; and C_i (UᵀU - I)_j besides, since the
stored U is orthonormal to fp32 only. With an output basis Δ = Vᵀ (W_after - W_before) U, of a whole layer at a time. That finds
one large move; method/systematic.py finds many small ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from warp_ds.errors import ArtifactError
from warp_ds.method.eigenbasis import BAR, orthogonality_error
from warp_ds.method.mask import unpack_bits
from warp_ds.method.rotation import Rotation
from warp_ds.method.systematic import Sums
from warp_ds.method.two_sided import TwoSided
from warp_ds.models.directory import ModelDirectory, short_dtype
from warp_ds.store.bases import BasisStore
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore

SIGMAS = 12.0
#: The masked step makes W from C by fp32 products of n terms: an error of about n^½ units of 2^-24 of the row's size.
FP32_PRODUCTS = 2.0**-24
#: ... and by TF32 products on a GPU where W is stored in 16 bits.
TF32_PRODUCTS = 2.0**-11


@dataclass
class LayerCertificate:
    """One layer of the certificate; moves in the units of the weights. NaN where the layer holds no finite numbers."""

    layer: str
    frozen: int
    free: int
    frozen_max: float
    frozen_rms: float
    free_max: float
    free_rms: float
    coefficient_rms: float
    """Root mean square of the frozen coefficients before."""
    allowed_max: float
    """Largest move of a frozen coefficient that rounding allows in this layer."""
    violations: int
    """Frozen coefficients that moved further than rounding allows for them."""
    worst_move: float
    """Of the frozen coefficient that moved furthest for what rounding allows it."""
    worst_allowed: float
    """What rounding allows that one."""
    free_beyond: int
    """Free coefficients that moved further than rounding allows a frozen one in their place."""
    not_finite: int
    """NaN and infinities in the layer, before and after."""
    together: float = 0.0
    """Length of the move of all its frozen coefficients."""
    together_allowed: float = 0.0
    """What rounding allows that."""
    grid: str = ""
    """The coarsest dtype that holds every weight after training."""


def relative_drift(layers: Sequence[tuple[float, float]]) -> float:
    """‖ΔC‖ / ‖C‖ over all frozen coefficients, from each layer's ``layer_drift``."""
    moved, size = (sum(part) for part in zip(*layers, strict=True)) if layers else (0.0, 0.0)
    return (moved / size) ** 0.5 if size else 0.0


def layer_drift(
    target: TargetLayer, before: ModelDirectory, after: ModelDirectory, masks: MaskStore, basis: BasisStore
) -> tuple[float, float]:
    """‖ΔC‖² and ‖C‖² of one layer's frozen coefficients, without what a certificate asks besides."""
    rotation = basis.rotation(target.name, torch.float64)
    w_before, w_after = before.weight(target), after.weight(target)
    moved = size = 0.0
    for rows in [slice(0, target.m)] if basis.two_sided else _chunks(target.m, target.n):
        frozen = unpack_bits(masks.packed(target.name, rows.start, rows.stop), target.n)
        old = w_before[rows].double()
        moved += float(rotation.rotate(w_after[rows].double() - old)[frozen].square().sum())
        size += float(rotation.rotate(old)[frozen].square().sum())
    return moved, size


class _Layer:
    """Running figures of one layer, a block of rows at a time."""

    def __init__(self) -> None:
        self.counts = {"frozen": 0, "free": 0, "violations": 0, "free beyond": 0}
        self.squares = {"frozen": 0.0, "free": 0.0, "size": 0.0}
        self.largest = {"frozen": 0.0, "free": 0.0, "allowed": 0.0}
        self.worst = (0.0, 0.0)

    def add(self, moved: Tensor, size: Tensor, allowed: Tensor, frozen: Tensor) -> None:
        """Δ, C before, what rounding allows Δ, and which are frozen: [k, n] each."""
        free = ~frozen
        beyond = moved.abs() > allowed
        self.counts["violations"] += int(beyond[frozen].sum())
        self.counts["free beyond"] += int(beyond[free].sum())
        for name, which in (("frozen", frozen), ("free", free)):
            self.counts[name] += int(which.sum())
            if which.any():
                self.squares[name] += float(moved[which].square().sum())
                self.largest[name] = max(self.largest[name], float(moved[which].abs().max()))
        if frozen.any():
            self.squares["size"] += float(size[frozen].square().sum())
            moves, allowances = moved[frozen].abs(), allowed[frozen]
            self.largest["allowed"] = max(self.largest["allowed"], float(allowances.max()))
            most = int((moves / allowances).argmax())
            worst = float(moves[most]), float(allowances[most])
            self.worst = max(self.worst, worst, key=lambda w: w[0] / w[1] if w[1] else 0.0)

    def rms(self, name: str, of: str) -> float:
        return (self.squares[name] / self.counts[of]) ** 0.5 if self.counts[of] else 0.0


def certify_layers(
    before: ModelDirectory, after: ModelDirectory, masks: MaskStore, basis: BasisStore | None
) -> list[tuple[LayerCertificate, Sums]]:
    """In the masks' order; layers that share a basis file are done one after another, and the last file's is kept."""
    files = {t.name: "" if basis is None else basis.metadata.layers[t.name]["file"] for t in masks.layers}
    certified: dict[str, tuple[LayerCertificate, Sums]] = {}
    last, complete = "", None
    for target in sorted(masks.layers, key=lambda t: files[t.name]):
        if basis is None:
            complete = Complete(Rotation(None, target.n))
        elif complete is None or last != files[target.name]:
            complete = None  # frees the last one first
            last, complete = files[target.name], orthonormal(basis, target)
        if basis is not None and basis.two_sided:
            complete = complete.beside(orthonormal_outputs(basis, target))
        certified[target.name] = _certify_layer(target, before, after, masks, complete)
    return [certified[target.name] for target in masks.layers]


def _certify_layer(
    target: TargetLayer, before: ModelDirectory, after: ModelDirectory, masks: MaskStore, basis: Complete
) -> tuple[LayerCertificate, Sums]:
    w_before, w_after = before.weight(target), after.weight(target)
    not_finite = int((~torch.isfinite(w_before)).sum()) + int((~torch.isfinite(w_after)).sum())
    if not_finite:
        count, nan = masks.metadata.layers[target.name]["frozen"], math.nan
        return LayerCertificate(
            target.name, count, target.m * target.n - count, nan, nan, nan, nan, nan, nan, 0, nan, nan, 0, not_finite, nan, nan
        ), Sums()
    rotation, grid = basis.whole, grid_of(w_after)
    low_precision = torch.finfo(grid).eps > 1e-6
    figures, sums = _Layer(), Sums()
    for rows in _chunks(target.m, target.n) if basis.left is None else [slice(0, target.m)]:
        old, new = w_before[rows].double(), w_after[rows].double()
        moved, size = rotation.rotate(new - old), rotation.rotate(old)
        # The start model is exact as stored: only W after training was rounded.
        row_size = old.square().mean(dim=1, keepdim=True).sqrt()
        rounding = half_ulp(new, grid)
        if basis.left is None:
            allowed, variance, typical = explained(rounding, row_size, low_precision, basis)
        else:
            allowed, variance, typical = explained_on_both_sides(rounding, size, low_precision, basis)
        frozen = unpack_bits(masks.packed(target.name, rows.start, rows.stop), target.n)
        figures.add(moved, size, allowed, frozen)
        left = None if basis.left is None else basis.left.matrix
        sums.add(moved, size, frozen, variance, rounding, typical, basis.matrix, left)
    counts = figures.counts
    return LayerCertificate(
        target.name,
        counts["frozen"],
        counts["free"],
        figures.largest["frozen"],
        figures.rms("frozen", "frozen"),
        figures.largest["free"],
        figures.rms("free", "free"),
        figures.rms("size", "frozen"),
        figures.largest["allowed"],
        counts["violations"],
        *figures.worst,
        counts["free beyond"],
        0,
        grid="" if grid == w_after.dtype else f"{short_dtype(grid)} (stored in {short_dtype(w_after.dtype)})",
    ), sums


def explained(rounding: Tensor, row_size: Tensor, low_precision: bool, basis: Complete) -> tuple[Tensor, Tensor, Tensor]:
    """Of coefficients of rows that were rounded by at most ``rounding`` [k, n] after products that made them: how far each may
    be off, its variance by rounding, both [k, n], and the products' root mean square [k, 1]. ``row_size`` [k, 1]: root mean
    square of the rows' entries; ``low_precision``: the products may have been TF32."""
    n = rounding.shape[1]
    products = row_size * max(FP32_PRODUCTS * max(16.0, 2 * n**0.5), TF32_PRODUCTS if low_precision else 0.0)
    allowed, variance = rounding + products, rounding.square().div(3)
    typical = row_size * max(FP32_PRODUCTS * max(12.0, 1.5 * n**0.5), TF32_PRODUCTS if low_precision else 0.0)
    if basis.absolute is not None and basis.squared is not None and basis.skew is not None:
        variance = _weighted(rounding.square(), basis.squared).div(3)
        deviation = variance.sqrt() + products / 3**0.5
        allowed = torch.minimum(_weighted(allowed, basis.absolute), SIGMAS * deviation) + row_size * n**0.5 * basis.skew
        typical = typical + 2 * row_size * basis.skew.max()
    return allowed, variance, typical


def explained_on_both_sides(
    rounding: Tensor, size: Tensor, low_precision: bool, basis: Complete
) -> tuple[Tensor, Tensor, Tensor]:
    """``explained`` of all rows of C = Vᵀ W U; ``size`` [m, n] is C before. An entry's error reaches every coefficient, through
    |V| and |U|; products with V have an error of their own, and (VᵀV - I) C stands beside C (UᵀU - I)."""
    assert basis.left is not None
    (right, skew), (left, left_skew) = _parts(basis), _parts(basis.left)
    m, n = rounding.shape
    rms = size.square().mean().sqrt()
    units = sum(max(16.0, 2 * k**0.5) for k in (m, n))
    products = rms * max(FP32_PRODUCTS * units, 2 * TF32_PRODUCTS if low_precision else 0.0)
    variance = _weighted(_weighted(rounding.square(), right[1]).T, left[1]).T.div(3)
    worst = _weighted(_weighted(rounding + products, right[0]).T, left[0]).T
    lengths = torch.linalg.vector_norm(size, dim=1, keepdim=True), torch.linalg.vector_norm(size, dim=0, keepdim=True)
    off = lengths[0] * skew + lengths[1] * left_skew[:, None]
    allowed = torch.minimum(worst, SIGMAS * (variance.sqrt() + products / 3**0.5)) + off
    typical = products + 2 * (lengths[0] / n**0.5 * skew.max() + lengths[1].max() / m**0.5 * left_skew.max())
    return allowed, variance, typical


def _parts(side: Complete) -> tuple[tuple[Tensor, Tensor], Tensor]:
    assert side.absolute is not None and side.squared is not None and side.skew is not None
    return (side.absolute, side.squared), side.skew


@dataclass(frozen=True)
class Complete:
    """A complete basis U [n, n] as it is asked for; None for the identity."""

    rotation: Rotation
    """In fp64."""
    matrix: Tensor | None = None
    """U in fp32; so are |U| and U²."""
    absolute: Tensor | None = None
    squared: Tensor | None = None
    skew: Tensor | None = None
    """Length [n] of each column of UᵀU - I, fp64."""
    left: Complete | None = None
    """V [m, m], where C = Vᵀ W U."""

    @property
    def whole(self) -> Rotation:
        """The rotation of both sides."""
        return self.rotation if self.left is None else TwoSided(self.left.rotation, self.rotation)

    def beside(self, left: Complete) -> Complete:
        """With V on the left."""
        return replace(self, left=left)


def orthonormal(basis: BasisStore, target: TargetLayer) -> Complete:
    """The basis of the layer's inputs, every entry of UᵀU - I looked at."""
    return _orthonormal(basis, target, basis.columns(target.name)[0], "basis")


def orthonormal_outputs(basis: BasisStore, target: TargetLayer) -> Complete:
    """The same of its outputs' V [m, m]."""
    return _orthonormal(basis, target, basis.output_columns(target.name)[0], "output basis")


def _orthonormal(basis: BasisStore, target: TargetLayer, columns: Tensor, what: str) -> Complete:
    n = len(columns)
    try:
        rotation = Rotation(columns, n, torch.float64)
    except ValueError as error:
        raise ArtifactError(f"{basis.directory}: the {what} of {target.name}: {error}; run phase 1 again") from error
    u = rotation.rotate(torch.eye(n, dtype=torch.float64)) if rotation.matrix is None else rotation.matrix
    gram = u.T @ u
    gram.diagonal().sub_(1.0)
    r = columns.shape[1]
    # Reflectors are orthonormal whatever they were made from; a dense U begins with the stored columns.
    off = (
        orthogonality_error(columns.double())
        if rotation.matrix is None
        else float(torch.linalg.vector_norm(gram[:r, :r], float("inf")))
    )
    if not off <= BAR:
        raise ArtifactError(
            f"{basis.directory}: the {what} of {target.name} is not orthonormal (an entry of UᵀU - I is "
            f"{off:.1e}, more than {BAR:g}); run phase 1 again"
        )
    skew = torch.linalg.vector_norm(gram, dim=0)
    del gram
    return Complete(rotation, u.float(), u.abs().float(), u.square().float(), skew)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """values @ weights in fp32, each row first brought to a size that fp32 holds; fp64."""
    largest = values.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return ((values / largest).float() @ weights).double() * largest * (1 + 1e-5)


def grid_of(w: Tensor) -> torch.dtype:
    """The coarsest dtype that holds every entry: of a model that was stored in 16 bits once, those."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype.itemsize < w.dtype.itemsize and torch.equal(w.to(dtype).to(w.dtype), w):
            return dtype
    return w.dtype


def half_ulp(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours in ``dtype`` of each entry of w (fp64), fp64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(w)
    return torch.ldexp(torch.full_like(w, info.eps / 4), exponent).clamp_min(info.tiny * info.eps)


def _chunks(rows: int, n: int) -> Iterator[slice]:
    step = max(1, (1 << 23) // n)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))
