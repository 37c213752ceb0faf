"""What is of linear layers that every token passes is refused on experts and routers, by name and before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import FAMILIES

from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import TrainArguments
from warp_ds.flags.comparison import CompareArguments
from warp_ds.models.targets import targets_of
from warp_ds.phases import adapters
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


def test_an_adapter_on_everything_is_on_what_every_token_passes() -> None:
    for name, kinds in (("qwen3_moe", 4), ("glm4_moe", 7)):
        model = FAMILIES[name].model(name)
        layers = adapters.adapted_layers(model, [], TrainArguments(adapter="lora", masks_dir="none"))
        assert len(layers) == kinds * 4 and all(layer.expert is None for layer in layers)


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
