"""Phases 1, 2 and 3 on mixtures of experts, on 1, 2 and 3 ranks, against the dense one-process reference.

Qwen 3 MoE has experts alone, DeepSeek's kind (GLM 4.5) a dense first block and an expert that every token passes; gpt-oss and
Llama 4 store theirs transposed. Routers are masked beside them, and ``APART`` has a basis for each expert's gate and up.
Tolerances as in Llama's references.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dense_reference
import experts_reference
import numpy as np
import pytest
import rows_reference
import torch
from phase3_jobs import family_jobs, make_model, phase12
from ranks import run_ranks
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from warp_ds.evaluation.certificate import certify
from warp_ds.evaluation.movement import movement
from warp_ds.store.bases import BasisStore
from warp_ds.store.masks import MaskStore

WORLDS = (1, 2, 3)
SHARED = {
    "max_position_embeddings": 256,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_size": 24,
    "intermediate_size": 28,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_experts_per_tok": 2,
}


def qwen3(vocabulary: int) -> Any:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(vocab_size=vocabulary, **SHARED, num_experts=5, moe_intermediate_size=20, head_dim=8)
    )


def mixtral(vocabulary: int) -> Any:
    return MixtralForCausalLM(MixtralConfig(vocab_size=vocabulary, **SHARED, num_local_experts=3))


def glm4(vocabulary: int) -> Any:
    sizes = {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 20,
        "head_dim": 8,
    }
    return Glm4MoeForCausalLM(Glm4MoeConfig(vocab_size=vocabulary, **SHARED, **sizes, n_group=1, topk_group=1))


def gpt_oss(vocabulary: int) -> Any:
    """Its down projections are square, so that no shape tells that they are stored transposed; biases of some size."""
    sizes = {"intermediate_size": 24, "num_local_experts": 3, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    model = GptOssForCausalLM(GptOssConfig(vocab_size=vocabulary, **{**SHARED, **sizes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj_bias"):
                parameter.normal_(0.0, 0.2)
    return model


def llama4(vocabulary: int) -> Any:
    sizes = {"num_local_experts": 3, "intermediate_size_mlp": 28, "interleave_moe_layer_step": 2, "head_dim": 8}
    return Llama4ForCausalLM(Llama4TextConfig(vocab_size=vocabulary, **SHARED, **sizes))


#: Family -> its model, and the layers that are masked.
CASES = {
    "qwen3": (qwen3, "ffn_down,ffn_up,ffn_gate,router"),
    "mixtral": (mixtral, "experts_down,experts_gate,attn_o"),
    "glm4": (glm4, "ffn_down,experts_up,experts_down,router"),
    "gpt_oss": (gpt_oss, "ffn_down,ffn_up,ffn_gate,router"),
    "llama4": (llama4, "experts_down,experts_up,router"),
}
APART = {1: ("qwen3",), 2: ("qwen3", "llama4"), 3: ("qwen3",)}
"""World size -> families with a basis for each expert's gate and up."""
#: Family, and whether experts have bases of their own -> bases. Routers share the block's where there is one.
FILES = {("qwen3", True): 22, ("mixtral", False): 10, ("glm4", False): 7, ("gpt_oss", False): 8, ("llama4", False): 5}
FILES[("llama4", True)] = 7
RUNS = [(family, world) for family in CASES for world in WORLDS]


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family, (build, _) in CASES.items():
        made[family] = tmp_path_factory.mktemp(family)
        make_model(made[family], build)
    return made


@pytest.fixture(scope="module")
def jobs(roots: dict[str, Path]) -> dict[int, dict[str, list[float]]]:
    layers = {family: of for family, (_, of) in CASES.items()}
    return {world: run_ranks(world, family_jobs, layers, roots, world, APART[world])[0] for world in WORLDS}


