"""Where bases are placed, what that costs, and what moving shards or bases sends. Exactness: tests/test_masked_step.py."""

from __future__ import annotations

import gc
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_method_products import Counted
from torch.utils._python_dispatch import TorchDispatchMode

from warp_ds.cluster import processes
from warp_ds.method.products import Products
from warp_ds.method.rotation import Rotation
from warp_ds.method.two_sided import TwoSided
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.partition import RowPartition
from warp_ds.zero.placement_costs import FP32, GPU, Cost, Dtypes, Machine
from warp_ds.zero.placements import CLASSES, BasisShard, Owner, Placement, Replicated, place_bases, predict_costs
from warp_ds.zero.protected_layer import ProtectedLayer
from warp_ds.zero.whole_layers import WholeLayers

BF16 = Dtypes(torch.bfloat16, torch.bfloat16)
LAYERS = [TargetLayer(f"layers.{i}.down", i, "ffn_down", 8, 32) for i in range(6)]


def own_bases(nbytes: int) -> dict[str, tuple[str, int]]:
    return {layer.name: (f"file {layer.layer}", nbytes) for layer in LAYERS}


def owners_of(*asked: Any) -> dict[str, int]:
    placement, _ = place_bases(*asked)
    assert isinstance(placement, Owner)
    return placement.owners


def test_small_bases_are_replicated_and_large_ones_get_owners() -> None:
    state = 12 * 8 * 32 // 2  # of a layer, on each of two ranks
    assert place_bases("auto", LAYERS, own_bases(state), 2)[0].name == "replicated"
    assert set(owners_of("auto", LAYERS, own_bases(state + 1), 2).values()) == {0, 1}
    assert place_bases("replicated", LAYERS, own_bases(10**9), 2)[0].name == "replicated"
    assert place_bases("owner", LAYERS, own_bases(1), 1)[0].name == "replicated", "one rank has them all anyway"
    with pytest.raises(ValueError, match="auto, replicated, sharded, owner"):
        place_bases("owners", LAYERS, own_bases(1), 2)


def test_owners_are_balanced_and_neighbours_differ() -> None:
    owners = list(owners_of("owner", LAYERS, own_bases(4 * 32 * 32), 3).values())
    assert sorted(owners) == [0, 0, 1, 1, 2, 2]
    assert all(len(set(owners[i : i + 3])) == 3 for i in range(4))


def test_a_shared_basis_has_one_owner_that_is_charged_for_all_its_layers() -> None:
    layers = [TargetLayer(f"{i}.{kind}", i, f"attn_{kind}", 8, 8) for i in range(2) for kind in "qkv"]
    layers += [TargetLayer(f"{i}.down", i, "ffn_down", 8, 8) for i in range(3)]
    bases = {x.name: (f"{x.layer} {'attn' if x.type != 'ffn_down' else 'down'}", 256) for x in layers}
    owners = owners_of("owner", layers, bases, 2)
    assert owners["0 attn"] != owners["1 attn"] and sorted(owners[f"{i} down"] for i in range(3)) in ([0, 0, 1], [0, 1, 1])


def test_costs_are_the_arithmetic_of_the_sizes() -> None:
    """By hand, on two ranks. q and k share a basis, which is gathered once for both; down's owner has most to rotate."""
    layers = [TargetLayer("q", 0, "attn_q", 4, 6), TargetLayer("k", 0, "attn_k", 2, 6)]
    layers.append(TargetLayer("down", 0, "ffn_down", 6, 8))
    bases = {"q": ("attn", 144), "k": ("attn", 144), "down": ("down", 256)}
    assert predict_costs(layers, bases, 2) == {
        "replicated": Cost(0, 144 + 256, 2 * (4 * 36 + 2 * 36 + 6 * 64) / 2),
        "sharded": Cost(2 * (72 + 128), 72 + 128 + 2 * 256, 600, ahead=True),
        "owner": Cost(2 * 4 * (12 + 6 + 24), 256 + 2 * 4 * 48, 2 * 6 * 64),
    }
    # Of a 3 x 5 layer on two ranks, row 1 is cut: both rotate it, and a ring's all-reduce sends it once in each direction.
    cut = predict_costs([TargetLayer("odd", 0, "ffn_down", 3, 5)], {"odd": ("odd", 100)}, 2)
    assert cut["replicated"] == Cost(2 * 2 * 20 / 2, 100, 2 * (1.5 + 1) * 25)
    assert cut["sharded"].sent == 40 + 2 * 4 * 13, "25 elements in two pieces of 13"


