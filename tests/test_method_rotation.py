"""A stored U means [U, complement of its Householder reflectors], however it is applied."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from warp_ds.method import rotation as module
from warp_ds.method.rotation import Rotation, householder_wy

# n and r: dense (2 r >= n), reflectors (2 r < n), one column, complete, odd and even.
SIZES = [(21, 21), (21, 15), (21, 5), (15, 1), (16, 8), (16, 7), (64, 3), (1, 1), (33, 32)]
#: Rounding of fp32 products of up to 64 terms of unit vectors.
FP32 = 2e-6


def orthonormal(n: int, r: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0][:, :r]


def complete(u: torch.Tensor) -> torch.Tensor:
    """[U, U⊥] by LAPACK through numpy."""
    q = np.linalg.qr(u.double().numpy(), mode="complete")[0]
    return torch.cat([u.double(), torch.from_numpy(q[:, u.shape[1] :])], dim=1)


@pytest.mark.parametrize(("n", "r"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rotates_into_the_completed_basis_and_back(n: int, r: int, dtype: torch.dtype) -> None:
    u = orthonormal(n, r).float()
    w = torch.randn(9, n, generator=torch.Generator().manual_seed(1), dtype=dtype)
    rotation = Rotation(u, n, dtype)
    assert (rotation.reflectors is not None) == (2 * r < n)
    c = rotation.rotate(w)
    assert c.dtype == dtype
    # In fp64 what is left is the rounding of the stored fp32 U, on which reflectors and dense product differ.
    assert (c.double() - w.double() @ complete(u)).abs().max() < 20 * FP32
    assert (rotation.unrotate(c) - w).abs().max() < 20 * FP32


@pytest.mark.parametrize(("n", "r"), [(n, r) for n, r in SIZES if r < n])
def test_householder_complement_is_numpys(n: int, r: int) -> None:
    u = orthonormal(n, r)
    v, t, signs = householder_wy(u)
    q = torch.eye(n, dtype=torch.float64) - v @ t @ v.T
    assert (q.T @ q - torch.eye(n, dtype=torch.float64)).abs().max() < 1e-13
    assert (q[:, :r] * signs - u).abs().max() < 1e-13
    assert (q - torch.from_numpy(np.linalg.qr(u.numpy(), mode="complete")[0])).abs().max() < 1e-13


def test_columns_that_need_no_reflection() -> None:
    """LAPACK writes tau = 0 for a column that is already a unit vector, of either sign."""
    for u in (torch.eye(9)[:, :3], -torch.eye(9)[:, :3], torch.eye(9)[:, [2, 0]], torch.eye(9)[:, [0, 5, 1]]):
        w = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
        rotation = Rotation(u, 9)
        assert torch.allclose(rotation.rotate(w).double(), w.double() @ complete(u), atol=FP32)
        assert torch.allclose(rotation.unrotate(rotation.rotate(w)), w, atol=FP32)


def test_dense_and_reflectors_mean_the_same_basis() -> None:
    """The same columns applied densely: what differs is rounding alone."""
    u = orthonormal(40, 6).float()
    reflected = Rotation(u, 40)
    dense = Rotation(None, 40)
    dense.matrix = complete(u).float()
    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(reflected.rotate(w), dense.rotate(w), atol=10 * FP32)
    assert torch.allclose(reflected.unrotate(w), dense.unrotate(w), atol=10 * FP32)


def rounds(rotation: Rotation, w: torch.Tensor) -> float:
    """What there and back does to W, over its size; in fp64, so that it is the held basis's doing alone."""
    basis = Rotation(None, rotation.n)
    assert rotation.matrix is not None
    basis.matrix = rotation.matrix.double()
    return float((basis.unrotate(basis.rotate(w)) - w).norm() / w.norm())


