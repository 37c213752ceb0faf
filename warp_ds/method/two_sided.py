"""C = Vᵀ W U: rotated coefficients in coordinates of a layer's outputs and of its inputs.

W = V C Uᵀ is the seed's own formula (Kim et al., ICLR 2023), whose V is usually the identity. V mixes the rows of W, so that
no rotation of some rows alone exists: all of W comes together for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from warp_ds.method.eigenbasis import Basis, covariance_basis, fix_signs, token_basis
from warp_ds.method.products import EXACT, Products
from warp_ds.method.rotation import Rotation


class TwoSided(Rotation):
    """Maps a whole W [m, n] to C = Vᵀ W U [m, n] and back, V [m, m] and U [n, n] complete and orthonormal."""

    def __init__(self, left: Rotation, right: Rotation):
        """``left`` is V, ``right`` U."""
        super().__init__(None, right.n)
        self.m = left.n
        self.left, self.right = left, right

    @property
    def is_identity(self) -> bool:
        return self.left.is_identity and self.right.is_identity

    def flops(self, rows: int) -> int:
        """Floating-point operations of one rotation; ``rows`` is m."""
        return self.left.flops(self.n) + self.right.flops(rows)

    def rotate(self, w: Tensor, products: Products = EXACT) -> Tensor:
        """C = Vᵀ W U for W [m, n]; new tensor [m, n]."""
        return self.right.rotate(self.left.rotate(w.T, products).T, products)

    def unrotate(self, c: Tensor, products: Products = EXACT) -> Tensor:
        """W = V C Uᵀ for C [m, n]; new tensor [m, n]."""
        # In this order the result is contiguous where U is dense.
        return self.right.unrotate(self.left.unrotate(c.T, products).T, products)

    def to(self, device: torch.device | str) -> TwoSided:
        return TwoSided(self.left.to(device), self.right.to(device))

    def polished(self) -> TwoSided:
        return TwoSided(self.left.polished(), self.right.polished())

    def _tensors(self) -> list[Tensor]:
        return self.left._tensors() + self.right._tensors()


def output_basis(w: Tensor, x: Tensor | None, sigma: Tensor | None, energy: float = 1.0, max_rank: int = 0) -> Basis:
    """V of a layer y = W x: the eigenvectors of W Σ Wᵀ, the covariance of its outputs (a bias is no part of it), as ActSVD's
    left singular vectors of W X are (Wei et al., ICML 2024, arXiv 2402.05162, section 3).

    ``w`` [m, n]; of the inputs either tokens ``x`` [T, n], of which there are fewer than inputs, or their covariance ``sigma``
    [n, n]. At most min(T, m, n) columns are stored. ``energy`` and ``max_rank`` as of the basis of the inputs.
    """
    w = w.double()
    if x is not None:
        y = x.to(w) @ w.T
        return token_basis(y, energy, max_rank) if len(y) < len(w) else covariance_basis(y.T @ y / len(y), energy, max_rank)
    assert sigma is not None
    sigma = sigma.to(w)
    if len(w) <= w.shape[1]:
        return covariance_basis(_symmetric(w @ sigma @ w.T), energy, max_rank)
    # W = Q R, so that W Σ Wᵀ = Q (R Σ Rᵀ) Qᵀ: n eigenvectors, and no null space of m - n to decompose.
    q, r = torch.linalg.qr(w)
    basis = covariance_basis(_symmetric(r @ sigma @ r.T), energy, max_rank, torch.float64)
    basis.columns = fix_signs(q @ basis.columns.double(), dtype=torch.float32)
    return basis


def _symmetric(product: Tensor) -> Tensor:
    return (product + product.T) / 2
