"""Tiny configurations of transformers' decoder families, and what each must come to: its layers are found, or it is refused.

Four blocks each. A model is only made on meta, unless a test says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from warp_ds.models.layer_names import EXPERT_TYPES, ROUTER

ALL = "0-3"
MIXTURE = (*EXPERT_TYPES, ROUTER)
FFN, ATTENTION = ("ffn_down", "ffn_up", "ffn_gate"), ("attn_q", "attn_k", "attn_v", "attn_o")
BASE: dict[str, Any] = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
BASE |= dict(num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
OLD: dict[str, Any] = dict(n_embd=32, n_layer=4, n_head=4, n_inner=48, rotary_dim=4)
MAMBA: dict[str, Any] = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1)
LINEAR: dict[str, Any] = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
MOE: dict[str, Any] = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
MOE |= dict(n_routed_experts=4, shared_expert_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1, n_group=1)
MOE |= dict(topk_group=1)
MLA: dict[str, Any] = dict(
    q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, num_key_value_heads=4
)
VISION: dict[str, Any] = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28)
VISION |= dict(patch_size=14, crop_size=28)
AUDIO: dict[str, Any] = dict(hidden_size=16, intermediate_size=16, num_blocks=1, num_attention_heads=2, ext_pw_out_channel=16)
AUDIO |= dict(depthwise_separable_out_channel=16, nemo_conv_channels=16, input_size=16)
HEADS: dict[str, Any] = dict(head_dim=8)
ODD: dict[str, Any] = dict(layer_types=["linear_attention", "full_attention"] * 2)
LOCAL: dict[str, Any] = dict(layer_types=["sliding_attention", "full_attention"] * 2)


@dataclass(frozen=True)
class Family:
    """What must come of a configuration: layer type -> its blocks, or the words with which it is refused."""

    more: dict[str, Any]
    found: dict[str, str]
    fused: tuple[str, ...] = ()
    """Layer types that are rows of a fused weight, where they are found."""
    refused: dict[str, str] = field(default_factory=dict)
    walk: bool = True
    """Whether it can be run block by block."""
    kind: str = ""
    """model_type, where the row's name is another."""

    def config(self, name: str) -> Any:
        return CONFIG_MAPPING[self.kind or name](**{**BASE, **self.more})

    def model(self, name: str, device: str = "meta") -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(self.config(name)).eval()


def blocks(ffn: str = ALL, attention: str = ALL, gate: bool = True) -> dict[str, str]:
    kinds = {kind: ffn for kind in FFN if gate or kind != "ffn_gate"} | dict.fromkeys(ATTENTION, attention)
    return {kind: where for kind, where in kinds.items() if where}


def dense(**more: Any) -> Family:
    return Family(more, blocks())


def ungated(fused: tuple[str, ...] = (), walk: bool = True, refused: dict[str, str] | None = None, **more: Any) -> Family:
    """Up and down without a gate."""
    refused = {"ffn_gate": "has no ffn_gate"} | (refused or {})
    found = {kind: where for kind, where in blocks(gate=False).items() if kind not in refused}
    return Family(more, found, fused, refused, walk)


def experts(where: str = ALL, **more: Any) -> Family:
    """A mixture whose routed experts are layers in the blocks ``where``; ffn_* are what every token passes, else theirs."""
    return Family({**MOE, **more}, blocks() | dict.fromkeys(MIXTURE, where))


QKV = ("attn_q", "attn_k", "attn_v")
LLAMA_LIKE = (
    "llama mistral qwen2 gemma2 olmo olmo2 olmo3 granite smollm3 cohere cohere2 exaone4 ernie4_5 stablelm bitnet internlm3"
).split()
WITH_HEADS = "qwen3 gemma gemma3_text vaultgemma helium seed_oss hunyuan_v1_dense cwm ministral ministral3".split()