@pytest.mark.parametrize("r", [300, 200])
def test_a_polished_basis_brings_weights_back(r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of columns that are orthonormal to 1e-5 alone, and in blocks that do not divide n; fp32 rounds at 6e-8."""
    monkeypatch.setattr(module, "BLOCK", 128)
    g = torch.Generator().manual_seed(6)
    u = (orthonormal(300, r) + 1e-6 * torch.randn(300, r, generator=g, dtype=torch.float64)).float()
    w = torch.randn(7, 300, generator=g, dtype=torch.float64)
    stored = Rotation(u, 300)
    polished = stored.polished()
    assert rounds(stored, w) > 5e-6
    assert rounds(polished, w) < 1e-7
    assert stored.matrix is not None and polished.matrix is not None and torch.equal(stored.matrix[:, :r], u)
    assert (polished.matrix - stored.matrix).abs().max() < 2e-5
    monkeypatch.setattr(module, "POLISH_ON_CPU", 299)
    assert stored.polished() is stored, "it would take too long"
    reflected, identity = Rotation(u[:, :100], 300), Rotation(None, 300)
    assert reflected.polished() is reflected and identity.polished() is identity


def test_no_rows_and_identity() -> None:
    for u in (orthonormal(8, 8), orthonormal(8, 2)):
        rotation = Rotation(u, 8)
        assert rotation.rotate(torch.zeros(0, 8)).shape == (0, 8)
        assert rotation.unrotate(torch.zeros(0, 8)).shape == (0, 8)
    identity = Rotation(None, 8)
    w = torch.randn(3, 8)
    assert identity.is_identity and identity.nbytes == 0 and identity.flops(3) == 0
    assert identity.rotate(w) is w and identity.unrotate(w) is w


def test_inputs_are_left_alone() -> None:
    for r in (3, 20, 21):
        rotation = Rotation(orthonormal(21, r), 21)
        w = torch.randn(4, 21, generator=torch.Generator().manual_seed(4))
        before = w.clone()
        rotation.rotate(w)
        rotation.unrotate(w)
        assert torch.equal(w, before)


@pytest.mark.parametrize("r", [21, 5])
def test_what_is_held_is_packed_and_comes_back(r: int) -> None:
    rotation = Rotation(orthonormal(21, r), 21)
    packed = rotation.packed()
    assert packed.nbytes == rotation.nbytes
    again = rotation.to("meta").unpacked(torch.cat([packed, torch.full((3,), float("nan"))]))
    w = torch.randn(4, 21, generator=torch.Generator().manual_seed(7))
    assert torch.equal(again.rotate(w), rotation.rotate(w)) and torch.equal(again.unrotate(w), rotation.unrotate(w))


def test_bytes_and_operations_are_counted() -> None:
    dense, reflected = Rotation(orthonormal(21, 21), 21), Rotation(orthonormal(21, 5), 21)
    assert dense.nbytes == 21 * 21 * 4 and dense.flops(10) == 2 * 10 * 21 * 21
    assert reflected.nbytes == (2 * 21 * 5 + 5) * 4 and reflected.flops(10) == 4 * 10 * 21 * 5


@pytest.mark.parametrize("columns", [torch.randn(8, 3), torch.full((8, 3), float("nan")), torch.zeros(8, 8)])
def test_columns_that_are_not_orthonormal_are_refused(columns: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="not orthonormal"):
        Rotation(columns, 8)


@pytest.mark.parametrize("shape", [(7, 3), (8, 9), (8,)])
def test_columns_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="is \\[8, r <= 8\\]"):
        Rotation(torch.zeros(shape), 8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n,r", [(300, 100), (300, 200), (300, 300), (5, 1), (4, 3)])
def test_made_on_a_gpu_it_is_the_same(n: int, r: int) -> None:
    """Frozen coefficients belong to these very coordinates, whichever device completes the basis."""
    columns = torch.linalg.qr(torch.randn(n, r, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0].float()
    if r == 3:
        columns = torch.eye(n)[:, :r]  # nothing to reflect
    w = torch.randn(7, n, generator=torch.Generator().manual_seed(1))
    here, there = Rotation(columns, n), Rotation(columns.cuda(), n)
    torch.testing.assert_close(there.rotate(w.cuda()).cpu(), here.rotate(w), rtol=0, atol=1e-5)
    torch.testing.assert_close(there.unrotate(there.rotate(w.cuda())).cpu(), w, rtol=0, atol=1e-5)
