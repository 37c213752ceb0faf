"""The masked step against dense fp64 references, on one to four ranks, under every setting it claims to be exact in.

Tolerances: five steps of an fp32 optimizer against an fp64 one. Adam's eps is 1e-4, because at 1e-8 two right
implementations part by rounding alone (entries with gradients near zero); losses agree far closer than weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_local_fp32_param
from masked_artefacts import (
    MODELS,
    Artefacts,
    DenseAnyOptimizer,
    dense_adamw,
    loss_of,
    read_artefacts,
    reference_losses,
    token_batches,
    train_only,
    write_artefacts,
)
from ranks import run_ranks
from test_method_products import Counted

import warp_ds
from warp_ds.cluster import processes
from warp_ds.method.products import EXACT, SPLIT_ERROR, Products, matmul_precision
from warp_ds.method.rotation import Rotation
from warp_ds.store.masks import MaskStore
from warp_ds.zero.masked_step import MaskedStep, decay, weight_decay_kind
from warp_ds.zero.placements import Owner, Replicated, Sharded, predict_costs

LOSS, WEIGHT = 1e-6, 1e-5
STEPS = 5


@dataclass(frozen=True)
class Case:
    name: str
    optimizer: str = "adamw"
    model: str = "odd"
    basis: str = "activation"
    clip: float = 0.4
    decay: float = 0.1
    groups: bool = False
    """Several parameter groups: other decay and other learning rate for the norms, the layers of block 1 apart."""
    only: bool = False
    """Nothing but the masked layers trains: their mask decides the gradient norm, and whether it is clipped."""
    accumulation: int = 1
    placement: str = "replicated"
    """Of the bases: on every rank, at an owner, to which shards are sent, or sharded, and gathered ahead of use."""
    zero: dict[str, Any] = field(default_factory=dict, hash=False)
    worlds: tuple[int, ...] = (1, 2, 3, 4)
    products: str = "auto"
    """How products of bf16 weights are taken."""
    samples: int = 12
    """Of a global batch: a number of times the world size."""


LARGE = 10**9
CASES = [
    Case("plain", zero={"stage3_param_persistence_threshold": 0}),
    Case("persistent", zero={"stage3_param_persistence_threshold": LARGE}),
    Case("some persistent", zero={"stage3_param_persistence_threshold": 100}, worlds=(2,)),
    Case("identity basis", basis="identity", worlds=(2, 3)),
    Case("a rank of padding", model="nano", clip=0.15, worlds=(4,)),
    Case("a rank of padding, offloaded", model="nano", clip=0.15, worlds=(4,), zero={"offload_optimizer": {"device": "cpu"}}),
    Case("accumulation", accumulation=3, worlds=(1, 2, 4)),
    Case("accumulation of two", accumulation=2, worlds=(3,)),
    Case("only masked layers", only=True, clip=0.005),
    Case(
        "only masked layers, offloaded",
        only=True,
        clip=0.005,
        worlds=(1, 2),
        zero={"offload_optimizer": {"device": "cpu"}, "sub_group_size": 100},
    ),
    *(
        case
        for where, placement in {"bases at owners": "owner", "sharded bases": "sharded"}.items()
        for case in (
            Case(where, placement=placement),
            Case(
                f"{where}, sub-groups and groups",
                placement=placement,
                groups=True,
                worlds=(2, 3),
                zero={"sub_group_size": 100, "stage3_param_persistence_threshold": LARGE},
            ),
            Case(
                f"{where}, offloaded",
                placement=placement,
                worlds=(2, 4),
                accumulation=3,
                zero={"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
            ),
            Case(f"{where}, a rank of padding", placement=placement, model="nano", clip=0.15, worlds=(4,)),
            Case(f"{where}, identity basis", placement=placement, basis="identity", worlds=(2,)),
        )
    ),
    Case("no clipping", clip=0.0, worlds=(1, 3)),
    Case("no decay", decay=0.0, worlds=(2,)),
    Case("sub-groups", zero={"sub_group_size": 100}),
    Case("parameter groups", groups=True),
    Case(
        "parameter groups and sub-groups",
        groups=True,
        worlds=(2,),
        accumulation=2,
        zero={"sub_group_size": 100, "stage3_param_persistence_threshold": 0},
    ),
    Case("optimizer on the CPU", zero={"offload_optimizer": {"device": "cpu", "pin_memory": False}}),
    Case(
        "optimizer on the CPU, accumulation",
        accumulation=3,
        groups=True,
        worlds=(2,),
        zero={"offload_optimizer": {"device": "cpu"}, "sub_group_size": 100},
    ),
    Case(
        "parameters on the CPU",
        worlds=(1, 2),
        zero={"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}},
    ),
    Case("small buckets, no overlap", worlds=(2, 3), zero={"reduce_bucket_size": 64, "overlap_comm": False}),
    Case("all-reduce for reduce-scatter", worlds=(3,), zero={"reduce_scatter": False}),
    Case("adam", optimizer="adam", worlds=(1, 2, 3)),
    Case("adam with decoupled decay", optimizer="adam decoupled", worlds=(2,)),
    Case("sgd", optimizer="sgd", worlds=(1, 3)),
    Case("sgd, groups", optimizer="sgd", groups=True, worlds=(2,), zero={"sub_group_size": 100}),
    Case("cpu adam", optimizer="cpu adam", worlds=(1, 2)),
    Case("cpu adam, coupled decay", optimizer="cpu adam coupled", groups=True, worlds=(2,)),
    Case(
        "cpu adam, offloaded",
        optimizer="cpu adam",
        worlds=(2, 3),
        groups=True,
        zero={"offload_optimizer": {"device": "cpu"}, "sub_group_size": 100},
    ),
    Case(
        "cpu adam, partly offloaded",
        optimizer="cpu adam",
        worlds=(2,),
        groups=True,
        zero={"offload_optimizer": {"device": "cpu", "ratio": 0.4}, "sub_group_size": 100},
    ),
]


def make_optimizer(kind: str, groups: list[dict[str, Any]], dense: bool = False) -> Any:
    """For the engine, or (``dense``) the one of torch that does the same for the reference."""
    adam: dict[str, Any] = dict(lr=1e-2, eps=1e-4)
    if kind.startswith("fused adam"):
        if dense:
            return make_optimizer(kind.replace("fused adam", "cpu adam"), groups, dense)
        return deepspeed.ops.adam.FusedAdam(groups, adam_w_mode="coupled" not in kind, **adam)
    if kind.startswith("cpu adam") and not dense:
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode="coupled" not in kind, **adam)
    if kind in ("adamw", "adam decoupled", "cpu adam"):
        if kind == "adam decoupled":
            return torch.optim.Adam(groups, decoupled_weight_decay=True, **adam)
        return torch.optim.AdamW(groups, **adam)
    if kind in ("adam", "cpu adam coupled"):
        return torch.optim.Adam(groups, **adam)
    if kind == "sgd plain":
        return torch.optim.SGD(groups, lr=0.1)
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)


def hyperparameters(case: Case, names: list[str]) -> tuple[dict[str, float], dict[str, float] | None]:
    """Weight decay and, with groups, learning rate of each parameter."""
    if not case.groups:
        return dict.fromkeys(names, case.decay), None
    base = {"sgd": 0.1}.get(case.optimizer, 1e-2)
    decay = {k: 0.0 if "norm" in k else 2 * case.decay if ".1." in k else case.decay for k in names}
    return decay, {k: base / 2 if ".1." in k else base for k in names}


@functools.cache
def reference(
    root: Path, optimizer: str, model: str, basis: str, clip: float, decay: float, groups: bool, only: bool, samples: int
) -> Any:
    """Losses, and the optimizer that holds the trained weights; one for all cases that differ in ZeRO-3 settings alone."""
    case = Case("reference", optimizer, model, basis, clip, decay, groups, only)
    dense = MODELS[model]()
    artefacts = read_artefacts(root / model / basis)
    if only:
        train_only(dense, artefacts.frozen)
    named = {k: p.detach().clone() for k, p in dense.named_parameters() if p.requires_grad}
    decays, lr = hyperparameters(case, list(named))
    if optimizer == "adamw" and not groups:
        chosen: Any = dense_adamw(dense, artefacts, clip, decays)
    else:
        chosen = DenseAnyOptimizer(named, artefacts, lambda g: make_optimizer(optimizer, g, dense=True), decays, clip, lr)
    return reference_losses(dense, token_batches(STEPS, samples), chosen), chosen


def reference_of(case: Case, root: Path) -> Any:
    settings = case.optimizer, case.model, case.basis, case.clip, case.decay, case.groups, case.only, case.samples
    return reference(root, *settings)


def make_engine(case: Case, dtype: torch.dtype = torch.float32, trained: Iterable[str] | None = None, **config: Any) -> Any:
    """``trained`` are the names of the parameters that train; None for all."""
    model = MODELS[case.model](dtype)
    if trained is not None:
        train_only(model, trained)
    parameters = {k: p for k, p in model.named_parameters() if p.requires_grad}
    decay, lr = hyperparameters(case, list(parameters))
    groups: dict[Any, dict[str, Any]] = {}
    for k, p in parameters.items():
        options = {"weight_decay": decay[k], **({"lr": lr[k]} if lr else {})}
        groups.setdefault(tuple(options.items()), {"params": [], **options})["params"].append(p)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make_optimizer(case.optimizer, list(groups.values())),
        config={
            "train_micro_batch_size_per_gpu": case.samples // processes.world_size() // case.accumulation,
            "gradient_accumulation_steps": case.accumulation,
            "gradient_clipping": case.clip,
            "zero_optimization": {
                "stage": 3,
                "stage3_param_persistence_threshold": 0,
                "stage3_gather_16bit_weights_on_model_save": True,
                **case.zero,
            },
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": dtype == torch.bfloat16},
            **config,
        },
    )
    return engine


def protect(engine: Any, artefacts: Artefacts, placement: str = "auto", products: str = "auto") -> MaskedStep:
    # The masks name their basis.
    protection = warp_ds.protect(engine, None, artefacts.masks, basis_placement=placement, products=products)
    assert isinstance(protection, MaskedStep)
    return protection


def train_step(engine: Any, batch: torch.Tensor, accumulation: int = 1) -> float:
    """One optimizer step on this rank's share of a global batch; the loss of the whole batch."""
    mine = batch.chunk(processes.world_size())[processes.rank()].to(engine.device)
    total = torch.zeros(1, dtype=torch.float64, device=processes.collective_device())
    for micro in mine.chunk(accumulation):
        loss = loss_of(engine, micro)
        engine.backward(loss)
        engine.step()
        total += (loss.detach().double() / accumulation).to(total.device)
    return float(processes.all_reduce_sum(total)) / processes.world_size()


