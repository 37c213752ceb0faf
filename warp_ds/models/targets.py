"""Finds the linear layers that ``--target_layers`` and ``--layer_type`` name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from warp_ds.errors import ConfigError
from warp_ds.models.context import text_config
from warp_ds.models.layer_names import LAYER_TYPES, parse_layer_types, parse_target_layers
from warp_ds.models.transformers_internals import zero3_hidden_from_transformers
from warp_ds.store.layers import TargetLayer

#: Where a layer type is found in a block, for Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3 and all built like them.
MODULES = {
    "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_gate": "mlp.gate_proj",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_o": "self_attn.o_proj",
}
#: Layer types that see the same input in all these models; phase 1 finds it by the input itself.
SHARING = (("ffn_up", "ffn_gate"), ("attn_q", "attn_k", "attn_v"))
_FUSED = ("qkv_proj", "gate_up_proj", "query_key_value", "c_attn", "wqkv", "w_pack", "dense_h_to_4h", "in_proj")

#: What stands beside a text decoder, where a model's class does not say which part that is.
_BESIDE = {
    "vision_tower",
    "vision_model",
    "visual",
    "vision_embed_tokens",
    "audio_tower",
    "audio_model",
    "speech_encoder",
    "multi_modal_projector",
    "mtp",
    "mtp_layers",
    "encoder",
}


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the blocks of the model's text decoder, whatever towers (vision, audio) and drafts stand beside it.

    ConfigError where it has no list of blocks of the text configuration's depth.
    """
    config = text_config(model.config)
    depth = getattr(config, "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    within = {id(m) for m in (decoder if isinstance(decoder, nn.Module) else model).modules()}
    lists = [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, nn.ModuleList) and len(m) == depth and id(m) in within and not _BESIDE & set(name.split("."))
    ]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} has no list of {depth} decoder blocks: this kind of model is not "
            "supported (Llama, Mistral, Qwen 2, Gemma 2 and models built like them are)"
        )
    return lists[0]


def find_targets(model: nn.Module, target_layers: str, layer_type: str) -> list[TargetLayer]:
    """The layers to rotate, by block, then in the order of LAYER_TYPES. Works on ZeRO-3 partitioned parameters.

    Raises ConfigError, naming the module, for a range outside the model, fused projections, Conv1D, experts and
    quantised layers.
    """
    types = parse_layer_types(layer_type)
    prefix, blocks = find_blocks(model)
    return [
        _target(blocks[index], f"{prefix}.{index}", index, kind)
        for index in parse_target_layers(target_layers, len(blocks))
        for kind in types
    ]


def targets_of(model_dir: Path, target_layers: str, layer_type: str) -> list[TargetLayer]:
    """``find_targets`` from the configuration in ``model_dir`` alone: no weight is read. Raises what transformers does, too."""
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    # A Trainer of the same process leaves its configuration behind, by which transformers would gather and fill.
    with zero3_hidden_from_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return find_targets(model, target_layers, layer_type)


def check_targets(model_dir: Path, target_layers: str, layer_type: str) -> None:
    """Raises what ``find_targets`` would, before any weight is read."""
    try:
        targets_of(model_dir, target_layers, layer_type)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError):
        return  # What is wrong with the model itself is said where it is loaded.


def _target(block: nn.Module, prefix: str, index: int, kind: str) -> TargetLayer:
    inner = dict(block.named_modules())
    name = f"{prefix}.{MODULES[kind]}"
    if kind.startswith("ffn"):
        _refuse_experts(inner, prefix, kind)
    module = inner.get(MODULES[kind])
    if module is None:
        parent = MODULES[kind].split(".")[0]
        # What stands where the layer would be is named first.
        for other, candidate in sorted(inner.items(), key=lambda item: item[0].split(".")[0] != parent):
            if isinstance(candidate, Conv1D):
                raise ConfigError(
                    f"{prefix}.{other} is a Conv1D, which stores W transposed: GPT-2's kind of model is "
                    "not supported; use one with plain linear layers"
                )
            if other.rsplit(".", 1)[-1].lower() in _FUSED:
                raise ConfigError(
                    f"{prefix}.{other} fuses several projections in one matrix, so {kind} cannot be "
                    "rotated alone: choose another --layer_type, or a model with separate projections"
                )
        raise ConfigError(
            f"no module {name} for {kind}: {prefix} has "
            f"{', '.join(n for n, m in inner.items() if isinstance(m, nn.Linear)) or 'no linear layers'}"
        )
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise ConfigError(
            f"{name} is a {type(module).__name__} of {_dtype(module)}, not a plain linear layer: load "
            "the model unquantised and without adapters (merge them first)"
        )
    return TargetLayer(name, index, kind, module.out_features, module.in_features)


def _refuse_experts(inner: dict[str, nn.Module], prefix: str, kind: str) -> None:
    for name in inner:
        if name.rsplit(".", 1)[-1] in ("experts", "block_sparse_moe", "router"):
            raise ConfigError(
                f"{prefix}.{name} is a mixture of experts: its layers see different tokens each, and "
                f"{kind} of such a block is not supported; choose attention layers with --layer_type"
            )


def _dtype(module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    return str(weight.dtype).removeprefix("torch.") if weight is not None else "no weight"


def shared_inputs(layers: Iterable[TargetLayer]) -> list[list[TargetLayer]]:
    """The layers grouped by the input that they see in the known architectures; file naming takes the first of each."""
    groups: dict[tuple[int, str], list[TargetLayer]] = {}
    for layer in sorted(layers, key=lambda layer: (layer.layer, LAYER_TYPES.index(layer.type))):
        shared = next((kinds[0] for kinds in SHARING if layer.type in kinds), layer.type)
        groups.setdefault((layer.layer, shared), []).append(layer)
    return list(groups.values())
