"""gpt-oss in MXFP4, as it is published, through phases 1 to 3: what comes out is certified against what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from phase3_jobs import make_model, phase3, phase12
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_zero_conversions import in_fp8, store_in_mxfp4
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM, Mxfp4Config

from warp_ds.errors import ArtifactError
from warp_ds.evaluation.certificate import BROKEN, KEPT, certify
from warp_ds.evaluation.unmasked import CHANGED, SAME
from warp_ds.models.directory import ModelDirectory
from warp_ds.models.targets import targets_of
from warp_ds.store.masks import MaskStore


def gpt_oss(vocabulary: int) -> Any:
    ends = dict(pad_token_id=2, bos_token_id=0, eos_token_id=1, max_position_embeddings=256)
    sizes = dict(hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)
    sizes |= dict(num_local_experts=3, num_experts_per_tok=2, head_dim=8)
    return GptOssForCausalLM(GptOssConfig(vocab_size=vocabulary, layer_types=["full_attention"] * 2, **sizes, **ends))


def job(root: Path) -> None:
    phase12(root, root / "out", "experts_down,router")
    phase3(root, root / "out", root / "out")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fewer_bits")
    make_model(made, gpt_oss)
    store_in_mxfp4(made / "m")
    run_ranks(2, job, made)
    return made


def dequantised(root: Path) -> dict[str, torch.Tensor]:
    """As transformers makes them, whole."""
    model = AutoModelForCausalLM.from_pretrained(
        root / "m", dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    return {name: p.detach() for name, p in model.named_parameters()}


def test_an_expert_is_read_as_transformers_makes_it(root: Path) -> None:
    masks = MaskStore((root / "out" / "phase2_latest" / "masks").resolve())
    directory, whole = ModelDirectory.of(root / "m", masks.layers), dequantised(root)
    experts = [layer for layer in masks.layers if layer.expert is not None]
    assert len(experts) == 6
    for layer in experts:
        assert torch.equal(directory.weight(layer), whole[layer.parameter][layer.expert].T), layer.name
    gate_up = directory.parameter("model.layers.1.mlp.experts.gate_up_proj")
    rows = whole["model.layers.1.mlp.experts.gate_up_proj"].transpose(1, 2)
    assert torch.equal(gate_up, torch.cat([rows[:, 0::2], rows[:, 1::2]], dim=1))


def test_it_is_certified_against_the_published_files(root: Path) -> None:
    after, masks = root / "out" / "phase3_latest" / "model", root / "out" / "phase2_latest" / "masks"
    certificate = certify(root / "m", after, masks)
    assert certificate.outcome == KEPT, certificate.problems
    rest = {of.what: of for of in certificate.not_claimed}
    assert rest["other layers"].state == SAME, rest["other layers"]
    stored = load_file(after / "model.safetensors")
    before = dequantised(root)["model.layers.0.mlp.experts.down_proj"]
    assert not torch.equal(stored["model.layers.0.mlp.experts.down_proj"], before)


def test_what_is_changed_shows(root: Path, tmp_path: Path) -> None:
    after, masks = root / "out" / "phase3_latest" / "model", root / "out" / "phase2_latest" / "masks"
    for file in after.resolve().iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.1.mlp.experts.gate_up_proj"][2, 5, 7] += 1.0
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    certificate = certify(root / "m", tmp_path, masks)
    rest = {of.what: of for of in certificate.not_claimed}
    assert (certificate.outcome, rest["other layers"].state) == (KEPT, CHANGED)
    assert rest["other layers"].detail.startswith("1 of "), rest["other layers"]
    stored["model.layers.1.mlp.experts.down_proj"][2] *= 1.01
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert certify(root / "m", tmp_path, masks).outcome == BROKEN


def test_float8_is_refused_with_the_cure(tmp_path: Path) -> None:
    in_fp8(tmp_path / "fp8")
    for kind in ("attn_q", "experts_down"):
        (layer, *_) = targets_of(tmp_path / "fp8", "0", kind)
        with pytest.raises(ArtifactError, match="a start model save again in the training's dtype"):
            ModelDirectory.of(tmp_path / "fp8", [layer]).weight(layer)
