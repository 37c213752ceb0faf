"""Checkpoints of protected runs: continued to the bit, W for every reader, and refused where they would be misread."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from deepspeed.checkpoint import ds_to_universal
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from masked_artefacts import Artefacts, odd_model, read_artefacts, token_batches, write_artefacts
from ranks import run_ranks
from test_masked_step import (
    LARGE,
    LOSS,
    WEIGHT,
    Case,
    frozen_moved,
    gathered,
    make_engine,
    masters,
    protect,
    run_all,
    train_step,
    weight_error,
)

from warp_ds.cluster import processes
from warp_ds.zero.masked_step import MaskedStep
from warp_ds.zero.placements import PLACEMENTS
from warp_ds.zero.zero3_step import COEFFICIENTS, MARK

BEFORE, AFTER = 3, 3
GROUPS = Case("groups", groups=True, zero={"sub_group_size": 100, "stage3_param_persistence_threshold": 100})
RESUMED: list[tuple[Case, torch.dtype]] = [
    (Case("plain"), torch.float32),
    (Case("persistent", zero={"stage3_param_persistence_threshold": LARGE}), torch.float32),
    (Case("persistent, bf16", zero={"stage3_param_persistence_threshold": LARGE}), torch.bfloat16),
    (GROUPS, torch.float32),
    (replace(GROUPS, name="groups, bf16"), torch.bfloat16),
    (
        Case(
            "cpu adam, offloaded",
            optimizer="cpu adam",
            groups=True,
            zero={"offload_optimizer": {"device": "cpu"}, "sub_group_size": 100},
        ),
        torch.float32,
    ),
    (
        Case("parameters offloaded", zero={"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}),
        torch.bfloat16,
    ),
    (replace(GROUPS, name="sharded bases, bf16", placement="sharded"), torch.bfloat16),
    (
        Case(
            "bases at owners, bf16, offloaded",
            placement="owner",
            zero={"offload_optimizer": {"device": "cpu"}, "sub_group_size": 100},
        ),
        torch.bfloat16,
    ),
    (Case("sgd", optimizer="sgd"), torch.float32),
    (Case("sgd without momentum", optimizer="sgd plain"), torch.float32),
]


def go_on(engine: Any, case: Case, first: int, count: int) -> list[float]:
    return [train_step(engine, batch, case.accumulation) for batch in token_batches(first + count)[first:]]


class Saved(NamedTuple):
    losses: list[float]
    """Of the steps after the checkpoint."""
    weights: dict[str, torch.Tensor]
    end: dict[str, torch.Tensor]
    """The weights after those steps."""
    state: dict[str, torch.Tensor]
    """``whole_state`` at the checkpoint."""


def whole_state(engine: Any) -> dict[str, torch.Tensor]:
    """Masters and Adam's moments of every parameter, whole, on every rank; of masked layers, those of C."""
    found = {}
    for name, param in engine.module.named_parameters():
        found[f"master of {name}"] = safe_get_full_fp32_param(param).to("cpu", copy=True)
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{key} of {name}"] = safe_get_full_optimizer_state(param, key).to("cpu", copy=True)
    return found


def save(case: Case, dtype: torch.dtype, artefacts: Artefacts, folder: Path) -> Saved:
    """A run that saves a checkpoint and goes on."""
    engine = make_engine(case, dtype)
    protection = protect(engine, artefacts, case.placement)
    start = masters(protection)
    go_on(engine, case, 0, BEFORE)
    at_save = gathered(engine)
    state = {} if case.optimizer.startswith("sgd") else whole_state(engine)
    engine.save_checkpoint(folder, "here")
    losses = go_on(engine, case, BEFORE, AFTER)
    assert frozen_moved(protection, start) == 0
    at_end = gathered(engine)
    if dtype == torch.bfloat16:
        engine.save_16bit_model(folder, "model.bin", exclude_frozen_parameters=False)
    engine.destroy()
    return Saved(losses, at_save, at_end, state)


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], what: str) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{what}: {name} is off by {(found[name] - value).abs().max()}"


