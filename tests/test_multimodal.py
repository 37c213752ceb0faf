"""A Gemma 3 that reads pictures (its tower as deep as its text part) through all phases: only masked text layers change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from phase3_jobs import common, make_model, phase3, phase12
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4Config,
    LlavaConfig,
    Mistral3Config,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
)

from warp_ds.evaluation.certificate import certify
from warp_ds.evaluation.movement import movement
from warp_ds.flags.arguments import SafetyTuningArguments
from warp_ds.launch.planning.fit import make_plan
from warp_ds.models.classes import auto_class, is_language_model
from warp_ds.models.targets import find_targets
from warp_ds.phases.merge import merge, safe_delta_formula
from warp_ds.phases.training import run_safety_tuning
from warp_ds.store.bases import BasisStore

TEXT: dict[str, Any] = dict(hidden_size=40, intermediate_size=51, num_hidden_layers=2, num_attention_heads=4)
TEXT |= dict(num_key_value_heads=2, head_dim=10, max_position_embeddings=256, pad_token_id=2, bos_token_id=0, eos_token_id=1)
VISION = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8)
PROCESSOR = {"preprocessor_config.json": {"image_processor_type": "Gemma3ImageProcessor"}, "processor_config.json": {"a": 1}}


def gemma3(vocabulary: int) -> Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config={**TEXT, "vocab_size": vocabulary + 2, "sliding_window": 8},
        vision_config=VISION,
        mm_tokens_per_image=1,
        image_token_index=vocabulary,
    )
    return Gemma3ForConditionalGeneration(config)


def job(root: Path) -> dict[str, str]:
    phase12(root, root / "out", "ffn_down,attn_q")
    tuned = run_safety_tuning(
        SafetyTuningArguments(
            **common(root, root / "out", safety_data=str(root / "refusals_fit.jsonl"), safety_samples=4, epochs=1)
        ),
        {"weight_decay": 0.1},
    )
    runs = {scope: phase3(root, root / "out", root / scope, train_scope=scope, epochs=2) for scope in ("warp", "all")}
    return {**{scope: str(run / "model") for scope, run in runs.items()}, "phase0": str(tuned / "model")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gemma3")
    make_model(path, gemma3)
    for name, content in PROCESSOR.items():
        (path / "m" / name).write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def models(root: Path) -> dict[str, Path]:
    return {name: Path(path) for name, path in run_ranks(2, job, root)[0].items()}


@pytest.mark.parametrize("name", ["warp", "all", "phase0"])
def test_what_is_no_text_is_carried_through(root: Path, models: dict[str, Path], name: str) -> None:
    start, trained = (load_file(path / "model.safetensors") for path in (root / "m", models[name]))
    assert trained.keys() == start.keys() and any("vision_tower" in key for key in start)
    changed = {key for key in start if not torch.equal(start[key], trained[key])}
    assert changed and all("language_model" in key for key in changed)
    if name == "warp":
        assert {key.partition(".layers.")[2] for key in changed} == {
            f"{block}.{module}.weight" for block in (0, 1) for module in ("mlp.down_proj", "self_attn.q_proj")
        }
    for file, content in PROCESSOR.items():
        assert json.loads((models[name] / file).read_text()) == content
    assert type(AutoModelForImageTextToText.from_pretrained(models[name])) is Gemma3ForConditionalGeneration


def test_the_certificate_and_the_movement_read_stored_names(root: Path, models: dict[str, Path]) -> None:
    basis, masks = ((root / "out" / f"phase{i}_latest" / kind) for i, kind in ((1, "basis"), (2, "masks")))
    certificate = certify(root / "m", models["warp"], masks)
    assert certificate.kept and len(certificate.layers) == 4, certificate.problems
    moved = movement(root / "m", models["warp"], basis)
    assert len(moved) == 4 and all(value > 0 for value in moved.values())


def test_safe_delta_merges_stored_names(root: Path, models: dict[str, Path], tmp_path: Path) -> None:
    basis = root / "out" / "phase1_latest" / "basis"
    merge(models["warp"], root / "m", tmp_path / "merged", safe_delta_formula(basis, 1e6), layers=BasisStore(basis).layers)
    start, merged = load_file(root / "m" / "model.safetensors"), load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == start.keys()
    assert sum(not torch.equal(start[key], merged[key]) for key in start) == 4


def test_plan_counts_the_whole_model(root: Path) -> None:
    stored = load_file(root / "m" / "model.safetensors")
    assert make_plan(str(root / "m")).shape.parameters == sum(tensor.numel() for tensor in stored.values())


SMALL = {**TEXT, "vocab_size": 64}
TOWER = {**VISION, "depth": 2, "num_heads": 2, "out_hidden_size": 40, "vision_output_dim": 16, "projector_output_dim": 16}
OTHERS = {
    "qwen2_5_vl": Qwen2_5_VLConfig(text_config=SMALL, vision_config=TOWER),
    "qwen3_vl": Qwen3VLConfig(text_config=SMALL, vision_config=TOWER),
    "qwen3_5": Qwen3_5Config(
        text_config={**SMALL, "layer_types": ["linear_attention", "full_attention"]},
        vision_config=TOWER,
        architectures=["Qwen3_5ForConditionalGeneration"],
    ),
    "llava": LlavaConfig(
        text_config={**SMALL, "model_type": "llama"}, vision_config={**VISION, "model_type": "clip_vision_model"}
    ),
    "mistral3": Mistral3Config(
        text_config={**SMALL, "model_type": "mistral"}, vision_config={**VISION, "model_type": "pixtral", "head_dim": 8}
    ),
    "llama4": Llama4Config(
        text_config={**SMALL, "interleave_moe_layer_step": 3, "intermediate_size_mlp": 51},
        vision_config=TOWER,
        architectures=["Llama4ForConditionalGeneration"],
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_that_read_pictures(kind: str) -> None:
    """The whole class is loaded, and its text part's layers are found, with a tower that is as deep."""
    config = OTHERS[kind]
    assert is_language_model(config) and auto_class(config) is AutoModelForImageTextToText
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    names = [layer.name for layer in find_targets(model, "all", "attn_o,ffn_down")]
    assert len(names) == (3 if kind == "qwen3_5" else 4) and all("language_model." in name for name in names), names