def masters(protection: MaskedStep) -> list[torch.Tensor]:
    return [safe_get_local_fp32_param(layer.param).clone() for layer in protection.layers]


def frozen_moved(protection: MaskedStep, before: list[torch.Tensor]) -> int:
    """Frozen coefficients of all ranks of which a bit changed."""
    moved = torch.zeros(1, device=processes.collective_device())
    for layer, old in zip(protection.layers, before, strict=True):
        new = safe_get_local_fp32_param(layer.param)
        for piece, frozen in layer.frozen_pieces(new.device):
            moved += (new[piece].view(torch.int32) != old[piece].view(torch.int32))[frozen].sum()
    return int(processes.all_reduce_sum(moved))


def weight_error(engine: Any, weights: dict[str, torch.Tensor]) -> float:
    worst = 0.0
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            with deepspeed.zero.GatheredParameters([param]):
                worst = max(worst, (param.double().cpu() - weights[name]).abs().max().item())
    return worst


def unforeseen_bytes(case: Case, artefacts: Artefacts, protection: MaskedStep, sent: int) -> float:
    """What this and other ranks ``sent`` a step, at most, less what is predicted; 0 but for bytes that are rounded down."""
    masks = MaskStore(artefacts.masks)
    basis = masks.find_basis()
    bases = {layer.name: ("identity", 0) if basis is None else basis.held(layer.name) for layer in masks.layers}
    placement = "replicated" if basis is None else case.placement
    error = max(processes.all_gather_object(sent)) - predict_costs(masks.layers, bases, processes.world_size())[placement].sent
    # An all-reduce's share of a rank is no whole number of bytes on three ranks: two a sub-group and step.
    return 0.0 if -2 * len(protection.driver.units) < error <= 0 and processes.world_size() == 3 else error