def continues_to_the_bit(case: Case, dtype: torch.dtype, root: Path, folder: Path) -> None:
    artefacts = read_artefacts(root)
    losses, at_save, at_end, state = save(case, dtype, artefacts, folder)

    engine = make_engine(case, dtype)
    protection = protect(engine, artefacts, case.placement)
    engine.load_checkpoint(folder, "here")
    same(gathered(engine), at_save, "protected, then loaded")
    if state:
        same(whole_state(engine), state, "protected, then loaded")
    start = masters(protection)
    assert go_on(engine, case, BEFORE, AFTER) == losses, "protected, then loaded"
    assert frozen_moved(protection, start) == 0
    same(gathered(engine), at_end, "protected, then loaded")
    engine.destroy()

    engine = make_engine(case, dtype)
    engine.load_checkpoint(folder, "here")
    same(gathered(engine), at_save, "loaded without protection")
    protection = protect(engine, artefacts, case.placement)
    assert all(x.eq(y).all() for x, y in zip(masters(protection), start, strict=True)), "not the same C"
    same(gathered(engine), at_save, "loaded, then protected")
    assert go_on(engine, case, BEFORE, AFTER) == losses, "loaded, then protected"
    same(gathered(engine), at_end, "loaded, then protected")
    base = engine.optimizer.optimizer
    assert not any(MARK in group for group in base.param_groups)
    assert not any(COEFFICIENTS in state for state in base.state.values()), "a copy of C is left in memory"
    engine.destroy()

    if processes.rank() == 0:
        exported = get_fp32_state_dict_from_zero_checkpoint(folder, "here")
        for name, value in at_save.items():
            # In fp32 what the model trains on is what is exported; in bf16 it is that, rounded.
            assert torch.equal(exported[name].to(dtype), value), f"zero_to_fp32 of {name}"
    if dtype == torch.bfloat16 and processes.rank() == 0:
        same(torch.load(folder / "model.bin", weights_only=True), at_end, "16-bit model")
    processes.barrier()


def resumes_under_any_placement(root: Path, folder: Path) -> None:
    """C and W come back to the bit wherever bases lie; what follows is alike within the rounding of other products."""
    artefacts = read_artefacts(root)
    cases = {placement: replace(GROUPS, placement=placement) for placement in PLACEMENTS if placement != "auto"}
    for number, (saved, case) in enumerate(cases.items()):
        losses, at_save, at_end, state = save(case, torch.float32, artefacts, folder / saved)
        for resumed in cases:
            what = f"saved as {saved}, resumed as {resumed}"
            engine = make_engine(case)
            protect_first = number % 2 == 0
            protection = protect(engine, artefacts, resumed) if protect_first else None
            engine.load_checkpoint(folder / saved, "here")
            same(gathered(engine), at_save, what)
            protection = protection or protect(engine, artefacts, resumed)
            same(whole_state(engine), state, what)
            start = masters(protection)
            again = go_on(engine, case, BEFORE, AFTER)
            assert max(abs(a - b) for a, b in zip(again, losses, strict=True)) < LOSS, what
            assert weight_error(engine, {k: v.double() for k, v in at_end.items()}) < WEIGHT, what
            assert frozen_moved(protection, start) == 0, what
            engine.destroy()


def agrees(protection: MaskedStep) -> float:
    """How far the model's shards are from C Uᵀ."""
    worst = 0.0
    for sub_group, layers in protection.driver.units.items():
        for layer, weights in protection.placement.rotate_back(layers, protection.driver.coefficients):
            real = slice(0, layer.partition.stop - layer.partition.start)
            error = (weights[real] - layer.param.ds_tensor.flatten()[real].float()).abs()
            worst = max(worst, float(error.max()) if error.numel() else 0.0)
        assert sub_group >= 0
    return worst


