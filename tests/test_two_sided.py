"""C = Vᵀ W U and back, and V of W Σ Wᵀ, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_method_rotation import FP32, complete, orthonormal

from warp_ds.evaluation.drift import Complete, explained_on_both_sides
from warp_ds.method.rotation import Rotation
from warp_ds.method.systematic import Sums
from warp_ds.method.two_sided import TwoSided, output_basis


@pytest.mark.parametrize(("m", "q", "n", "r"), [(9, 9, 21, 21), (21, 5, 9, 7), (15, 1, 16, 3), (1, 1, 8, 8)])
def test_rotates_both_sides_and_back(m: int, q: int, n: int, r: int) -> None:
    v, u = orthonormal(m, q, 1).float(), orthonormal(n, r, 2).float()
    w = torch.randn(m, n, generator=torch.Generator().manual_seed(3))
    both = TwoSided(Rotation(v, m), Rotation(u, n))
    c = both.rotate(w)
    assert (c.double() - complete(v).T @ w.double() @ complete(u)).abs().max() < 20 * FP32
    assert (both.unrotate(c) - w).abs().max() < 20 * FP32
    assert both.to("meta").rotate(w.to("meta")).shape == c.shape
    assert both.nbytes == Rotation.held_bytes(m, q) + Rotation.held_bytes(n, r)
    assert (both.polished().rotate(w) - c).abs().max() < 20 * FP32
    assert not both.is_identity and both.flops(m) == both.left.flops(n) + both.right.flops(m)


@pytest.mark.parametrize(("m", "n", "tokens"), [(7, 12, 40), (12, 7, 40), (7, 12, 9), (12, 7, 5), (7, 12, 5)])
def test_the_output_basis_is_of_the_outputs_covariance(m: int, n: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(4)
    w, x = torch.randn(m, n, generator=generator), torch.randn(tokens, n, generator=generator)
    y = x.double() @ w.double().T
    covariance = (y.T @ y / tokens).numpy()
    values = np.linalg.eigvalsh(covariance)[::-1]
    # As phase 1 has them: tokens where there are fewer than inputs, else their covariance.
    few = tokens < n
    basis = output_basis(w, x if few else None, None if few else x.T @ x / tokens)
    rank = min(m, n, tokens)
    assert basis.columns.shape == (m, rank) and basis.columns.dtype == torch.float32
    v, s = basis.columns.double().numpy(), basis.values.double().numpy()
    assert np.abs(v.T @ v - np.eye(rank)).max() < 1e-6
    assert np.abs((v * s) @ v.T - covariance).max() < 1e-5 * values[0]
    assert np.abs(s - values[:rank]).max() < 1e-5 * values[0]
    largest = v[np.abs(v).argmax(axis=0), np.arange(rank)]
    assert (largest > 0).all()
    cut = output_basis(w, x if few else None, None if few else x.T @ x / tokens, max_rank=2)
    assert np.abs(np.abs(cut.columns.numpy().T @ v[:, :2]) - np.eye(2)).max() < 1e-4


def test_what_rounding_allows_passes_through_both_sides() -> None:
    """Errors of W's entries of very different sizes: variances and sums of C = Vᵀ W U, entry by entry."""
    m, n, generator = 6, 9, torch.Generator().manual_seed(5)
    v, u = orthonormal(m, m, 1), orthonormal(n, n, 2)
    sides = [Rotation(v.float(), m, torch.float64), Rotation(u.float(), n, torch.float64)]
    skew = torch.zeros(1, dtype=torch.float64)
    left, right = (
        Complete(side, x.float(), x.abs().float(), x.square().float(), skew.expand(len(x)))
        for side, x in zip(sides, (v, u), strict=True)
    )
    error = 10.0 ** -torch.randint(3, 9, (m, n), generator=generator).double()
    size, frozen = torch.randn(m, n, generator=generator).double(), torch.rand(m, n, generator=generator) < 0.4
    allowed, variance, typical = explained_on_both_sides(error, size, False, right.beside(left))
    wanted = v.square().T @ (error.square() / 3) @ u.square()
    assert (variance / wanted - 1).abs().max() < 1e-4
    signs = torch.randint(0, 2, (200, m, n), generator=generator).double() * 2 - 1
    moved = v.T @ (signs * error) @ u
    assert (moved.abs() <= allowed).all() and (moved.abs().amax(0) > 0.02 * allowed).any()
    sums = Sums()
    sums.add(moved[0], size, frozen, variance, error, typical, right.matrix, left.matrix)
    for drift, pattern in zip(sums.drifts, (torch.ones_like(size), torch.sign(size), size), strict=True):
        b = v @ torch.where(frozen, pattern, 0.0) @ u.T
        assert drift.squares == pytest.approx(float((b * error).square().sum()), rel=1e-3)
    assert (sums.rows[0][:, 3] == torch.where(frozen.any(1), error.max(), 0.0)).all()