def run_case(case: Case, root: Path) -> dict[str, float]:
    losses, dense = reference_of(case, root)
    artefacts = read_artefacts(root / case.model / case.basis)
    engine = make_engine(case, trained=artefacts.frozen if case.only else None)
    protection = protect(engine, artefacts, case.placement)
    if case.placement == "owner" and case.basis != "identity" and processes.world_size() > 1:
        placement = protection.placement
        assert isinstance(placement, Owner)
        assert set(placement.own) == {key for key, owner in placement.owners.items() if owner == processes.rank()}
        assert len(set(placement.owners.values())) > 1, "one rank owns every basis"
    if case.placement == "sharded" and case.basis != "identity" and processes.world_size() > 1:
        assert isinstance(protection.placement, Sharded)
        assert all(layer.basis in protection.placement.pieces for layer in protection.layers)
    before = masters(protection)
    found = [train_step(engine, batch, case.accumulation) for batch in token_batches(STEPS, case.samples)]
    metrics = protection.metrics()
    result = {
        "loss": max(abs(a - b) for a, b in zip(found, losses, strict=True)),
        "weights": weight_error(engine, dense.weights()),
        "moved": frozen_moved(protection, before),
        "norm": abs(float(engine.get_global_grad_norm()) / dense.norm - 1),
        "clipped": dense.norm / case.clip if case.clip else 0.0,
        "removed": abs(metrics.grad_norm_removed - dense.removed),
        "share": abs(
            metrics.masked_fraction
            - sum(int(f.sum()) for f in dense.frozen.values()) / sum(f.numel() for f in dense.frozen.values())
        ),
        "trained": weight_error(engine, dict(MODELS[case.model]().named_parameters())),
        "bytes": unforeseen_bytes(case, artefacts, protection, metrics.rotate_bytes),
    }
    engine.destroy()
    return result