def parts_of(root: Path, world: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(experts' layers, others)"""
    parts = rows_reference.read_parts(root / f"world{world}")
    return {k: p for k, p in parts.items() if "[" in k}, {k: p for k, p in parts.items() if "[" not in k}


@pytest.mark.parametrize("family,world", RUNS)
def test_bases_and_masks_are_the_references(roots: Any, jobs: Any, family: str, world: int) -> None:
    root = roots[family]
    experts, others = parts_of(root, world)
    assert (len(experts), len(others)) == {
        "qwen3": (30, 2),
        "mixtral": (12, 2),
        "glm4": (8, 3),
        "gpt_oss": (18, 2),
        "llama4": (6, 1),
    }[family]
    inputs = experts_reference.experts_inputs(root)
    seen = {name: inputs[experts_reference.sees(part, family in APART[world])] for name, part in experts.items()}
    sigmas = {name: dense_reference.covariance(x) for name, x in seen.items()}
    files = {
        entry["file"]
        for entry in BasisStore((root / f"world{world}" / "phase1_latest" / "basis").resolve()).metadata.layers.values()
    }
    assert len(files) == FILES[family, family in APART[world]]
    few = {name for name, x in seen.items() if len(x) < experts[name].basis.shape[0]}
    for name, sigma in (sigmas | rows_reference.covariances(root, others)).items():
        part = (experts | others)[name]
        u, s = part.basis.double().numpy(), part.values.double().numpy()
        assert np.abs((u * s) @ u.T - sigma).max() < 1e-5 * np.abs(sigma).max(), name
        assert name not in few or u.shape[1] < u.shape[0], name
    scores = experts_reference.importances(root, experts, 3) | rows_reference.importances(root, others, 3)
    for name, of_layer in scores.items():
        wanted = dense_reference.highest([of_layer], round(0.2 * of_layer.size))[0]
        frozen = (experts | others)[name].frozen.numpy()
        # What differs may only be scores within fp32's rounding of the threshold.
        assert abs(int(frozen.sum()) - int(wanted.sum())) <= 2, name
        least = of_layer[wanted].min(initial=np.inf)
        assert np.abs(of_layer[frozen != wanted] - least).max(initial=0.0) < 1e-4 * least, name
        assert (frozen != wanted).sum() <= 4, name


@pytest.mark.parametrize("family,world", RUNS)
def test_training_is_the_references_and_the_certificate_says_so(roots: Any, jobs: Any, family: str, world: int) -> None:
    root, artefacts = roots[family], roots[family] / f"world{world}"
    experts, others = parts_of(root, world)
    parts = experts | others
    expected, weights = experts_reference.training(root, parts)
    assert jobs[world][family] == pytest.approx(expected, abs=1e-6)
    start, trained = (
        dict(AutoModelForCausalLM.from_pretrained(of).named_parameters())
        for of in (root / "m", artefacts / "phase3_latest" / "model")
    )
    for name, value in trained.items():
        if name not in weights:
            assert torch.equal(value, start[name]), name
            continue
        assert (value.double() - weights[name]).abs().max() < 1e-5, name
        assert (value - start[name]).abs().max() > 1e-3, name
    certificate = certify(root / "m", artefacts / "phase3_latest" / "model", artefacts / "phase2_latest" / "masks")
    assert certificate.kept, certificate.problems
    assert len(certificate.layers) == len(parts)
    moved = movement(root / "m", artefacts / "phase3_latest" / "model", artefacts / "phase1_latest" / "basis")
    assert moved.keys() == parts.keys()


def test_one_threshold_for_a_blocks_experts(tmp_path: Path) -> None:
    make_model(tmp_path, mixtral)
    run_ranks(2, block_job, tmp_path)
    parts = rows_reference.read_parts(tmp_path / "out")
    masks = MaskStore((tmp_path / "out" / "phase2_latest" / "masks").resolve())
    assert masks.metadata.scope == "block" and len(parts) == 6
    scores = experts_reference.importances(tmp_path, parts, 3)
    for block in ("layers.0.", "layers.1."):
        names = [name for name in parts if block in name]
        wanted = dense_reference.highest([scores[name] for name in names], round(0.2 * sum(scores[n].size for n in names)))
        frozen = [parts[name].frozen.numpy() for name in names]
        assert sum(int(f.sum()) for f in frozen) == sum(int(w.sum()) for w in wanted)
        assert len({int(f.sum()) for f in frozen}) > 1, "every expert has the same share"
        assert sum(int((f != w).sum()) for f, w in zip(frozen, wanted, strict=True)) <= 4  # fp32's rounding at the threshold


def block_job(root: Path) -> None:
    phase12(root, root / "out", "experts_down", mask_scope="block")
