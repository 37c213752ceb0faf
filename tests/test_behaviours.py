"""Several behaviours kept at once: the union of the masks that each would have alone with its share, on any number of ranks.

From files to masks against a dense reference, and in more units against the masks of each behaviour alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dense_reference as reference
import numpy as np
import pytest
import torch
from dense_training import encoded
from phase3_jobs import LAYERS, common, make_model
from phase12_jobs import importance_arguments, make_rows, masks_job, run_job, save_model
from ranks import run_ranks
from test_phase12_reference import assert_basis
from transformers import AutoTokenizer

from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import BasisArguments, ImportanceArguments
from warp_ds.flags.parsing import parse_arguments
from warp_ds.launch.chain_flags import phase_flags
from warp_ds.method.mask import unpack_bits
from warp_ds.phases.behaviours import Union, named_apart, shares_of, spread_evenly
from warp_ds.store.bases import BasisStore
from warp_ds.store.masks import MaskStore

SETS = "refusals.jsonl,tools.jsonl@2"
TWO = (make_rows(), make_rows(7, silent=(1,))[::-1])


def frozen(directory: Path) -> dict[str, torch.Tensor]:
    masks = MaskStore(directory)
    return {layer.name: unpack_bits(masks.packed(layer.name), layer.n) for layer in masks.layers}


# Rows: of 40, where both shares and their sum are whole numbers, as counts are rounded together.
UNITS: list[dict[str, Any]] = [
    {},
    {"mask_unit": "column", "mask_scope": "global", "gradient_checkpointing": True},
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


SHARES = (0.15, 0.05)
BATCH = 3
DENSE = {"entries": {}, "columns": {"mask_unit": "column", "mask_scope": "global"}}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray], list[Any]]:
    """A model of odd sizes with two files; Σ of the first file's tokens and twice the second's, and each one's gradients."""
    root = tmp_path_factory.mktemp("dense")
    model = reference.load(make_model(root))
    tokenizer = AutoTokenizer.from_pretrained(root / "m")
    sets = [
        [{"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer} for prompt, answer in encoded(file, tokenizer)]
        for file in (root / "refusals_fit.jsonl", root / "utility_train.jsonl")
    ]
    kinds = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    names = [name for name, _ in model.named_modules() if name.endswith(kinds)]
    inputs = [reference.layer_inputs(model, names, rows) for rows in sets]
    sigma = {name: reference.covariance(np.concatenate([inputs[0][name], *2 * [inputs[1][name]]])) for name in names}
    return root, sigma, [reference.gradients(model, names, rows, BATCH) for rows in sets]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_bases_and_masks_equal_a_dense_reference(
    ranks: int, dense: tuple[Path, dict[str, np.ndarray], list[Any]], tmp_path: Path
) -> None:
    root, sigma, gradients = dense
    files = f"{root / 'refusals_fit.jsonl'},{root / 'utility_train.jsonl'}@2"
    shared = common(root, tmp_path, layer_type=LAYERS, safety_data=files, safety_samples=0)
    phase2 = {**shared, "keep_ratio": 0.2, "keep_shares": "0.15,0.05", "importance_batch_size": BATCH}
    phases = [ImportanceArguments(**phase2, **more, run_name=name) for name, more in DENSE.items()]
    run_ranks(ranks, run_job, BasisArguments(**shared, run_name="basis"), *phases)
    store = BasisStore(tmp_path / "basis" / "basis")
    bases = {name: [column.double().numpy() for column in store.columns(name)] for name in sigma}
    for name, (u, s) in bases.items():
        assert_basis(u, s, sigma[name], name)
    scores = [{name: reference.importance(batches, name, bases[name][0]) for name in sigma} for batches in gradients]
    for which, more in DENSE.items():
        masks, differing, both = frozen(tmp_path / which / "masks"), 0, 0
        for group in [list(masks)] if more else [[name] for name in masks]:
            taken = [highest([each[name] for name in group], which, number) for number, each in enumerate(scores)]
            for name, first, second in zip(group, *taken, strict=True):
                differing += int((masks[name].numpy() != (first | second)).sum())
                both += int((first & second).sum()) if which == "entries" else int((first & second)[0].sum())
        assert differing <= 2, which  # entries on either side of a threshold, whose scores agree to fp32 rounding
        report = json.loads((tmp_path / which / "masks" / "behaviours.json").read_text())
        assert report["both"][0]["frozen"] == pytest.approx(both, abs=2) and both, which


def highest(scores: list[np.ndarray], which: str, behaviour: int) -> list[np.ndarray]:
    """bool [m, n] of a group's layers: the units that one behaviour freezes; the counts of both together are exact."""
    units = [s if which == "entries" else np.sqrt((s**2).sum(axis=0, keepdims=True)) for s in scores]
    total = sum(unit.size for unit in units)
    ends = [0, round(SHARES[0] * total), round(sum(SHARES) * total)]
    taken = reference.highest(units, ends[behaviour + 1] - ends[behaviour])
    return [np.broadcast_to(t, s.shape) for t, s in zip(taken, scores, strict=True)]


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
