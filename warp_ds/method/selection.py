"""Which scores are the highest: exact counts, ties by index, zeros never.

Scores are fp32 and not negative, so their bits order as integers do: the k-th largest is found by two histograms of
16 bits each, which add up over blocks (and over ranks) without moving a score.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

HIGH, LOW = 1 << 15, 1 << 16
"""Bins of the upper 16 bits (the sign bit is 0) and of the lower 16."""
DECADE = 10
"""Bins a decade of the histograms that are kept."""
LOG_BINS = range(math.floor(DECADE * math.log10(2.0**-133)), math.ceil(DECADE * 128 * math.log10(2.0)))
"""Their bins: bin k begins at 10^(k / DECADE); the first holds what is less too."""
CHUNK = 1 << 22
"""Scores looked at in one piece, so that temporary memory stays small."""


def score_bits(scores: Tensor) -> Tensor:
    """The bits of non-negative fp32 scores as int32, in the same order as the scores."""
    return scores.contiguous().view(torch.int32)


def high_histogram(scores: Tensor) -> Tensor:
    """How many scores above 0 have each value of the upper 16 bits: int64 [HIGH]."""
    counts = torch.zeros(HIGH, dtype=torch.int64, device=scores.device)
    for bits in score_bits(scores).view(-1).split(CHUNK):
        counts += torch.bincount(bits >> 16, minlength=HIGH)
        counts[0] -= bits.numel() - torch.count_nonzero(bits)
    return counts


def log_histogram(high: Tensor) -> Tensor:
    """A ``high_histogram`` by the logarithm: int64 [len(LOG_BINS)].

    No score is looked at again: bins begin where one of the upper 16 bits' values does, up to 0.8 % above 10^(k / DECADE).
    """
    least = (torch.arange(HIGH, dtype=torch.int32, device=high.device) << 16).view(torch.float32).double()
    bins = (DECADE * least.log10()).floor() - LOG_BINS.start
    counts = torch.zeros(len(LOG_BINS), dtype=torch.int64, device=high.device)
    return counts.index_add_(0, bins.nan_to_num().clamp(0, len(LOG_BINS) - 1).long(), high)


def low_histogram(scores: Tensor, high: int) -> Tensor:
    """Of the scores above 0 whose upper 16 bits are ``high``, how many have each value of the lower: int64 [LOW]."""
    counts = torch.zeros(LOW, dtype=torch.int64, device=scores.device)
    for bits in score_bits(scores).view(-1).split(CHUNK):
        counts += torch.bincount(bits[(bits >> 16) == high] & (LOW - 1), minlength=LOW)
    if high == 0:
        counts[0] = 0
    return counts


def bin_of_kth(histogram: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest (k >= 1), and how many lie in the bins above it."""
    above = torch.cumsum(histogram.flip(0), 0)
    index = int((above < k).sum())
    return histogram.numel() - 1 - index, int(above[index - 1]) if index else 0


def take(scores: Tensor, threshold: int, ties: int) -> Tensor:
    """bool like ``scores``: bits above ``threshold``, and the first ``ties`` (row-major) of those equal to it."""
    bits = score_bits(scores)
    taken = bits > threshold
    if ties:
        equal = (bits == threshold).view(-1).nonzero().view(-1)[:ties]
        taken.view(-1)[equal] = True
    return taken


def random_scores(seed: int, first: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """fp32 [count] in (0, 1) for the entries ``first`` to ``first + count - 1`` of one stream, whoever asks for them.

    A counter-based generator (SplitMix64's mixing function), so that any piece can be made on any rank.
    """
    z = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=device)
    z = z * _signed(0x9E3779B97F4A7C15) + _signed((seed * 0xD1342543DE82EF95 + 1) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shift_right(z, shift)) * _signed(factor)
    z = z ^ _shift_right(z, 31)
    return (_shift_right(z, 40).float() + 0.5) * 2.0**-24


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift_right(z: Tensor, by: int) -> Tensor:
    """Logical shift: int64 shifts copy the sign bit."""
    return (z >> by) & ((1 << (64 - by)) - 1)
