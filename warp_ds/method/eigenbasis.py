"""Orthonormal bases of a layer's input space: Σ = U Λ Uᵀ, and others in its place."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

import scipy.linalg
import torch
from torch import Tensor

BAR = 1e-5
"""The largest orthogonality error and relative residual of a basis that is stored."""
SPREAD = 1e-5
"""An fp32 decomposition is off by some 3e-7 λ_1 (measured, any n): where all eigenvalues lie within this share of λ_1, the
coefficients UᵀΣU of two columns correlate by less than 0.05 through it. Where they do not, Σ is decomposed in fp64."""
FROM_ROUNDING = 1e-11
"""Of a few tokens, eigenvalues below this share of λ_1 are not stored: the same token, computed twice in fp32, differs by
some 1e-7 of its length, which squares to 1e-14, and tokens that do differ were seen to leave 1e-9 and more. Far from both,
so that the rank does not hang on the order in which a batch was computed."""
PROBES = 32
BLOCK = 512
WIDE = 2048
"""On a CPU, wider ones are decomposed by SciPy's library: on one thread of an AMD EPYC the bases of a block (2,816 and twice
1,024) took two thirds of the time that they take by torch's alone; on two threads 2,816 by itself took 85 %, and 1,024 and
below as much or more."""


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


def covariance_basis(sigma: Tensor, energy: float = 1.0, max_rank: int = 0, dtype: torch.dtype | None = None) -> Basis:
    """Eigenvectors of Σ [n, n], symmetric, of at least n tokens: one for every input that is not always 0.

    The rank is counted, not cut at a threshold: where the small end of a spectrum runs into fp32's rounding, as those of real
    models do, a threshold would cut elsewhere on other ranks or processors. Eigenvalues that rounding made negative are 0.

    ``dtype`` None takes the cheapest precision that resolves the small end: fp32, or fp64 (see ``SPREAD``).
    """
    variances = torch.diagonal(sigma)
    live = variances != 0
    if not bool(live.all()):
        inner = covariance_basis(sigma[live][:, live], energy, max_rank, dtype or torch.float64)
        columns = inner.columns.new_zeros(len(sigma), inner.rank)
        columns[live] = inner.columns
        return replace(inner, columns=columns)
    if dtype is not None:
        return _decomposed(sigma.to(dtype), energy, max_rank)
    if bool(variances.min() >= SPREAD * variances.max()):  # no smaller than the smallest eigenvalue
        basis = _decomposed(sigma.float(), energy, max_rank)
        resolved = bool(basis.values[-1] >= SPREAD * basis.values[0])
        if resolved and basis.orthogonality_error <= BAR and basis.residual <= BAR:
            return basis
    return _decomposed(sigma.double(), energy, max_rank)


def _decomposed(sigma: Tensor, energy: float, max_rank: int) -> Basis:
    """The same in the precision that Σ [n, n] has."""
    values, columns = _eigh(sigma)
    values = values.flip(0).clamp_min(0.0)
    rank = _kept(values, len(values), energy, max_rank)
    descending = torch.arange(len(sigma) - 1, len(sigma) - 1 - rank, -1, device=sigma.device)
    return _basis(columns, values[:rank], values, lambda z: sigma @ z, descending)


def token_basis(x: Tensor, energy: float = 1.0, max_rank: int = 0) -> Basis:
    """The same for Σ = (1/T) xᵀx of T tokens x [T, n], without forming Σ: for fewer tokens than inputs.

    The T x T Gram matrix has the same eigenvalues, and u = xᵀ v / ‖xᵀ v‖ for each of its vectors v. It squares the
    spread of x's singular values, so it is formed and decomposed in fp64.
    """
    count = len(x)
    x = x.double()
    values, v = _eigh(x @ x.T / count)
    values, v = values.flip(0).clamp_min(0.0), v.flip(1)
    there = int((values > FROM_ROUNDING * values[:1]).sum())
    rank = _kept(values, there, energy, max_rank)
    kept = values[:rank]
    u = x.T @ (v[:, :rank] / (kept * count).sqrt())
    # Rounding leaves u_i a part of size eps λ_1 / λ_i along the first directions: QR takes it out, and keeps the rest.
    if orthogonality_error(u) > torch.finfo(torch.float32).eps:
        u, triangle = torch.linalg.qr(u)
        u = u * torch.sign(torch.diagonal(triangle))
    return _basis(u, kept, values, lambda z: x.T @ (x @ z) / count)


def inputs_basis(n: int, x: Tensor | None, sigma: Tensor | None, energy: float = 1.0, max_rank: int = 0) -> Basis:
    """Of what was seen of n inputs: tokens ``x`` [T, n], T < n, or the covariance ``sigma`` [n, n], or (both None) nothing."""
    if x is not None:
        return token_basis(x, energy, max_rank)
    return unseen_basis(n) if sigma is None else covariance_basis(sigma, energy, max_rank)


def weight_basis(w: Tensor, energy: float = 1.0, max_rank: int = 0) -> Basis:
    """Right singular vectors of W [m, n] and its singular values; ``energy`` counts squared singular values."""
    m, n = w.shape
    if m < n:
        basis = token_basis(w, energy, max_rank)
    else:
        basis = covariance_basis(w.double().T @ w.double() / m, energy, max_rank, torch.float64)
    basis.values = (basis.values.double() * m).sqrt().float()
    return basis


def unseen_basis(n: int) -> Basis:
    """Of a layer that saw nothing: one column that stands for nothing (its value is 0), and its complement."""
    return Basis(torch.eye(n, 1), torch.zeros(1), energy=1.0, orthogonality_error=0.0, residual=0.0)


def random_basis(n: int, seed: int, max_rank: int = 0) -> Basis:
    """``max_rank`` (0: n) columns of a random rotation, uniform over all, from ``seed``; every value is 1."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(max_rank, n) if max_rank else n
    q, triangle = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))
    ones = torch.ones(n, dtype=torch.float64)
    return _basis(q * torch.sign(torch.diagonal(triangle)), ones[:rank], ones, lambda z: z)


