"""Importance batches cut into steps of one micro-batch a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from warp_ds.cluster.dealing import evenly
from warp_ds.data.collate import EMPTY
from warp_ds.zero.batches import Samples


@dataclass
class Step:
    """One micro-batch on each rank."""

    parts: list[list[int]]
    """rank -> its samples, EMPTY where it has none"""
    segments: list[tuple[int, int, bool]]
    """(first token, end, last) of each importance batch among the tokens of all ranks in order; ``last``: no later step
    holds more of this batch"""
    tokens: list[int]
    """rank -> how many tokens its samples have"""


def importance_batches(samples: Samples, size: int) -> tuple[list[range], list[range]]:
    """The safety set cut into batches of ``size`` samples: those with a response token, and those without."""
    batches = [range(first, min(first + size, len(samples))) for first in range(0, len(samples), size)]
    speaking = [batch for batch in batches if any(samples.responses(i) for i in batch)]
    return speaking, [batch for batch in batches if batch not in speaking]


def plan_steps(batches: Sequence[range], samples: Samples, batch_size: int, ranks: int) -> list[Step]:
    """The steps that run ``batches``, the importance batches, at most ``batch_size`` samples a rank and step.

    A step holds whole importance batches wherever one fits into it, so that no unfinished sum need be kept between
    steps.
    """
    capacity = batch_size * ranks
    together = max(1, capacity // max((len(batch) for batch in batches), default=1))
    steps = []
    for first in range(0, len(batches), together):
        chosen = batches[first : first + together]
        flat = [(i, b) for b, batch in enumerate(chosen) for i in batch]
        for start in range(0, len(flat), capacity):
            piece = flat[start : start + capacity]
            rest = {b for _, b in flat[start + capacity :]}
            steps.append(_step(piece, rest, samples, ranks))
    return steps


def _step(piece: list[tuple[int, int]], rest: set[int], samples: Samples, ranks: int) -> Step:
    parts = [[piece[k][0] for k in part] or [EMPTY] for part in evenly(len(piece), ranks)]
    segments: list[tuple[int, int, bool]] = []
    position = 0
    for b in dict.fromkeys(b for _, b in piece):
        length = sum(samples.counts(i) for i, other in piece if other == b)
        segments.append((position, position + length, b not in rest))
        position += length
    tokens = [sum(samples.counts(i) for i in part if i != EMPTY) for part in parts]
    return Step(parts, segments, tokens)
