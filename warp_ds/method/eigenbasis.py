"""Orthonormal bases of a layer's input space: Σ = U Λ Uᵀ (section 2.2 of the method), and others in its place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import scipy.linalg
import torch
from torch import Tensor

BAR = 1e-5
"""The largest orthogonality error and relative residual of a basis that is stored."""
PROBES = 32
BLOCK = 512
WIDE = 1000
"""On a CPU, wider ones are decomposed by SciPy's library, in fp64 on one thread of an AMD EPYC: 0.21 s for torch's 0.29 s at
1,024 inputs, 0.66 s for 0.95 s at 1,536, 4.0 s for 8.8 s at 2,816."""


@dataclass
class Basis:
    """The stored part of a basis of n inputs: r orthonormal columns, the most important first."""

    columns: Tensor
    """U [n, r] fp32"""
    values: Tensor
    """S [r] fp32, descending: eigenvalues of Σ, or singular values of W"""
    energy: float
    """Share of the sum of all eigenvalues that the r columns hold."""
    orthogonality_error: float
    """Largest row norm of UᵀU - I, which no entry exceeds, estimated from random probes; the largest entry itself where
    that estimate is above ``BAR``."""
    residual: float
    """‖ΣU - UΛ‖ / ‖Σ‖ in the Frobenius norm, the numerator estimated from random probes."""

    @property
    def rank(self) -> int:
        return self.columns.shape[1]


def covariance_basis(sigma: Tensor, energy: float = 1.0, max_rank: int = 0) -> Basis:
    """Eigenvectors of the symmetric Σ [n, n] of at least as many tokens as inputs: one for each input that is ever nonzero.

    Decomposed in fp64, whatever Σ's dtype: an fp32 decomposition errs by 1e-7 of the largest eigenvalue everywhere, and
    real inputs have thousands of eigenvalues closer together than that, whose vectors it mixes. Which are stored is
    counted, not measured: eigenvalues run smoothly into the rounding of Σ, so any bar on their size would fall between
    two of them, and where depends on the order in which Σ was summed. Those that rounding made negative are stored as 0.

    Raises ValueError where Σ holds NaN or infinity.
    """
    if not bool(torch.isfinite(sigma).all()):
        raise ValueError("Σ holds NaN or infinity: the model's activations are not finite, so there is no basis")
    live = torch.diagonal(sigma) > 0
    whole = sigma.double()
    inner = whole if bool(live.all()) else whole[live][:, live]
    values, columns = _eigh(inner)
    values = values.flip(0).clamp_min(0.0)
    rank = _kept(values, -1.0, energy, max_rank)
    descending = torch.arange(len(inner) - 1, len(inner) - 1 - rank, -1, device=sigma.device)
    if len(inner) < len(whole):
        columns = columns.new_zeros(len(whole), len(inner)).index_copy_(0, live.nonzero()[:, 0], columns)
    return _basis(columns, values[:rank], values, lambda z: whole @ z, descending)


def token_basis(x: Tensor, energy: float = 1.0, max_rank: int = 0) -> Basis:
    """The same for Σ = (1/T) xᵀx of T tokens x [T, n], without forming Σ: for fewer tokens than inputs.

    The T x T Gram matrix has the same eigenvalues, and u = xᵀ v / ‖xᵀ v‖ for each of its vectors v. It squares the
    spread of x's singular values, so it is formed and decomposed in fp64.
    """
    count, n = x.shape
    x = x.double()
    values, v = _eigh(x @ x.T / count)
    values, v = values.flip(0).clamp_min(0.0), v.flip(1)
    rank = _kept(values, max(count, n) * torch.finfo(torch.float64).eps, energy, max_rank)
    kept = values[:rank]
    u = x.T @ (v[:, :rank] / (kept * count).sqrt())
    # Rounding leaves u_i a part of size eps λ_1 / λ_i along the first directions: QR takes it out, and keeps the rest.
    if orthogonality_error(u) > torch.finfo(torch.float32).eps:
        u, triangle = torch.linalg.qr(u)
        u = u * torch.sign(torch.diagonal(triangle))
    return _basis(u, kept, values, lambda z: x.T @ (x @ z) / count)


def weight_basis(w: Tensor, energy: float = 1.0, max_rank: int = 0) -> Basis:
    """Right singular vectors of W [m, n] and its singular values; ``energy`` counts squared singular values."""
    m, n = w.shape
    if m < n:
        basis = token_basis(w, energy, max_rank)
    else:
        basis = covariance_basis(w.double().T @ w.double() / m, energy, max_rank)
    basis.values = (basis.values.double() * m).sqrt().float()
    return basis


def random_basis(n: int, seed: int, max_rank: int = 0) -> Basis:
    """``max_rank`` (0: n) columns of a random rotation, uniform over all, from ``seed``; every value is 1."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(max_rank, n) if max_rank else n
    q, triangle = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))
    ones = torch.ones(n, dtype=torch.float64)
    return _basis(q * torch.sign(torch.diagonal(triangle)), ones[:rank], ones, lambda z: z)


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [k], ascending, and eigenvectors [k, k] of ``symmetric``, which is left as it is."""
    # SciPy holds the interpreter meanwhile: in a thread beside this rank's own work, that would stop.
    beside = threading.current_thread() is not threading.main_thread()
    if beside or symmetric.device.type != "cpu" or len(symmetric) <= WIDE:
        values, vectors = torch.linalg.eigh(symmetric)
        return values, vectors
    # To LAPACK a symmetric matrix is its own transpose, which lies in memory as LAPACK wants it.
    found = scipy.linalg.eigh(symmetric.numpy().T, driver="evd", check_finite=False)
    return torch.from_numpy(found[0]), torch.from_numpy(found[1])


def _kept(values: Tensor, tolerance: float, energy: float, max_rank: int) -> int:
    """How many of the descending ``values`` [k] are stored: above ``tolerance``, then ``energy``, then ``max_rank``.

    ``tolerance`` is relative to the largest; below 0 all are above it. At least one is kept where any value is above 0.
    """
    if not values.numel() or not float(values[0]) > 0.0:
        return 0
    rank = int((values > values[0] * tolerance).sum())
    if energy < 1.0:
        share = torch.cumsum(values.double(), 0) / values.double().sum()
        rank = min(rank, int((share < energy).sum()) + 1)
    return min(rank, max_rank) if max_rank else rank


def _basis(
    u: Tensor, kept: Tensor, values: Tensor, sigma: Callable[[Tensor], Tensor], order: Tensor | None = None
) -> Basis:
    """The columns u [n, r], or those of ``order``, with their errors; ``sigma`` multiplies vectors [n, k] by Σ."""
    columns = fix_signs(u, order, torch.float32)
    total = float(values.double().sum())
    orthogonality, residual = _probed_errors(columns, kept, values, sigma)
    return Basis(
        columns=columns,
        values=kept.float().contiguous(),
        energy=float(kept.double().sum()) / total if total else 1.0,
        orthogonality_error=orthogonality if orthogonality <= BAR else orthogonality_error(columns),
        residual=residual,
    )


def _probed_errors(
    columns: Tensor, kept: Tensor, values: Tensor, sigma: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """Largest row norm of UᵀU - I, and ‖ΣU - UΛ‖_F / ‖Σ‖_F, at the cost of a few products with vectors.

    For z of independent signs, E ‖A z‖² is ‖A‖_F² and E (A z)_i² is the squared norm of row i: without variance where one
    entry is alone, and with PROBES of them never far below the largest entry of a row.
    """
    if not columns.shape[1]:
        return 0.0, 0.0
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(0, 2, (columns.shape[1], PROBES), generator=generator).to(values) * 2.0 - 1.0
    u = columns.to(values.dtype)
    uz = u @ z
    rows = torch.linalg.vector_norm(u.T @ uz - z, dim=1) / PROBES**0.5
    error = sigma(uz) - u @ (kept.unsqueeze(1) * z)
    return float(rows.max()), float(torch.linalg.norm(error) / PROBES**0.5 / torch.linalg.norm(values))


def fix_signs(columns: Tensor, order: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Each column [n, r] times ±1, so that its entry of largest magnitude (the first of equal ones) is positive.

    ``order`` picks columns, int64 [r]. A block at a time, so that what is alive beside the result stays small.
    """
    if order is None:
        order = torch.arange(columns.shape[1], device=columns.device)
    fixed = columns.new_empty(columns.shape[0], len(order), dtype=dtype or columns.dtype)
    for begin in range(0, len(order) if columns.numel() else 0, BLOCK):
        # LAPACK's columns lie one after another in memory: as rows they are read in one go.
        vectors = columns.T.index_select(0, order[begin : begin + BLOCK])
        largest = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
        vectors *= torch.where(largest < 0, -1.0, 1.0).to(vectors.dtype)
        fixed[:, begin : begin + BLOCK] = vectors.T
    return fixed


def orthogonality_error(columns: Tensor) -> float:
    """Largest entry of |UᵀU - I| for U [n, r]; only a block of the r x r product is alive at a time."""
    worst = 0.0
    for begin in range(0, columns.shape[1], BLOCK):
        gram = columns[:, begin : begin + BLOCK].T @ columns[:, begin:]
        gram.diagonal().sub_(1.0)
        worst = max(worst, float(torch.linalg.vector_norm(gram, float("inf"))))
    return worst
