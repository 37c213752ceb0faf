"""What version 0.1 called by other paths is found, with a warning that names the new one."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from warp_ds.data.datasets import load_pairs


@pytest.mark.parametrize(
    "old, name, new",
    [
        ("warp_ds.config", "TrainArguments", "warp_ds.flags.arguments"),
        ("warp_ds.config", "parse_training", "warp_ds.flags.parsing"),
        ("warp_ds.config", "identity_settings", "warp_ds.flags.identity"),
        ("warp_ds.artifacts", "MaskStore", "warp_ds.store.masks"),
        ("warp_ds.artifacts", "ArtifactError", "warp_ds.errors"),
        ("warp_ds.phases.targets", "find_targets", "warp_ds.models.targets"),
        ("warp_ds.cluster.chain", "run_phase", "warp_ds.launch.submission"),
        ("warp_ds.report.verify", "certify", "warp_ds.evaluation.certificate"),
        ("warp_ds.zero.runtime", "init_distributed", "warp_ds.cluster.processes"),
        ("warp_ds.zero.runtime", "zero3_config", "warp_ds.zero.settings"),
    ],
)
def test_old_names(old: str, name: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old}.{name} is {new}.{name} now"):
        assert getattr(importlib.import_module(old), name) is getattr(importlib.import_module(new), name)


def test_a_name_that_never_was() -> None:
    with pytest.raises(AttributeError, match="warp_ds.config"):
        importlib.import_module("warp_ds.config").no_such_flag  # noqa: B018


def test_pairs_as_two_columns(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns[1:]}) + "\n" + json.dumps({"messages": turns}) + "\n")
    assert load_pairs(tmp_path / "a.jsonl").to_list() == [
        {"prompt": "2+2?", "response": "4"},
        {"prompt": "system: Be brief.\nuser: 2+2?", "response": "4"},
    ]
