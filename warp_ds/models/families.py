"""Where transformers' decoder blocks keep each layer type: the paths of its module, and its rows where a weight fuses several.

A block is known by what is in it, not by its model's name: the first path that a block has is the layer. A family whose
code is built of the same parts needs no entry; one that fuses projections has one in ``FUSED``, by the class that holds
the fused weight, since only its code says which rows are which.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from warp_ds.models.layer_names import LAYER_TYPES
from warp_ds.store.layers import Ranges

#: Layer type -> the paths in a block at which transformers' families have it; the first that is there counts.
PATHS: dict[str, tuple[str, ...]] = {
    "ffn_down": (
        "mlp.down_proj",  # Llama and all built like it
        "feed_forward.down_proj",  # Falcon-H1, Jamba, the dense blocks of Llama 4
        "mixer.down_proj",  # the feed-forward blocks of Nemotron-H
        "mlp_block.down_proj",  # RecurrentGemma
        "ffn.down_proj",  # MPT
        "feed_forward.w2",  # LFM2
        "mlp.fc2",  # Phi, nanochat
        "fc2",  # OPT, BioGPT, XGLM
        "mlp.c_proj",  # StarCoder 2, GPT-Neo, GPT-BigCode
        "mlp.dense_4h_to_h",  # GPT-NeoX, Falcon, BLOOM, Persimmon
        "mlp.fc_out",  # GPT-J, CodeGen
        "shared_mlp.output_linear",  # Granite 4
        "mlp.shared_expert.down_proj",  # what every token passes beside a mixture's routed experts: Qwen 2 MoE, Qwen 3-Next
        "mlp.shared_experts.down_proj",  # DeepSeek, GLM 4.5, Ernie 4.5
        "mlp.shared_mlp.down_proj",  # HunYuan
        "feed_forward.shared_expert.down_proj",  # Llama 4
    ),
    "ffn_up": (
        "mlp.up_proj",
        "feed_forward.up_proj",
        "mixer.up_proj",
        "mlp_block.up_proj",
        "ffn.up_proj",
        "feed_forward.w3",
        "mlp.fc1",
        "fc1",
        "mlp.c_fc",
        "mlp.dense_h_to_4h",
        "mlp.fc_in",
        "mlp.shared_expert.up_proj",
        "mlp.shared_experts.up_proj",
        "mlp.shared_mlp.up_proj",
        "feed_forward.shared_expert.up_proj",
    ),
    "ffn_gate": (
        "mlp.gate_proj",
        "feed_forward.gate_proj",
        "mlp_block.gate_proj",
        "feed_forward.w1",
        "mlp.shared_expert.gate_proj",
        "mlp.shared_experts.gate_proj",
        "mlp.shared_mlp.gate_proj",
        "feed_forward.shared_expert.gate_proj",
    ),
    **{
        f"attn_{part}": (
            f"self_attn.{part}_proj",
            f"mixer.{part}_proj",  # the attention blocks of Nemotron-H
            f"temporal_block.{part}_proj",  # RecurrentGemma
            f"attn.{part}_proj",  # GPT-J
            f"attn.attention.{part}_proj",  # GPT-Neo
        )
        for part in "qkv"
    },
    "attn_o": (
        "self_attn.o_proj",
        "self_attn.out_proj",  # OPT, LFM2
        "self_attn.dense",  # Phi, Persimmon
        "mixer.o_proj",
        "temporal_block.o_proj",
        "attention.dense",  # GPT-NeoX
        "self_attention.dense",  # Falcon, BLOOM
        "attn.out_proj",
        "attn.attention.out_proj",
        "attn.c_proj",  # GPT-BigCode
    ),
}

#: Names of weights that fuse several of these layer types.
_QKV = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "W_pack", "qkv")
_GATE_UP = ("gate_up_proj", "input_linear")
FUSED_NAMES = {**dict.fromkeys(("attn_q", "attn_k", "attn_v"), _QKV), **dict.fromkeys(("ffn_up", "ffn_gate"), _GATE_UP)}

Cut = Callable[[Any, int], dict[str, Ranges]]
"""(the module that holds a fused weight, its rows) -> layer type -> its rows"""


def _halves(module: Any, rows: int) -> dict[str, Ranges]:
    return {"ffn_gate": ((0, rows // 2),), "ffn_up": ((rows // 2, rows),)}


def _in_turn(queries: int, keys: int) -> dict[str, Ranges]:
    """All queries, then all keys, then all values."""
    return {
        "attn_q": ((0, queries),),
        "attn_k": ((queries, queries + keys),),
        "attn_v": ((queries + keys, queries + 2 * keys),),
    }


def _by_group(groups: int, queries: int, width: int) -> dict[str, Ranges]:
    """Group after group of ``queries`` query heads, a key head and a value head, of ``width`` rows each."""
    stride = (queries + 2) * width
    places = {"attn_q": (0, queries), "attn_k": (queries, queries + 1), "attn_v": (queries + 1, queries + 2)}
    return {
        kind: tuple((g * stride + first * width, g * stride + end * width) for g in range(groups))
        for kind, (first, end) in places.items()
    }


def _phi3(module: Any, rows: int) -> dict[str, Ranges]:
    keys = module.config.num_key_value_heads * module.head_dim
    return _in_turn(rows - 2 * keys, keys)


def _by_head(module: Any, rows: int) -> dict[str, Ranges]:
    heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
    heads = heads or module.config.num_attention_heads
    return _by_group(heads, 1, rows // (3 * heads))


def _falcon(module: Any, rows: int) -> dict[str, Ranges]:
    if module.new_decoder_architecture:
        return _by_group(module.num_kv_heads, module.num_heads // module.num_kv_heads, module.head_dim)
    return _in_turn(rows - 2 * module.head_dim, module.head_dim) if module.multi_query else _by_head(module, rows)


def _bigcode(module: Any, rows: int) -> dict[str, Ranges]:
    return _in_turn(rows - 2 * module.kv_dim, module.kv_dim) if module.multi_query else _by_head(module, rows)


#: Class of the module that holds a fused weight -> how its rows are cut, as its forward does in transformers 5.23.
FUSED: dict[str, Cut] = {
    "Phi3Attention": _phi3,
    "Phi4MultimodalAttention": _phi3,
    "GPTNeoXAttention": _by_head,
    "BloomAttention": _by_head,
    "PersimmonAttention": _by_head,
    "MiniMaxLightningAttention": _by_head,
    "FalconAttention": _falcon,
    "GPTBigCodeAttention": _bigcode,
    "Phi3MLP": _halves,
    "Phi4MultimodalMLP": _halves,
    "GlmMLP": _halves,
    "Glm4MLP": _halves,
    "GraniteMoeHybridMLP": _halves,
}

assert set(PATHS) == set(LAYER_TYPES)


def fused_rows(holder: nn.Module, kind: str, rows: int) -> Ranges | None:
    """The rows of the layer type ``kind`` in a fused weight of ``rows`` rows that lies in ``holder``; None where its code is
    not known to us, or makes other rows than the weight has."""
    cut = FUSED.get(type(holder).__name__)
    of_kind = cut(holder, rows) if cut else {}
    covered = sum(end - first for ranges in of_kind.values() for first, end in ranges)
    return of_kind.get(kind) if covered == rows else None