def test_what_bf16_saves_is_counted() -> None:
    """The layers above, q and k's basis dense (4 · 6² bytes), down's of reflectors. C goes to its owner in fp32."""
    layers = [TargetLayer("q", 0, "attn_q", 4, 6), TargetLayer("k", 0, "attn_k", 2, 6)]
    layers.append(TargetLayer("down", 0, "ffn_down", 6, 8))
    bases = {"q": ("attn", 144), "k": ("attn", 144), "down": ("down", 200)}
    found = predict_costs(layers, bases, 2, BF16)
    # A gradient there and back, C, and W back.
    assert found["owner"].sent == max((2 + 4) * 24 + (2 + 2) * 18, (2 + 4) * 18 + (2 + 2) * 24)
    assert found["owner"].by_bf16 == 6 * 50 / 2 and found["owner"].multiply_adds == 2 * 6 * 50
    assert found["replicated"].by_bf16 == found["sharded"].by_bf16 == (6 * 36 + 6 * 50 / 2) / 2
    assert predict_costs(layers, bases, 2, Dtypes(weights=torch.bfloat16))["owner"].by_bf16 == 0, "fp32 gradients take three"
    cut = predict_costs([TargetLayer("odd", 0, "ffn_down", 3, 5)], {"odd": ("odd", 100)}, 2, BF16)["replicated"]
    assert cut == Cost((10 + 20), 100, 2 * (1.5 + 1) * 25, by_bf16=(1.5 + 1) * 25), "row 1 of a gradient, and of C"
    assert cut.seconds(Machine(1, 1e9, False)) - cut.seconds(Machine(1, 1e9, False, splits=True)) == pytest.approx(62.5 / 3)


def test_ahead_of_use_hides_what_is_sent_where_that_overlaps() -> None:
    cost = Cost(sent=30, held=0, multiply_adds=4, ahead=True)
    assert cost.seconds(Machine(2, 10, overlaps=True)) == 3
    assert cost.seconds(Machine(2, 10, overlaps=False)) == Cost(30, 0, 4).seconds(Machine(2, 10, overlaps=True)) == 5


def test_the_fastest_that_fits_is_chosen() -> None:
    """Six dense bases of 4096 bytes on two ranks: 24,576 bytes replicated, 20,480 sharded, 14,336 at owners."""
    bases = own_bases(4 * 32 * 32)

    def chosen(memory: float, machine: Machine = GPU) -> str:
        return place_bases("auto", LAYERS, bases, 2, machine, memory)[0].name

    slow = Machine(1e6, 1e6, overlaps=True)
    assert chosen(24576) == "replicated", "sends nothing"
    assert chosen(24575) == "owner", "sends a quarter of what gathering does"
    assert chosen(24575, slow) == "sharded", "hides what it sends"
    assert chosen(24575, Machine(1e6, 1e6, overlaps=False)) == chosen(20479, slow) == "owner"
    assert chosen(1) == "owner", "holds least"
    placed, why = place_bases("sharded", LAYERS, bases, 2)
    assert placed.name == "sharded" and why.startswith("as asked")
    assert all(name in why for name in ("replicated", "sharded", "owner"))
    assert {placed.readers(key) for key in placed.sizes} == {range(2)}, "all read what all keep a piece of"


