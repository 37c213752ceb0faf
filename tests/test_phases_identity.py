"""What keeps two runs apart, what does not, and how it is said; a training that goes on with other micro-batches."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from phase3_jobs import SAMPLES, TRAINER, dies_at, losses, make_model, phase3, phase12
from ranks import run_ranks
from safetensors.torch import load_file

from warp_ds.errors import ConfigError
from warp_ds.flags import training_arguments
from warp_ds.flags.arguments import (
    BasisArguments,
    EvaluateArguments,
    ImportanceArguments,
    SafetyTuningArguments,
    TrainArguments,
)
from warp_ds.flags.comparison import CompareArguments, SweepArguments
from warp_ds.flags.identity import identity_settings, natures
from warp_ds.flags.parsing import parse_training
from warp_ds.phases.identity import identify
from warp_ds.store.files import write_json

KINDS = (
    SafetyTuningArguments,
    BasisArguments,
    ImportanceArguments,
    TrainArguments,
    EvaluateArguments,
    CompareArguments,
    SweepArguments,
)
INPUTS = {"model": "m", "data": "d"}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, a task and a directory of refusals, in the working directory."""
    (tmp_path / "tiny").mkdir()
    for name in ("tiny/config.json", "tiny/tokenizer.json", "task.jsonl", "refusals.txt"):
        (tmp_path / name).write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_spellings_of_a_path_are_one(place: Path) -> None:
    for kind in KINDS:
        plain = identity_settings(kind(model_name="tiny"))
        assert all(identity_settings(kind(model_name=name)) == plain for name in ("./tiny", "tiny/", f"{place}/tiny"))
        assert identity_settings(kind(model_name="org/tiny")) != plain, "a name of the hub stays"
    data = identity_settings(TrainArguments(utility_data="task.jsonl"))
    assert identity_settings(TrainArguments(utility_data=f"{place}/../{place.name}/task.jsonl")) == data
    a, b = (identity_settings(TrainArguments(masks_dir=where)) for where in ("x/masks", None))
    assert a == b != identity_settings(TrainArguments(masks_dir="none"))
    assert identity_settings(TrainArguments(epochs=3)) == identity_settings(TrainArguments(epochs=3.0))


def test_what_changes_no_result_keeps_no_run_apart(place: Path) -> None:
    changed = {
        "batch_size": 1,
        "eval_batch_size": 3,
        "gradient_checkpointing": True,
        "basis_placement": "owner",
        "collect": "hooks",
        "svd_placement": "rank0",
        "save_minutes": 1.0,
        "output_dir": "o",
        "log_dir": "l",
    }
    assert not any(natures()[name].identity for name in changed)
    for kind in KINDS:
        own = {name: value for name, value in changed.items() if hasattr(kind, name)}
        assert identify("p", kind(**own), INPUTS, {}).record == identify("p", kind(), INPUTS, {}).record
        assert identify("p", kind(seed=7), INPUTS, {}).record != identify("p", kind(), INPUTS, {}).record


@pytest.mark.parametrize(
    ("words", "same"),
    [
        ("--save_strategy no", True),
        ("--save_steps 3 --save_total_limit 2 --logging_steps 1 --report_to none", True),
        ("--weight_decay 0.0 --lr_scheduler_type linear --max_steps -1", True),
        ("--dataloader_num_workers 2", True),
        ("--weight_decay 0.1", False),
        ("--lr_scheduler_type cosine", False),
        ("--max_steps 7", False),
    ],
)
def test_saving_and_defaults_are_no_difference(words: str, same: bool) -> None:
    arguments, passed = parse_training(TrainArguments, words.split())
    assert (training_arguments.training_settings(passed) == {}) is same
    plain = identify("phase3", TrainArguments(), INPUTS, {}).record
    assert (identify("phase3", arguments, INPUTS, passed).record == plain) is same


def test_contents_keep_runs_apart(place: Path) -> None:
    arguments = TrainArguments(model_name="tiny", deepspeed="ds.json")
    (place / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    write_json(
        place / "checkpoints" / "before" / "config.json", {**identify("phase3", arguments, INPUTS, {}).record, "settings": {}}
    )
    before = place / "checkpoints" / "before"
    assert identify("phase3", arguments, INPUTS, {}).differences(before) == []
    assert identify("phase3", arguments, INPUTS | {"data": "e"}, {}).differences(before) == [
        "the contents of the data are others (d and e)"
    ]
    (place / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}))
    (place / "tiny" / "tokenizer.json").write_text("[]")
    found = identify("phase3", arguments, INPUTS, {}).differences(before)
    assert found is not None and len(found) == 2
    assert found[0] == "--deepspeed optimizer was not given and is {'type': 'AdamW'}"
    assert found[1].startswith("the contents of --model_name's tokenizer are others (")
    assert identify("phase1", arguments, INPUTS, {}).differences(before) is None