# ---------------------------------------------------------------- bf16, and steps that are skipped


REPLAYED = {
    # bf16 weights. The gradient a rank steps with is kept in grad_accum_dtype: rotated in fp32, it stays fp32 with the
    # first. With DeepSpeed's default it is rotated as it is, bf16, and rounded to that once more, as every micro-batch's sum
    # is: a relative 2^-9 of a gradient, of which Adam makes at most lr * 2^-8 a step.
    "fp32 accumulation": ({"data_types": {"grad_accum_dtype": "fp32"}}, 2e-6),
    "bf16 accumulation": ({}, STEPS * 1e-2 * 2.0**-8),
    # Three products of bf16 parts, of which a gradient is off by 3 * 2^-16 (``method.products``).
    "split products": ({"data_types": {"grad_accum_dtype": "fp32"}}, 2e-6 + STEPS * 1e-2 * SPLIT_ERROR),
}


def dense_of(case: Case, named: dict[str, torch.Tensor], artefacts: Artefacts) -> Any:
    decay, lr = hyperparameters(case, list(named))
    return DenseAnyOptimizer(named, artefacts, lambda g: make_optimizer(case.optimizer, g, dense=True), decay, case.clip, lr)


def run_replay(
    case: Case,
    dtype: torch.dtype,
    config: dict[str, Any],
    root: Path,
    steps: int = STEPS,
    dense_of: Callable[..., Any] = dense_of,
) -> dict[str, float]:
    """The dense reference is given the very gradients of a run, so that what is compared is the step alone.

    A step that DeepSpeed skips for an overflow is skipped by the reference, and counted.
    """
    artefacts = read_artefacts(root)
    engine = make_engine(case, dtype, **config)
    protection = protect(engine, artefacts, case.placement, case.products)
    params = dict(engine.module.named_parameters())
    start = masters(protection)
    dense = dense_of(case, {k: p.detach().clone().float() for k, p in MODELS["odd"](dtype).named_parameters()}, artefacts)
    gradients: dict[str, torch.Tensor] = {}
    inner = engine.optimizer._get_norm_groups

    def record() -> Any:
        for name, param in params.items():
            gradients[name] = safe_get_full_grad(param).to("cpu", copy=True) / engine.optimizer.loss_scale
        return inner()

    engine.optimizer._get_norm_groups = record
    skipped = 0
    for batch in token_batches(steps):
        before = masters(protection)
        train_step(engine, batch, case.accumulation)
        if engine.optimizer.overflow:
            skipped += 1
            assert all(torch.equal(x, y) for x, y in zip(before, masters(protection), strict=True))
        else:
            dense.step(gradients)
    masters_error = max(
        (safe_get_full_fp32_param(param).double().cpu() - dense.value[name]).abs().max().item()
        for name, param in params.items()
    )
    sent = max(processes.all_gather_object(protection.metrics().rotate_bytes))
    shards_differ = 0
    for sub_group in protection.driver.units:
        shards = [layer.param.ds_tensor.clone() for layer in protection.driver.units[sub_group]]
        protection.write_weights(sub_group)
        shards_differ += sum(
            int((shard != layer.param.ds_tensor).sum())
            for shard, layer in zip(shards, protection.driver.units[sub_group], strict=True)
        )
    half_ulp = torch.finfo(dtype).eps / 4
    result = {
        "unforeseen": sent - protection.placement.cost().sent,
        "gradients": protection.placement.dtypes.gradients.itemsize,
        "masters": masters_error,
        "moved": frozen_moved(protection, start),
        "shards": shards_differ,
        "skipped": skipped,
        "norm": abs(float(engine.get_global_grad_norm()) / dense.norm - 1),
        # What the model trains on is C Uᵀ rounded once: what is more comes of the masters.
        "weights": max(
            ((p.double() - dense.weights()[name]).abs() - 2 * half_ulp * dense.weights()[name].abs()).max().item()
            for name, p in gathered(engine).items()
        ),
    }
    engine.destroy()
    return result


