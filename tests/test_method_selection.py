"""The selection by histograms against a full sort, ties included."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from warp_ds.method import selection
from warp_ds.method.selection import (
    DECADE,
    LOG_BINS,
    bin_of_kth,
    high_histogram,
    log_histogram,
    low_histogram,
    random_scores,
    take,
)


def kth(scores: torch.Tensor, k: int) -> tuple[int, int]:
    """Threshold bits and ties of the k highest."""
    high, above_high = bin_of_kth(high_histogram(scores), k)
    low, above_low = bin_of_kth(low_histogram(scores, high), k - above_high)
    return (high << 16) | low, k - above_high - above_low


CASES = {
    "spread": torch.rand(50, 41, generator=torch.Generator().manual_seed(0)) * 1e-3,
    "close": 1.0 + 1e-7 * torch.randint(0, 9, (50, 41), generator=torch.Generator().manual_seed(1)).float(),
    "ties": torch.randint(0, 4, (50, 41), generator=torch.Generator().manual_seed(2)).float(),
    "subnormal": torch.rand(50, 41, generator=torch.Generator().manual_seed(3)) * 1e-42,
    "huge": torch.rand(50, 41, generator=torch.Generator().manual_seed(4)) * 3e38,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 2, 500, 1025, 2049, 2050])
def test_the_k_highest(monkeypatch: pytest.MonkeyPatch, case: str, k: int) -> None:
    monkeypatch.setattr(selection, "CHUNK", 100)
    scores = CASES[case]
    k = min(k, int((scores > 0).sum()))  # zeros are never taken
    expected = np.zeros(scores.numel(), dtype=bool)
    expected[np.argsort(-scores.numpy().reshape(-1), kind="stable")[:k]] = True
    assert (take(scores, *kth(scores, k)).numpy().reshape(-1) == expected).all()


@pytest.mark.parametrize("case", CASES)
def test_the_histogram_by_logarithm(case: str) -> None:
    scores = CASES[case][CASES[case] > 0].double().numpy()
    counts = log_histogram(high_histogram(CASES[case])).numpy()
    assert counts.sum() == len(scores)
    # An edge lies up to one step of the upper 16 bits (8 of them exponent, 7 fraction) above the power of ten.
    edges = 10.0 ** (np.arange(LOG_BINS.start + 1, LOG_BINS.stop + 1) / DECADE)
    low, high = (np.cumsum(np.histogram(scores, [0.0, *(edges * by)])[0]) for by in (1.0, 1.0 + 2.0**-7))
    assert (low <= counts.cumsum()).all() and (counts.cumsum() <= high).all()


def test_random_scores_are_one_stream() -> None:
    whole = random_scores(7, 0, 1000)
    assert torch.equal(whole, torch.cat([random_scores(7, 0, 333), random_scores(7, 333, 667)]))
    assert not torch.equal(whole, random_scores(8, 0, 1000))
    assert (whole > 0).all() and (whole < 1).all()


def test_random_scores_are_uniform_and_unrelated() -> None:
    a, b = random_scores(1, 0, 100_000).double(), random_scores(2, 0, 100_000).double()
    # Standard errors over 1e5 draws: 9e-4 for a mean of 0.5, 3e-3 for a correlation and for a share of a tenth / 100.
    assert abs(a.mean() - 0.5) < 5e-3
    assert (torch.histc(a, 10, 0, 1) / 1e5 - 0.1).abs().max() < 5e-3
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 0.02
    assert abs(torch.corrcoef(torch.stack([a[:-1], a[1:]]))[0, 1]) < 0.02
