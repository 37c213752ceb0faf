"""Phase 3 with masks that grow, against one dense process that finds importances and masks anew by itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_reference import gradients
from dense_training import DenseAdamW, encoded, task_loss
from phase3_jobs import TRAINER, Interrupted, losses, make_model, phase2, phase3, phase12
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from warp_ds.cluster import processes
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.evaluation.certificate import certify
from warp_ds.phases import training
from warp_ds.phases.arms import compose
from warp_ds.phases.growing import Growing

STEPS, RATIO = 5, 0.2
LAYERS = "ffn_down,attn_q"
KINDS: dict[str, dict[str, Any]] = {"refresh": {"refresh_steps": 2}, "schedule": {"keep_ratio_schedule": "0:0.2,1:0.3,3:0.6"}}
SHARES = {"refresh": {2: 1 - 0.8**2, 4: 1 - 0.8**3}, "schedule": {1: 0.3, 3: 0.6}}
STOPPED = "refresh"


class Watch(TrainerCallback):
    """Counts the bits of frozen coefficients that a step has changed; dies at the beginning of a step."""

    def __init__(self, trainer: Any, dies_after: int):
        (self.growing,) = (own for own in trainer.callback_handler.callbacks if isinstance(own, Growing))
        self.dies_after, self.moved, self.seen = dies_after, 0, list[Any]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.dies_after:
            raise Interrupted
        step: Any = self.growing.warp.protection
        self.seen = [
            (layer, piece, frozen.clone(), step.driver.coefficients(layer)[piece].clone())
            for layer in step.layers
            for piece, frozen in layer.frozen_pieces(torch.device("cpu"))
        ]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step: Any = self.growing.warp.protection
        for layer, piece, frozen, before in self.seen:
            now = step.driver.coefficients(layer)[piece]
            self.moved += int((now.view(torch.int32) != before.view(torch.int32))[frozen].sum())


def grown(root: Path, output: Path, kind: str, dies_after: int = -1, **more: Any) -> tuple[str, int] | None:
    """One start of phase 3; its directory and how many frozen bits moved; None where it died."""
    arrange, watches = training._arrange_reporters, list[Watch]()

    def arranged(trainer: Any, *rest: Any) -> None:
        arrange(trainer, *rest)
        watches.append(Watch(trainer, dies_after))
        trainer.add_callback(watches[0])

    training._arrange_reporters = arranged  # type: ignore[assignment]
    try:
        data = {"refresh_data": str(root / "refusals_fit.jsonl"), "importance_batch_size": 3}
        saving = {"save_strategy": "steps", "save_steps": 3}
        run = phase3(root, root / "artefacts", output, saving, **data, **KINDS[kind], **more)
    except Interrupted:
        return None
    finally:
        training._arrange_reporters = arrange  # type: ignore[assignment]
    moved = processes.all_reduce_sum(torch.tensor([float(watches[0].moved)]))
    return str(run), int(moved)


def everything(root: Path, output: Path) -> dict[str, Any]:
    found: dict[str, Any] = {kind: grown(root, output / kind, kind) for kind in KINDS}
    if processes.world_size() == 2:
        assert grown(root, root / "stopped", STOPPED, dies_after=4) is None
    return found


def again(root: Path, output: Path) -> tuple[str, int] | None:
    if processes.rank() == 0:
        shutil.copytree(root / "stopped", output)
    processes.barrier()
    return grown(root, output, STOPPED)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("growing_phase3")
    make_model(path)
    run_ranks(1, phase12, path, path / "artefacts", LAYERS)
    return path


@pytest.fixture(scope="module")
def made(root: Path) -> dict[int, Any]:
    return {world: run_ranks(world, everything, root, root / f"world{world}")[0] for world in (1, 2, 3)}


def bits(directory: Path) -> dict[str, torch.Tensor]:
    """Layer -> bool [m, n]."""
    entries = json.loads((directory / "metadata.json").read_text())["layers"]
    return {
        name: torch.from_numpy(
            np.unpackbits(load_file(directory / e["file"])["frozen"].numpy(), axis=1)[:, : e["shape"][1]].astype(bool)
        )
        for name, e in entries.items()
    }


def scores(model: Any, names: list[str], rows: list[Any], bases: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """S = Σ_b |∂L_b/∂W U| of the columns that are stored, fp64."""
    samples = [{"input_ids": before + after, "labels": [-100] * len(before) + after} for before, after in rows]
    total = {name: torch.zeros(1, dtype=torch.float64) for name in names}
    for batch in gradients(model, names, samples, 3):
        total = {name: total[name] + (torch.from_numpy(batch[name]) @ bases[name].double()).abs() for name in names}
    return total


def dense(root: Path, run: Path, kind: str) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses and weights of one dense process; how many bits of the masks that ``run`` wrote are not its own, each a score
    within 1e-4 of the threshold: fp32 rounding. It goes on with the run's."""
    model = AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(root / "m")
    basis, masks = ((root / "artefacts" / f"phase{i}_latest" / what).resolve() for i, what in ((1, "basis"), (2, "masks")))
    frozen = bits(masks)
    files = json.loads((basis / "metadata.json").read_text())["layers"]
    bases = {name: load_file(basis / files[name]["file"])["U"] for name in frozen}
    params = dict(model.named_parameters())
    trained = {f"{name}.weight": params[f"{name}.weight"].detach().clone() for name in frozen}
    optimizer = DenseAdamW(
        trained,
        {f"{name}.weight": u for name, u in bases.items()},
        {f"{name}.weight": mask for name, mask in frozen.items()},
        lr=2e-3,
        eps=1e-4,
        decay=dict.fromkeys(trained, float(TRAINER["weight_decay"])),
        clip=float(TRAINER["max_grad_norm"]),
    )
    loss_of, safety = task_loss(root, tokenizer), encoded(root / "refusals_fit.jsonl", tokenizer)
    said, other = [], 0
    for step in range(STEPS + 1):
        with torch.no_grad():
            for name, w in optimizer.weights().items():
                params[name].copy_(w)
        if step in SHARES[kind]:
            written = bits(run / f"masks_step{step}")
            for name, s in scores(model, list(frozen), safety, bases).items():
                wanted, key = round(SHARES[kind][step] * frozen[name].numel()), f"{name}.weight"
                free = torch.where(frozen[name][:, : s.shape[1]], 0.0, s)
                more = wanted - int(frozen[name].sum())
                threshold = free.flatten().topk(more).values[-1]
                assert int(written[name].sum()) == wanted and not (frozen[name] & ~written[name]).any()
                differ = (written[name] != frozen[name])[:, : s.shape[1]] != (free >= threshold)
                assert ((free[differ] - threshold).abs() < 1e-4 * threshold).all(), (name, step)
                other += int(differ.sum())
                frozen[name] = optimizer.frozen[key] = written[name]
                optimizer.m[key][written[name]] = optimizer.v[key][written[name]] = 0.0
        if step < STEPS:
            model.zero_grad()
            loss = loss_of(model, None)
            loss.backward()
            said.append(loss.item())
            optimizer.step({name: params[name].grad for name in trained})
    return said, optimizer.weights(), other