FAMILIES: dict[str, Family] = {
    **{kind: dense() for kind in LLAMA_LIKE},
    **{kind: dense(**HEADS) for kind in WITH_HEADS},
    # Feed-forward layers of other names, or without a gate.
    **{kind: ungated() for kind in ("apertus", "arcee", "nemotron", "phi", "starcoder2", "nanochat", "biogpt")},
    "opt": ungated(ffn_dim=48, word_embed_proj_dim=32),
    "xglm": ungated(num_layers=4, attention_heads=4, d_model=32, ffn_dim=48),
    "gptj": ungated(walk=False, **OLD),
    "gpt_neo": ungated(walk=False, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]]),
    "falcon_h1": Family({**HEADS, **MAMBA, "mamba_d_ssm": 64}, blocks(), walk=False),
    # Fused projections.
    "phi3": Family({}, blocks(), fused=(*QKV, "ffn_up", "ffn_gate")),
    "phi4_multimodal": Family({"vision_config": VISION, "audio_config": AUDIO}, blocks(), fused=(*QKV, "ffn_up", "ffn_gate")),
    "glm": Family(HEADS, blocks(), fused=("ffn_up", "ffn_gate")),
    "glm4": Family(HEADS, blocks(), fused=("ffn_up", "ffn_gate")),
    "gpt_neox": ungated(QKV),
    "persimmon": ungated(QKV),
    "bloom": ungated(QKV, walk=False, n_layer=4, n_head=4),
    "gpt_bigcode": ungated(QKV, **OLD),
    "falcon": ungated(QKV, walk=False, ffn_hidden_size=48),
    "mpt": ungated((), False, dict.fromkeys(QKV, "fuses several"), d_model=32, n_heads=4, n_layers=4),
    "codegen": ungated((), False, dict.fromkeys(QKV, "fuses several"), **OLD),
    "gpt2": Family(OLD, {}, refused={"ffn_down": "Conv1D", "attn_q": "Conv1D", "attn_o": "Conv1D"}),
    # Hybrids.
    "qwen3_next": Family({**MOE, **HEADS, **LINEAR, "mlp_only_layers": [0, 1, 2, 3]}, blocks(attention="3")),
    "qwen3_5_text": Family({**HEADS, **LINEAR}, blocks(attention="3")),
    "olmo_hybrid": Family({"linear_num_key_heads": 2, "linear_num_value_heads": 2, **HEADS}, blocks(attention="3")),
    "lfm2": Family({"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}, blocks(attention="1,3")),
    "jamba": Family(dict(num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4), blocks(attention="1,3")),
    "granitemoehybrid": Family(
        {"num_local_experts": 0, "shared_intermediate_size": 48, "layer_types": ["mamba", "attention"] * 2, **MAMBA},
        blocks(attention="1,3"),
        fused=("ffn_up", "ffn_gate"),
    ),
    "bamba": Family({"attn_layer_indices": [1], **MAMBA}, blocks(attention="1"), walk=False),
    "recurrent_gemma": Family({**HEADS, "lru_width": 32}, blocks(attention="2")),
    "nemotron_h": Family(
        {**HEADS, "layers_block_type": ["mamba", "attention", "mlp", "mamba"], "mamba_num_heads": 8, "mamba_head_dim": 8}
        | {"ssm_state_size": 8, "n_groups": 1},
        blocks("2", "1", gate=False),
        refused={"ffn_gate": "has no ffn_gate"},
    ),
    "mamba2": Family(
        dict(num_heads=8, head_dim=8, state_size=8, n_groups=1),
        {},
        refused={"ffn_down": "backbone.layers.0, a Mamba2Block, has mixer.in_proj, mixer.out_proj", "attn_q": "has no attn_q"},
    ),
    # Blocks that get more than the block before them returned.
    "gemma3n_text": Family(
        {**HEADS, "laurel_rank": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, **LOCAL}
        | {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4, "intermediate_size": [48] * 4},
        {**blocks(), "attn_k": "0-1", "attn_v": "0-1"},
        walk=False,
    ),
    "gemma4_text": Family({**HEADS, "global_head_dim": 8, "hidden_size_per_layer_input": 0, **LOCAL}, blocks()),
    "gemma4_text, shared keys": Family(
        {**HEADS, "global_head_dim": 8, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, **LOCAL}
        | {"num_kv_shared_layers": 2},
        {**blocks(), "attn_k": "0-1", "attn_v": "0-1"},
        walk=False,
        kind="gemma4_text",
    ),
    "inkling2_text": Family(
        {"n_routed_experts": 4, "num_experts_per_tok": 2}, blocks() | dict.fromkeys(MIXTURE, ALL), walk=False
    ),
    # Hyper-connections: a block gets several streams, and the last one mixes them.
    "qwen4_exp_text": Family(
        {**MOE, **HEADS, **LINEAR, "hc_lowrank": 8, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
        | {"indexer_budget": 16, "indexer_compress_ratio": 4, "num_hidden_layers": 4},
        blocks(attention="3") | dict.fromkeys(MIXTURE, ALL),
    ),
    # Mixtures of experts.
    **{kind: experts() for kind in ("mixtral", "qwen2_moe", "olmoe", "phimoe", "granitemoe")},
    "qwen3_moe": experts(**HEADS),
    "minimax": experts(**HEADS, **ODD),
    "ernie4_5_moe": experts("1-3"),
    **{kind: experts("1-3", **HEADS) for kind in ("glm4_moe", "dots1")},
    "laguna": experts("1-3", **HEADS, moe_router_logit_softcapping=2.0),  # its router returns capped logits
    # Experts that are stored transposed.
    "gpt_oss": experts(**HEADS, **LOCAL),
    "aria_text": experts(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
    "llama4_text": experts("1,3", **HEADS, **dict(intermediate_size_mlp=48, interleave_moe_layer_step=2)),
    "jetmoe": Family(MOE, {}, refused=dict.fromkeys((*FFN, *MIXTURE), "nothing of this model can be rotated")),
    **{
        kind: Family(
            {**MOE, **MLA},
            {**blocks(attention=""), "attn_o": ALL, **dict.fromkeys(MIXTURE, "1-3")},
            refused={"attn_q": "has no attn_q"},
            walk=kind != "glm_moe_dsa",  # its blocks return tuples
        )
        for kind in ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa")
    },
}

#: Families whose code decides which rows are which; and the kinds of Falcon.
CUT = {
    **{name: FAMILIES[name] for name in ("llama", "phi3", "glm4", "gpt_neox", "bloom", "gpt_bigcode", "persimmon")},
    "granitemoehybrid": FAMILIES["granitemoehybrid"],
    "gpt_bigcode, many": ungated(QKV, **OLD, multi_query=False),
    "falcon, one key": FAMILIES["falcon"],
    "falcon, many": ungated(QKV, walk=False, ffn_hidden_size=48, multi_query=False),
    "falcon, grouped": ungated(QKV, walk=False, ffn_hidden_size=48, new_decoder_architecture=True, num_kv_heads=2),
}


def table() -> str:
    """Rows of docs/families.md: what is found of every family, and what is refused with what words."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, family in FAMILIES.items():
        by_blocks: dict[str, list[str]] = {}
        for kind, where in family.found.items():
            by_blocks.setdefault("" if where == ALL else f" in blocks {where} of 0-3", []).append(kind)
        found = "; ".join(f"{_short(kinds)}{where}" for where, kinds in by_blocks.items())
        rows_of = f" ({_short(list(family.fused))} as rows of a fused weight)" if family.fused else ""
        by_reason: dict[str, list[str]] = {}
        for kind, reason in family.refused.items():
            by_reason.setdefault(reason, []).append(kind)
        refused = "; ".join(f"{_short(kinds)}: {reason}" for reason, kinds in by_reason.items())
        rows.setdefault((found + rows_of, refused), []).append(f"`{name}`")
    head = "| families (`model_type`) | works | refused by name |\n|---|---|---|\n"
    return head + "\n".join(f"| {' '.join(names)} | {found} | {refused} |" for (found, refused), names in rows.items()) + "\n"


def _short(kinds: list[str]) -> str:
    for group, word in ((ATTENTION, "attn_*"), (FFN, "ffn_*"), (EXPERT_TYPES, "experts_*")):
        if set(group) <= set(kinds):
            kinds = [word, *(kind for kind in kinds if kind not in group)]
    return ", ".join(kinds)


if __name__ == "__main__":
    print(table())
