"""The highest scores of all ranks' rows: exact counts by small reductions, the same cost for either scope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from warp_ds.cluster.processes import all_reduce_sum, collective_device, rank, world_size
from warp_ds.method.selection import (
    HIGH,
    LOG_BINS,
    LOW,
    bin_of_kth,
    high_histogram,
    log_histogram,
    low_histogram,
    score_bits,
    take,
)

GROUPS_AT_ONCE = 64
"""Thresholds whose histograms are reduced together: 48 MB of int64."""
NOTHING = 2**31 - 1
"""Bits that no score exceeds."""


@dataclass
class Chosen:
    """What is frozen of one block of scores."""

    threshold: int
    """Bits of the lowest frozen score."""
    ties: int
    """How many of this rank's scores equal to it are frozen, the first by index."""
    equal: int
    """How many of this rank's scores are equal to it."""
    value: float | None
    """The lowest frozen score; None where nothing is frozen."""
    logs: Tensor
    """How the block's scores above 0 lie, over all ranks (``log_histogram``)."""

    def log_counts(self, units: int) -> dict[str, Any]:
        """What scores.json holds of a layer: how many of its ``units`` score 0, and the counts from the lowest to the highest
        used bin."""
        used = self.logs.nonzero().flatten().tolist()
        first, last = (used[0], used[-1] + 1) if used else (0, 0)
        return {"zeros": units - int(self.logs.sum()), "first": LOG_BINS[first], "counts": self.logs[first:last].tolist()}

    def mask(self, scores: Tensor) -> Tensor:
        """bool like ``scores``, the block that this was chosen from."""
        if self.ties == self.equal and self.threshold < NOTHING:
            return take(scores, self.threshold - 1, 0)  # every tie is taken: no need to look for the first ones
        return take(scores, self.threshold, self.ties)


def choose(groups: Sequence[Sequence[Tensor]], wanted: Sequence[int]) -> list[list[Chosen]]:
    """For each group the ``wanted`` highest of its scores, over all ranks.

    A group is a list of blocks, each this rank's rows of one layer (fp32, not negative; ranks hold ascending rows).
    Ties go by index: block, then row, then column. Scores of 0 are never taken, so a group may give fewer.
    """
    chosen: list[list[Chosen]] = []
    for first in range(0, len(groups), GROUPS_AT_ONCE):
        chosen += _choose(groups[first : first + GROUPS_AT_ONCE], wanted[first : first + GROUPS_AT_ONCE])
    return chosen


def _choose(groups: Sequence[Sequence[Tensor]], wanted: Sequence[int]) -> list[list[Chosen]]:
    totals, parts = [_zeros(blocks, HIGH) for blocks in groups], []
    for total, blocks in zip(totals, groups, strict=True):
        for scores in blocks:
            histogram = high_histogram(scores)
            total += histogram
            parts.append(log_histogram(histogram))
    high, logs = _reduced(totals), _reduced(parts)
    counts = [min(k, int(h.sum())) for h, k in zip(high, wanted, strict=True)]
    bins = [bin_of_kth(h, k) if k else (HIGH, 0) for h, k in zip(high, counts, strict=True)]
    low = _reduced(
        [sum((low_histogram(s, b) for s in blocks), _zeros(blocks, LOW)) for blocks, (b, _) in zip(groups, bins, strict=True)]
    )
    thresholds: list[tuple[int, int]] = []
    for histogram, (b, above), k in zip(low, bins, counts, strict=True):
        if k:
            lower, above_low = bin_of_kth(histogram, k - above)
            thresholds.append(((b << 16) | lower, k - above - above_low))
        else:
            thresholds.append((NOTHING, 0))
    return _share_ties(groups, thresholds, logs)


def _share_ties(groups: Sequence[Sequence[Tensor]], thresholds: list[tuple[int, int]], logs: Tensor) -> list[list[Chosen]]:
    """Deals the ties of each threshold to blocks and ranks in index order."""
    pairs = [(s, t, n) for blocks, (t, n) in zip(groups, thresholds, strict=True) for s in blocks]
    local = torch.tensor([int((score_bits(s) == t).sum()) if n else 0 for s, t, n in pairs], dtype=torch.int64)
    everywhere = _gathered(local)
    of_groups: list[list[Chosen]] = []
    position = 0
    for blocks, (threshold, left) in zip(groups, thresholds, strict=True):
        chosen = []
        value = float(torch.tensor(threshold, dtype=torch.int32).view(torch.float32)) if threshold < NOTHING else None
        for _ in blocks:
            counts = everywhere[:, position]
            before, equal = int(counts[: rank()].sum()), int(counts[rank()])
            chosen.append(Chosen(threshold, max(0, min(equal, left - before)), equal, value, logs[position]))
            left = max(0, left - int(counts.sum()))
            position += 1
        of_groups.append(chosen)
    return of_groups


def _zeros(blocks: Sequence[Tensor], bins: int) -> Tensor:
    return torch.zeros(bins, dtype=torch.int64, device=blocks[0].device)


def _reduced(histograms: list[Tensor]) -> Tensor:
    """[groups, bins] on the CPU, summed over ranks."""
    return all_reduce_sum(torch.stack([h.to(collective_device()) for h in histograms])).cpu()


def _gathered(local: Tensor) -> Tensor:
    """[ranks, k] on the CPU."""
    if world_size() == 1:
        return local.unsqueeze(0)
    local = local.to(collective_device())
    of_ranks = [torch.empty_like(local) for _ in range(world_size())]
    dist.all_gather(of_ranks, local)
    return torch.stack(of_ranks).cpu()


def gather_packed(packed: Tensor, m: int, most: int, writer: int) -> Tensor | None:
    """All rows [m, k] of a packed mask on rank ``writer`` (None elsewhere), from blocks of at most ``most`` rows."""
    if world_size() == 1:
        return packed
    padded = packed.new_zeros(most, packed.shape[1], device=collective_device())
    padded[: packed.shape[0]] = packed
    of_ranks = [torch.empty_like(padded) for _ in range(world_size())] if rank() == writer else None
    dist.gather(padded, of_ranks, dst=writer)
    return torch.cat(of_ranks)[:m].cpu() if of_ranks is not None else None
