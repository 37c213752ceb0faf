"""Each baseline against its paper's formula, written out in numpy or by brute force on a tiny layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from warp_ds.method.baselines import (
    attention_neurons,
    linear_neurons,
    resta,
    robust_neurons,
    safe_delta,
    safety_hessian,
    safety_share,
    top_share,
)

M, N, T = 5, 7, 40


@pytest.fixture()
def layer() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(T, N, generator=draw, dtype=torch.float64) * torch.linspace(0.3, 2.0, N, dtype=torch.float64)
    values, columns = torch.linalg.eigh(x.T @ x / T)
    aligned = torch.randn(M, N, generator=draw)
    return {
        "x": x,
        "values": values.flip(0),
        "columns": columns.flip(1),
        "aligned": aligned,
        "tuned": aligned + 0.1 * torch.randn(M, N, generator=draw),
    }


def test_safeinstr_mixes_a_tenth() -> None:
    assert [safety_share(n, 0.1) for n in (0, 1, 10, 1000, 1001)] == [0, 1, 1, 100, 101]


def test_resta_adds_the_safety_vector() -> None:
    tuned, aligned, unaligned = (torch.tensor([[float(v)]]) for v in (3, 2, 5))
    assert resta(tuned, aligned, unaligned, 0.3).item() == pytest.approx(3 + 0.3 * (2 - 5))


def test_safe_delta_hessian_is_that_of_the_safety_inputs(layer: dict[str, torch.Tensor]) -> None:
    x = layer["x"].numpy()
    h = 2 * x.T @ x / T
    expected = h + 0.01 * np.mean(np.diag(h)) * np.eye(N)
    np.testing.assert_allclose(safety_hessian(layer["columns"], layer["values"]).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("s", [0.0, 20_000.0, 60_000.0, 1e12])
@pytest.mark.parametrize("block", [3, 7])
def test_safe_delta_is_the_published_selection_and_compensation(layer: dict[str, torch.Tensor], s: float, block: int) -> None:
    hessian = safety_hessian(layer["columns"], layer["values"])
    found, kept = safe_delta(layer["aligned"], layer["tuned"], hessian, s, block)
    h = hessian.numpy()
    w, target = layer["aligned"].double().numpy(), layer["tuned"].double().numpy()
    # The price of column j: ½ / [H_F⁻¹]_jj over the columns F from j on, by inverting each rest of H.
    price = np.array([0.5 / np.linalg.inv(h[j:, j:])[0, 0] for j in range(N)])
    chosen, expected = np.zeros((M, N), bool), w.copy()
    for first in range(0, N, block):
        columns = range(first, min(first + block, N))
        # Selection, entry by entry: the cheapest columns first, until the block's budget is spent; the dearest 15 % never.
        budget = s * M / 4096 * block / 4096 * np.mean(price[list(columns)])
        entries = sorted(((i, j) for i in range(M) for j in columns), key=lambda e: (price[e[1]], e))
        spent = 0.0
        for i, j in entries[: len(entries) - int(0.15 * len(entries))]:
            spent += (target[i, j] - expected[i, j]) ** 2 * price[j]
            if spent > budget:
                break
            chosen[i, j] = True
        # Compensation: with columns up to j fixed, the open ones go where ½ δᵀ H δ is least (a linear system, not OBS).
        for i in range(M):
            for j in columns:
                change = target[i, j] - expected[i, j] if chosen[i, j] else 0.0
                expected[i, j] += change
                if j + 1 < N:
                    expected[i, j + 1 :] -= np.linalg.solve(h[j + 1 :, j + 1 :], h[j + 1 :, j] * change)
    assert np.array_equal(kept.numpy(), chosen)
    most = sum(n - int(0.15 * n) for n in ([35] if block == 7 else [15, 15, 5]))
    assert chosen.sum() == {0.0: 0, 1e12: most}.get(s, chosen.sum())
    assert s not in (20_000.0, 60_000.0) or 0 < chosen.sum() < most
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(found.numpy()[chosen], target[chosen], atol=1e-6)


@pytest.mark.parametrize("at_once", [2, 3, 7])
def test_safe_delta_settles_several_columns_at_once_the_same(layer: dict[str, torch.Tensor], at_once: int) -> None:
    hessian = safety_hessian(layer["columns"], layer["values"])
    one, kept = safe_delta(layer["aligned"], layer["tuned"], hessian, 120.0, at_once=1)
    found, same = safe_delta(layer["aligned"], layer["tuned"], hessian, 120.0, at_once=at_once)
    assert torch.equal(kept, same) and 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(found, one, rtol=1e-6, atol=1e-6)  # fp64 inside, fp32 as returned


def test_compensation_lowers_the_safety_loss(layer: dict[str, torch.Tensor]) -> None:
    found, kept = safe_delta(layer["aligned"], layer["tuned"], safety_hessian(layer["columns"], layer["values"]), 120.0)
    plain = torch.where(kept, layer["tuned"], layer["aligned"])

    def loss(w: torch.Tensor) -> float:
        return float((layer["x"] @ (w - layer["aligned"]).double().T).square().sum())

    assert loss(found) < loss(plain)


def test_linear_neurons_are_what_switching_off_does() -> None:
    draw = torch.Generator().manual_seed(1)
    h, w = torch.randn(T, N, generator=draw), torch.randn(M, N, generator=draw)
    for k, importance in enumerate(linear_neurons(h, w)):
        without = h.clone()
        without[:, k] = 0
        assert float(importance) == pytest.approx(float(torch.linalg.norm(h @ w.T - without @ w.T)), rel=1e-5)


def test_attention_neurons_are_what_switching_off_does() -> None:
    draw = torch.Generator().manual_seed(2)
    q, k = torch.randn(6, 4, generator=draw), torch.randn(6, 4, generator=draw)
    ones = torch.ones(1, 1, 6, 1)

    def attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        # The rows of the attention matrix, read off PyTorch's own attention by its values.
        value = torch.eye(6).expand(1, 1, 6, 6) * ones
        return torch.nn.functional.scaled_dot_product_attention(q[None, None], k[None, None], value, is_causal=True)[0, 0]

    found = attention_neurons(q, k)
    for c in range(4):
        off = q.clone()
        off[:, c] = 0
        assert float(found[c]) == pytest.approx(float(torch.linalg.norm(attention(q, k) - attention(off, k))), abs=1e-5)


def test_safety_neurons_matter_for_every_input_and_robust_ones_are_not_foundational() -> None:
    importance = torch.tensor([[3.0, 1.0, 9.0, 2.0], [3.0, 5.0, 0.1, 2.5]])
    safety = top_share(importance.min(0).values, 0.5)
    assert safety.tolist() == [True, False, False, True]
    foundation = torch.tensor([True, True, False, False])
    assert robust_neurons(safety, foundation).tolist() == [False, False, False, True]
