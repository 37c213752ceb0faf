"""What a comparison tells its phases: every flag that they share with it, and of the steps those that are meant."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from warp_ds.flags.arguments import TrainArguments
from warp_ds.flags.comparison import CompareArguments
from warp_ds.phases import bench
from warp_ds.phases.arms import compose
from warp_ds.phases.bench import Bench
from warp_ds.phases.trials import Trial

PASSED = {"max_steps": 7, "warmup_steps": 3, "weight_decay": 0.1}


@pytest.fixture()
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """phase -> the flags, and the further TrainingArguments, of its last run; no phase runs."""
    seen: dict[str, Any] = {}
    for phase in ("run_basis", "run_importance", "run_training", "run_safety_tuning"):

        def run(arguments: Any, passed: Any = None, phase: str = phase) -> Path:
            seen[phase] = (arguments, passed)
            return tmp_path / phase

        monkeypatch.setattr(bench, phase, run)
    monkeypatch.setattr(bench, "resolve_model_dir", lambda name, flag="": Path(name))
    return seen


def made(tmp_path: Path, **more: Any) -> Bench:
    arguments = CompareArguments(output_dir=str(tmp_path), log_dir=str(tmp_path / "logs"), layer_type="attn_q", **more)
    data: Any = SimpleNamespace(sets=None, task=[], mix=[], safety=[], harmful_mix=[], behaviours=())
    return Bench(arguments, tmp_path / "m", tmp_path / "c", data, PASSED)


def test_packing_and_processes_reach_every_phase(tmp_path: Path, told: dict[str, Any]) -> None:
    one = made(tmp_path, packing=True, tokens_per_batch=1024, num_proc=3)
    one.model(Trial(compose("rotated"), 1e-4, 42))
    one.unaligned()
    assert len(told) == 4
    for phase, (arguments, _) in told.items():
        assert (arguments.packing, arguments.tokens_per_batch, arguments.num_proc) == (True, 1024, 3), phase


def test_the_arms_steps_are_not_those_of_other_trainings(tmp_path: Path, told: dict[str, Any]) -> None:
    one = made(tmp_path)
    one.model(Trial(compose("rotated"), 1e-4, 42))
    one.unaligned()
    assert told["run_training"][1] == PASSED and told["run_safety_tuning"][1] == {"weight_decay": 0.1}
    one.model(Trial(compose("full+patch"), 1e-4, 42))
    assert told["run_safety_tuning"][1] == {"weight_decay": 0.1}


def test_every_arm_trains_the_layers_of_the_comparison(tmp_path: Path, told: dict[str, Any]) -> None:
    one = made(tmp_path)
    for name, layers in (("lora", "attn_q"), ("lora+column", None), ("layers", None)):
        one.model(Trial(compose(name), 1e-4, 42))
        arguments = told["run_training"][0]
        assert (arguments.lora_layers, arguments.layer_type) == (layers, "attn_q")
        arguments.check()


def test_replay_is_told_to_the_arms_that_replay(tmp_path: Path, told: dict[str, Any]) -> None:
    one = made(tmp_path, der_alpha=2.0, replay_batch_size=5)
    for name in ("full", "constrained", "der"):
        one.model(Trial(compose(name), 1e-4, 42))
        arguments = told["run_training"][0]
        arguments.check()
        replays = name == "der"
        assert arguments.replay_batch_size == (5 if replays else 0)
        assert arguments.der_alpha == (2.0 if replays else TrainArguments.der_alpha)
