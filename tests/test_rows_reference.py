"""Phases 1, 2 and 3 on fused projections and on a hybrid, on 1, 2 and 3 ranks, against the dense one-process reference.

GPT-NeoX fuses queries, keys and values head by head: each is many ranges of one weight's rows. Only some of them are named, so
the others must stay to the bit. LFM2's blocks are convolutions and attention by turns. Tolerances as in Llama's references.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dense_reference
import numpy as np
import pytest
import rows_reference
import torch
from phase3_jobs import family_jobs, make_model
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

import warp_ds
from warp_ds.evaluation.certificate import certify
from warp_ds.evaluation.movement import movement

WORLDS = (1, 2, 3)
SHARED = {"max_position_embeddings": 256, "pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1, "hidden_size": 30}


def neox(vocabulary: int) -> Any:
    sizes = {"intermediate_size": 41, "num_hidden_layers": 2, "num_attention_heads": 3}
    return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=vocabulary, **SHARED, **sizes, use_parallel_residual=False))


def phi3(vocabulary: int) -> Any:
    sizes = {"intermediate_size": 41, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1}
    return Phi3ForCausalLM(Phi3Config(vocab_size=vocabulary, **SHARED, **sizes))


def lfm2(vocabulary: int) -> Any:
    sizes = {"intermediate_size": 41, "num_hidden_layers": 3, "num_attention_heads": 3, "num_key_value_heads": 1}
    kinds = ["conv", "full_attention", "conv"]
    return Lfm2ForCausalLM(
        Lfm2Config(vocab_size=vocabulary, **SHARED, **sizes, layer_types=kinds, block_auto_adjust_ff_dim=False)
    )


#: Family -> its model, and the layers that are masked.
CASES = {
    "neox": (neox, "attn_q,attn_v,ffn_up,ffn_down"),
    "phi3": (phi3, "attn_k,ffn_gate"),
    "lfm2": (lfm2, "attn_q,attn_o,ffn_down"),
}
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
    return {world: run_ranks(world, family_jobs, layers, roots, world)[0] for world in WORLDS}


@pytest.mark.parametrize("family,world", RUNS)
def test_bases_and_masks_are_the_references(roots: Any, jobs: Any, family: str, world: int) -> None:
    root, parts = roots[family], rows_reference.read_parts(roots[family] / f"world{world}")
    of_types = {part.name.rpartition("[")[2].rstrip("]") for part in parts.values() if part.rows is not None}
    assert of_types == {"neox": {"attn_q", "attn_v"}, "phi3": {"attn_k", "ffn_gate"}, "lfm2": set()}[family]
    for name, sigma in rows_reference.covariances(root, parts).items():
        u, s = parts[name].basis.double().numpy(), parts[name].values.double().numpy()
        assert np.abs((u * s) @ u.T - sigma).max() < 1e-5 * np.abs(sigma).max(), name
    for name, scores in rows_reference.importances(root, parts, 3).items():
        wanted = dense_reference.highest([scores], round(0.2 * scores.size))[0]
        frozen = parts[name].frozen.numpy()
        assert frozen.sum() == wanted.sum()
        # What differs may only be scores within fp32's rounding of the threshold.
        least = scores[wanted].min()
        assert np.abs(scores[frozen != wanted] - least).max(initial=0.0) < 1e-4 * least, name
        assert (frozen != wanted).sum() <= 4, name


@pytest.mark.parametrize("family,world", RUNS)
def test_training_is_the_references_and_the_certificate_says_so(roots: Any, jobs: Any, family: str, world: int) -> None:
    root, artefacts = roots[family], roots[family] / f"world{world}"
    parts = rows_reference.read_parts(artefacts)
    expected, weights = rows_reference.training(root, parts)
    assert jobs[world][family] == pytest.approx(expected, abs=1e-6)
    start = load_file(root / "m" / "model.safetensors")
    trained = load_file(artefacts / "phase3_latest" / "model" / "model.safetensors")
    for name, value in trained.items():
        if name not in weights:
            assert torch.equal(value, start[name]), name
            continue
        assert (value.double() - weights[name]).abs().max() < 1e-5, name
        assert (value - start[name]).abs().max() > 1e-3, name
        taken = [row for part in parts.values() if f"{part.module}.weight" == name for row in part.rows or range(len(value))]
        rest = sorted({*range(len(value))} - {*taken})
        assert torch.equal(value[rest], start[name][rest]), f"rows of {name} that no mask names"
    certificate = certify(root / "m", artefacts / "phase3_latest" / "model", artefacts / "phase2_latest" / "masks")
    assert certificate.kept, certificate.problems
    assert len(certificate.layers) == len(parts)
    moved = movement(root / "m", artefacts / "phase3_latest" / "model", artefacts / "phase1_latest" / "basis")
    assert moved.keys() == parts.keys() and all(0 < value < 1 for value in moved.values())


@pytest.mark.parametrize("held", [True, False])
def test_other_rows_are_held_or_trained_by_a_plain_optimizer_too(roots: Any, jobs: Any, held: bool) -> None:
    root, artefacts = roots["neox"], roots["neox"] / "world1"
    basis, masks = ((artefacts / f"phase{i}_latest" / kind).resolve() for i, kind in ((1, "basis"), (2, "masks")))
    model = AutoModelForCausalLM.from_pretrained(root / "m")
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    warp_ds.protect_optimizer(model, optimizer, basis, masks, hold_rest=held)
    ids = torch.arange(24).view(2, 12)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    parts = rows_reference.read_parts(artefacts).values()
    for part in parts:
        before, after = start[f"{part.module}.weight"], model.state_dict()[f"{part.module}.weight"]
        rows = list(part.rows or range(len(before)))
        change = (after[rows] - before[rows]).double() @ part.basis.double()
        assert change[part.frozen].abs().max() < 1e-6 and change[~part.frozen].abs().max() > 1e-3, part.name
        if "query_key_value" in part.module:  # no mask names the keys
            taken = {
                row
                for other in rows_reference.read_parts(artefacts).values()
                if other.module == part.module
                for row in other.rows
            }
            rest = sorted({*range(len(before))} - taken)
            assert rest and torch.equal(before[rest], after[rest]) == held
