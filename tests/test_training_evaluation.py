"""Evaluation during training: one token mean and one rate on any number of ranks; the best model; early stopping."""

from __future__ import annotations

import inspect
import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from phase3_jobs import SAMPLES, common, dies, dies_at, losses, make_model, phase3, phase12
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.trainer_utils import SaveStrategy

from warp_ds.cluster import preemption, processes
from warp_ds.data.collate import pad_token
from warp_ds.data.datasets import load_prompts
from warp_ds.data.lengths import encode_dataset
from warp_ds.errors import ConfigError
from warp_ds.evaluation.certificate import certify
from warp_ds.evaluation.generate import generate_greedy, loss_per_token
from warp_ds.evaluation.metrics import wilson
from warp_ds.flags.arguments import SafetyTuningArguments, TrainArguments
from warp_ds.phases import checkpoints, training, watching
from warp_ds.phases.identity import identify
from warp_ds.phases.trainer import MetricsFile

EVERY_STEP = {"eval_strategy": "steps", "eval_steps": 1}
WORST = {**EVERY_STEP, "load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
"""The loss falls, so that the "best" model is the first that is evaluated."""


def judged(answer: str, prompt: str) -> str:
    """A verdict that a model of noise has several of."""
    return ("refusal", "compliance", "not_judged")[len(answer) % 3]


def lines_of(run: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if name in line]


def job(root: Path, output: Path) -> dict[str, str]:
    watching.verdict = judged  # type: ignore[assignment]
    data = {"eval_data": str(root / "harmless_heldout.jsonl"), "eval_safety": str(root / "refusals_fit.jsonl")}
    start = partial(phase3, root, root / "artefacts", max_new_tokens=6)
    kept = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    ends = partial(start, output / "resumed", {**WORST}, **data, save_minutes=1e-9)
    with dies_at(4, "eval_loss"):
        ends()
    stops = partial(start, output / "stopped", {**WORST, **kept}, **data, early_stopping_patience=2)
    with dies(training, "export", lambda *args: True, instead=True):
        stops()
    runs = {
        "watched": start(output / "watched", {**EVERY_STEP, "eval_on_start": True}, **data),
        "unwatched": start(output / "unwatched"),
        "best": start(output / "best", WORST, **data),
        "first": start(output / "first", {"max_steps": 1}),
        "resumed": ends(),
        "stopped": stops(),
    }
    safety = {"safety_data": data["eval_safety"], "safety_samples": 0, "epochs": 1, "eval_safety": data["eval_safety"]}
    tuning = SafetyTuningArguments(**common(root, output / "phase0", max_new_tokens=4, eval_safety_samples=3, **safety))
    runs["tuned"] = training.run_safety_tuning(tuning)
    return {name: str(run) for name, run in runs.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluated")
    make_model(path)
    run_ranks(1, phase12, path, path / "artefacts")
    return path


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[int, dict[str, Path]]:
    found = {world: run_ranks(world, job, root, root / f"world{world}")[0] for world in (1, 2)}
    return {world: {name: Path(run) for name, run in of.items()} for world, of in found.items()}


@pytest.mark.parametrize("world", [1, 2])
def test_the_loss_is_one_token_mean_and_the_rate_one_rate(root: Path, runs: Any, world: int) -> None:
    run = runs[world]["watched"]
    found = lines_of(run, "eval_loss")
    assert [line["step"] for line in found] == [0, 1, 2, 3, 4, 5]
    tokenizer = AutoTokenizer.from_pretrained(root / "m")
    rows = [json.loads(line) for line in (root / "harmless_heldout.jsonl").read_text().splitlines()]
    encoded = encode_dataset(rows, tokenizer, 200).to_list()
    prompts = load_prompts(root / "refusals_fit.jsonl")
    for line, trained in ((found[0], root / "m"), (found[-1], run / "model")):
        model = AutoModelForCausalLM.from_pretrained(trained)
        alone = loss_per_token(model, encoded, pad_token_id=pad_token(tokenizer), batch_size=1)
        assert line["eval_loss"] == pytest.approx(alone, abs=2e-6)  # fp32, in batches of two against one by one
        verdicts = [judged(answer, "") for answer in generate_greedy(model, tokenizer, prompts, max_new_tokens=6, batch_size=1)]
        refused, n = verdicts.count("refusal"), len(verdicts) - verdicts.count("not_judged")
        assert (line["eval_refusal_rate"], line["eval_refusal_judged"]) == (refused / n, n)
        assert (line["eval_refusal_rate_low"], line["eval_refusal_rate_high"]) == wilson(refused, n)


@pytest.mark.parametrize("world", [1, 2])
def test_looking_changes_nothing(runs: Any, world: int) -> None:
    assert losses(runs[world]["watched"]) == losses(runs[world]["unwatched"])
    seen, unseen = (load_file(runs[world][name] / "model" / "model.safetensors") for name in ("watched", "unwatched"))
    assert all(torch.equal(value, unseen[name]) for name, value in seen.items())


def test_any_number_of_ranks_finds_the_same(runs: Any) -> None:
    one, two = (lines_of(runs[world]["watched"], "eval_loss") for world in (1, 2))
    for name in ("eval_loss", "eval_refusal_rate", "eval_refusal_rate_low"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], abs=2e-6), name


@pytest.mark.parametrize("name", ["best", "resumed", "stopped"])
@pytest.mark.parametrize("world", [1, 2])
def test_the_best_model_is_that_of_its_step(root: Path, runs: Any, world: int, name: str) -> None:
    """To the bit, and with frozen coefficients where they were."""
    best, first = (load_file(runs[world][which] / "model" / "model.safetensors") for which in (name, "first"))
    start = load_file(root / "m" / "model.safetensors")
    assert all(torch.equal(value, first[key]) for key, value in best.items())
    assert any(not torch.equal(value, start[key]) for key, value in best.items())
    kept = certify(root / "m", runs[world][name] / "model", root / "artefacts" / "phase2_latest" / "masks")
    assert kept.kept, kept.problems
    assert json.loads((runs[world][name] / "finished.json").read_text())["training"]["best_step"] == 1
    assert max(line["step"] for line in lines_of(runs[world][name], "eval_loss")) == (3 if name == "stopped" else 5)


@pytest.mark.parametrize("world", [1, 2])
def test_early_stopping(runs: Any, world: int) -> None:
    run = runs[world]["stopped"]
    assert [line["step"] for line in lines_of(run, "loss")] == [1, 2, 3], (
        "two evaluations after the first, and none when it goes on"
    )
    assert sorted(path.name for path in (run / "trainer").iterdir()) == ["checkpoint-1", "checkpoint-3"], (
        "the best and the newest"
    )


def left_at(start: Any, step: int) -> bool:
    """Whether a start that is asked to leave at a step does."""
    on_step_end = MetricsFile.on_step_end

    def asking(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGUSR2)

    preemption.watch()
    MetricsFile.on_step_end = asking  # type: ignore[method-assign]
    try:
        start()
        return False
    except preemption.Preempted:
        return True
    finally:
        MetricsFile.on_step_end, preemption._asked = on_step_end, None  # type: ignore[method-assign]
        preemption.unwatch()


def leaves(root: Path, output: Path) -> dict[str, Any]:
    """Per way to leave: whether the run left, its newest whole checkpoint and the steps of evaluations then, and in the end."""
    data: dict[str, Any] = {"eval_data": str(root / "harmless_heldout.jsonl"), "eval_samples": 2}
    epochs = {**data, "epochs": 2, "global_batch_size": SAMPLES // 2 + SAMPLES % 2}
    ways: dict[str, Any] = {
        "no new best": (3, WORST, data),
        "in an epoch": (1, {"eval_strategy": "epoch"}, epochs),
        "after an epoch": (2, {"load_best_model_at_end": True}, epochs),
    }
    found = {}
    for name, (step, passed, flags) in ways.items():
        start = partial(phase3, root, root / "artefacts", output / name, passed, **flags)
        left = left_at(start, step)
        (run,) = (output / name).glob("phase3_2*")
        newest = checkpoints.newest_whole(run / "trainer") or ""
        state = json.loads((Path(newest) / "trainer_state.json").read_text())
        kept = [line["step"] for line in state["log_history"] if "eval_loss" in line]
        found[name] = (left, Path(newest).name, kept, [line["step"] for line in lines_of(start(), "eval_loss")])
    return found


def test_leaving_saves_and_loses_no_evaluation(root: Path, tmp_path: Path) -> None:
    assert run_ranks(1, leaves, root, tmp_path)[0] == {
        "no new best": (True, "checkpoint-3", [1, 2, 3], [1, 2, 3, 4, 5]),
        "in an epoch": (True, "checkpoint-1", [], [2, 4]),
        "after an epoch": (True, "checkpoint-2", [2], [2, 4]),
    }


def test_what_is_changed_of_trainer_is_there() -> None:
    """Private methods, which a newer transformers may rename: then ours would never be called."""
    evaluates, trains = (inspect.getsource(m) for m in (Trainer._maybe_log_save_evaluate, Trainer._inner_training_loop))
    assert "= self._determine_best_metric(" in evaluates and "self._save_checkpoint(" in evaluates
    assert "self._run_epoch(" in trains and "self._load_best_model()" in inspect.getsource(Trainer._finalize_training)


def another_world(root: Path, output: Path) -> str:
    data = {"eval_data": str(root / "harmless_heldout.jsonl"), "eval_samples": 2}
    start = partial(phase3, root, root / "artefacts", output, WORST, **data)
    if processes.world_size() == 2:
        with dies_at(2, "eval_loss"):
            start()
        return ""
    try:
        return str(start())
    except ConfigError as error:
        return str(error)


def test_the_best_checkpoint_of_another_number_of_ranks_is_refused(root: Path) -> None:
    run_ranks(2, another_world, root, root / "another")
    (said,) = run_ranks(1, another_world, root, root / "another")
    assert "--load_best_model_at_end" in said and "start again on 2 ranks" in said and "\n" not in said


@pytest.mark.parametrize("world", [1, 2])
def test_safety_tuning_is_watched_after_every_epoch(runs: Any, world: int) -> None:
    (line,) = lines_of(runs[world]["tuned"], "eval_refusal_rate")
    assert line["epoch"] == 1 and line["eval_refusal_judged"] <= 3 and "eval_loss" not in line


@pytest.mark.parametrize(
    ("flags", "passed", "said"),
    [
        ({}, {"eval_strategy": "steps"}, "--eval_strategy needs something to evaluate on"),
        ({}, {"load_best_model_at_end": True}, "--load_best_model_at_end needs something to evaluate on"),
        ({"early_stopping_patience": 1}, {}, "--early_stopping_patience needs something to evaluate on"),
        ({"eval_data": "x"}, {"eval_strategy": "no"}, "--eval_data says nothing under --eval_strategy no"),
        ({"eval_safety": "x"}, {"load_best_model_at_end": True}, "needs --eval_data"),
        (
            {"eval_data": "x"},
            {"load_best_model_at_end": True, "metric_for_best_model": "eval_refusal_rate"},
            "needs --eval_safety",
        ),
        ({"eval_data": "x", "early_stopping_patience": 1}, {"metric_for_best_model": "bleu"}, "choose from loss, refusal_rate"),
        ({"eval_data": "x"}, {**WORST, "save_strategy": "steps", "save_steps": 2}, "needs a checkpoint of every step"),
        (
            {"eval_data": "x"},
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "needs a checkpoint of every step",
        ),
        ({"eval_data": "x"}, {"load_best_model_at_end": True, "save_strategy": "no"}, "needs a checkpoint of every step"),
    ],
)
def test_what_cannot_be_is_one_line(flags: dict[str, Any], passed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        watching.settle(TrainArguments(**flags), passed)


def test_what_follows_from_the_flags() -> None:
    assert watching.settle(TrainArguments(eval_data="x"), {}) == {"eval_strategy": "epoch"}
    best = watching.settle(TrainArguments(eval_data="x"), {"load_best_model_at_end": True, "eval_strategy": "steps"})
    assert (best["save_strategy"], best["metric_for_best_model"]) == ("best", "loss")
    same = {**WORST, "save_strategy": SaveStrategy.STEPS, "save_steps": 1}
    assert watching.settle(TrainArguments(eval_data="x"), same) == same


def test_a_run_is_the_same_one_unless_evaluation_chooses(root: Path) -> None:
    def settings(passed: dict[str, Any], **more: Any) -> dict[str, Any]:
        return identify("phase3", TrainArguments(**common(root, root, **more)), {}, passed).settings

    plain = settings({})
    assert settings(dict(EVERY_STEP), eval_data="x", eval_safety="y", eval_samples=3, max_new_tokens=4) == plain
    best = settings(dict(WORST), eval_data="x")
    assert best != plain and best["eval_steps"] == 1 and best["eval_data"] == "x"
    assert settings({**WORST, "per_device_eval_batch_size": 3}, eval_data="x") == best
    assert settings({}, eval_data="x", early_stopping_patience=2) != plain
