"""How far two masks freeze the same thing: as sets of coefficients, and as subspaces of the weights.

A mask F [m, n] (1 = frozen) in a basis U [n, n] holds row i of W fixed in span{U_j : F_ij = 1}; of all rows together that
is a subspace of dimension k = |F| of R^(m n). Two such subspaces with projectors P and P' are compared by tr(P P'), the
sum of the squared cosines of their principal angles (Bjorck and Golub, Math. Comp. 27, 1973), which no choice of
eigenvectors within an eigenspace changes: only within one basis do entries themselves mean the same.
"""

from __future__ import annotations

import torch
from torch import Tensor


def common_entries(first: Tensor, second: Tensor) -> int:
    """|F ∩ F'| of two bool masks [m, n] in one basis."""
    return int((first & second).sum())


def iou(common: float, k: float, other: float) -> float:
    """Intersection over union of sets of ``k`` and ``other`` elements, of which ``common`` are the same; nan of empty ones."""
    union = k + other - common
    return common / union if union else float("nan")


def chance_common(k: float, other: float, entries: float) -> float:
    """The expected |F ∩ F'| of two sets drawn at random among ``entries``; and the expected tr(P P') of such masks, in any
    bases: the squares of U' Uᵀ sum to 1 in each row and column."""
    return k * other / entries if entries else 0.0


def trace_overlap(first: Tensor, second: Tensor, squares: Tensor) -> float:
    """tr(P P') = Σ_i F_i M F'_iᵀ of bool masks [m, a] and [m, b], with M = (Uᵀ U')² entry by entry [a, b]."""
    return float(((first.to(squares.dtype) @ squares) * second).sum(dtype=torch.float64))


def trace_by_columns(first: Tensor, second: Tensor, squares: Tensor) -> float:
    """The expected tr(P P') if each column kept its number of frozen entries, but not which: c M c'ᵀ / m."""
    a, b = first.sum(0).to(torch.float64), second.sum(0).to(torch.float64)
    return float(a @ squares.double() @ b) / first.shape[0]


def principal_angles(product: Tensor) -> Tensor:
    """Angles in degrees, ascending [min(a, b)], between the column spaces of two bases with U_Fᵀ U'_F' = ``product`` [a, b].

    Of equal directions fp32 leaves up to 0.03 degrees.
    """
    cosines = torch.linalg.svdvals(product.double()).clamp(max=1.0)
    return torch.rad2deg(torch.acos(cosines))
