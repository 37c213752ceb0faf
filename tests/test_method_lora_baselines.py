"""Published LoRA baselines against their formulas, written out otherwise."""

from __future__ import annotations

import pytest
import torch
from dense_training import complete_basis

from warp_ds.method.lora_baselines import safe_lora, wsr
from warp_ds.method.rotation import Rotation


@pytest.mark.parametrize("threshold", [-1.0, 0.35, 1.0])
def test_safe_lora(threshold: float) -> None:
    g = torch.Generator().manual_seed(0)
    aligned, unaligned = (torch.randn(6, 9, generator=g, dtype=torch.float64) for _ in range(2))
    b, a = torch.randn(6, 2, generator=g, dtype=torch.float64), torch.randn(2, 9, generator=g, dtype=torch.float64)
    # As its authors' code has it: the projection is put on B, the cosine taken of the flattened products.
    v = aligned - unaligned
    c = torch.mm(v, v.t()) / torch.norm(v)
    cosine = torch.nn.functional.cosine_similarity((c @ b @ a).reshape(1, -1), (b @ a).reshape(1, -1)).item()
    expected = aligned + (c @ b if cosine <= threshold else b) @ a
    found, measured = safe_lora(aligned, aligned + b @ a, unaligned, threshold)
    assert measured == pytest.approx(cosine, abs=1e-9) and 0.36 < cosine < 0.99
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_safe_lora_without_a_direction_takes_everything_back() -> None:
    w = torch.eye(3)
    found, cosine = safe_lora(w, w + 1.0, w, 0.35)
    assert torch.equal(found, w) and cosine == 0.0


@pytest.mark.parametrize("rank", [2, 7, 9])
def test_wsr(rank: int) -> None:
    """Coefficient by coefficient: every free one c_ij of ΔW adds c_ij u_jᵀ to row i; of full rank what had rank 2."""
    g = torch.Generator().manual_seed(1)
    w, b, a = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((6, 9), (6, 2), (2, 9)))
    stored = torch.linalg.qr(torch.randn(9, 9, generator=g, dtype=torch.float64))[0][:, :rank]
    frozen = torch.rand(6, 9, generator=g) < 0.4
    expected, u = w.clone(), complete_basis(stored)
    for i in range(6):
        for j in range(9):
            if not frozen[i, j]:
                expected[i] += float(2.0 * b[i] @ a @ u[:, j]) * u[:, j]
    found = wsr(w, 2.0 * b @ a, Rotation(stored, 9, torch.float64), frozen)
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.linalg.matrix_rank(found - w) == 6
    assert torch.equal(wsr(w, 2.0 * b @ a, Rotation(None, 9), torch.ones(6, 9, dtype=torch.bool)), w)
