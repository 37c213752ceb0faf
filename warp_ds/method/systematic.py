"""Whether many small moves of frozen coefficients are rounding: a test of their sums (docs/certificate.md derives it).

W after training is rounded to its stored dtype: w + ε, |ε_ik| <= e_ik, the errors independent of one another. Frozen
coefficients move by Δ = ε U (and by the inexact products that make W from C, of root mean square q_i in row i). Over any set G
of them, ‖Δ_G‖ is a convex function of ε, Lipschitz with constant 1, so it exceeds its mean by t with probability
exp(-t² / 2s²), s = 2 e / π for errors spread evenly between neighbours (the log-Sobolev constant of an interval); its mean is
at most (Σ_G v)^½ with v_ij = Σ_k U_kj² e_ik² / 3. And Σ_G a Δ for a fixed pattern a is a sum of independent terms b_ik ε_ik,
b = a Uᵀ: it exceeds (2 ln(2/p) Σ b² e² / 3)^½ with probability p, even errors being sub-Gaussian of proxy e² / 3.

Where both models are stored in 16 bits, steps smaller than a unit in the last place leave errors that are neither even nor of
mean 0 (weight decay of the free coefficients alone, say: measured, a variance up to 1.64 times the even one, and 0.28 of the
errors alike, along C): SPREAD and PATTERNS make room for that. A drift below that is not found.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

FALSE_ALARM = 1e-9
"""Probability that any sum of an honest pair of models is found too large."""
SPREAD = 2.5
"""Of the variance, above that of errors spread evenly; 3 would be errors that are all as large as they can be."""
PATTERNS = {"all in one direction": 0.1, "along their signs": 0.4, "in proportion to them": 0.4}
"""What a sum weighs the moves by: the share of the errors that may be alike in an honest pair."""


@dataclass
class Sum:
    """‖Δ_G‖ of a set of frozen coefficients, and what rounding explains."""

    moved: float = 0.0
    """Σ Δ²"""
    variance: float = 0.0
    """Σ v"""
    products: float = 0.0
    """Σ q²"""
    largest: float = 0.0
    """e, the largest error of an entry of these rows."""
    count: int = 0

    def allowed(self, log_tests: float) -> float:
        """Of ``moved``^½, with probability 1 - FALSE_ALARM over exp(``log_tests``) such tests."""
        tail = math.sqrt(2.0 * (log_tests - math.log(FALSE_ALARM))) * 2.0 / math.pi
        return math.sqrt(SPREAD * self.variance) + math.sqrt(self.products) + tail * self.largest

    def __add__(self, other: Sum) -> Sum:
        return Sum(
            self.moved + other.moved,
            self.variance + other.variance,
            self.products + other.products,
            max(self.largest, other.largest),
            self.count + other.count,
        )


@dataclass
class Drift:
    """Σ a Δ for one pattern a, and what bounds it."""

    moved: float = 0.0
    squares: float = 0.0
    """Σ b² e²"""
    alike: float = 0.0
    """Σ |b| e: were all errors alike"""
    products: float = 0.0
    """The same of the inexact products."""

    def allowed(self, log_tests: float, bias: float) -> float:
        tail = math.sqrt(2.0 * (log_tests + math.log(2.0) - math.log(FALSE_ALARM)))
        return tail * math.sqrt(SPREAD * self.squares / 3) + bias * (self.alike + self.products)

    def __add__(self, other: Drift) -> Drift:
        return Drift(
            self.moved + other.moved, self.squares + other.squares, self.alike + other.alike, self.products + other.products
        )


@dataclass
class Sums:
    """The sums of one layer, or of several: what ``add`` has seen, a block of rows at a time."""

    whole: Sum = field(default_factory=Sum)
    drifts: list[Drift] = field(default_factory=lambda: [Drift() for _ in PATTERNS])
    rows: list[Tensor] = field(default_factory=list)
    """[rows, 5]: the fields of ``Sum``"""
    columns: Tensor | None = None
    """[n, 5]"""
    tests: int = 0

    def add(
        self,
        moved: Tensor,
        size: Tensor,
        frozen: Tensor,
        variance: Tensor,
        error: Tensor,
        products: Tensor,
        basis: Tensor | None,
        left: Tensor | None = None,
    ) -> None:
        """Whole rows: Δ [k, n], C before, which are frozen, v, e of W's entries, q [k, 1], U [n, n] (None: the identity); of
        C = Vᵀ W U all rows at once, and V [m, m]."""
        zero = torch.zeros((), dtype=moved.dtype)
        # With V an error in any row reaches each.
        of_rows = (error.amax(1, keepdim=True) if left is None else error.amax()).expand_as(moved)
        whole = (moved.square(), variance.to(moved.dtype), products.square().expand_as(moved), of_rows)
        parts = [torch.where(frozen, part, zero) for part in whole]
        counts = frozen.sum(1).to(moved.dtype)
        self.rows.append(torch.stack([*(p.sum(1) for p in parts[:3]), parts[3].amax(1), counts], 1))
        columns = torch.stack([*(p.sum(0) for p in parts[:3]), parts[3].amax(0), frozen.sum(0).to(moved.dtype)], 1)
        if self.columns is None:
            self.columns = columns
        else:
            largest = torch.maximum(self.columns[:, 3], columns[:, 3])
            self.columns = self.columns + columns
            self.columns[:, 3] = largest
        self.whole += Sum(
            float(parts[0].sum()), float(parts[1].sum()), float(parts[2].sum()), float(parts[3].max()), int(frozen.sum())
        )
        patterns = (torch.ones_like(size), torch.sign(size), size)
        for number, pattern in enumerate(patterns):
            self.drifts[number] += _drift(torch.where(frozen, pattern, zero), moved, error, products, basis, left)

    def excesses(self, log_tests: float) -> Iterator[str]:
        """What is more than rounding explains, in words; ``log_tests``: the logarithm of how many tests there are in all."""
        if self.whole.moved**0.5 > self.whole.allowed(log_tests):
            yield (
                f"together its {self.whole.count} frozen coefficients moved by {self.whole.moved**0.5:.3e}, where rounding "
                f"allows {self.whole.allowed(log_tests):.3e}"
            )
        for (name, bias), drift in zip(PATTERNS.items(), self.drifts, strict=True):
            if abs(drift.moved) > drift.allowed(log_tests, bias):
                yield (
                    f"its frozen coefficients moved {name}: a sum of {drift.moved:.3e}, where rounding allows "
                    f"{drift.allowed(log_tests, bias):.3e}"
                )
        for name, table in (("row", torch.cat(self.rows) if self.rows else None), ("column", self.columns)):
            beyond = [] if table is None else _beyond(table, log_tests)
            if beyond:
                yield (
                    f"the frozen coefficients of {len(beyond)} {name}s (the first: {beyond[0]}) moved more than rounding allows"
                )

    @property
    def number(self) -> int:
        """Of tests."""
        return 1 + len(PATTERNS) + sum(len(rows) for rows in self.rows) + (0 if self.columns is None else len(self.columns))

    def totals(self) -> Sums:
        """Without rows and columns: what can be added to other layers'."""
        return Sums(self.whole, list(self.drifts))

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.whole + other.whole, [a + b for a, b in zip(self.drifts, other.drifts, strict=True)])


def _drift(
    pattern: Tensor, moved: Tensor, error: Tensor, products: Tensor, basis: Tensor | None, left: Tensor | None = None
) -> Drift:
    b = pattern.float() if basis is None else pattern.to(basis.dtype) @ basis.T
    b = b if left is None else left @ b
    lengths = torch.linalg.vector_norm(pattern, dim=1, keepdim=True)
    weighted = b.to(error.dtype) * error
    return Drift(
        float((pattern * moved).sum()),
        float(weighted.square().sum()),
        float(weighted.abs().sum()),
        float((lengths * products).sum()) * pattern.shape[1] ** 0.5,
    )


def _beyond(table: Tensor, log_tests: float) -> list[int]:
    """Rows of [k, 5] whose ``moved`` is more than ``Sum.allowed``."""
    tail = math.sqrt(2.0 * (log_tests - math.log(FALSE_ALARM))) * 2.0 / math.pi
    allowed = (SPREAD * table[:, 1]).sqrt() + table[:, 2].sqrt() + tail * table[:, 3]
    return [int(i) for i in (table[:, 0].sqrt() > allowed).nonzero().flatten()]
