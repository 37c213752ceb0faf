"""Phase 1: one orthonormal basis per distinct layer input (sections 2.1 and 2.2 of the method)."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from warp_ds.artifacts import (
    BasisMetadata,
    TargetLayer,
    fingerprint_model,
    fingerprint_rows,
    layer_entry,
    metadata_dict,
    write_json,
    write_tensors,
)
from warp_ds.config import BasisArguments, ConfigError
from warp_ds.data.datasets import load_pairs
from warp_ds.data.formats import encode_dataset
from warp_ds.method.eigenbasis import Basis, covariance_basis, random_basis, weight_basis
from warp_ds.phases.run import start_run
from warp_ds.phases.targets import find_blocks, find_targets, shared_inputs
from warp_ds.zero.batches import Samples
from warp_ds.zero.collect import Deferred, collect_with_hooks, owners, reduce_to_owners
from warp_ds.zero.fetch import gathered
from warp_ds.zero.model import context_length, load_model, resolve_model_dir
from warp_ds.zero.runtime import (
    all_gather_object,
    init_distributed,
    on_every_rank_or_none,
    on_rank_0,
    rank,
    world_size,
    zero3_config,
)

logger = logging.getLogger(__name__)


def run_basis(arguments: BasisArguments, pairs: Any = None) -> Path:
    """Runs phase 1 and returns its run directory; ``pairs`` (rows of prompt and response) replace --safety_data."""
    arguments.check()
    _check(arguments)
    init_distributed(arguments.resolved_device, arguments.timeout)
    ds_config = zero3_config(arguments)
    pairs = safety_pairs(arguments) if pairs is None else pairs
    model_dir = resolve_model_dir(arguments.model_name)
    inputs = {"model": on_rank_0(lambda: fingerprint_model(model_dir), "reading the model"),
              "data": fingerprint_rows(pairs)}
    with start_run("phase1", arguments, inputs=inputs) as run:
        if run.done:
            return run.directory
        model, tokenizer = load_model(arguments, ds_config)
        layers = find_targets(model, arguments.target_layers, arguments.layer_type)
        dataset = encode_dataset(pairs, tokenizer, arguments.max_length, context_length(model.config),
                                 prompt_only=arguments.token_scope == "prompt")
        compute_basis(model, tokenizer, layers, dataset, arguments, run.directory / "basis", inputs)
        run.finish()
    return run.directory


def safety_pairs(arguments: Any) -> Any:
    """The safety set of phases 1 and 2, in order."""
    with on_every_rank_or_none("reading the safety data"):
        return load_pairs(
            arguments.safety_data, split=arguments.safety_split, samples=arguments.safety_samples,
            prompt_column=arguments.prompt_column, response_column=arguments.response_column,
            refusal_file=arguments.refusal_file,
        )


def compute_basis(
    model: Any, tokenizer: Any, layers: Sequence[TargetLayer], dataset: Any, arguments: BasisArguments,
    directory: Path, fingerprints: dict[str, str],
) -> BasisMetadata:
    """Writes the bases of ``layers`` into ``directory``; every rank calls it, with the same arguments.

    ``dataset``: rows of input_ids and labels (with --token_scope prompt: of the prompts alone). ``fingerprints``: of
    'model' and 'data'. Raises NotFinite, ConfigError.
    """
    _check(arguments)
    samples = Samples(dataset, tokenizer, arguments.resolved_device, arguments.token_scope)
    metadata = BasisMetadata(
        basis=arguments.basis, model_fingerprint=fingerprints["model"], data_fingerprint=fingerprints["data"],
        token_scope=arguments.token_scope, model_name=arguments.model_name, tokens=samples.tokens,
    )
    entries = _from_activations if arguments.basis == "activation" else _without_data
    found: dict[str, tuple[list[TargetLayer], dict[str, Any]]] = {}
    for part in all_gather_object(entries(model, layers, samples, arguments, directory)):
        found.update(part)
    order = {layer.name: position for position, layer in enumerate(layers)}
    for file, (sharing, entry) in sorted(found.items(), key=lambda item: min(order[x.name] for x in item[1][0])):
        metadata.bases[file] = entry
        metadata.layers.update({layer.name: layer_entry(layer, file) for layer in sharing})
    metadata.layers = {layer.name: metadata.layers[layer.name] for layer in layers}
    on_rank_0(lambda: write_json(directory / "metadata.json", metadata_dict(metadata)), "writing the basis metadata")
    return metadata


Entries = dict[str, tuple[list[TargetLayer], dict[str, Any]]]
"""file -> (the layers that share it, its entry in the metadata)"""


def _from_activations(
    model: Any, layers: Sequence[TargetLayer], samples: Samples, arguments: BasisArguments, directory: Path
) -> Entries:
    """Σ over the counted tokens, then Σ = U Λ Uᵀ on each basis's owner. Returns the entries of this rank's files."""
    if samples.tokens == 0:
        raise ConfigError(f"no token of the safety set counts with --token_scope {arguments.token_scope}: use another "
                          "scope, more samples, or a longer --max_length (responses may have been cut off)")
    _, blocks = find_blocks(model)
    groups = collect_with_hooks(model, list(blocks), layers, samples, arguments.batch_size)
    entries: Entries = {}
    failure = Deferred("decomposing the covariances")
    for group, tokens, sigma in reduce_to_owners(groups, arguments.svd_placement):
        if tokens != samples.tokens:
            raise ConfigError(f"{group.first.name} saw {tokens} tokens, but the safety set has {samples.tokens}: the "
                              "model runs this layer more than once a pass, or not for every token")
        with failure:
            if sigma is not None:
                begun = time.monotonic()
                basis = covariance_basis(sigma, arguments.energy, arguments.max_rank)
                entries |= _write(directory, group.layers, basis, tokens, time.monotonic() - begun)
    failure.meet()
    return entries


def _without_data(
    model: Any, layers: Sequence[TargetLayer], samples: Samples, arguments: BasisArguments, directory: Path
) -> Entries:
    """--basis weight (one basis a layer: from its own W) and random (one per shared input)."""
    groups = shared_inputs(layers) if arguments.basis == "random" else [[layer] for layer in layers]
    ranks = 1 if arguments.svd_placement == "rank0" else world_size()
    entries: Entries = {}
    failure = Deferred("making the bases")
    dealt = owners([float(g[0].n) ** 3 for g in groups], ranks)
    for number, (group, owner) in enumerate(zip(groups, dealt, strict=True)):
        begun = time.monotonic()
        weight = model.get_submodule(group[0].name).weight
        with gathered([weight] if arguments.basis == "weight" else []):
            w = weight.detach().float().clone() if owner == rank() else torch.empty(0)
        with failure:
            if owner == rank():
                if arguments.basis == "random":
                    basis = random_basis(group[0].n, arguments.seed * 1_000_003 + number, arguments.max_rank)
                else:
                    basis = weight_basis(w, arguments.energy, arguments.max_rank)
                entries |= _write(directory, group, basis, 0, time.monotonic() - begun)
    failure.meet()
    return entries


def _write(directory: Path, layers: Sequence[TargetLayer], basis: Basis, tokens: int, seconds: float) -> Entries:
    """Writes one basis file, named by its first layer type; returns its entry."""
    first = shared_inputs(layers)[0][0]
    file = f"{first.stem}_svd.safetensors"
    write_tensors(directory / file, {"U": basis.columns, "S": basis.values})
    entry = {
        "n": first.n, "rank": basis.rank, "tokens": tokens, "energy": basis.energy,
        "orthogonality_error": basis.orthogonality_error, "residual": basis.residual,
        "seconds": round(seconds, 3), "bytes": (directory / file).stat().st_size,
    }
    figures = (f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in entry.items())
    logger.info("%s: %s", file, ", ".join(figures))
    return {file: (list(layers), entry)}


def _check(arguments: BasisArguments) -> None:
    if arguments.basis == "identity":
        raise ConfigError("--basis identity needs no phase 1: give it to phase 2, and leave --basis_dir out")
