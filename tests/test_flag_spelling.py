"""One spelling of flags everywhere, and --debug, which reaches every count of samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import (
    BasisArguments,
    EvaluateArguments,
    ImportanceArguments,
    SafetyTuningArguments,
    TrainArguments,
)
from warp_ds.flags.comparison import CompareArguments, SweepArguments
from warp_ds.flags.flag import DEBUG_SAMPLES, apply_debug, dataclass_fields
from warp_ds.flags.groups import PublishFlags, WatchingFlags
from warp_ds.flags.jobs import DoctorArguments
from warp_ds.flags.parsing import parse_training
from warp_ds.launch.chain_flags import phase_flags
from warp_ds.launch.cli import main, underscored
from warp_ds.phases.compare import training_flags

KINDS = (
    SafetyTuningArguments,
    BasisArguments,
    ImportanceArguments,
    TrainArguments,
    EvaluateArguments,
    CompareArguments,
    SweepArguments,
    DoctorArguments,
)


@pytest.mark.parametrize("kind", KINDS)
def test_debug_reaches_every_count_of_samples(kind: Any) -> None:
    arguments = kind(debug=True)
    if hasattr(arguments, "sample_counts"):
        arguments.sample_counts = "20,0"
    before = dataclasses.asdict(arguments)
    apply_debug(arguments)
    # By their words, not their names: a count that is called otherwise is found here.
    counts = [f.name for f in dataclasses.fields(kind) if "0 = all" in f.metadata["help"]]
    assert counts or kind is DoctorArguments
    for name in counts:
        assert getattr(arguments, name) in (DEBUG_SAMPLES, str(DEBUG_SAMPLES)), name
    changed = {name for name, value in before.items() if getattr(arguments, name) != value}
    assert changed <= {*counts, "target_layers"}
    quiet = kind()
    apply_debug(quiet)
    assert quiet == kind()


def test_dashes_and_underscores_are_one() -> None:
    assert underscored(["plan", "--gpus-per-node", "8", "--host-memory=2-3", "-x", "a-b", "--config"]) == [
        "plan",
        "--gpus_per_node",
        "8",
        "--host_memory=2-3",
        "-x",
        "a-b",
        "--config",
    ]


def test_plan_takes_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=100).save_pretrained(tmp_path)
    shown = []
    for words in (("--gpus-per-node", "2", "--gpu-memory", "40"), ("--gpus_per_node", "2", "--gpu_memory", "40")):
        assert main(["plan", "--model_name", str(tmp_path), *words]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "1 x 2 GPUs of 40.00 GB" in shown[0]


def test_submit_takes_both(tmp_path: Path) -> None:
    words = ["--safety-samples", "7", "--phase3.batch-size=3"]
    found = phase_flags(["phase1", "phase3"], words, tmp_path)
    assert found["phase1"][:2] == ["--safety_samples", "7"] and found["phase3"][:2] == ["--batch_size", "3"]


def test_a_comparison_takes_what_its_phases_take() -> None:
    words = "--max_rank 9 --energy 0.9 --svd_placement rank0 --basis_placement owner --save-minutes 2 --weight_decay 0.1"
    arguments, passed = parse_training(CompareArguments, words.split())
    assert (arguments.max_rank, arguments.energy, passed) == (9, 0.9, {"weight_decay": 0.1})
    made = training_flags(arguments)
    assert (made.basis_placement, made.save_minutes, made.learning_rate) == ("owner", 2.0, 5e-5)
    # Whatever a phase of it has is a flag of the comparison's, or is decided there.
    own = {f.name for f in dataclasses.fields(CompareArguments)}
    watching = dataclass_fields(WatchingFlags).keys() - {"max_new_tokens"}
    decided = {
        "adapter",
        "lora_layers",
        "lora_method",
        "task_basis_dir",
        "merge_adapter",
        "objective",
        "replay_data",
        "refresh_data",
        "refresh_samples",
        "basis",
        "output_basis",
        "mask_unit",
        "score",
        "basis_dir",
        "masks_dir",
        "left_projection",
        "learning_rate",
        *watching,
    }
    for kind in (BasisArguments, ImportanceArguments, TrainArguments):
        assert {f.name for f in dataclasses.fields(kind)} - dataclass_fields(PublishFlags).keys() <= own | decided
    with pytest.raises(ConfigError, match="--push_to_hub is refused: a comparison sends nothing to the hub"):
        parse_training(CompareArguments, ["--push_to_hub", "me/x"])
    for name in decided:
        with pytest.raises(ConfigError, match=f"--{name} is (decided|set) by"):
            parse_training(CompareArguments, [f"--{name}", "x"])
    with pytest.raises(ConfigError, match="--energy is a share"):
        CompareArguments(energy=2.0).check()
