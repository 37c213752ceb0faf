"""Where bases are placed, and what moving shards to them sends. Exactness: tests/test_masked_step.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from warp_ds.artifacts import TargetLayer
from warp_ds.method.rotation import Rotation
from warp_ds.zero import runtime
from warp_ds.zero.partition import RowPartition
from warp_ds.zero.shard_rotation import ProtectedLayer, ShardRotation, place_bases

LAYERS = [TargetLayer(f"layers.{i}.down", i, "ffn_down", 8, 32) for i in range(6)]


def own_bases(nbytes: int) -> dict[str, tuple[str, int]]:
    return {layer.name: (f"file {layer.layer}", nbytes) for layer in LAYERS}


def test_small_bases_are_replicated_and_large_ones_get_owners() -> None:
    state = 12 * 8 * 32 // 2  # of a layer, on each of two ranks
    assert set(place_bases("auto", LAYERS, own_bases(state), 2).values()) == {None}
    assert set(place_bases("auto", LAYERS, own_bases(state + 1), 2).values()) == {0, 1}
    assert set(place_bases("replicated", LAYERS, own_bases(10**9), 2).values()) == {None}
    assert set(place_bases("owner", LAYERS, own_bases(1), 1).values()) == {None}, "one rank has them all anyway"
    with pytest.raises(ValueError, match="auto, replicated, owner"):
        place_bases("owners", LAYERS, own_bases(1), 2)


def test_owners_are_balanced_and_neighbours_differ() -> None:
    owners = list(place_bases("owner", LAYERS, own_bases(4 * 32 * 32), 3).values())
    assert sorted(owners) == [0, 0, 1, 1, 2, 2]
    assert all(len(set(owners[i : i + 3])) == 3 for i in range(4))


def test_a_shared_basis_has_one_owner_that_is_charged_for_all_its_layers() -> None:
    layers = [TargetLayer(f"{i}.{kind}", i, f"attn_{kind}", 8, 8) for i in range(2) for kind in "qkv"]
    layers += [TargetLayer(f"{i}.down", i, "ffn_down", 8, 8) for i in range(3)]
    bases = {x.name: (f"{x.layer} {'attn' if x.type != 'ffn_down' else 'down'}", 256) for x in layers}
    owners = place_bases("owner", layers, bases, 2)
    assert owners["0 attn"] != owners["1 attn"] and sorted(owners[f"{i} down"] for i in range(3)) in ([0, 0, 1], [0, 1, 1])


def rotate_at_owners(m: int, n: int) -> tuple[float, int, int]:
    """Largest error against the whole product; bytes sent by this rank; bytes that arithmetic expects of it."""
    rank, ranks = runtime.rank(), runtime.world_size()
    generator = torch.Generator().manual_seed(3)
    layers, weights, bases = [], {}, {}
    for i in range(3):
        u = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
        w = torch.randn(m, n, generator=generator)
        part = RowPartition(m, n, ranks, rank)
        none = torch.zeros(0, 1, dtype=torch.uint8)
        owner = i % ranks
        name = f"layer {i}"
        layers.append(ProtectedLayer(TargetLayer(name, i, "ffn_down", m, n), torch.nn.Parameter(torch.empty(0)),
                                     Rotation(u, n) if owner == rank else None, part, none, none, 0, owner))
        padded = torch.cat([w.flatten(), torch.full((part.length * ranks - m * n,), float("nan"))])
        weights[name], bases[name] = padded[rank * part.length :][: part.length], w.double() @ u.double()
    rotating, worst = ShardRotation(torch.device("cpu")), 0.0
    for layer, c in rotating(layers, lambda layer: weights[layer.target.name], Rotation.rotate):
        part = layer.partition
        real = part.stop - part.start
        expected = bases[layer.target.name].flatten()[part.start : part.stop]
        worst = max([worst, *(c[:real].double() - expected).abs().tolist()])
        assert not c[real:].any(), "padding is not 0"
    owned = sum(layer.owner == rank for layer in layers)
    length = layers[0].partition.length
    expected_bytes = 4 * length * ((3 - owned) + owned * (ranks - 1))
    dist.barrier()
    return worst, rotating.take_sent(), expected_bytes


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_shards_reach_their_owner_and_come_back(world_size: int) -> None:
    for worst, sent, expected in run_ranks(world_size, rotate_at_owners, 5, 7):
        assert worst < 1e-5
        assert sent == expected
