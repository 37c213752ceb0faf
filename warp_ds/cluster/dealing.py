"""How samples, layers and files are dealt to ranks: arithmetic of sizes, the same on every rank; no process group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def in_turn(items: Sequence[Item], ranks: int, rank: int, empty: Item) -> list[Item]:
    """This rank's items: item i is rank i % ranks's. ``empty`` fills up, so that every rank has as many, and no collective
    waits for one that never comes."""
    filled = [*items, *[empty] * (-len(items) % ranks)]
    return filled[rank::ranks]


def evenly(count: int, ranks: int) -> list[range]:
    """For each rank a contiguous part of ``count`` in order; the first ones are longer by one where they must."""
    most, more = divmod(count, ranks)
    cuts = [r * most + min(r, more) for r in range(ranks + 1)]
    return [range(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]


def block(count: int, ranks: int, rank: int) -> range:
    """This rank's of contiguous blocks of ceil(count / ranks), as ZeRO-3 cuts parameters; the last may be short or empty."""
    most = -(-count // ranks)
    return range(min(rank * most, count), min((rank + 1) * most, count))


class LeastLoaded:
    """Deals things as they come, each to the rank with the least work so far (the lowest of equals)."""

    def __init__(self, ranks: int):
        self.load = [0.0] * ranks

    def next(self, cost: float) -> int:
        """The rank that gets a thing of ``cost``."""
        owner = self.load.index(min(self.load))
        self.load[owner] += cost
        return owner
