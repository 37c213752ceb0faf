"""The running covariance against NumPy in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from warp_ds.method import covariance
from warp_ds.method.covariance import Covariance


@pytest.mark.parametrize("n", [1, 7, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum_over_pieces(monkeypatch: pytest.MonkeyPatch, n: int, dtype: torch.dtype) -> None:
    monkeypatch.setattr(covariance, "BLOCK", 32)  # several blocks, the last one not whole
    monkeypatch.setattr(covariance, "TOKENS", 30)  # pieces that do not fill the buffer, and that fill it several times
    x = torch.randn(200, n, generator=torch.Generator().manual_seed(0)).to(dtype)
    running = Covariance(n)
    for piece in (x[:1], x[1:90], x[90:90], x[90:]):
        given = piece.clone()
        running.add(given)
        given.fill_(7)  # the model may write over its activations
    exact = x.double().numpy().T @ x.double().numpy() / 200
    sigma = running.result()
    assert sigma.dtype == torch.float32 and running.tokens == 200
    assert torch.equal(sigma, sigma.T)
    # Products of low-precision inputs are exact in fp32; 200 sums round at 6e-8 each.
    assert np.abs(sigma.numpy() - exact).max() < 2e-6 * np.abs(exact).max()


def test_division_by_the_tokens_of_all_ranks() -> None:
    running = Covariance(2)
    running.add(torch.ones(4, 2))
    assert torch.equal(running.result(tokens=8), torch.full((2, 2), 0.5))


def test_no_tokens() -> None:
    with pytest.raises(ValueError, match="no token was counted"):
        Covariance(3).result()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    """Halves are multiplied as they are; inputs of very different size keep their own accuracy."""
    n = 2500  # three blocks, the last one not whole
    generator = torch.Generator("cuda").manual_seed(0)
    x = (torch.randn(3000, n, generator=generator, device="cuda") * torch.logspace(0, -3, n, device="cuda")).to(dtype)
    running = Covariance(n, "cuda")
    for piece in x.split(700):
        running.add(piece)
    exact = x.double().T @ x.double() / len(x)
    sigma = running.result()
    deviations = exact.diagonal().sqrt()
    worst = float(((sigma.double() - exact) / deviations / deviations[:, None]).abs().max())
    # A product of 1,024 tokens is summed in 64 steps, of which each cuts at most 2^-23 on a tensor core.
    assert worst < 64 * 2.0**-23, worst
    assert torch.equal(sigma, sigma.T)
