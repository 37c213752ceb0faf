"""Several behaviours kept at once: the union of the masks that each would have alone with its share, on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from phase12_jobs import importance_arguments, make_rows, masks_job, save_model
from ranks import run_ranks

from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import BasisArguments, ImportanceArguments
from warp_ds.flags.parsing import parse_arguments
from warp_ds.launch.chain_flags import phase_flags
from warp_ds.method.mask import unpack_bits
from warp_ds.phases.behaviours import Union, named_apart, shares_of, spread_evenly
from warp_ds.store.masks import MaskStore

SETS = "refusals.jsonl,tools.jsonl@2"
TWO = (make_rows(), make_rows(7, silent=(1,))[::-1])


def frozen(directory: Path) -> dict[str, torch.Tensor]:
    masks = MaskStore(directory)
    return {layer.name: unpack_bits(masks.packed(layer.name), layer.n) for layer in masks.layers}


# Rows: of 40, where both shares and their sum are whole numbers, as counts are rounded together.
UNITS: list[dict[str, Any]] = [
    {},
    {"mask_unit": "column", "mask_scope": "global"},
    {"mask_unit": "row", "layer_type": "ffn_down,attn_q"},
]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The masks of each behaviour by itself, as ``test_phase12_reference`` holds them against dense references."""
    root = tmp_path_factory.mktemp("alone")
    model = save_model(root / "model", "llama")
    cases = [
        (importance_arguments(model, basis="identity", keep_ratio=share, **unit), rows, None, root / f"{number}_{which}")
        for number, unit in enumerate(UNITS)
        for which, (rows, share) in enumerate(zip(TWO, (0.15, 0.05), strict=True))
    ]
    run_ranks(1, masks_job, cases)
    return root


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_the_union_of_what_each_would_freeze(ranks: int, alone: Path, tmp_path: Path) -> None:
    common = {"basis": "identity", "safety_data": SETS, "keep_shares": "0.15,0.05"}
    cases = [
        (importance_arguments(alone / "model", **common, **unit), TWO, None, tmp_path / str(number) / "masks")
        for number, unit in enumerate(UNITS)
    ]
    run_ranks(ranks, masks_job, cases)
    for number in range(len(UNITS)):
        directory = tmp_path / str(number) / "masks"
        first, second = (frozen(alone / f"{number}_{which}") for which in (0, 1))
        both, apart = 0, 0
        for name, mask in frozen(directory).items():
            # Scores differ by rounding with the number of ranks: an entry at the threshold may.
            assert int((mask != (first[name] | second[name])).sum()) <= (0 if ranks == 1 else 2), (number, name)
            both += int((first[name] & second[name]).sum())
            apart += int((mask & ~first[name]).sum())
        report = json.loads((directory / "behaviours.json").read_text())
        assert [b["data"] for b in report["behaviours"]] == ["refusals.jsonl", "tools.jsonl"] and both and apart
        if report["unit"] == "entry":
            assert report["both"][0]["frozen"] == pytest.approx(both, abs=0 if ranks == 1 else 2)
        metadata = MaskStore(directory).metadata  # checks counts against what is promised
        assert metadata.keep_ratio == pytest.approx(0.2)
        assert any("both freeze" in note for note in metadata.notes)


def test_counts_of_all_together_are_exact() -> None:
    """Thirds of 10 units, of scores that have nothing in common: 3, 4 and 3, together 10."""
    union = Union([["layer"]], {"layer": 10}, [1 / 3] * 3)
    order = torch.arange(10.0)
    for first in (0, 3, 7):
        union.add({"layer": 1e-30 * torch.where((order >= first) & (order < first + 4), 2.0, 1.0).view(1, 10)})
    assert [int(taken["layer"].sum()) for taken in union.taken] == [3, 4, 3]
    assert int((union.scores["layer"] > 0).sum()) == len(
        set().union(*({*t["layer"][0].nonzero().flatten().tolist()} for t in union.taken))
    )


def test_shares_and_samples() -> None:
    named = ImportanceArguments(safety_data=SETS, keep_ratio=0.1)
    assert named_apart(named) == ["refusals.jsonl", "tools.jsonl"] and shares_of(named, 2) == [0.05, 0.05]
    assert named_apart(ImportanceArguments(safety_data=SETS, keep_shares="mixed")) == [SETS]
    assert spread_evenly(5, 2) == [2, 3] and spread_evenly(0, 2) == [0, 0] and spread_evenly(1, 3) == [1, 1, 1]
    for shares, said in (("0.1", "1 shares, and --keep_data names 2"), ("a,b", "even, mixed, or"), ("0.9,0.9", "from 0 to 1")):
        with pytest.raises(ConfigError, match=said):
            shares_of(ImportanceArguments(safety_data=SETS, keep_shares=shares), 2)


def test_two_names_of_one_flag(tmp_path: Path) -> None:
    for words in (["--keep_data", "a.jsonl", "--keep_samples=7"], ["--keep-data=a.jsonl", "--safety_samples", "7"]):
        found = parse_arguments(BasisArguments, words)
        assert (found.safety_data, found.safety_samples) == ("a.jsonl", 7)
    with pytest.raises(ConfigError, match="--keep_data and --safety_data are two names of one flag"):
        parse_arguments(BasisArguments, ["--keep_data", "a.jsonl", "--safety_data", "b.jsonl"])
    with pytest.raises(ConfigError, match="did you mean --keep_data"):
        parse_arguments(BasisArguments, ["--keep_dat", "a.jsonl"])
    file = tmp_path / "flags.yaml"
    file.write_text("keep_data: a.jsonl\n")
    assert parse_arguments(BasisArguments, ["--config", str(file)]).safety_data == "a.jsonl"
    assert parse_arguments(BasisArguments, ["--config", str(file), "--safety_data", "b.jsonl"]).safety_data == "b.jsonl"
    file.write_text("keep_data: a.jsonl\nsafety_data: b.jsonl\n")
    with pytest.raises(ConfigError, match="safety_data stands there twice"):
        parse_arguments(BasisArguments, ["--config", str(file)])
    flags = phase_flags(["phase1", "phase2"], ["--keep_data", "a.jsonl", "--phase2.keep_samples", "3"], tmp_path)
    assert "a.jsonl" in flags["phase1"] and "3" in flags["phase2"] and "3" not in flags["phase1"]