def gathered(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter, whole, on every rank."""
    found = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param]):
            found[name] = param.detach().to("cpu", copy=True)
    return found


@functools.cache
def replays(world_size: int, root: Path) -> dict[str, Any]:
    zeros = {
        "resident": ({"stage3_param_persistence_threshold": LARGE}, 1),
        "offloaded": ({"offload_optimizer": {"device": "cpu"}, "sub_group_size": 100}, 2),
    }
    jobs = [
        (
            f"{kind}, {place}",
            run_replay,
            (
                Case(
                    "bf16",
                    groups=True,
                    accumulation=accumulation,
                    zero=zero,
                    placement="owner" if place == "offloaded" else "replicated",
                    products="split" if kind == "split products" else "auto",
                ),
                torch.bfloat16,
                config,
                root / "odd" / "activation",
            ),
        )
        for kind, (config, _) in REPLAYED.items()
        for place, (zero, accumulation) in zeros.items()
    ]
    # In bf16 through the other placements, with products that tell bf16 from fp32.
    jobs += [
        (
            f"bf16 accumulation, {placement}",
            run_replay,
            (Case("bf16", groups=True, placement=placement, products="split"), torch.bfloat16, {}, root / "odd" / "activation"),
        )
        for placement in ("owner", "sharded")
    ]
    # Last, as it stays on for every later engine of a process.
    jobs.append(
        (
            "autocast",
            run_replay,
            (
                Case("autocast", groups=True, zero={"sub_group_size": 100}),
                torch.float32,
                {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
                root / "odd" / "activation",
            ),
        )
    )
    return run_ranks(world_size, run_all, jobs)[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "place"),
    [*((kind, place) for kind in REPLAYED for place in ("resident", "offloaded"))]
    + [("bf16 accumulation", "owner"), ("bf16 accumulation", "sharded")],
)
def test_bf16_steps_as_the_reference_does_with_the_same_gradients(
    artefacts_root: Path, world_size: int, kind: str, place: str
) -> None:
    found = replays(world_size, artefacts_root)[f"{kind}, {place}"]
    assert found["moved"] == 0, found
    assert found["masters"] < REPLAYED[kind][1], found
    assert found["shards"] == 0 and found["weights"] < 2 * REPLAYED[kind][1], found
    assert found["norm"] < (2.0**-8 if kind == "bf16 accumulation" else 1e-5), found
    # An offloaded optimizer's are fp32 copies of the sums.
    assert found["gradients"] == (2 if kind == "bf16 accumulation" and place != "offloaded" else 4), found
    # An all-reduce's share of a rank is no whole number of bytes on three ranks: two a sub-group and step.
    assert -20 < found["unforeseen"] <= 0 if world_size == 3 else found["unforeseen"] == 0, found


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bf16_autocast_steps_as_the_reference_does_with_the_same_gradients(artefacts_root: Path, world_size: int) -> None:
    """fp32 weights, of which the linear layers' gradients are reduced in bf16; the step is an fp32 one."""
    found = replays(world_size, artefacts_root)["autocast"]
    assert found["moved"] == 0 and found["shards"] == 0, found
    assert found["masters"] < 2e-6 and found["weights"] < 4e-6 and found["norm"] < 1e-5, found


def run_overflow(zero: dict[str, Any], root: Path) -> dict[str, float]:
    """A step whose gradient is not finite is skipped by DeepSpeed: nothing changes, and the next ones are exact."""
    case = Case("overflow", zero=zero)
    losses, dense = reference_of(case, root)
    engine = make_engine(case)
    protection = protect(engine, read_artefacts(root / "odd" / "activation"))
    start, found = masters(protection), []
    for step, batch in enumerate(token_batches(STEPS)):
        if step == 2:
            before, weights = masters(protection), gathered(engine)
            engine.backward(loss_of(engine, batch.chunk(processes.world_size())[processes.rank()]) * float("inf"))
            engine.step()
            assert engine.optimizer.overflow
            assert all(torch.equal(x, y) for x, y in zip(before, masters(protection), strict=True))
            assert all(torch.equal(weights[k], v) for k, v in gathered(engine).items())
        found.append(train_step(engine, batch))
    result = {
        "loss": max(abs(a - b) for a, b in zip(found, losses, strict=True)),
        "weights": weight_error(engine, dense.weights()),
        "moved": frozen_moved(protection, start),
    }
    engine.destroy()
    return result


def test_a_skipped_step_changes_nothing(artefacts_root: Path) -> None:
    jobs = [
        (name, run_overflow, (zero, artefacts_root))
        for name, zero in {
            "resident": {"stage3_param_persistence_threshold": LARGE},
            "offloaded": {"offload_optimizer": {"device": "cpu"}},
        }.items()
    ]
    for name, found in run_ranks(2, run_all, jobs)[0].items():
        assert found["moved"] == 0 and found["loss"] < LOSS and found["weights"] < WEIGHT, (name, found)


# ---------------------------------------------------------------- all jobs of a number of ranks


def run_all(jobs: list[tuple[str, Callable[..., Any], tuple[Any, ...]]]) -> dict[str, Any]:
    """Each job's result by name: many checks, one process group. The first failure ends it: other ranks may hang by then."""
    found: dict[str, Any] = {}
    for name, job, args in jobs:
        try:
            found[name] = job(*args)
        except Exception as error:
            raise AssertionError(f"in {name!r} on rank {processes.rank()}") from error
    return found


def write_all(root: Path) -> Path:
    for name, make in MODELS.items():
        for basis in ("activation", "identity"):
            write_artefacts(root / name / basis, make(), {"ffn_down": 1, "attn_q": 2} if name == "nano" else None, basis=basis)
    return root


@pytest.fixture(scope="module")
def artefacts_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("artefacts"))


