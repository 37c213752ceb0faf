"""Orthonormal bases of a layer's input space: Σ = U Λ Uᵀ (section 2.2 of the method), and others in its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from warp_ds.method.covariance import BLOCK


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
    """Largest entry of |UᵀU - I|."""
    residual: float
    """‖ΣU - UΛ‖ / ‖Σ‖ in the Frobenius norm."""

    @property
    def rank(self) -> int:
        return self.columns.shape[1]


def covariance_basis(
    sigma: Tensor, energy: float = 1.0, max_rank: int = 0, dtype: torch.dtype = torch.float32
) -> Basis:
    """Eigenvectors of the symmetric Σ [n, n], decomposed in ``dtype``; columns whose eigenvalue is above rounding."""
    sigma = sigma.to(dtype)
    values, columns = torch.linalg.eigh(sigma)
    values, columns = values.flip(0).clamp_min(0.0), columns.flip(1)
    rank = _kept(values, torch.finfo(dtype).eps, energy, max_rank)
    kept, u = values[:rank], fix_signs(columns[:, :rank])
    norm = torch.linalg.norm(sigma)
    residual = torch.linalg.norm(sigma @ u - u * kept) / norm if rank else norm.new_zeros(())
    return _basis(u, kept, values, float(residual))


def token_basis(x: Tensor, energy: float = 1.0, max_rank: int = 0) -> Basis:
    """The same for Σ = (1/T) xᵀx of T tokens x [T, n], without forming Σ: for fewer tokens than inputs.

    The T x T Gram matrix has the same eigenvalues, and u = xᵀ v / ‖xᵀ v‖ for each of its vectors v. It squares the
    spread of x's singular values, so it is formed and decomposed in fp64.
    """
    count, n = x.shape
    x = x.double()
    values, v = torch.linalg.eigh(x @ x.T / count)
    values, v = values.flip(0).clamp_min(0.0), v.flip(1)
    rank = _kept(values, max(count, n) * torch.finfo(torch.float64).eps, energy, max_rank)
    kept = values[:rank]
    u = x.T @ (v[:, :rank] / (kept * count).sqrt())
    # Rounding leaves u_i a part of size eps λ_1 / λ_i along the first directions: QR takes it out, and keeps the rest.
    if orthogonality_error(u) > torch.finfo(torch.float32).eps:
        u, triangle = torch.linalg.qr(u)
        u = u * torch.sign(torch.diagonal(triangle))
    u = fix_signs(u)
    norm = torch.linalg.norm(values)
    residual = torch.linalg.norm(x.T @ (x @ u) / count - u * kept) / norm if rank else norm.new_zeros(())
    return _basis(u, kept, values, float(residual))


def _kept(values: Tensor, tolerance: float, energy: float, max_rank: int) -> int:
    """How many of the descending ``values`` [k] are stored: above rounding, then ``energy``, then ``max_rank``.

    ``tolerance`` is relative to the largest. At least one is kept where any value is above 0.
    """
    if not values.numel() or not float(values[0]) > 0.0:
        return 0
    rank = int((values > values[0] * tolerance).sum())
    if energy < 1.0:
        share = torch.cumsum(values.double(), 0) / values.double().sum()
        rank = min(rank, int((share < energy).sum()) + 1)
    return min(rank, max_rank) if max_rank else rank


def _basis(u: Tensor, kept: Tensor, values: Tensor, residual: float) -> Basis:
    total = float(values.double().sum())
    columns = u.float().contiguous()
    return Basis(
        columns=columns,
        values=kept.float().contiguous(),
        energy=float(kept.double().sum()) / total if total else 1.0,
        orthogonality_error=orthogonality_error(columns),
        residual=residual,
    )


def fix_signs(columns: Tensor) -> Tensor:
    """Each column [n, r] times ±1, so that its entry of largest magnitude (the first of equal ones) is positive."""
    if not columns.numel():
        return columns
    largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))
    return columns * torch.where(largest < 0, -1.0, 1.0).to(columns.dtype)


def orthogonality_error(columns: Tensor) -> float:
    """Largest entry of |UᵀU - I| for U [n, r]; only a block of the r x r product is alive at a time."""
    worst = 0.0
    for begin in range(0, columns.shape[1], BLOCK):
        gram = columns[:, begin : begin + BLOCK].T @ columns[:, begin:]
        gram.diagonal().sub_(1.0)
        worst = max(worst, float(gram.abs().max()))
    return worst


def weight_basis(w: Tensor, energy: float = 1.0, max_rank: int = 0) -> Basis:
    """Right singular vectors of W [m, n] and its singular values; ``energy`` counts squared singular values."""
    _, values, vh = torch.linalg.svd(w.double(), full_matrices=False)
    squares = values.square()
    rank = _kept(squares, (max(w.shape) * torch.finfo(torch.float32).eps) ** 2, energy, max_rank)
    u = fix_signs(vh[:rank].T)
    gram = w.double().T @ w.double()
    norm = torch.linalg.norm(gram)
    residual = torch.linalg.norm(gram @ u - u * squares[:rank]) / norm if rank else norm.new_zeros(())
    basis = _basis(u, squares[:rank], squares, float(residual))
    basis.values = values[:rank].float().contiguous()
    return basis


def random_basis(n: int, seed: int, max_rank: int = 0) -> Basis:
    """``max_rank`` (0: n) columns of a random rotation, uniform over all, from ``seed``; every value is 1."""
    generator = torch.Generator().manual_seed(seed)
    rank = min(max_rank, n) if max_rank else n
    q, triangle = torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))
    u = fix_signs(q * torch.sign(torch.diagonal(triangle)))
    ones = torch.ones(rank, dtype=torch.float64)
    return _basis(u, ones, torch.ones(n, dtype=torch.float64), 0.0)