def without_optimizer_states(root: Path, folder: Path) -> None:
    """The weights come from the checkpoint, the moments start anew: the same as a new run from those weights."""
    case, artefacts = GROUPS, read_artefacts(root)
    at_save = save(case, torch.float32, artefacts, folder).weights
    outcomes = []
    for protect_first in (True, False):
        engine = make_engine(case)
        protection = protect(engine, artefacts) if protect_first else None
        engine.load_checkpoint(folder, "here", load_optimizer_states=False)
        same(gathered(engine), at_save, f"without optimizer states, {protect_first}")
        protection = protection or protect(engine, artefacts)
        assert agrees(protection) < 1e-6
        start = masters(protection)
        outcomes.append(go_on(engine, case, BEFORE, AFTER))
        assert frozen_moved(protection, start) == 0
        assert agrees(protection) == 0.0
        engine.destroy()
    assert outcomes[0] == outcomes[1]


def module_only(root: Path, folder: Path) -> None:
    """DeepSpeed then loads nothing under ZeRO-3 but makes its masters anew from the model: they must hold C again."""
    case, artefacts = GROUPS, read_artefacts(root)
    save(case, torch.float32, artefacts, folder)
    engine = make_engine(case)
    protection = protect(engine, artefacts)
    go_on(engine, case, 0, 2)
    engine.load_checkpoint(folder, "here", load_module_only=True)
    assert agrees(protection) < 1e-6
    start = masters(protection)
    go_on(engine, case, BEFORE, AFTER)
    assert frozen_moved(protection, start) == 0 and agrees(protection) == 0.0
    engine.destroy()


def refusal(what: Callable[[], Any]) -> str:
    try:
        what()
    except ValueError as error:
        return str(error)
    raise AssertionError("was not refused")


def other_masks_are_refused(root: Path, other: Path, folder: Path) -> None:
    case, artefacts = Case("plain"), read_artefacts(root)
    at_save = save(case, torch.float32, artefacts, folder).weights
    engine = make_engine(case)
    protect(engine, read_artefacts(other))
    message = refusal(lambda: engine.load_checkpoint(folder, "here"))
    assert "other basis and masks" in message and "start anew" in message
    engine.destroy()
    engine = make_engine(case)
    engine.load_checkpoint(folder, "here")
    before = [flat.clone() for flat in engine.optimizer.fp32_partitioned_groups_flat]
    assert "other basis and masks" in refusal(lambda: protect(engine, read_artefacts(other)))
    after = engine.optimizer.fp32_partitioned_groups_flat
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)), "refused, but the masters changed"
    same(gathered(engine), at_save, "refused")
    go_on(engine, case, BEFORE, 1)  # It is still a working, unprotected engine.
    engine.destroy()


def unprotected_training_is_refused(root: Path, folder: Path, optimizer: str) -> None:
    """A protected checkpoint, trained on without protection, cannot pass for one of a protected run."""
    case, artefacts = replace(GROUPS, optimizer=optimizer), read_artefacts(root)
    save(case, torch.float32, artefacts, folder)
    engine = make_engine(case)
    engine.load_checkpoint(folder, "here")
    if optimizer != "sgd plain":
        for group in engine.optimizer.optimizer.param_groups:
            group["lr"] = 1e-9  # So small a step that the weights hardly show it.
    go_on(engine, case, BEFORE, 1)
    engine.save_checkpoint(folder, "unprotected")
    engine.destroy()
    for protect_first in (True, False):
        engine = make_engine(case)

        def resume(engine: Any = engine, protect_first: bool = protect_first) -> None:
            if protect_first:
                protect(engine, artefacts)
            engine.load_checkpoint(folder, "unprotected")
            if not protect_first:
                protect(engine, artefacts)

        message = refusal(resume)
        assert "trained on without protection" in message and "start anew" in message, message
        engine.destroy()