@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_grow_are_those_of_a_dense_process(root: Path, made: dict[int, Any], kind: str) -> None:
    for world, found in made.items():
        run, moved = Path(found[kind][0]), found[kind][1]
        said, weights, other = dense(root, run, kind)
        assert losses(run) == pytest.approx(said, abs=2e-5), world
        trained = load_file(run / "model" / "model.safetensors")
        worst = max(float((trained[name].double() - w).abs().max()) for name, w in weights.items())
        assert worst < 2e-5 and moved == 0 and other <= 2, (world, worst, moved, other)
        assert sorted(path.name for path in run.glob("masks_step*")) == [f"masks_step{step}" for step in SHARES[kind]]


@pytest.mark.parametrize("world", [2, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_goes_on_with_the_masks_of_its_checkpoint(root: Path, made: dict[int, Any], tmp_path: Path, world: int) -> None:
    whole = Path(made[2][STOPPED][0])
    found, moved = run_ranks(world, again, root, tmp_path / "again")[0]
    ours, theirs = (load_file(Path(run) / "model" / "model.safetensors") for run in (found, whole))
    # On as many ranks to the bit; on others within fp32's rounding of two steps, an entry at the threshold included.
    bar = 0.0 if world == 2 else 2e-5
    assert max(float((ours[name] - theirs[name]).abs().max()) for name in ours) <= bar and moved == 0
    assert losses(Path(found)) == pytest.approx(losses(whole), abs=bar)


def test_the_certificate_is_of_the_masks_at_the_start(root: Path, made: dict[int, Any]) -> None:
    run = Path(made[1]["refresh"][0])
    verdict = certify(root / "m", run / "model", root / "artefacts" / "phase2_latest" / "masks")
    assert verdict.outcome == "kept"
    with pytest.raises(ArtifactError, match="hold from optimizer step 2 of a training on"):
        certify(root / "m", run / "model", run / "masks_step2")


OTHER: dict[str, dict[str, Any]] = {
    "entry global bfloat16": {"packing": True},
    "column layer bfloat16": {"products": "split"},
    "row global float32": {"packing": True},
}


def other_ways(root: Path, output: Path) -> dict[str, tuple[str, int] | None]:
    """Of each unit, scope and dtype: masks found so, and grown so."""
    found = {}
    for case, more in OTHER.items():
        unit, scope, dtype = case.split()
        place, made = output / case.replace(" ", "_"), {"dtype": dtype, **more}
        phase2(
            root, place, LAYERS, basis_dir=str(root / "artefacts" / "phase1_latest"), mask_unit=unit, mask_scope=scope, **made
        )
        found[case] = grown(root, place, "refresh", masks_dir=str(place / "phase2_latest"), **made)
    return found


@pytest.fixture(scope="module")
def made_otherwise(root: Path) -> dict[str, tuple[str, int]]:
    return run_ranks(2, other_ways, root, root / "otherwise")[0]


@pytest.mark.parametrize("case", OTHER)
def test_masks_of_any_unit_and_scope_grow(root: Path, made_otherwise: dict[str, tuple[str, int]], case: str) -> None:
    """In bf16 and packed too: whole units, exact counts, nothing thaws, and no frozen coefficient moves by a bit."""
    run, moved = Path(made_otherwise[case][0]), made_otherwise[case][1]
    unit, scope, _ = case.split()
    before = bits(run.parent / "phase2_latest" / "masks")
    assert moved == 0 and len(losses(run)) == STEPS
    sizes = {
        name: {"entry": mask.numel(), "row": mask.shape[0], "column": mask.shape[1]}[unit] for name, mask in before.items()
    }
    for step, share in SHARES["refresh"].items():
        now = bits(run / f"masks_step{step}")
        counts = {}
        for name, mask in now.items():
            assert not (before[name] & ~mask).any(), (name, step)
            if unit != "entry":
                along = mask.all(dim=int(unit == "row"))
                assert torch.equal(along, mask.any(dim=int(unit == "row"))), (name, step)
                mask = along
            counts[name] = int(mask.sum())
        if scope == "global":
            assert sum(counts.values()) == round(share * sum(sizes.values())), step
        else:
            assert counts == {name: round(share * size) for name, size in sizes.items()}, step
        before = now


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"refresh_steps": 2}, "--refresh_data, examples"),
    ({"refresh_data": "x.jsonl"}, "--refresh_data, examples"),
    ({**KINDS["schedule"], "refresh_steps": 2, "refresh_data": "x.jsonl"}, "leave --refresh_steps out"),
    ({"keep_ratio_schedule": "5:0.3,9:0.2", "refresh_data": "x.jsonl"}, "nothing thaws"),
    ({"keep_ratio_schedule": "0.3", "refresh_data": "x.jsonl"}, "STEP:SHARE"),
    ({"keep_ratio_schedule": "5:1.5", "refresh_data": "x.jsonl"}, "at most 1"),
    ({"refresh_steps": 2, "refresh_data": "x.jsonl", "masks_dir": "none"}, "without masks"),
    ({"refresh_steps": 2, "refresh_data": "x.jsonl", "adapter": "lora"}, "stay as they are"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_flags_that_do_not_go_together(flags: dict[str, Any], said: str) -> None:
    from warp_ds.flags.arguments import TrainArguments

    with pytest.raises(ConfigError, match=said):
        TrainArguments(model_name="m", **flags).check()


@pytest.mark.parametrize(
    "arm", ["refresh@2", "osft+refresh@2", "lora+column+schedule", "rotated+refresh@0.5", "rotated+schedule@2"]
)
def test_what_grows_is_a_mask_of_weights(arm: str) -> None:
    assert compose("column+refresh@2").strength("refresh", 0) == 2 and compose("rotated+schedule").grows == "schedule"
    with pytest.raises(ConfigError, match="is of a mask of weights|no number of optimizer steps|take a strength"):
        compose(arm)


def test_a_schedule_begins_above_the_masks_share(root: Path) -> None:
    from warp_ds.flags.arguments import TrainArguments

    data = {"refresh_data": str(root / "refusals_fit.jsonl"), "masks_dir": str(root / "artefacts" / "phase2_latest")}
    read: Callable[..., Any] = Growing.read
    for schedule in ("0:0.1,5:0.3", "5:0.2"):
        with pytest.raises(ConfigError, match="freeze 0.2 from the start"):
            read(TrainArguments(model_name="m", keep_ratio_schedule=schedule, **data), {})
    with pytest.raises(ConfigError, match="--load_best_model_at_end"):
        read(TrainArguments(model_name="m", refresh_steps=2, **data), {"load_best_model_at_end": True})
