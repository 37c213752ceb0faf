"""Wrong input to phases 1 and 2: each stops before any work, with a message that names cause and cure."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from phase12_jobs import (
    FINGERPRINTS,
    Tokenizer,
    basis_arguments,
    basis_job,
    importance_arguments,
    make_rows,
    run_job,
    save_model,
)
from ranks import run_ranks
from tiny_models import SIZES, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, Glm4MoeConfig, GPT2Config, GptOssConfig, LlamaConfig, MixtralConfig, MptConfig

from warp_ds.errors import ArtifactError, ConfigError, DataError
from warp_ds.models.expert_rows import hold_in_rows
from warp_ds.models.layer_names import in_ranges, parse_target_layers
from warp_ds.models.targets import find_targets
from warp_ds.phases.basis import compute_basis, run_basis
from warp_ds.phases.importance import compute_masks
from warp_ds.store.bases import BasisStore
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import newest
from warp_ds.zero.batches import Samples
from warp_ds.zero.collect import TOKENS, Background, LayerInput, in_small_pieces
from warp_ds.zero.model import load_model, resolve_model_dir

ROWS = make_rows()


def on_meta(config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


# ---------------------------------------------------------------- target layers


def test_targets_are_found_with_their_shapes() -> None:
    found = find_targets(tiny_model("llama"), "all", "attn_v,ffn_down")
    assert [(t.name, t.layer, t.type, t.m, t.n) for t in found] == [
        ("model.layers.0.mlp.down_proj", 0, "ffn_down", 40, 51),
        ("model.layers.0.self_attn.v_proj", 0, "attn_v", 20, 40),
        ("model.layers.1.mlp.down_proj", 1, "ffn_down", 40, 51),
        ("model.layers.1.self_attn.v_proj", 1, "attn_v", 20, 40),
    ]
    assert [t.stem for t in find_targets(tiny_model("llama"), "last", "ffn_up")] == ["layer_01_ffn_up"]


@pytest.mark.parametrize(
    "config,kind,named",
    [
        (MptConfig(d_model=40, n_heads=4, n_layers=2, vocab_size=64), "attn_q", "transformer.blocks.0.attn.Wqkv fuses"),
        (GPT2Config(vocab_size=64, n_embd=40, n_layer=2, n_head=4), "ffn_down", "transformer.h.0.mlp.c_proj is a Conv1D"),
    ],
)
def test_layers_that_cannot_be_rotated_are_named(config: Any, kind: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        find_targets(on_meta(config), "all", kind)


def test_experts_that_transformers_holds_transposed_are_named_with_the_cure() -> None:
    """Of such sizes that nothing else would tell: W is square."""
    config = GptOssConfig(**{**SIZES, "intermediate_size": SIZES["hidden_size"]}, num_local_experts=2, head_dim=10)
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="layers.0.mlp.experts, a GptOssExperts, holds W transposed .*experts_in_rows=True"):
        find_targets(model, "all", "ffn_down")
    assert len(find_targets(model, "all", "attn_q")) == len(model.model.layers)
    hold_in_rows(model)
    assert len(find_targets(model, "all", "ffn_down")) == 2 * len(model.model.layers)


def test_attention_of_a_mixture_of_experts_is_fine() -> None:
    assert len(find_targets(on_meta(MixtralConfig(**SIZES, num_local_experts=2)), "all", "attn_q")) == 2


def test_experts_are_layers_each() -> None:
    targets = find_targets(on_meta(MixtralConfig(**SIZES, num_local_experts=2)), "last", "ffn_down,ffn_up,experts_up")
    assert [(t.name.removeprefix("model.layers.1.mlp.experts."), t.stem, t.rows, t.height, t.shape) for t in targets] == [
        ("down_proj[experts_down_000]", "layer_01_experts_down_000", ((0, 40),), 80, (40, 51)),
        ("down_proj[experts_down_001]", "layer_01_experts_down_001", ((40, 80),), 80, (40, 51)),
        ("gate_up_proj[experts_up_000]", "layer_01_experts_up_000", ((51, 102),), 204, (51, 40)),
        ("gate_up_proj[experts_up_001]", "layer_01_experts_up_001", ((153, 204),), 204, (51, 40)),
    ]
    # A block's expert for every token is its feed-forward; the routed ones are asked for by their own name.
    shared = Glm4MoeConfig(**SIZES, n_routed_experts=2, first_k_dense_replace=1, moe_intermediate_size=24, head_dim=10)
    assert [t.name for t in find_targets(on_meta(shared), "all", "ffn_down")] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.1.mlp.shared_experts.down_proj",
    ]


def test_adapters_and_quantised_layers_are_named() -> None:
    model = tiny_model("llama")
    model.model.layers[0].mlp.down_proj = nn.Sequential(nn.Linear(51, 40))
    with pytest.raises(ConfigError, match="layers.0.mlp.down_proj is a Sequential of no weight, not a plain linear"):
        find_targets(model, "all", "ffn_down")
    with pytest.raises(ConfigError, match="has no list of"):
        find_targets(Blockless(), "all", "ffn_down")


class Blockless(nn.Module):
    config = LlamaConfig(**SIZES)


@pytest.mark.parametrize(
    "text,blocks",
    [
        ("0-5,12,20-31", [*range(6), 12, *range(20, 32)]),
        ("31, 3,3-4", [3, 4, 31]),
        ("early,30-31", [*range(11), 30, 31]),
        ("last", [31]),
        ("all", [*range(32)]),
    ],
)
def test_lists_and_ranges_of_layers(text: str, blocks: list[int]) -> None:
    assert parse_target_layers(text, 32) == blocks
    assert parse_target_layers(in_ranges(blocks), 32) == blocks


@pytest.mark.parametrize(
    "layers,kind",
    [
        *((layers, "ffn_down") for layers in ("2", "0-2", "1-0", "x", "0,2", "0,", ",", "", "0-", "-1", "0,x", "0 1")),
        ("all", "mlp"),
        ("all", ""),
    ],
)
def test_layers_that_are_not_there(layers: str, kind: str) -> None:
    with pytest.raises(ConfigError, match="no block 2, only 0-1|1-0 names no block: the smaller|use all, early|choose from"):
        find_targets(tiny_model("llama"), layers, kind)


@pytest.mark.parametrize("layers,why", [("0-9", "no block 9, only 0-1"), ("0,late", "late names no block: of 2 blocks none")])
def test_what_of_the_layers_is_not_there_is_said(layers: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse_target_layers(layers, 2)


# ---------------------------------------------------------------- model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_model(tmp_path_factory.mktemp("model") / "llama", "llama")
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_no_such_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        resolve_model_dir(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="directory without config.json"):
        resolve_model_dir(str(tmp_path))
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="somebody/nothing: no such directory here, not in the hub's cache.*hf download"):
        resolve_model_dir("somebody/nothing")


def test_longer_than_the_context(model_dir: Path) -> None:
    with pytest.raises(DataError, match="--max_length 65 exceeds the model's context of 64"):
        load_model(basis_arguments(model_dir, max_length=65), {"zero_optimization": {"stage": 3}})


def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    with pytest.raises(ConfigError, match="its configuration or tokenizer cannot be read"):
        load_model(basis_arguments(tmp_path), {"zero_optimization": {"stage": 3}})


# ---------------------------------------------------------------- data and flags


def test_no_token_counts(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6], "labels": [-100, -100]}]
    model = tiny_model("llama")
    layers = find_targets(model, "all", "ffn_down")
    with pytest.raises(ConfigError, match="no token of the safety set counts with --token_scope response"):
        compute_basis(
            model, Tokenizer(), layers, rows, basis_arguments(tmp_path, token_scope="response"), tmp_path, FINGERPRINTS
        )
    with pytest.raises(ConfigError, match="no sample has a response token"):
        compute_masks(model, Tokenizer(), layers, [rows], None, importance_arguments(tmp_path), tmp_path, FINGERPRINTS)


def test_identity_needs_no_phase_1_and_has_no_singular_values(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--basis identity needs no phase 1"):
        run_basis(basis_arguments(tmp_path, basis="identity", output_dir=str(tmp_path), log_dir=str(tmp_path)))
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match="--score singular_value needs a basis"):
        compute_masks(
            model,
            Tokenizer(),
            find_targets(model, "all", "ffn_down"),
            [ROWS],
            None,
            importance_arguments(tmp_path, basis="identity", score="singular_value"),
            tmp_path,
            FINGERPRINTS,
        )


@pytest.mark.parametrize(
    "flag",
    [
        {"batch_size": 0},
        {"importance_batch_size": 0},
        {"keep_ratio": 1.5},
        {"keep_ratio": float("nan")},
        {"safety_samples": -1},
        {"device": "tpu"},
    ],
)
def test_flags_out_of_range(tmp_path: Path, flag: dict[str, Any]) -> None:
    arguments = importance_arguments(tmp_path, output_dir=str(tmp_path), log_dir=str(tmp_path), **flag)
    with pytest.raises(ConfigError, match="--" + next(iter(flag))):
        arguments.check()


# ---------------------------------------------------------------- a basis for something else


@pytest.fixture(scope="module")
def down_basis(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("down") / "basis"
    run_ranks(1, basis_job, [(basis_arguments(model_dir, layer_type="ffn_down"), ROWS, directory)])
    return directory


@pytest.mark.parametrize(
    "change,message",
    [
        ({"fingerprint": "other"}, r"belong to the model .* \(m\), not to .* \(other\)"),
        ({"layer_type": "attn_q"}, "has no layer model.layers.0.self_attn.q_proj: it was made for ffn_down of blocks 0-1"),
        ({"model": True}, "belongs to another model"),
    ],
)
def test_a_basis_of_something_else(down_basis: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    if "model" in change:
        model.config.intermediate_size = 33
        model = AutoModelForCausalLM.from_config(model.config)
    arguments = importance_arguments(tmp_path, layer_type=change.get("layer_type", "ffn_down"))
    layers = find_targets(model, "all", arguments.layer_type)
    fingerprints = {**FINGERPRINTS, "model": change.get("fingerprint", "m")}
    with pytest.raises(ArtifactError, match=message):
        compute_masks(model, Tokenizer(), layers, [ROWS], BasisStore(down_basis), arguments, tmp_path, fingerprints)


# ---------------------------------------------------------------- the phases as they are started


def test_both_phases_from_flags_to_artefacts(model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "safety.jsonl"
    pairs = [{"prompt": f"{a} {b}", "response": "no no"} for a in ("yes", "no") for b in ("yes", "no", "yes no")]
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    common = {
        "safety_data": str(data),
        "output_dir": str(tmp_path / "out"),
        "log_dir": str(tmp_path / "logs"),
        "max_length": 32,
        "layer_type": "ffn_down,attn_q",
    }
    basis = basis_arguments(model_dir, **common)
    named = dataclasses.replace(basis, run_name="twice")
    one, again = run_ranks(2, run_job, named, named)[0]
    assert one == again and (Path(one) / "finished.json").is_file()
    (run,) = {
        path for paths in run_ranks(2, run_job, importance_arguments(model_dir, keep_ratio=0.05, **common)) for path in paths
    }
    assert Path(run) == newest(tmp_path / "out", "phase2")
    masks = MaskStore(Path(run) / "masks")
    store = BasisStore(newest(tmp_path / "out", "phase1") / "basis")
    masks.check(store, masks.metadata.model_fingerprint, str(model_dir))
    assert masks.metadata.frozen == sum(round(0.05 * m * n) for m, n in ((40, 51), (40, 40), (40, 51), (40, 40)))
    assert store.metadata.tokens > 0 and not (Path(run) / "scores").exists()


@pytest.mark.parametrize("device, sizes", [("cpu", [2, 2, 1, 1, 1, 1, 1]), ("cuda", [5, 4])])
def test_micro_batches_are_cut_on_a_cpu(device: str, sizes: list[int]) -> None:
    """Until the widest activation, 1,000 wide in fp32, is below 8 MB (2,097 tokens), or down to one sample."""
    lengths = [1000, 800, 800, 900, 600, 600, 40, 600, 2400]
    rows = [{"input_ids": [3] * length, "labels": [3] * length} for length in lengths]
    layers = [TargetLayer("a", 0, "attn_q", 64, 64), TargetLayer("b", 0, "ffn_up", 1000, 64)]
    batches = [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    pieces = in_small_pieces(batches, layers, Samples(rows, Tokens(), device), 4)
    assert [i for piece in pieces for i in piece] == [i for batch in batches for i in batch]
    assert [len(piece) for piece in pieces] == sizes


class Tokens:
    eos_token_id = pad_token_id = 2


def test_a_lone_rank_on_a_cpu_decomposes_at_once() -> None:
    """Its failures come when all ranks meet, as ever; what follows a failure is not begun."""
    done: list[int] = []

    def failing() -> None:
        raise ArithmeticError("no convergence")

    with Background("decomposing") as decompositions:
        for job in (lambda: done.append(threading.get_ident()), failing, lambda: done.append(0)):
            decompositions.start(job)
        with pytest.raises(ArithmeticError, match="no convergence"):
            decompositions.meet()
    assert done == [threading.get_ident()]


def test_tokens_that_are_sent_are_copied() -> None:
    """The model may write over its activations."""
    kept, x = LayerInput([], TOKENS, None), torch.ones(3, 5)
    kept.add(x)
    x.fill_(7)
    assert torch.equal(kept.pieces[0], torch.ones(3, 5)) and kept.tokens == 3