def unprotected_runs_are_refused(root: Path, folder: Path, optimizer: str) -> None:
    """Moments of an unprotected run are moments of W, whatever the optimizer calls them."""
    case, artefacts = replace(GROUPS, optimizer=optimizer), read_artefacts(root)
    engine = make_engine(case)
    go_on(engine, case, 0, 1)
    assert "already stepped without protection" in refusal(lambda: protect(engine, artefacts))
    engine.save_checkpoint(folder, "never protected")
    engine.destroy()
    engine = make_engine(case)
    protect(engine, artefacts)
    assert "already stepped without protection" in refusal(lambda: engine.load_checkpoint(folder, "never protected"))
    engine.destroy()


def released(root: Path, folder: Path) -> None:
    """After release the engine is DeepSpeed's own again: masters W, nothing hooked, no mark in its checkpoints."""
    case, artefacts = GROUPS, read_artefacts(root)
    engine = make_engine(case)
    hooked = set(vars(engine.optimizer))
    protection = protect(engine, artefacts)
    go_on(engine, case, 0, 2)
    weights = gathered(engine)
    protection.release()
    assert set(vars(engine.optimizer)) == hooked
    same(gathered(engine), weights, "released")
    low = torch.cat([p.ds_tensor.flatten() for group in engine.optimizer.fp16_groups for p in group])
    assert torch.equal(torch.cat([flat.detach() for flat in engine.optimizer.fp32_partitioned_groups_flat]), low)
    engine.save_checkpoint(folder, "released")
    saved = engine.optimizer.state_dict()["optimizer_state_dict"]
    assert not any(MARK in group for group in saved["param_groups"])
    assert not any(COEFFICIENTS in state for state in saved["state"].values())
    engine.destroy()


SCENES = (without_optimizer_states, module_only, released, resumes_under_any_placement)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefacts")
    write_artefacts(folder / "these", odd_model())
    write_artefacts(folder / "other", odd_model(), seed=2)
    return folder


@pytest.fixture(scope="module")
def outcomes(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, these = tmp_path_factory.mktemp("checkpoints"), root / "these"
    jobs: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        (case.name, continues_to_the_bit, (case, dtype, these, folder / str(i))) for i, (case, dtype) in enumerate(RESUMED)
    ]
    jobs += [(f.__name__, f, (these, folder / f.__name__)) for f in SCENES]
    jobs += [("other masks", other_masks_are_refused, (these, root / "other", folder / "other"))]
    jobs += [
        (f"trained on without protection, {kind}", unprotected_training_is_refused, (these, folder / f"on {kind}", kind))
        for kind in ("adamw", "cpu adam", "sgd plain")
    ]
    jobs += [
        (f"never protected, {kind}", unprotected_runs_are_refused, (these, folder / f"never {kind}", kind))
        for kind in ("adamw", "sgd")
    ]
    return run_ranks(2, run_all, jobs)[0]


@pytest.mark.parametrize(
    "name",
    [
        *(case.name for case, _ in RESUMED),
        *(f.__name__ for f in SCENES),
        "other masks",
        *(f"trained on without protection, {kind}" for kind in ("adamw", "cpu adam", "sgd plain")),
        *(f"never protected, {kind}" for kind in ("adamw", "sgd")),
    ],
)
def test_checkpoint(outcomes: dict[str, Any], name: str) -> None:
    assert name in outcomes


# ---------------------------------------------------------------- universal checkpoints

UNIVERSAL = {
    "fp32": (replace(GROUPS, zero={"sub_group_size": 100}), torch.float32),
    "bf16, sharded bases": (replace(GROUPS, placement="sharded", zero={"sub_group_size": 100}), torch.bfloat16),
    "offloaded": (
        Case(
            "offloaded", optimizer="cpu adam", groups=True, zero={"offload_optimizer": {"device": "cpu"}, "sub_group_size": 100}
        ),
        torch.float32,
    ),
}
#: Of losses and weights after the checkpoint, by dtype. In bf16 other micro-batches and sums round gradients otherwise, by
#: which a weight may be rounded the other way: a unit of those up to 1 (measured: 3e-5 and 2^-11).
ALIKE = {torch.float32: (LOSS, WEIGHT), torch.bfloat16: (2e-4, 2.0**-8)}