def make_layers(
    name: str, m: int, n: int, r: int, count: int, dtypes: Dtypes = FP32
) -> tuple[Placement, list[ProtectedLayer], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Layers of which each second one shares the basis of the one before, their shards of W, and C = W U in fp64."""
    rank, ranks = processes.rank(), processes.world_size()
    generator = torch.Generator().manual_seed(3)
    targets = [TargetLayer(f"layer {i}", i, "ffn_down", m, n) for i in range(count)]
    bases = {x.name: (f"basis {x.layer // 2}", Rotation.held_bytes(n, r)) for x in targets}
    placement = {each.name: each for each in CLASSES}[name](targets, bases, ranks, rank, dtypes)
    layers, weights, expected = [], {}, {}
    for i, target in enumerate(targets):
        if i % 2 == 0:
            rotation = Rotation(torch.linalg.qr(torch.randn(n, r, generator=generator))[0], n)
            placement.keep(bases[target.name][0], lambda whole=rotation: whole)
        w = torch.randn(m, n, generator=generator).to(dtypes.gradients).float()
        part = RowPartition(m, n, ranks, rank)
        none = torch.zeros(0, 1, dtype=torch.uint8)
        param = torch.nn.Parameter(torch.empty(0))
        layers.append(ProtectedLayer(target, param, bases[target.name][0], part, none, none, 0, torch.device("cpu")))
        weights[target.name] = w.flatten()[part.start : part.stop]
        expected[target.name] = rotation.rotate(w).double().flatten()
    return placement, layers, weights, expected


def rotate_all(name: str, m: int, n: int, r: int, dtypes: Dtypes = FP32) -> tuple[float, int, int]:
    """Largest error against the whole product; bytes sent by this rank; bytes that arithmetic expects of it. Of gradients of
    a dtype: of their rotation alone, and beyond the rounding of what an owner sends back."""
    rank, ranks = processes.rank(), processes.world_size()
    placement, layers, weights, expected = make_layers(name, m, n, r, 6, dtypes)
    worst, size = 0.0, dtypes.gradients.itemsize
    rounding = torch.finfo(dtypes.gradients).eps / 2 if name == "owner" else 0.0
    shares = {key: w.to(dtypes.gradients) for key, w in weights.items()}
    for layer, c in placement.rotate(layers, lambda layer: shares[layer.target.name], fast=size < 4):
        part, target = layer.partition, expected[layer.target.name]
        assert c.dtype == torch.float32
        error = (c.double() - target[part.start : part.stop]).abs() - rounding * target[part.start : part.stop].abs()
        worst = max([worst, *error.tolist()])
    part = layers[0].partition
    joined = 2 * size * 6 * n * len(part.cut_rows) * (ranks - 1) // ranks
    owned = sum(placement.owners[layer.basis] == rank for layer in layers) if isinstance(placement, Owner) else 0
    elements = n * n if 2 * r >= n else 2 * n * r + r
    arithmetic = {
        "replicated": joined,
        "owner": size * ((6 - owned) * part.shares[rank] + owned * (m * n - part.shares[rank])),
        "sharded": joined + 3 * (ranks - 1) * 4 * -(-elements // ranks),
    }
    dist.barrier()
    sent = placement.sent
    if size < 4:
        # And a step's other half: C in fp32, of which W is sent back as it is rounded.
        for _, again in placement.rotate_back(layers, lambda layer: weights[layer.target.name], fast=True):
            assert again.dtype == torch.float32
            assert name != "owner" or torch.equal(again, again.to(dtypes.weights).float())
        whole = max(processes.all_gather_object(placement.sent))
        assert -2 < whole - placement.cost().sent <= 0, (name, whole, placement.cost())  # two all-reduces, rounded down
        dist.barrier()
    return worst, sent, arithmetic[name]


def rotate_each() -> dict[str, tuple[float, int, int]]:
    """5 x 7 is cut within rows by two, three and four ranks; of 2 columns' reflectors, one piece in four is padded."""
    return {
        f"{placement}, r = {r}, {dtypes.gradients}": rotate_all(placement, 5, 7, r, dtypes)
        for placement in ("replicated", "sharded", "owner")
        for r in (7, 2)
        for dtypes in (FP32, BF16)
    }


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_shards_are_rotated_and_what_is_sent_is_counted(world_size: int) -> None:
    for of_rank in run_ranks(world_size, rotate_each):
        for worst, sent, expected in of_rank.values():
            assert worst < 1e-5, of_rank
            assert sent == expected, of_rank


@pytest.mark.parametrize(
    ("q", "r", "of_bf16", "multiply_adds"),
    [
        (20, 24, 2 + 3, 24 * 20 * 20),
        (3, 24, 5 + 3, 24 * (2 * 20 * 3 + 3) / 2),
        (0, 24, 2, 20 * 24 * 24),
        (20, 4, 2 + 6, 24 * 20 * 20),
    ],
)
def test_of_both_sides_only_the_first_meets_a_bf16_gradient(q: int, r: int, of_bf16: int, multiply_adds: float) -> None:
    """Of V with q columns of 20 (0: none) and U with r of 24, dense or as reflectors: Vᵀ G is fp32."""
    m, n = 20, 24
    target = TargetLayer("down", 0, "ffn_down", m, n)
    left, right = (Rotation(torch.linalg.qr(torch.randn(size, k))[0] if k else None, size) for size, k in ((m, q), (n, r)))
    bases = {"down": ("down", left.nbytes + right.nbytes)}
    param, none = torch.nn.Parameter(torch.empty(0, dtype=torch.bfloat16)), torch.zeros(0, 1, dtype=torch.uint8)
    layer = ProtectedLayer(target, param, "down", RowPartition(m, n, 1, 0), none, none, 0, torch.device("cpu"))
    g, counts = torch.randn(m * n).bfloat16(), []
    for dtypes in (BF16, Dtypes(weights=torch.bfloat16)):
        placement = WholeLayers([target], bases, 1, dtypes=dtypes, left={"down": left.nbytes}, right={"down": "file"})
        placement.products = "split"
        placement.keep("down", lambda: TwoSided(left, right))
        with Counted() as counted:
            ((_, found),) = placement.rotate([layer], lambda _: g, fast=True)
        counts.append(counted.count)
        assert placement.cost().by_bf16 == (multiply_adds if dtypes == BF16 else 0)
    exact = TwoSided(left, right).rotate(g.float().view(m, n)).flatten()
    assert found.dtype == torch.float32 and torch.allclose(found, exact, atol=1e-3)
    assert counts == [of_bf16, of_bf16 + 1]


#: Whole bases alive when each of three is gathered, and at each of six layers' rotations, of which two at a time share one.
AT_GATHER, AT_USE = [1, 2, 2], [2, 2, 2, 2, 1, 1]


def whole_bases_alive(n: int) -> tuple[list[int], list[int]]:
    placement, layers, weights, _ = make_layers("sharded", 4, n, n, len(AT_USE))
    at_gather: list[int] = []
    at_use: list[int] = []
    gather = BasisShard.gather

    def count(into: list[int], expected: list[int]) -> None:
        def now() -> int:
            found = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta and t.numel() >= n * n]
            return len({t.untyped_storage().data_ptr() for t in found})

        # Gloo's thread lets go of a buffer a moment after the work is done, when it gets Python's lock.
        deadline = time.monotonic() + 2
        while now() > expected[len(into)] and time.monotonic() < deadline:
            time.sleep(0.01)
        into.append(now())

    def counted_gather(self: BasisShard) -> tuple[torch.Tensor, Any]:
        coming = gather(self)
        count(at_gather, AT_GATHER)
        return coming

    def counted_use(rotation: Rotation, rows: torch.Tensor, products: Products) -> torch.Tensor:
        count(at_use, AT_USE)
        return rotation.rotate(rows, products)

    BasisShard.gather = counted_gather  # type: ignore[method-assign]
    try:
        for _ in placement.apply(layers, lambda layer: weights[layer.target.name], counted_use, fast=False):
            pass
    finally:
        BasisShard.gather = gather  # type: ignore[method-assign]
    return at_gather, at_use


