"""Importance batches cut into steps of one micro-batch a rank."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

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


Piece = list[tuple[int, int]]
"""(sample, its importance batch), in order"""


def plan_steps(batches: Sequence[range], samples: Samples, batch_size: int, ranks: int) -> list[Step]:
    """The steps that run ``batches``, the importance batches, at most ``batch_size`` rows a rank and step.

    A step holds whole importance batches wherever one fits into it, so that no unfinished sum need be kept between
    steps.
    """
    if samples.capacity is not None:
        return _packed_steps(batches, samples, batch_size, ranks)
    capacity = batch_size * ranks
    together = max(1, capacity // max((len(batch) for batch in batches), default=1))
    steps = []
    for first in range(0, len(batches), together):
        chosen = batches[first : first + together]
        flat = [(i, b) for b, batch in enumerate(chosen) for i in batch]
        for start in range(0, len(flat), capacity):
            piece = flat[start : start + capacity]
            rest = {b for _, b in flat[start + capacity :]}
            steps.append(_step(piece, rest, samples, evenly(len(piece), ranks)))
    return steps


def _packed_steps(batches: Sequence[range], samples: Samples, rows: int, ranks: int) -> list[Step]:
    steps: list[Step] = []
    piece: Piece = []

    def close(rest: set[int]) -> None:
        nonlocal piece
        if piece:
            steps.append(_step(piece, rest, samples, _evenly_packed(piece, samples, ranks)))
        piece = []

    for b, batch in enumerate(batches):
        more = [(i, b) for i in batch]
        if _fits(piece + more, samples, rows, ranks):
            piece += more
            continue
        close(set())
        for item in more:
            if piece and not _fits([*piece, item], samples, rows, ranks):
                close({b})
            piece.append(item)
        if len(piece) < len(more):
            close(set())  # the end of a batch that takes several steps
    close(set())
    return steps


def _fits(piece: Piece, samples: Samples, rows: int, ranks: int) -> bool:
    parts = _evenly_packed(piece, samples, ranks)
    return all(len(samples.packed(piece[k][0] for k in part)) <= rows for part in parts)


def _evenly_packed(piece: Piece, samples: Samples, ranks: int) -> list[range]:
    """For each rank a contiguous part of the piece, of nearly as many tokens as the others'."""
    ends = list(accumulate(samples.length([i]) for i, _ in piece))
    middles = [end - samples.length([i]) / 2 for end, (i, _) in zip(ends, piece, strict=True)]
    cuts = [0, *(bisect_left(middles, ends[-1] * r / ranks) for r in range(1, ranks)), len(piece)]
    return [range(a, b) for a, b in pairwise(cuts)]


def _step(piece: Piece, rest: set[int], samples: Samples, of_ranks: Sequence[range]) -> Step:
    parts = [[piece[k][0] for k in part] or [EMPTY] for part in of_ranks]
    segments: list[tuple[int, int, bool]] = []
    position = 0
    for b in dict.fromkeys(b for _, b in piece):
        length = sum(samples.counts(i) for i, other in piece if other == b)
        segments.append((position, position + length, b not in rest))
        position += length
    tokens = [sum(samples.counts(i) for i in part if i != EMPTY) for part in parts]
    return Step(parts, segments, tokens)
