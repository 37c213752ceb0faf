"""Adapters on a family with fused projections (Phi 3: qkv_proj, gate_up_proj): what holds some rows of one is refused by name,
before anything trains; whole layers beside them are protected as anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from phase3_jobs import losses, make_model, phase3, phase12
from ranks import run_ranks
from test_adapter_phases import LORA, common
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

from warp_ds.errors import UnsupportedSetting
from warp_ds.evaluation.adapter_certificate import certify_adapter
from warp_ds.flags.comparison import CompareArguments
from warp_ds.models.adapter_directory import AdapterDirectory
from warp_ds.phases import compare, training
from warp_ds.phases.compare import run_compare

WHOLE, PARTS = "ffn_down,attn_o", "attn_q,ffn_up"


def jobs(root: Path) -> dict[str, Any]:
    """Bases and masks of both; training with those of whole layers, the fused ones with free adapters beside them."""
    for layers in (WHOLE, PARTS):
        phase12(root, root / layers, layers, mask_unit="column")
    run = phase3(root, root / WHOLE, root / "out", lora_layers=f"{WHOLE},attn_q", merge_adapter=True, **LORA)
    return {"run": str(run), "losses": losses(run)}


def odd_phi3(vocabulary: int) -> PreTrainedModel:
    sizes = {"vocab_size": vocabulary, "hidden_size": 42, "intermediate_size": 55, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 256}
    return Phi3ForCausalLM(Phi3Config(**sizes, **heads, pad_token_id=2, bos_token_id=0, eos_token_id=1))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fused")
    make_model(path, odd_phi3)
    return path


@pytest.fixture(scope="module")
def run(root: Path) -> dict[str, Any]:
    return run_ranks(2, jobs, root)[0]


def test_whole_layers_beside_fused_ones_are_protected(root: Path, run: Any) -> None:
    adapter, masks = Path(run["run"]) / "adapter", root / WHOLE / "phase2_latest" / "masks"
    assert run["losses"][-1] < run["losses"][0]
    assert {name.rsplit(".", 1)[1] for name in AdapterDirectory.of(adapter).layers} == {"down_proj", "o_proj", "qkv_proj"}
    certificate = certify_adapter(root / "m", adapter, masks)
    assert certificate.kept and len(certificate.layers) == 4
    (free,) = certificate.not_claimed
    assert free.what == "adapters of layers without a mask" and free.detail.startswith(
        "2, the first model.layers.0.self_attn.qkv"
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"masks_dir": "phase2_latest"}, "cannot hold its adapter: model.layers.0.mlp.gate_up_proj.ffn_up. is some"),
        (
            {"masks_dir": "phase2_latest", "lora_layers": "attn_v"},
            "cannot hold its adapter: .*qkv_proj.attn_q. is some rows of",
        ),
        ({"lora_method": "salora", "masks_dir": "none"}, "--lora_method salora: .*ffn_up. is some rows of"),
        ({"lora_method": "guardspace", "masks_dir": "none"}, "--lora_method guardspace: .*ffn_up. is some rows of"),
    ],
)
def test_what_holds_some_rows_is_refused_before_a_model_is_loaded(
    root: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, str], message: str
) -> None:
    monkeypatch.setattr(training, "load_model", None)
    given = {**more, "masks_dir": str(root / PARTS / "phase2_latest") if more["masks_dir"] != "none" else "none"}
    if "lora_method" in more:
        given["basis_dir"] = str(root / PARTS / "phase1_latest")
    with pytest.raises(UnsupportedSetting, match=message):
        phase3(root, root / PARTS, tmp_path, **{**LORA, **given})


@pytest.mark.parametrize("arm", ["lora+column", "lora+output-row", "lora+wsr", "lora+salora", "lora+guardspace"])
def test_a_comparison_refuses_such_arms_before_it_trains(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: str
) -> None:
    monkeypatch.setattr(compare, "load_data", None)
    shared = common(root, tmp_path, safety_data="s", utility_data="u", harmful_data="h", layer_type=PARTS)
    with pytest.raises(UnsupportedSetting, match=f"--arms {arm.replace('+', '.')}: .*is some rows of"):
        run_compare(CompareArguments(**shared, arms=f"before,lora,{arm}"))