def test_a_sharded_basis_is_gathered_while_the_one_before_is_used_and_then_dropped() -> None:
    assert run_ranks(2, whole_bases_alive, 64) == [(AT_GATHER, AT_USE)] * 2


class EmulatedTF32(TorchDispatchMode):
    """What a GPU does where torch's setting asks for TF32: its products see 10 bits of their operands' fp32 mantissas.

    Emulated, because a CPU's products stay fp32 whatever is set. ``rounded``, as libraries do, or cut off, as tensor cores
    do by themselves, which is the worse.
    """

    def __init__(self, rounded: bool) -> None:
        super().__init__()
        self.added = 1 << 12 if rounded else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        products = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        if func.overloadpacket in products and torch.backends.cuda.matmul.fp32_precision == "tf32":
            seen = (((t.contiguous().view(torch.int32) + self.added) & -(1 << 13)).view(torch.float32) for t in args[-2:])
            args = (*args[:-2], *seen)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rounded", [True, False], ids=["rounded", "cut off"])
@pytest.mark.parametrize("r", [192, 12], ids=["dense", "reflectors"])
@pytest.mark.parametrize("apply", [Rotation.rotate, Rotation.unrotate], ids=["rotate", "unrotate"])
def test_reduced_products_err_less_than_the_rounding_of_the_weights(apply: Any, r: int, rounded: bool) -> None:
    """In Frobenius norm, over the error of rounding the exact product to the weights' dtype.

    The products' own rounding is 2^-11 (cut off, 2^-10) of each operand; bf16 rounds by 2^-8, fp16 by 2^-11, fp32 by 2^-24.
    """
    m, n = 64, 192
    placement, (layer,), weights, _ = make_layers("replicated", m, n, r, 1)
    flat = weights[layer.target.name]
    assert isinstance(placement, Replicated)
    rotation = placement.whole[layer.basis]
    columns = rotation.unrotate(torch.eye(n)).T[:, :r]
    exact = apply(Rotation(columns, n, torch.float64), flat.view(m, n).double()).flatten()
    whole = apply(rotation, flat.view(m, n)).flatten()

    def product(weights: torch.dtype, way: str = "tf32") -> torch.Tensor:
        placement.products = way
        layer_of_dtype = replace(layer, param=torch.nn.Parameter(torch.empty(0, dtype=weights)))
        with EmulatedTF32(rounded):
            return next(placement.apply([layer_of_dtype], lambda _: flat, apply, fast=True))[1]

    def error(product: torch.Tensor, weights: torch.dtype) -> float:
        return float((product - exact).norm() / (exact.to(weights) - exact).norm())

    reduced = product(torch.bfloat16)
    assert not torch.equal(reduced, whole), "nothing is emulated"
    assert error(reduced, torch.bfloat16) < 0.5
    assert error(product(torch.bfloat16, "split"), torch.bfloat16) < 0.02
    assert error(reduced, torch.float16) > 0.5, "then fp16 could have it too"
    assert torch.equal(product(torch.float16), whole) and torch.equal(product(torch.float32), whole)
