"""The gradient of the rotated coefficients against autograd's."""

from __future__ import annotations

import torch

from warp_ds.method.importance import coefficient_gradient, response_loss, rotated_inputs


def test_coefficient_gradient_is_autograds() -> None:
    torch.manual_seed(0)
    x, u = torch.randn(7, 5), torch.linalg.qr(torch.randn(5, 5))[0]
    c = (torch.randn(3, 5) @ u).requires_grad_(True)  # C = W U
    y = x @ (c @ u.T).T
    y.retain_grad()
    y.sin().sum().backward()
    assert torch.allclose(coefficient_gradient(y.grad, rotated_inputs(x, u)), c.grad, atol=1e-6)
    thin = coefficient_gradient(y.grad, rotated_inputs(x, u[:, :2]))
    assert torch.allclose(thin, c.grad[:, :2], atol=1e-6)


def test_low_precision_inputs_are_multiplied_in_fp32() -> None:
    x = torch.full((1000, 1), 1.0, dtype=torch.bfloat16)
    assert coefficient_gradient(x, rotated_inputs(x, None)).item() == 1000.0  # bf16 sums would stop at 256


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
