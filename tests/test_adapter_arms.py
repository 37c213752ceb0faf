"""The arms with a LoRA adapter in a comparison on a tiny model: what each trains, and Safe LoRA's weights by its formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_training import complete_basis
from evaluation_jobs import make_models
from ranks import run_ranks
from safetensors.torch import load_file
from test_compare import comparison

from warp_ds.errors import ConfigError
from warp_ds.evaluation.adapter_certificate import certify_adapter
from warp_ds.evaluation.certificate import certify
from warp_ds.flags.arguments import TrainArguments
from warp_ds.flags.comparison import CompareArguments
from warp_ds.launch.chain_flags import check_flags, phase_flags
from warp_ds.method.lora_baselines import safe_lora
from warp_ds.method.mask import unpack_bits
from warp_ds.models.adapter_directory import AdapterDirectory
from warp_ds.phases.arms import parse_arms
from warp_ds.store.masks import MaskStore

ARMS = (
    "before,lora,lora+column,lora+original,lora+output-row,lora+safelora@0.99,lora+wsr,lora+guardspace,lora+salora,lora+asft@2"
)


def test_what_an_adapters_arm_is() -> None:
    arms = {
        arm.name: arm
        for arm in parse_arms("lora,lora+column,lora+original,lora+osft,column,lora+column+safeinstr+safelora,lora+output-row")
    }
    assert all(arm.adapter for name, arm in arms.items() if "lora" in name) and not arms["column"].adapter
    assert arms["lora"].basis is None and arms["lora"].trains == "target"
    assert (arms["lora+original"].basis, arms["lora+original"].unit) == ("identity", "column")
    assert (arms["lora+column"].basis, arms["lora+osft"].basis) == ("activation", "weight")
    rows = arms["lora+output-row"]
    assert (rows.basis, rows.output, rows.unit) == ("activation", "activation", "row")
    last = arms["lora+column+safeinstr+safelora"]
    assert last.safety_share == 0.1 and last.merge == "safelora" and last.unit == "column"
    for name in ("wsr", "full+wsr", "lora+wsr+column", "lora+wsr+salora"):
        with pytest.raises(ConfigError, match="wsr masks what a plain adapter has learned"):
            parse_arms(name)
    for name in ("lora+rotated", "lora+full", "lora+both"):
        with pytest.raises(ConfigError, match="whole columns"):
            parse_arms(name)


def compared(root: Path) -> str:
    return str(
        comparison(
            root, root / "out", kept_data=None, kept_format=[], arms=ARMS, lora_r=4, lora_dropout=0.0, learning_rates="1e-2"
        )
    )


def test_arms_of_adapters(tmp_path: Path) -> None:
    make_models(tmp_path)
    run = Path(run_ranks(1, compared, tmp_path)[0])
    rows: dict[str, Any] = {row["arm"]: row for row in json.loads((run / "report.json").read_text())["points"]}
    assert list(rows) == ARMS.split(",")
    start = next(Path(json.loads(path.read_text())["settings"]["model_name"]) for path in run.glob("phase3_lora_*/config.json"))
    adapters = {
        arm: run / f"phase3_{arm}_lr0.01_seed42" / "adapter"
        for arm in ("lora", "lora+column", "lora+original", "lora+output-row")
    }
    masks = {
        "lora+column": run / "phase2_start_activation_column_importance" / "masks",
        "lora+original": run / "phase2_start_identity_column_importance" / "masks",
        "lora+output-row": run / "phase2_start_activation_activation-outputs_row_importance" / "masks",
    }
    for arm, directory in masks.items():
        assert certify_adapter(start, adapters[arm], directory).outcome == "kept"
        assert certify_adapter(start, adapters["lora"], directory).outcome == "broken"
    published = {arm: run / f"phase3_{arm}_lr0.01_seed42" for arm in ("lora+guardspace", "lora+salora", "lora+asft@2")}
    settings = {arm: json.loads((path / "config.json").read_text())["settings"] for arm, path in published.items()}
    assert settings["lora+asft@2"]["asft_lambda"] == 2 and settings["lora+salora"]["lora_alpha"] == 4
    changed = {
        arm: {name.rsplit(".", 1)[1] for name in AdapterDirectory.of(path / "adapter").layers}
        for arm, path in published.items()
    }
    assert changed["lora+salora"] == {"q_proj", "v_proj"} and changed["lora+guardspace"] == {"q_proj", "down_proj"}
    unaligned = load_file(run / "phase0_unaligned" / "model" / "model.safetensors")
    aligned, trained = (load_file(path / "model.safetensors") for path in (start, adapters["lora"].parent / "model"))
    merged = load_file(run / "merge_lora+safelora@0.99_lr0.01_seed42" / "model" / "model.safetensors")
    changed = [name for name in aligned if not torch.equal(aligned[name], trained[name])]
    assert changed and all("q_proj" in name or "down_proj" in name for name in changed)
    for name, value in merged.items():
        expected = safe_lora(aligned[name], trained[name], unaligned[name], 0.99)[0] if name in changed else aligned[name]
        assert torch.allclose(value, expected, atol=1e-6), name
        assert name not in changed or not torch.allclose(value, trained[name], atol=1e-5), name
    masks = MaskStore(run / "phase2_start_activation_entry_importance" / "masks")
    products, (adapter, basis) = 0, (AdapterDirectory.of(adapters["lora"]), masks.find_basis())
    assert basis is not None
    projected = load_file(run / "merge_lora+wsr_lr0.01_seed42" / "model" / "model.safetensors")
    for layer in masks.layers:
        u, factors = complete_basis(basis.columns(layer.name)[0]), adapter.factors(layer.name)
        c = factors.scaling * factors.b.double() @ factors.a.double() @ u
        free = ~unpack_bits(masks.packed(layer.name), layer.n)
        assert torch.allclose(projected[layer.parameter].double(), aligned[layer.parameter] + (c * free) @ u.T, atol=1e-6)
        products += int((c[~free].abs() > 1e-4).sum())
    assert products > 100, "what was taken out"
    assert all(torch.equal(projected[name], aligned[name]) for name in aligned.keys() - set(changed))
    assert certify(start, run / "merge_lora+wsr_lr0.01_seed42" / "model", masks.directory).kept
    assert certify(start, adapters["lora"].parent / "model", masks.directory).outcome == "broken"


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"adapter": "dora"}, "DoRA scales whole rows"),
        ({"adapter": "qlora"}, "base is quantised"),
        ({"adapter": "ia3"}, "none or lora"),
        ({"lora_r": 8}, "--lora_r is of an adapter: give --adapter lora too"),
        ({"adapter": "lora", "train_scope": "all"}, "the adapter alone trains"),
        ({"adapter": "lora", "lora_dropout": 1.0}, "from 0 to below 1"),
        ({"adapter": "lora", "lora_layers": "attn_x"}, "choose from ffn_down"),
        ({"adapter": "lora", "masks_dir": "none", "layer_type": "attn_q"}, "name its layers with --lora_layers"),
    ],
)
def test_flags_that_are_refused(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainArguments(model_name=str(tmp_path), **flags).check()


def test_a_comparison_has_no_adapter_of_rank_0() -> None:
    with pytest.raises(ConfigError, match="--lora_r must be at least 1, not 0"):
        CompareArguments(lora_r=0).check()


def test_a_chain_that_reads_the_trained_model_merges_it(tmp_path: Path) -> None:
    words = ["--adapter", "lora", "--model_name", str(tmp_path), "--device", "cpu"]
    with pytest.raises(ConfigError, match="evaluate of this chain reads the model that phase3 makes: give --merge_adapter"):
        check_flags(phase_flags(["phase3", "evaluate"], words, tmp_path))
    check_flags(phase_flags(["phase3", "evaluate"], [*words, "--merge_adapter"], tmp_path))
    check_flags(phase_flags(["phase2", "phase3"], words, tmp_path))
