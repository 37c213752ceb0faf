"""Finds the linear layers that ``--target_layers`` and ``--layer_type`` name."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from warp_ds.cluster.processes import rank
from warp_ds.errors import ConfigError
from warp_ds.models.classes import auto_class, reads_pictures
from warp_ds.models.context import text_config
from warp_ds.models.experts import Experts, UnknownExperts, find_experts, shape_of
from warp_ds.models.families import FUSED_NAMES, PATHS, fused_rows
from warp_ds.models.layer_names import LAYER_TYPES, ROUTER, in_ranges, parse_layer_types, parse_target_layers, type_order
from warp_ds.models.routers import find_router
from warp_ds.models.transformers_internals import zero3_hidden_from_transformers
from warp_ds.store.layers import TargetLayer, uncovered

logger = logging.getLogger(__name__)

#: Layer types that see the same input in all these models; phase 1 finds it by the input itself.
SHARING = (("ffn_up", "ffn_gate"), ("attn_q", "attn_k", "attn_v"))

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


def beside_text(model: nn.Module) -> set[str]:
    """Names of the parameters of all that a model which reads pictures too has beside its text decoder, embedding and output
    layer; none of any other model's."""
    if not reads_pictures(model):
        return set()
    text: Any = model
    kept = [text.get_decoder(), text.get_input_embeddings(), text.get_output_embeddings()]
    own = {id(p) for module in kept if module is not None for p in module.parameters()}
    return {name for name, p in model.named_parameters() if id(p) not in own}


def find_targets(model: nn.Module, target_layers: str, layer_type: str) -> list[TargetLayer]:
    """The layers to rotate, by block, then in the order of LAYER_TYPES. Works on ZeRO-3 partitioned parameters.

    Blocks that have no layer of a type are left out, and counted in rank 0's log. Raises ConfigError, naming the module, for a
    range outside the model, Conv1D, experts, quantised layers, fused projections whose rows are not known, and where nothing
    is left.
    """
    targets, lacking = targets_and_lacking(model, target_layers, layer_type)
    if lacking and rank() == 0:
        logger.info("%s", lacking_in_words(lacking))
    return targets


def targets_and_lacking(model: nn.Module, target_layers: str, layer_type: str) -> tuple[list[TargetLayer], Lacking]:
    """``find_targets``, and the blocks that have no layer of a type, by the type."""
    types = parse_layer_types(layer_type)
    prefix, blocks = find_blocks(model)
    chosen = parse_target_layers(target_layers, len(blocks))
    named: set[str] = set()
    found, lacking = [], {kind: Blocks([], len(chosen)) for kind in types}
    for index in chosen:
        for kind in types:
            targets = _targets(blocks[index], f"{prefix}.{index}", index, kind)
            found += [target for target in targets if target.name not in named]
            named.update(target.name for target in targets)
            if not targets:
                lacking[kind].without.append(index)
    if not found:
        inner = dict(blocks[chosen[0]].named_modules())
        linear = ", ".join(name for name, module in inner.items() if isinstance(module, nn.Linear)) or "no linear layers"
        raise ConfigError(
            f"{type(model).__name__} has no {' or '.join(types)} in the {len(chosen)} blocks that --target_layers "
            f"{target_layers} names: {prefix}.{chosen[0]}, a {type(blocks[chosen[0]]).__name__}, has {linear}"
        )
    return found, {kind: blocks for kind, blocks in lacking.items() if blocks.without}


@dataclass(frozen=True)
class Blocks:
    """Of the chosen blocks those without a layer of some type."""

    without: list[int]
    chosen: int


Lacking = dict[str, Blocks]
"""layer type -> the chosen blocks that have none"""


def lacking_in_words(lacking: Lacking) -> str:
    """'attn_q is in 1 of 4 blocks (not in 0-2)'"""
    parts = (
        f"{kind} is in {of.chosen - len(of.without)} of {of.chosen} blocks (not in {in_ranges(of.without)})"
        for kind, of in lacking.items()
    )
    return "; ".join(parts)


def targets_of(model_dir: Path, target_layers: str, layer_type: str) -> list[TargetLayer]:
    """``find_targets`` from the configuration in ``model_dir`` alone: no weight is read. Raises what transformers does, too."""
    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    # A Trainer of the same process leaves its configuration behind, by which transformers would gather and fill.
    with zero3_hidden_from_transformers(), torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=False)
    return targets_and_lacking(model, target_layers, layer_type)[0]


def check_targets(
    model_dir: Path, target_layers: str, layer_type: str, alone: bool = False, expert_basis: str = "block"
) -> None:
    """Raises what ``find_targets`` and ``check_expert_basis`` would, before any weight is read.

    ``alone``: nothing but the layers is to train, and no mask holds the rest: ConfigError also for some rows of a parameter.
    """
    try:
        targets = targets_of(model_dir, target_layers, layer_type)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError):
        return  # What is wrong with the model itself is said where it is loaded.
    check_expert_basis(targets, expert_basis)
    for parameter in uncovered(targets) if alone else ():
        named = ", ".join(layer.name for layer in targets if layer.parameter == parameter)
        raise ConfigError(
            f"{named} is not all of {parameter}, which without masks trains as a whole: give all of its types with "
            "--layer_type, or --train_scope all"
        )


