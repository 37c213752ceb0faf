"""The gradient of the rotated coefficients against autograd's."""

from __future__ import annotations

import pytest
import torch

from warp_ds.method import importance
from warp_ds.method.importance import add_importance, importance_flops, response_loss, tokens_first


@pytest.mark.parametrize("rows_at_once", [2, 128])
def test_importance_is_autograds(monkeypatch: pytest.MonkeyPatch, rows_at_once: int) -> None:
    monkeypatch.setattr(importance, "ROWS", rows_at_once)
    torch.manual_seed(0)
    x, u = torch.randn(7, 5), torch.linalg.qr(torch.randn(5, 5))[0]
    c = (torch.randn(3, 5) @ u).requires_grad_(True)  # C = W U
    y = x @ (c @ u.T).T
    y.retain_grad()
    y.sin().sum().backward()
    for r in (5, 2):
        expected = 1.0 + 0.5 * c.grad[:, :r].abs()
        ways = {
            "tokens first": (x @ u[:, :r], None, None),
            "gradient first": (x, u[:, :r], None),
            "in two parts": (x[4:], u[:, :r], y.grad[:4].T @ x[:4]),
        }
        for way, (right, columns, pending) in ways.items():
            total = torch.ones(3, r)
            add_importance(total, y.grad[-len(right) :], right, columns, pending, scale=0.5)
            assert torch.allclose(total, expected, atol=1e-6), way


def test_low_precision_is_multiplied_in_fp32() -> None:
    ones, total = torch.ones(1000, 1, dtype=torch.bfloat16), torch.zeros(1, 1)
    add_importance(total, ones, ones)
    assert total.item() == 1000.0  # bf16 sums would stop at 256


def test_the_cheaper_way() -> None:
    assert tokens_first(100, 1, [1000], 1000, 1000)
    assert not tokens_first(2000, 1, [1000], 1000, 1000)
    assert tokens_first(2000, 1, [1000, 1000, 1000], 1000, 1000)  # one rotation serves three layers
    assert importance_flops(2000, 1, [1000], 1000, 1000) == 2 * 1000 * 1000 * 3000
    assert importance_flops(100, 4, [250], 1000, 500) == 2 * (25 * 1000 * 500 + 100 * 250 * 500)
    assert importance_flops(100, 1, [10], 20, 20, identity=True) == 2 * 100 * 10 * 20


def test_weights_of_one_batch_give_its_mean() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 11)
    labels = torch.tensor([[-100, -100, 3, 4, 5, -100], [-100, 7, -100, -100, -100, -100]])
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1))
    assert torch.allclose(response_loss(logits, labels, torch.full((2, 6), 1 / 4)), expected)


def test_no_label_still_has_a_graph() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = response_loss(logits, torch.full((1, 3), -100), torch.ones(1, 3))
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.any()