@pytest.fixture(scope="module")
def exact(artefacts_root: Path) -> Callable[[int], dict[str, Any]]:
    """Results of every case on a number of ranks: those ranks start once."""

    @functools.cache
    def on(world_size: int) -> dict[str, Any]:
        jobs = [(case.name, run_case, (case, artefacts_root)) for case in CASES if world_size in case.worlds]
        return run_ranks(world_size, run_all, jobs)[0]

    return on


@pytest.mark.parametrize(
    ("world_size", "case"),
    [(w, c) for w in (1, 2, 3, 4) for c in CASES if w in c.worlds],
    ids=lambda v: v.name if isinstance(v, Case) else str(v),
)
def test_equals_the_dense_reference(exact: Callable[[int], dict[str, Any]], world_size: int, case: Case) -> None:
    found = exact(world_size)[case.name]
    assert found["moved"] == 0, f"{found['moved']} frozen coefficients moved"
    assert found["loss"] < LOSS and found["weights"] < WEIGHT, found
    assert found["norm"] < 1e-5 and found["removed"] < 1e-5 and found["share"] < 1e-9, found
    assert found["clipped"] > 1 or not case.clip, "the clipping does not bind"
    assert found["bytes"] == 0, "it sends other than predicted"
    assert found["trained"] > 1e-3, "the model did not train, so the comparison means little"


# ---------------------------------------------------------------- small parts


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_matmul_precision_is_set_and_given_back(before: str) -> None:
    """Also where the newer of torch's two settings was used, as transformers' tf32 argument does."""
    backend = torch.backends.cuda.matmul
    backend.fp32_precision = before
    try:
        for inside in ("ieee", "tf32"):
            with matmul_precision(inside):
                assert backend.fp32_precision == inside
            assert backend.fp32_precision == before
    finally:
        backend.fp32_precision = "none"


