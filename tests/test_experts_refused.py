"""What is of linear layers that every token passes is refused on experts and routers, by name and before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES
from phase3_jobs import common, make_model, phase3
from test_experts_few_tokens import crowded

from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import SafetyTuningArguments, TrainArguments
from warp_ds.flags.comparison import CompareArguments
from warp_ds.models.targets import targets_of
from warp_ds.phases import adapters, training
from warp_ds.phases.arms import parse_arms
from warp_ds.phases.compare import check_layers


@pytest.fixture(params=["qwen3_moe", "gpt_oss", "llama4_text"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    FAMILIES[request.param].config(request.param).save_pretrained(tmp_path)
    return tmp_path


def test_adapters_on_experts_and_routers(config: Path) -> None:
    for kind, word in (("experts_down", "stacked experts"), ("router", "a router"), ("attn_q,router", "a router")):
        with pytest.raises(ConfigError, match=f"{word}.*Name such with --lora_layers"):
            adapters.check_layers(config, [], TrainArguments(adapter="lora", masks_dir="none", lora_layers=kind))
        masked = targets_of(config, "all", kind)
        with pytest.raises(ConfigError, match=word):
            adapters.check_layers(config, masked, TrainArguments(adapter="lora"))
        adapters.check_layers(config, masked, TrainArguments(adapter="none"))
        adapters.check_layers(config, masked, TrainArguments(adapter="lora", lora_layers="attn_q,attn_v"))
    adapters.check_layers(config, [], TrainArguments(adapter="lora", masks_dir="none"))


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe", "llama4_text"])
def test_an_adapter_on_everything_is_on_attention_and_where_it_is_said_to_be(name: str) -> None:
    model = FAMILIES[name].model(name, "cpu")
    layers = adapters.adapted_layers(model, [], TrainArguments(adapter="lora", masks_dir="none"))
    assert len(layers) == 16 and {layer.type for layer in layers} == {"attn_q", "attn_k", "attn_v", "attn_o"}
    adapted = adapters.add_lora(model, layers, TrainArguments(adapter="lora"), 0)
    on = {key.partition(".lora_A")[0] for key, p in adapted.named_parameters() if ".lora_A" in key}
    assert on == {f"base_model.model.{layer.module}" for layer in layers}


def test_a_dense_layer_beside_experts_is_refused(tmp_path: Path) -> None:
    """PEFT would take every block's experts in its place."""
    FAMILIES["glm4_moe"].config("glm4_moe").save_pretrained(tmp_path)
    arguments = TrainArguments(adapter="lora", masks_dir="none", lora_layers="ffn_down", target_layers="0", lora_dropout=0.0)
    with pytest.raises(ConfigError, match="model.layers.0.mlp.down_proj is beside a mixture's experts"):
        adapters.check_layers(tmp_path, [], arguments)
    model = FAMILIES["glm4_moe"].model("glm4_moe", "cpu")
    with pytest.raises(ConfigError, match="which are experts"):
        adapters.add_lora(model, targets_of(tmp_path, "0", "ffn_down"), arguments, 0)


def test_phases_refuse_them_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_model(tmp_path, crowded)
    monkeypatch.setattr(training, "load_model", None)
    adapter: dict[str, str] = {"adapter": "lora", "lora_layers": "experts_down"}
    with pytest.raises(ConfigError, match="stacked experts"):
        phase3(tmp_path, tmp_path, tmp_path / "out", **{"masks_dir": "none", **adapter})
    shared = common(tmp_path, tmp_path / "out", safety_data=str(tmp_path / "refusals_fit.jsonl"), **adapter)
    with pytest.raises(ConfigError, match="stacked experts"):
        training.run_safety_tuning(SafetyTuningArguments(**shared))


ARMS = {
    "lora": "stacked experts",
    "lora+column": "stacked experts",
    "lora+guardspace": "stacked experts",
    "lora+salora": None,
    "safedelta": "leave safedelta out",
    "sn-tune+rotated": "leave .* out",
    "full,rotated,column": None,
}


@pytest.mark.parametrize("arms", ARMS)
def test_arms_of_a_comparison(arms: str, tmp_path: Path) -> None:
    FAMILIES["qwen3_moe"].config("qwen3_moe").save_pretrained(tmp_path)
    parsed, refused = parse_arms(arms), ARMS[arms]
    check_layers(parsed, CompareArguments(layer_type="attn_q"), tmp_path) if "lora" in arms else None
    if refused is None:
        return check_layers(parsed, CompareArguments(layer_type="experts_down"), tmp_path)
    with pytest.raises(ConfigError, match=refused):
        check_layers(parsed, CompareArguments(layer_type="experts_down"), tmp_path)
