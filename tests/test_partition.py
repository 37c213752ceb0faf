"""Partition arithmetic against a plain cut of the flattened matrix, for every small shape and world size."""

from __future__ import annotations

import itertools

import pytest
import torch

from warp_ds.store.layers import Ranges, TargetLayer, uncovered
from warp_ds.zero.partition import RowPartition, between

SHAPES = [(1, 1), (1, 7), (2, 15), (3, 3), (2, 3), (5, 1), (15, 21), (18, 15), (4, 8), (7, 13)]
WORLDS = range(1, 10)


def pieces(matrix: torch.Tensor, world_size: int) -> list[torch.Tensor]:
    """What DeepSpeed gives each rank, padding as NaN."""
    flat = matrix.flatten()
    length = -(-flat.numel() // world_size)
    padded = torch.full((length * world_size,), float("nan"))
    padded[: flat.numel()] = flat
    return list(padded.split(length))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_fragments_are_the_whole_matrix(shape: tuple[int, int]) -> None:
    m, n = shape
    matrix = torch.arange(m * n, dtype=torch.float32).reshape(m, n)
    for world_size in WORLDS:
        found = torch.full_like(matrix, -1.0)
        for rank, local in enumerate(pieces(matrix, world_size)):
            part = RowPartition(m, n, world_size, rank)
            assert local.numel() == part.length
            assert local.isnan().sum() == part.length - (part.stop - part.start)
            rows = part.whole_rows(local)
            assert rows.shape == (len(part.rows), n)
            assert rows.data_ptr() == local[part.whole].data_ptr() or not rows.numel()
            found[part.rows.start : part.rows.stop] = rows
            covered = len(part.rows) * n
            for fragment in part.fragments:
                assert found[part.cut_rows[fragment.cut], fragment.columns].eq(-1).all(), "two ranks own an entry"
                found[part.cut_rows[fragment.cut], fragment.columns] = local[fragment.local]
                covered += fragment.local.stop - fragment.local.start
            assert covered == part.stop - part.start
        assert torch.equal(found, matrix), (shape, world_size)


def test_every_rank_knows_the_same_cut_rows() -> None:
    for (m, n), world_size in itertools.product(SHAPES, WORLDS):
        lists = [RowPartition(m, n, world_size, rank).cut_rows for rank in range(world_size)]
        assert all(rows == lists[0] == sorted(set(rows)) for rows in lists)
        owners = [
            {
                r
                for r in range(world_size)
                if RowPartition(m, n, world_size, r).start < (row + 1) * n and RowPartition(m, n, world_size, r).stop > row * n
            }
            for row in range(m)
        ]
        assert lists[0] == [row for row in range(m) if len(owners[row]) > 1], (m, n, world_size)


def test_a_rank_of_padding_owns_nothing() -> None:
    last = RowPartition(3, 3, 4, 3)
    assert (last.start, last.stop, last.length) == (9, 9, 3)
    assert len(last.rows) == 0 and last.fragments == [] and last.cut_rows == []
    assert last.whole_rows(torch.zeros(3)).shape == (0, 3)


def test_a_row_over_three_ranks() -> None:
    parts = [RowPartition(2, 15, 4, rank) for rank in range(4)]
    assert [len(p.rows) for p in parts] == [0, 0, 0, 0]
    assert [[(f.cut, f.columns.start, f.columns.stop) for f in p.fragments] for p in parts] == [
        [(0, 0, 8)],
        [(0, 8, 15), (1, 0, 1)],
        [(1, 1, 9)],
        [(1, 9, 15)],
    ]


#: Rows of a parameter of 8: one range, several (interleaved heads), ranges with gaps, all of it.
RANGES: list[Ranges] = [((0, 3),), ((5, 8),), ((0, 2), (4, 6)), ((1, 2), (3, 4), (6, 8)), ((0, 8),)]


@pytest.mark.parametrize("ranges", RANGES)
def test_some_rows_of_a_parameter(ranges: Ranges) -> None:
    for n, world_size in itertools.product((1, 3, 7), WORLDS):
        parameter = torch.arange(8 * n, dtype=torch.float32).reshape(8, n)
        matrix = torch.cat([parameter[first:end] for first, end in ranges])
        m, found = len(matrix), torch.full_like(matrix, -1.0)
        seen = []
        for rank, piece in enumerate(pieces(parameter, world_size)):
            part = RowPartition(m, n, world_size, rank, ranges, 8)
            assert piece.numel() == part.length and bool(piece[part.padding].isnan().all())
            share = part.take(piece)
            assert share.numel() == part.stop - part.start == part.shares[rank]
            assert torch.equal(share, matrix.flatten()[part.start : part.stop]), "a share is one range of the matrix"
            found[part.rows.start : part.rows.stop] = part.whole_rows(share)
            for fragment in part.fragments:
                found[part.cut_rows[fragment.cut], fragment.columns] = share[fragment.local]
            back = piece.clone()
            part.put(back, -share)
            changed = torch.zeros(part.length, dtype=torch.bool)
            for own in part.own:
                changed[own] = True
            assert torch.equal(back[changed], -share) and torch.equal(back[~changed].nan_to_num(), piece[~changed].nan_to_num())
            assert sum(s.stop - s.start for s in between(part.own, part.length)) == part.length - share.numel()
            seen.append(part.cut_rows)
        assert torch.equal(found, matrix) and all(rows == seen[0] for rows in seen), (ranges, n, world_size)


def test_what_no_layer_has() -> None:
    layers = [
        TargetLayer("qkv[attn_q]", 0, "attn_q", 4, 5, ((0, 2), (4, 6)), 9),
        TargetLayer("qkv[attn_k]", 0, "attn_k", 1, 5, ((2, 3),), 9),
        TargetLayer("up[ffn_up]", 0, "ffn_up", 2, 5, ((0, 2),), 2),
        TargetLayer("down", 0, "ffn_down", 2, 5),
    ]
    assert uncovered(layers) == {"qkv.weight": ((3, 4), (6, 9))}