def _eigh(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [k], ascending, and eigenvectors [k, k] of ``symmetric``, which is left as it is.

    Raises ValueError where an entry is not finite: libraries then return numbers without a word.
    """
    if not bool(torch.isfinite(symmetric).all()):
        raise ValueError("the inputs' covariance holds NaN or infinity: no basis can be made of it")
    # SciPy holds the interpreter meanwhile: in a thread beside this rank's own work, that would stop.
    beside = threading.current_thread() is not threading.main_thread()
    if beside or symmetric.device.type != "cpu" or len(symmetric) <= WIDE:
        values, vectors = torch.linalg.eigh(symmetric)
        return values, vectors
    # To LAPACK a symmetric matrix is its own transpose, which lies in memory as LAPACK wants it.
    values_and_vectors = scipy.linalg.eigh(symmetric.numpy().T, driver="evd", check_finite=False)
    return torch.from_numpy(values_and_vectors[0]), torch.from_numpy(values_and_vectors[1])


def _kept(values: Tensor, count: int, energy: float, max_rank: int) -> int:
    """How many of the descending ``values`` [k] are stored: of the first ``count``, ``energy``, then ``max_rank``."""
    if energy < 1.0 and count:
        share = torch.cumsum(values.double(), 0) / values.double().sum()
        count = min(count, int((share < energy).sum()) + 1)
    return min(count, max_rank) if max_rank else count


def _basis(u: Tensor, kept: Tensor, values: Tensor, sigma: Callable[[Tensor], Tensor], order: Tensor | None = None) -> Basis:
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


def _probed_errors(columns: Tensor, kept: Tensor, values: Tensor, sigma: Callable[[Tensor], Tensor]) -> tuple[float, float]:
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


def probed_orthogonality(columns: Tensor) -> float:
    """Largest row norm of UᵀU - I for U [n, r] as ``_probed_errors`` estimates it, in fp64; a block of columns at a time."""
    if not columns.shape[1]:
        return 0.0
    generator = torch.Generator().manual_seed(0)
    z = torch.randint(0, 2, (columns.shape[1], PROBES), generator=generator).double() * 2.0 - 1.0
    blocks = [slice(begin, begin + BLOCK) for begin in range(0, columns.shape[1], BLOCK)]
    uz = torch.zeros(columns.shape[0], PROBES, dtype=torch.float64)
    for block in blocks:
        uz += columns[:, block].double() @ z[block]
    worst = 0.0
    for block in blocks:
        rows = torch.linalg.vector_norm(columns[:, block].double().T @ uz - z[block], dim=1)
        worst = max(worst, float(rows.max()) / PROBES**0.5)
    return worst


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