def test_a_run_of_an_earlier_version_is_known_again(place: Path) -> None:
    """Its config.json has the flags as they were given, micro-batch and path among them, and none that came later."""
    run = place / "checkpoints" / "earlier"
    settings = {**identity_settings(TrainArguments()), "model_name": str(place / "tiny"), "batch_size": 4, "epochs": 3.0}
    del settings["train_scope"]
    write_json(run / "config.json", {"phase": "phase3", "identity": "x", "settings": settings, "inputs": INPUTS})
    assert identify("phase3", TrainArguments(model_name="tiny"), INPUTS, {}).differences(run) == []
    assert identify("phase3", TrainArguments(model_name="tiny", train_scope="all"), INPUTS, {}).differences(run) == [
        "--train_scope was warp and is all"
    ]


# ---------------------------------------------------------------- real runs


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def training_job(root: Path) -> dict[str, Any]:
    """A run of large micro-batches dies in the middle of its second epoch, and goes on as the README advises."""
    logging.getLogger("warp_ds").setLevel(logging.INFO)
    logging.getLogger("warp_ds").addHandler(shown := Lines())
    phase12(root, root)
    steady = {"global_batch_size": 3, "epochs": 3, "batch_size": 3}  # three steps an epoch, the last of one sample
    whole = phase3(root, root, root / "whole", **steady)
    out, saving = root / "cut", {"save_strategy": "steps", "save_steps": 5}
    with dies_at(6):
        phase3(root, root, out, saving, **steady)
    (cut,) = out.glob("phase3_2*")
    shown.lines.clear()
    os.chdir(root)
    lean = {
        **steady,
        "batch_size": 1,
        "gradient_checkpointing": True,
        "model_name": "./m/",
        "basis_placement": "replicated",
        "utility_data": "utility_train.jsonl",
    }
    found: dict[str, Any] = {}
    for name, changed in {"resume": {"resume": cut.name}, "named": {"run_name": cut.name}}.items():
        try:
            phase3(root, root, out, **{**lean, "learning_rate": 1e-3, **changed})
        except ConfigError as error:
            found[name] = str(error)
    with dies_at(1):  # two differences: a new run, whose first lines say which
        phase3(root, root, out, {"weight_decay": 0.2}, **{**lean, "learning_rate": 1e-3})
    found["near"] = [line for line in shown.lines if "nearly" in line or "writing to" in line]
    shown.lines.clear()
    again = phase3(root, root, out, **lean)
    found["log"] = [line for line in shown.lines if "going on" in line or line.startswith("training:")]
    ends = [load_file(run / "model" / "model.safetensors") for run in (whole, again)]
    return {
        **found,
        "same run": again == cut,
        "cut": str(cut),
        "losses": [losses(whole), losses(again)],
        "weights": max(float((ends[0][name] - value).abs().max()) for name, value in ends[1].items()),
    }


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("identity")
    make_model(root)
    return run_ranks(1, training_job, root)[0]


def test_a_training_goes_on_with_other_micro_batches(job: dict[str, Any]) -> None:
    assert job["same run"] and len(job["log"]) == 3, job["log"]
    assert f"training: {SAMPLES} samples, 9 steps of 3 samples (1 ranks x 3 micro-batches of 1)" in job["log"]
    whole, again = job["losses"]
    # Sums over other micro-batches round otherwise, in fp32; Adam (eps 1e-4) carries that on over four steps.
    assert len(whole) == 9 and again == pytest.approx(whole, abs=1e-5)
    assert job["weights"] < 1e-5


def test_what_keeps_runs_apart_is_said_once(job: dict[str, Any]) -> None:
    expected = "was started with other settings or data: --learning_rate was 0.002 and is 0.001. Give them as they were"
    assert expected in job["resume"] and expected in job["named"] and job["cut"] in job["resume"]
    near, begun = job["near"]
    assert begun.startswith("phase3: writing to")
    assert f"{job['cut']}, unfinished (" in near and " of 9 steps), is nearly the same run and is not gone on with: " in near
    assert "--learning_rate was 0.002 and is 0.001; --weight_decay was 0.1 and is 0.2." in near
    assert TRAINER["weight_decay"] == 0.1


def test_a_run_from_before_a_flag_of_several_words_is_gone_on_with(place: Path) -> None:
    run, now = place / "checkpoints" / "old", identify("compare", CompareArguments(), INPUTS, {})
    lists = [name for name, value in now.settings.items() if isinstance(value, list)]
    compared = {name: value for name, value in now.settings.items() if name not in lists}
    write_json(run / "config.json", {**replace(now, settings=compared).record, "settings": compared})
    assert lists and now.differences(run) == []


def test_resume_names_a_run_of_another_phase(place: Path) -> None:
    run = place / "checkpoints" / "r"
    write_json(run / "config.json", {**identify("phase1", BasisArguments(), INPUTS, {}).record, "settings": {}})
    with pytest.raises(ConfigError, match="is a run of phase1, not of phase2"):
        identify("phase2", ImportanceArguments(), INPUTS, {}).check(run)


def test_a_path_with_a_comma_is_one_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b.jsonl").write_text("{}")
    assert identity_settings(TrainArguments(utility_data="a,b.jsonl"))["utility_data"] == "by content"
    assert identity_settings(TrainArguments(utility_data="a,c.jsonl"))["utility_data"] == "a,c.jsonl"
