"""Dealing to ranks: everything is dealt once, and every rank has as many rounds as the others."""

from __future__ import annotations

import pytest

from warp_ds.cluster.dealing import LeastLoaded, block, evenly, in_turn
from warp_ds.data.collate import GlobalBatchSampler
from warp_ds.zero.partition import RowPartition


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7])
def test_everything_is_dealt_once(count: int, ranks: int) -> None:
    hands = [in_turn(range(count), ranks, rank, -1) for rank in range(ranks)]
    assert len({len(hand) for hand in hands}) == 1, "a rank would wait for another"
    assert [i for turn in zip(*hands, strict=True) for i in turn if i >= 0] == list(range(count))
    assert sum((hand.count(-1) for hand in hands), 0) < ranks
    for parts in (evenly(count, ranks), [block(count, ranks, rank) for rank in range(ranks)]):
        assert [i for part in parts for i in part] == list(range(count))
    assert max(map(len, evenly(count, ranks))) - min(map(len, evenly(count, ranks))) <= 1
    pieces = [RowPartition(count, 1, ranks, rank) for rank in range(ranks)]
    assert [block(count, ranks, rank) for rank in range(ranks)] == [range(piece.start, piece.stop) for piece in pieces]


def test_micro_batches_in_turn_are_those_of_training() -> None:
    for rank in range(3):
        sampler = GlobalBatchSampler(10, 3 * 2, 2, 3)
        batches = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
        assert in_turn(batches, 3, rank, [-1, -1]) == list(sampler.rank_batches(rank))


def test_the_least_loaded_is_next() -> None:
    owners = LeastLoaded(2)
    assert [owners.next(cost) for cost in (3, 1, 1, 1, 5, 1)] == [0, 1, 1, 1, 0, 1]
