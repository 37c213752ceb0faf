"""adapter_config.json as PEFT reads it: what is no plain LoRA is refused by name, and a pair that PEFT would leave out too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from warp_ds.errors import ArtifactError
from warp_ds.models.adapter_config import of_layer, why_not_loaded
from warp_ds.models.adapter_directory import AdapterDirectory
from warp_ds.phases.merge import merge_adapter

KEYS = [f"model.layers.{i}.{name}" for i in (0, 1, 11) for name in ("self_attn.q_proj", "mlp.down_proj")] + [
    "lm_head",
    "q_proj",
]
CHOICES: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["proj"]},
    {"target_modules": r".*layers\.1\.(self_attn\.q_proj|mlp.*)"},
    {"target_modules": "q_proj"},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": 11},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [0], "layers_pattern": ["blocks"]},
    {"target_modules": ["q_proj", "down_proj"], "exclude_modules": ["layers.0.mlp.down_proj"]},
    {"target_modules": ["q_proj", "down_proj"], "exclude_modules": r".*layers\.1\d\..*"},
    {"target_modules": ["lm_head", "down_proj"], "modules_to_save": ["lm_head"]},
]


@pytest.mark.parametrize("choice", CHOICES)
def test_a_pair_is_loaded_where_peft_finds_its_module(choice: dict[str, Any]) -> None:
    config = LoraConfig(r=3, **choice)
    found = [key for key in KEYS if check_target_module_exists(config, key)]
    assert [key for key in KEYS if not why_not_loaded({"r": 3, **choice}, key, 3)] == found
    assert all(why_not_loaded({"r": 4, **choice}, key, 3) for key in KEYS)


@pytest.mark.parametrize(
    "pattern", [{"q_proj": 2, "layers.0.mlp.down_proj": 5}, {"^model.layers.1.mlp.down_proj": 2}, {"proj": 2}]
)
def test_patterns_are_those_of_peft(pattern: dict[str, int]) -> None:
    config = {"r": 3, "rank_pattern": pattern}
    for key in KEYS:
        assert of_layer(config, "rank_pattern", "r", key) == pattern.get(get_pattern_key(list(pattern), key), 3)


PLAIN: dict[str, Any] = {"peft_type": "LORA", "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}


def written(directory: Path, **more: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps({**PLAIN, **more}))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    save_file(
        {f"{name}A.weight": torch.ones(3, 4), f"{name}B.weight": torch.ones(5, 3)}, directory / "adapter_model.safetensors"
    )
    return directory


@pytest.mark.parametrize(
    "more, message",
    [
        ({"r": 0}, "r is 0, no rank"),
        ({"r": "x"}, "r is 'x', no rank"),
        ({"r": True}, "r is True, no rank"),
        ({"r": 8}, "PEFT does not load: its rank is 3, and 8"),
        ({"rank_pattern": {"q_proj": 2}}, "its rank is 3, and 2"),
        ({"rank_pattern": [3]}, "rank_pattern is .3., no mapping"),
        ({"rank_pattern": {"(": 3}}, "which is no pattern"),
        ({"use_rslora": "false"}, "use_rslora is 'false'"),
        ({"target_modules": ["down_proj"]}, "target_modules does not name it"),
        ({"target_modules": "("}, "cannot be read"),
        ({"target_modules": 5}, "cannot be read"),
        ({"exclude_modules": ["q_proj"]}, "exclude_modules names it"),
        ({"layers_to_transform": [1]}, "layers_to_transform does not name its layer"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save names lm_head, which"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "stacked experts, is not read: merge it with PEFT"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    AdapterDirectory.of(written(tmp_path / "plain"))
    with pytest.raises(ArtifactError, match=message):
        AdapterDirectory.of(written(tmp_path / "other", **more))


def test_adapters_of_other_names_are_in_folders_of_their_own(tmp_path: Path) -> None:
    written(tmp_path / "safety")
    written(tmp_path / "second")
    with pytest.raises(ArtifactError, match="give one of its adapters .safety, second."):
        AdapterDirectory.of(tmp_path)


def test_pickled_and_sharded_adapters_are_not_read(tmp_path: Path) -> None:
    (written(tmp_path / "a") / "adapter_model.safetensors").rename(tmp_path / "a" / "adapter_model-00001-of-00001.safetensors")
    (tmp_path / "a" / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ArtifactError, match="pickled .*and sharded adapters are not read"):
        AdapterDirectory.of(tmp_path / "a")


def test_nothing_is_merged_into_a_quantised_base(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {"load_in_4bit": True}}))
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(5, 4)}, base / "model.safetensors")
    with pytest.raises(ArtifactError, match="is quantised"):
        merge_adapter(base, written(tmp_path / "a"), tmp_path / "out")