def _targets(block: nn.Module, prefix: str, index: int, kind: str) -> list[TargetLayer]:
    """The block's layers of a type, none where it has none; of a feed-forward that is experts alone, theirs.

    ConfigError where it has one that cannot be rotated.
    """
    inner = dict(block.named_modules())
    if kind == ROUTER or kind.startswith("experts_"):
        experts = _experts(inner, prefix, index)
        if experts is None:
            return []
        return [find_router(inner, prefix, experts)] if kind == ROUTER else experts.layers(kind)
    target = _target(inner, prefix, index, kind)
    if target is None and kind.startswith("ffn_") and (experts := _experts(inner, prefix, index)):
        return experts.layers(kind.replace("ffn_", "experts_"))
    return [target] if target else []


def _experts(inner: dict[str, nn.Module], prefix: str, index: int) -> Experts | None:
    """A block's experts; ConfigError, with what else of the block works, where they are held in an unknown way."""
    try:
        return find_experts(inner, prefix, index)
    except UnknownExperts as error:
        others = [kind for kind in LAYER_TYPES if not kind.startswith("ffn_") and _works(inner, prefix, index, kind)]
        works = (
            f"what works on this model is --layer_type {','.join(others)}" if others else "nothing of this model can be rotated"
        )
        raise ConfigError(f"{error}: {works}") from error


def _works(inner: dict[str, nn.Module], prefix: str, index: int, kind: str) -> bool:
    try:
        return _target(inner, prefix, index, kind) is not None
    except ConfigError:
        return False


def _target(inner: dict[str, nn.Module], prefix: str, index: int, kind: str) -> TargetLayer | None:
    """The layer of a type that every token passes."""
    path = next((path for path in PATHS[kind] if path in inner), None)
    if path is None:
        return _fused(inner, prefix, index, kind)
    module, name = inner[path], f"{prefix}.{path}"
    _check_linear(module, name)
    return TargetLayer(name, index, kind, *_shape(module))


def _fused(inner: dict[str, nn.Module], prefix: str, index: int, kind: str) -> TargetLayer | None:
    """The rows of a fused weight that are the block's layer of a type; None where it has no such weight."""
    for path, module in inner.items():
        holder, _, leaf = path.rpartition(".")
        if leaf not in FUSED_NAMES.get(kind, ()) or len(shape_of(getattr(module, "weight", torch.empty(0)))) == 3:
            continue  # three dimensions: experts of a kind of their own
        name = f"{prefix}.{path}"
        _check_linear(module, name)
        height, n = _shape(module)
        rows = fused_rows(inner[holder], kind, height)
        if rows is None:
            raise ConfigError(
                f"{name} fuses several projections in one matrix, and which of its rows are {kind} is not known for a "
                f"{type(inner[holder]).__name__}: choose another --layer_type, or a model of another family"
            )
        return TargetLayer(f"{name}[{kind}]", index, kind, sum(end - first for first, end in rows), n, rows, height)
    return None


def _check_linear(module: nn.Module, name: str) -> None:
    if isinstance(module, Conv1D):
        raise ConfigError(
            f"{name} is a Conv1D, which stores W transposed, so that no rank has whole rows of it: GPT-2's kind of model is "
            "not supported; use one with plain linear layers"
        )
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise ConfigError(
            f"{name} is a {type(module).__name__} of {_dtype(module)}, not a plain linear layer: load "
            "the model unquantised and without adapters (merge them first)"
        )


def _shape(module: Any) -> tuple[int, int]:
    """(outputs, inputs), also where the weight is partitioned."""
    return module.out_features, module.in_features


def _dtype(module: nn.Module) -> str:
    weight = getattr(module, "weight", None)
    return str(weight.dtype).removeprefix("torch.") if weight is not None else "no weight"


def check_expert_basis(layers: Sequence[TargetLayer], expert_basis: str) -> None:
    """ConfigError where bases are to be of experts, and no layer is an expert's."""
    if expert_basis == "expert" and all(layer.expert is None for layer in layers):
        raise ConfigError(
            f"--expert_basis expert: none of the layers is an expert's (the first is {layers[0].name}): leave it out, or name "
            "experts_gate, experts_up with --layer_type"
        )


def shared_inputs(layers: Iterable[TargetLayer], expert_basis: str = "block") -> list[list[TargetLayer]]:
    """The layers grouped by the input that they see in the known architectures; file naming takes the first of each.

    ``expert_basis``: whether gates and ups of a block's experts see the block's tokens, or each expert's its own.
    """
    groups: dict[tuple[int, str], list[TargetLayer]] = {}
    for layer in sorted(layers, key=lambda layer: (layer.layer, type_order(layer.type))):
        shared = next((kinds[0] for kinds in SHARING if layer.type in kinds), layer.type)
        if layer.type.startswith(("experts_up", "experts_gate")):
            shared = f"experts_up_{layer.expert}" if expert_basis == "expert" else "experts_up"
        groups.setdefault((layer.layer, shared), []).append(layer)
    return list(groups.values())