def save_for_all(root: Path, folder: Path) -> None:
    for kind, (case, dtype) in UNIVERSAL.items():
        saved = save(case, dtype, read_artefacts(root), folder / kind)
        if processes.rank() == 0:
            torch.save(saved._asdict(), folder / kind / "saved.pt")


def resume_universal(kind: str, root: Path, folder: Path) -> None:
    case, dtype = UNIVERSAL[kind]
    artefacts = read_artefacts(root)
    saved = Saved(**torch.load(folder / "saved.pt", weights_only=True))
    for protect_first in (True, False):
        what = f"{kind}, protect first {protect_first}"
        engine = make_engine(case, dtype, checkpoint={"load_universal": True})
        own = [dict(group) for group in engine.optimizer.optimizer.param_groups]
        protection = protect(engine, artefacts, case.placement) if protect_first else None
        engine.load_checkpoint(folder)
        same(gathered(engine), saved.weights, what)
        protection = protection or protect(engine, artefacts, case.placement)
        for group, before in zip(engine.optimizer.optimizer.param_groups, own, strict=True):
            assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in before.items() if k != "params"}
        for name, value in whole_state(engine).items():
            # DeepSpeed's converter drops C, which is then made anew from W.
            allowed = 1e-6 if name.removeprefix("master of ") in artefacts.frozen else 0.0
            assert (value - saved.state[name]).abs().max() <= allowed, f"{what}: {name}"
        start = masters(protection)
        again = go_on(engine, case, BEFORE, AFTER)
        steps = {float(state["step"]) for state in engine.optimizer.optimizer.state.values()}
        assert steps == {float(BEFORE + AFTER)}, steps
        loss = max(abs(a - b) for a, b in zip(again, saved.losses, strict=True))
        weights = weight_error(engine, {k: v.double() for k, v in saved.end.items()})
        assert loss < ALIKE[dtype][0] and weights < ALIKE[dtype][1], (what, loss, weights)
        assert frozen_moved(protection, start) == 0, what
        engine.destroy()
    engine = make_engine(replace(case, groups=False), dtype, checkpoint={"load_universal": True})
    protect(engine, artefacts, case.placement)
    assert "parameter groups" in refusal(lambda: engine.load_checkpoint(folder))
    engine.destroy()
    engine = make_engine(case, dtype, checkpoint={"load_universal": True})
    protection = protect(engine, artefacts, case.placement)
    engine.load_checkpoint(folder, load_optimizer_states=False)
    # Of bf16 weights C is made anew: half a unit of theirs.
    assert agrees(protection) < (1e-6 if dtype == torch.float32 else 2.0**-8)
    engine.destroy()
    dist.barrier()


@pytest.fixture(scope="module")
def universal(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of two ranks, converted."""
    folder = tmp_path_factory.mktemp("universal")
    run_ranks(2, save_for_all, root / "these", folder)
    for kind in UNIVERSAL:
        arguments, sys.argv = (
            sys.argv,
            [
                "ds_to_universal",
                "--input_folder",
                str(folder / kind / "here"),
                "--output_folder",
                str(folder / kind / "converted"),
                "--num_extract_workers",
                "1",
                "--num_merge_workers",
                "1",
            ],
        )
        try:
            ds_to_universal.main(ds_to_universal.parse_arguments())
        finally:
            sys.argv = arguments
    return folder


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_universal_checkpoint(root: Path, universal: Path, world_size: int) -> None:
    jobs = [(kind, resume_universal, (kind, root / "these", universal / kind)) for kind in UNIVERSAL]
    assert list(run_ranks(world_size, run_all, jobs)[0]) == list(UNIVERSAL)
