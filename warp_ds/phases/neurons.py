"""SN-Tune's safety neurons as masks: everything but the chosen rows and columns is frozen, in the original space."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from warp_ds.cluster import consensus, processes
from warp_ds.cluster.dealing import in_turn
from warp_ds.data.formats import encode_prompt
from warp_ds.data.sample import Sample
from warp_ds.errors import ConfigError
from warp_ds.method.baselines import attention_neurons, linear_neurons, robust_neurons, top_share
from warp_ds.method.mask import pack_bits
from warp_ds.models.layer_names import LAYER_TYPES
from warp_ds.models.targets import find_targets
from warp_ds.store.files import write_json
from warp_ds.store.fingerprints import fingerprint_rows
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import write_mask
from warp_ds.store.metadata import MasksMetadata, layer_entry, metadata_dict

logger = logging.getLogger(__name__)
LAYERS = ",".join(LAYER_TYPES)
#: Neurons of a block: name -> the weights' rows (or columns) that one neuron is.
NEURONS = {
    "ffn": {"ffn_up": "row", "ffn_gate": "row", "ffn_down": "column"},
    "attn_v": {"attn_v": "row"},
    "attn_q": {"attn_q": "row"},
    "attn_k": {"attn_k": "row"},
}


def least_importance(engine: Any, tokenizer: Any, prompts: Sequence[str | Sample]) -> dict[str, Tensor]:
    """'<block>.<kind of neuron>' -> the least importance [neurons] over the prompts, on every rank. Collective.

    The importances are ``method.baselines.linear_neurons`` and ``attention_neurons``, of projections as they come out
    of their layer (before rotary positions), as the formulas have them.
    """
    model = getattr(engine, "module", engine)
    device = next(model.parameters()).device
    importances: dict[str, Tensor] = {}
    ignore = [False]

    def note(name: str, importance: Tensor) -> None:
        if not ignore[0]:
            importance = importance.cpu()
            importances[name] = importance if name not in importances else torch.minimum(importances[name], importance)

    handles = [handle for number, modules in _modules(model).items() for handle in _watch(number, modules, note)]
    mine = in_turn(prompts, processes.world_size(), processes.rank(), None)
    try:
        with torch.no_grad():
            for prompt in tqdm(mine, desc="neurons", disable=processes.rank() != 0):
                # A rank without a prompt left runs one again, so that every rank enters the same collectives.
                ignore[0] = prompt is None
                ids = encode_prompt(prompts[0] if prompt is None else prompt, tokenizer)
                model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    parts = [part for part in processes.all_gather_object(importances) if part]
    return {name: torch.stack([part[name] for part in parts]).min(0).values for name in parts[0]}


def _modules(model: nn.Module) -> dict[int, dict[str, nn.Module]]:
    """Block -> its linear layers by type, and as 'attention' what holds them. ConfigError where a block has not all of them,
    each with a weight of its own."""
    modules: dict[int, dict[str, nn.Module]] = {}
    for layer in find_targets(model, "all", LAYERS):
        of_block = modules.setdefault(layer.layer, {})
        if not layer.rows:
            of_block[layer.type] = model.get_submodule(layer.module)
        if layer.type == "attn_q":
            of_block["attention"] = model.get_submodule(layer.module.rpartition(".")[0])
    for number, of_block in modules.items():
        if missing := sorted({*LAYER_TYPES} - of_block.keys()):
            raise ConfigError(
                f"safety neurons are rows and columns of {', '.join(LAYER_TYPES)}, each with a weight of its own: block "
                f"{number} of {type(model).__name__} has no such {', '.join(missing)}"
            )
    return modules


def _watch(number: int, modules: dict[str, nn.Module], note: Any) -> list[Any]:
    """Hooks on one block; a pre-hook sees the weight of its own layer whole, also under ZeRO-3."""
    kept: dict[str, Tensor] = {}
    width = int(modules["attention"].head_dim)  # type: ignore[arg-type]

    def ffn(module: nn.Module, inputs: Any) -> None:
        note(f"{number}.ffn", linear_neurons(inputs[0][0], module.weight))  # type: ignore[arg-type]

    def values(module: nn.Module, inputs: Any) -> None:
        # Query heads of one group read the same value channel.
        importance = linear_neurons(inputs[0][0], module.weight).view(-1, width)  # type: ignore[arg-type]
        groups = importance.square().view(kept["key"].shape[-1] // width, -1, width).sum(1).sqrt()
        note(f"{number}.attn_v", groups.reshape(-1))
        query, key = (kept[name][0].view(kept[name].shape[1], -1, width) for name in ("query", "key"))
        share = query.shape[1] // key.shape[1]
        heads = torch.stack([attention_neurons(query[:, h], key[:, h // share]) for h in range(query.shape[1])])
        note(f"{number}.attn_q", heads.reshape(-1))
        note(f"{number}.attn_k", heads.square().view(key.shape[1], share, width).sum(1).sqrt().reshape(-1))

    def keep(name: str) -> Any:
        return lambda module, inputs, output: kept.__setitem__(name, output)

    return [
        modules["ffn_down"].register_forward_pre_hook(ffn),
        modules["attn_o"].register_forward_pre_hook(values),
        modules["attn_q"].register_forward_hook(keep("query")),
        modules["attn_k"].register_forward_hook(keep("key")),
    ]


def safety_neuron_masks(
    engine: Any,
    tokenizer: Any,
    safety: Sequence[str | Sample],
    foundation: Sequence[str | Sample] | None,
    share: float,
    directory: Path,
    model_name: str,
    model_fingerprint: str,
) -> None:
    """Writes masks that freeze all but the safety neurons (less the foundation neurons, where given). Collective."""
    chosen = {name: top_share(least, share) for name, least in least_importance(engine, tokenizer, safety).items()}
    if foundation is not None:
        base = {name: top_share(least, share) for name, least in least_importance(engine, tokenizer, foundation).items()}
        chosen = {name: robust_neurons(neurons, base[name]) for name, neurons in chosen.items()}
    layers = [layer for layer in find_targets(getattr(engine, "module", engine), "all", LAYERS) if layer.type != "attn_o"]
    consensus.on_rank_0(
        lambda: _write(layers, chosen, directory, model_name, model_fingerprint, fingerprint_rows(safety)),
        "writing the neurons' masks",
    )


def _write(
    layers: Sequence[TargetLayer],
    chosen: dict[str, Tensor],
    directory: Path,
    model_name: str,
    model_fingerprint: str,
    data_fingerprint: str,
) -> None:
    metadata = MasksMetadata(
        keep_ratio=0.0,
        scope="layer",
        unit="neuron",
        score="safety neurons",
        basis="identity",
        basis_dir=None,
        basis_fingerprint=None,
        model_fingerprint=model_fingerprint,
        data_fingerprint=data_fingerprint,
        model_name=model_name,
    )
    for layer in layers:
        kind = next(kind for kind, weights in NEURONS.items() if layer.type in weights)
        neurons = chosen[f"{layer.layer}.{kind}"]
        trained = torch.zeros(layer.m, layer.n, dtype=torch.bool)
        if NEURONS[kind][layer.type] == "row":
            trained[neurons] = True
        else:
            trained[:, neurons] = True
        write_mask(directory, layer, pack_bits(~trained))
        frozen = int((~trained).sum())
        metadata.layers[layer.name] = layer_entry(layer, layer.mask_file, frozen=frozen, wanted=frozen, threshold=0.0)
        metadata.frozen += frozen
        metadata.entries += layer.m * layer.n
    metadata.keep_ratio = metadata.frozen / metadata.entries
    logger.info("%.2f %% of the coefficients are safety neurons'", 100 * (1 - metadata.keep_ratio))
    write_json(directory / "metadata.json", metadata_dict(metadata))