def test_only_what_is_rounded_to_bf16_is_rotated_with_fewer_bits(tmp_path: Path) -> None:
    """Gradients and 16-bit shards are; masters, checkpoints and the weights given back are not."""
    write_artefacts(tmp_path / "artefacts", MODELS["odd"]())
    chosen = run_ranks(1, products_used, tmp_path / "artefacts")[0]
    counts = {driver: found.pop("products") for driver, found in chosen.items()}
    entered = {"entering": {True}, "step": {False}}
    assert chosen == {"zero3": {**entered, "saving": {True}, "releasing": {True}}, "plain": entered, "fp32": entered}
    # In C, where a basis is dense, and with reflectors (twice); then in W, of fp32 C.
    (dense, reflectors) = counts["zero3"][1:]
    assert dense and reflectors, "not both are tried"
    assert counts["zero3"][0] == counts["plain"][0] == (2 + 3) * dense + (2 + 3 + 6) * reflectors
    assert counts["fp32"][0] == (3 + 3) * dense + (3 + 3 + 6) * reflectors


def products_used(root: Path) -> dict[str, dict[str, Any]]:
    """Whether products were exact, under DeepSpeed with both dtypes of gradients and on a plain optimizer; and how many
    matrices a step multiplied, of how many layers with dense bases and with reflectors."""
    seen: set[bool] = set()
    found: dict[str, dict[str, Any]] = {"zero3": {}, "plain": {}, "fp32": {}}

    def watched(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def watching(self: Rotation, rows: torch.Tensor, taken: Products = EXACT) -> torch.Tensor:
            seen.add(taken is EXACT)
            return original(self, rows, taken)

        return watching

    Rotation.rotate, Rotation.unrotate = watched(Rotation.rotate), watched(Rotation.unrotate)  # type: ignore

    def end_of(what: str, driver: str = "zero3") -> None:
        found[driver][what] = set(seen)
        seen.clear()

    def counted(driver: str, step: Callable[[], Any], protection: MaskedStep) -> None:
        with Counted() as counting:
            step()
        assert isinstance(protection.placement, Replicated)
        rotations = [protection.placement.whole[layer.basis] for layer in protection.layers]
        dense = sum(rotation.matrix is not None for rotation in rotations)
        found[driver]["products"] = counting.count, dense, len(rotations) - dense

    for driver, config in (("fp32", {"data_types": {"grad_accum_dtype": "fp32"}}), ("zero3", {})):
        engine = make_engine(Case("bf16"), torch.bfloat16, **config)
        protection = protect(engine, read_artefacts(root), products="split")
        end_of("entering", driver)
        engine.backward(loss_of(engine, token_batches(1)[0]))
        counted(driver, engine.step, protection)
        end_of("step", driver)
    engine.optimizer.state_dict()
    end_of("saving")
    protection.release()
    end_of("releasing")

    model, batch = MODELS["odd"](torch.bfloat16), token_batches(1)[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    protection = warp_ds.protect_optimizer(model, optimizer, None, root / "masks", products="split")
    end_of("entering", "plain")
    model(input_ids=batch, labels=batch).loss.backward()
    counted("plain", optimizer.step, protection)
    end_of("step", "plain")
    return found


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_decay_of_free_entries_is_the_optimizers_own(kind: Any, maximize: bool) -> None:
    c, gradient = torch.randn(2, 9, generator=torch.Generator().manual_seed(5))
    frozen = torch.arange(9) % 3 == 0
    own, ours = torch.nn.Parameter(c.clone()), torch.nn.Parameter(c.clone())
    own.grad, ours.grad = gradient.clone(), gradient.masked_fill(frozen, 0.0)
    own_optimizer, optimizer = (kind([p], lr=0.1, weight_decay=0.3, maximize=maximize) for p in (own, ours))
    own_optimizer.step()
    group = optimizer.param_groups[0]
    decay(weight_decay_kind(optimizer, group), group, ours.data, ours.grad, frozen)
    group["weight_decay"] = 0.0
    optimizer.step()
    assert torch.equal(ours[frozen], c[frozen])
    assert torch.allclose(ours[~frozen], own[~frozen], atol=1e-7)
