"""A configuration file says what it says: no value is re-typed, none is dropped, and what is no flag is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import TrainArguments
from warp_ds.flags.comparison import CompareArguments
from warp_ds.flags.parsing import parse_arguments, parse_training


def read(path: Path, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The flags that the file changes, and what it passes on."""
    path.write_text(text, encoding="utf-8")
    arguments, passed = parse_training(TrainArguments, ["--config", str(path)])
    return {
        f.name: getattr(arguments, f.name)
        for f in dataclasses.fields(TrainArguments)
        if f.init and getattr(arguments, f.name) != getattr(TrainArguments(), f.name)
    }, passed


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("masks_dir: null\nprompt_column: ~\nbasis_dir:\nrun_name: Null", {}),
        ("run_name: 'null'", {"run_name": "null"}),
        ("seed: 043", {"seed": 43}),
        ("utility_samples: 2_000", {"utility_samples": 2000}),
        ("learning_rate: 1e-4", {"learning_rate": 1e-4}),
        ("learning-rate: .5", {"learning_rate": 0.5}),
        ("run_name: 007", {"run_name": "007"}),
        ("run_name: 2021-05-03", {"run_name": "2021-05-03"}),
        ("run_name: 12:30", {"run_name": "12:30"}),
        ("run_name: yes", {"run_name": "yes"}),
        ("run_name: 1.50", {"run_name": "1.50"}),
        ("run_name: '--debug'", {"run_name": "--debug"}),
        ("debug: on\ngradient_checkpointing: Yes", {"debug": True, "gradient_checkpointing": True}),
        ("debug: off\ngradient_checkpointing: no", {}),
        ("layer_type: [attn_q, ffn_down]", {"layer_type": "attn_q,ffn_down"}),
        ("layer_type:\n- attn_q\n", {"layer_type": "attn_q"}),
        ("layer_type: attn_q,attn_k  # both", {"layer_type": "attn_q,attn_k"}),
    ],
)
def test_values_stay_as_they_are_written(tmp_path: Path, text: str, found: dict[str, Any]) -> None:
    assert read(tmp_path / "c.yaml", text) == (found, {})


def test_flags_that_pass_through(tmp_path: Path) -> None:
    text = (
        "save_total_limit: ~\nwarmup_steps: 010\nlogging_nan_inf_filter: off\nlr_scheduler_type: cosine\n"
        "lr_scheduler_kwargs: '{\"num_cycles\": 2}'\n"
    )
    assert read(tmp_path / "c.yaml", text) == (
        {},
        {
            "warmup_steps": 10,
            "logging_nan_inf_filter": False,
            "lr_scheduler_kwargs": {"num_cycles": 2},
            "lr_scheduler_type": "cosine",
        },
    )


def test_lists_for_comma_separated_flags(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("arms: [before, rotated]\nseeds: [1, 02]\nlearning_rates: [1e-5, 5e-5]\n")
    found = parse_arguments(CompareArguments, ["--config", str(tmp_path / "c.yaml")])
    assert (found.arms, found.seed_list, found.rate_list) == ("before,rotated", [1, 2], [1e-5, 5e-5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 0o17", "invalid int value: '0o17'"),
        ("seed: 1:30", "invalid int value: '1:30'"),
        ("seed: 0x1F", "invalid int value: '0x1F'"),
        ("seed: 3.0", "invalid int value: '3.0'"),
        ("seed: 1\nlearning_rate: 1\nseed: 2", "line 3: seed stands there twice .line 1"),
        ("learning_rate: 1\nlearning-rate: 2", "line 2: learning_rate stands there twice"),
        ("\nlearning_rat: null", "line 2: unknown flag --learning_rat: did you mean --learning_rate"),
        ("warmup_step: 3", "unknown flag --warmup_step: did you mean --warmup_steps"),
        ("Seed: 3", "unknown flag --Seed: did you mean --seed"),
        ("--seed: 3", "'--seed': write names without dashes"),
        ("train:\n  seed: 3", "line 1: train: a nested mapping"),
        ("lr_scheduler_kwargs: {num_cycles: 2}", "line 1: lr_scheduler_kwargs: a nested mapping .*JSON has it in quotes"),
        ("model_name: [a, b]", "model_name takes one value, not a list"),
        ("layer_type: []", "layer_type is an empty list"),
        ("layer_type: [attn_q, ~]", "layer_type is an empty list, or has an empty item"),
        ("layer_type: [[attn_q]]", "layer_type: a list where one value belongs"),
        ("label_names: [a, --debug]", "label_names holds '--debug', which would be another flag"),
        ("seed: !!python/object/apply:os.getenv [HOME]", "seed takes one value, not a list"),
        ("seed: !secret 3", "seed: a !secret where one value belongs"),
        ("config: other.yaml", "unknown flag --config"),
        ("seed: 1\n---\nseed: 2", "cannot be read as YAML: expected a single document"),
        ("seed: [1", "cannot be read as YAML"),
        ("- seed", "must be a mapping of flag names to values"),
        ("", "must be a mapping of flag names to values"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        read(tmp_path / "c.yaml", text)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_utf8_or_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes("run_name: é".encode("latin-1"))
    for name in ("c.yaml", "missing.yaml"):
        with pytest.raises(ConfigError, match=f"{name} cannot be read as YAML"):
            parse_arguments(CompareArguments, ["--config", str(tmp_path / name)])
