"""Phase 1: one orthonormal basis per distinct layer input (sections 2.1 and 2.2 of the method)."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from warp_ds.cluster.consensus import on_every_rank_or_none, on_rank_0
from warp_ds.cluster.dealing import LeastLoaded
from warp_ds.cluster.peaks import returning_large_pieces
from warp_ds.cluster.preemption import leave_if_asked
from warp_ds.cluster.processes import all_gather_object, init_distributed, rank, world_size
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.flags.arguments import BasisArguments
from warp_ds.method.eigenbasis import Basis, inputs_basis, random_basis, weight_basis
from warp_ds.models.layer_names import type_order
from warp_ds.models.targets import check_targets, find_blocks, find_targets, shared_inputs
from warp_ds.phases.output_bases import Write, check_output_basis, from_gradients, from_outputs, weights_of
from warp_ds.phases.packing import attention_of, check_apart, check_packing, micro_batch
from warp_ds.phases.publish import published
from warp_ds.phases.run import start_run
from warp_ds.phases.speed import log_rate
from warp_ds.phases.texts import safety_texts, tokenise
from warp_ds.store.bases import OUTPUT
from warp_ds.store.files import remove_unfinished, write_json, write_tensors
from warp_ds.store.fingerprints import fingerprint_rows
from warp_ds.store.layers import TargetLayer
from warp_ds.store.metadata import BasisMetadata, layer_entry, metadata_dict
from warp_ds.store.state import Progress
from warp_ds.zero.batches import Samples
from warp_ds.zero.collect import (
    ROUTED,
    Background,
    Delivered,
    LayerInput,
    Traffic,
    collect_by_walk,
    collect_with_hooks,
    decomposition_cost,
    deliver,
)
from warp_ds.zero.fetch import gathered
from warp_ds.zero.model import load_model, resolve_model_dir
from warp_ds.zero.settings import zero3_config
from warp_ds.zero.shared_reading import model_fingerprint
from warp_ds.zero.walk import BlockWalk

logger = logging.getLogger(__name__)


@published
def run_basis(arguments: BasisArguments, pairs: Any = None) -> Path:
    """Runs phase 1 and returns its run directory; ``pairs`` (samples) replace --safety_data."""
    arguments.check()
    _check(arguments)
    init_distributed(arguments.resolved_device, arguments.timeout)
    ds_config = zero3_config(arguments)
    pairs = safety_texts(arguments) if pairs is None else pairs
    model_dir = resolve_model_dir(arguments.model_name)
    with on_every_rank_or_none("looking for the layers"):
        check_targets(model_dir, arguments.target_layers, arguments.layer_type, expert_basis=arguments.expert_basis)
        check_packing(arguments, model_dir)
    inputs = {"model": model_fingerprint(model_dir), "data": fingerprint_rows(pairs)}
    with start_run("phase1", arguments, inputs=inputs) as run:
        if run.done:
            return run.directory
        dataset = tokenise(pairs, arguments, prompt_only=arguments.token_scope == "prompt")
        model, tokenizer = load_model(arguments, ds_config, attention_of(arguments))
        check_apart(arguments, model, dataset)
        layers = find_targets(model, arguments.target_layers, arguments.layer_type)
        compute_basis(model, tokenizer, layers, dataset, arguments, run.directory / "basis", inputs)
        run.finish()
    return run.directory


@returning_large_pieces()
def compute_basis(
    model: Any,
    tokenizer: Any,
    layers: Sequence[TargetLayer],
    dataset: Any,
    arguments: BasisArguments,
    directory: Path,
    fingerprints: dict[str, str],
) -> BasisMetadata:
    """Writes the bases of ``layers`` into ``directory``; every rank calls it, with the same arguments.

    ``dataset``: rows of input_ids and labels (with --token_scope prompt: of the prompts alone). ``fingerprints``: of
    'model' and 'data'. Basis files that lie in ``directory`` already are taken as finished. Raises NotFinite,
    ConfigError.
    """
    _check(arguments)
    _, capacity = micro_batch(arguments)
    samples = Samples(dataset, tokenizer, arguments.resolved_device, arguments.token_scope, capacity)
    metadata = BasisMetadata(
        basis=arguments.basis,
        model_fingerprint=fingerprints["model"],
        data_fingerprint=fingerprints["data"],
        token_scope=arguments.token_scope,
        model_name=arguments.model_name,
        tokens=samples.tokens,
    )
    entries: Entries = on_rank_0(lambda: _finished(directory), "looking for finished bases")
    if arguments.output_basis == "gradient":
        entries.update(_of_gradients(model, layers, samples, arguments, directory, entries))
    left = [layer for layer in layers if layer.name not in _inputs_of(entries)]
    if len(left) < len(layers):
        logger.info("%d of %d layers have their basis already", len(layers) - len(left), len(layers))
    if left:
        owner = _deal(layers, samples.tokens, arguments)
        make = _from_activations if arguments.basis == "activation" else _without_data
        for part in all_gather_object(make(model, left, samples, arguments, directory, owner)):
            entries.update(part)

    inputs, outputs = _inputs_of(entries), _outputs(entries)
    for layer in layers:
        more = {"output": outputs[layer.name]} if arguments.output_basis != "identity" else {}
        metadata.layers[layer.name] = layer_entry(layer, inputs[layer.name], **more)
        for file in (inputs[layer.name], *more.values()):
            of_file: Any = {key: value for key, value in entries[file].items() if key not in ("layers", "output")}
            metadata.bases[file] = of_file
    on_rank_0(lambda: write_json(directory / "metadata.json", metadata_dict(metadata)), "writing the basis metadata")
    return metadata


Entries = dict[str, dict[str, Any]]
"""file -> its entry in the metadata, and 'layers': the names of the layers that share it, 'output': whether it is of outputs"""


def _inputs_of(entries: Entries) -> dict[str, str]:
    """Layer name -> the file of its U."""
    return {name: file for file, entry in entries.items() if "output" not in entry for name in entry["layers"]}


def _outputs(entries: Entries) -> dict[str, str]:
    """Layer name -> the file of its V."""
    return {name: file for file, entry in entries.items() if "output" in entry for name in entry["layers"]}


def _of_gradients(
    model: Any, layers: Sequence[TargetLayer], samples: Samples, arguments: BasisArguments, directory: Path, known: Entries
) -> Entries:
    """V of the output gradients of the layers whose V is not ``known``; the entries of all ranks' files. Collective."""
    left = [layer for layer in layers if layer.name not in _outputs(known)]
    entries: Entries = {}
    if left:
        owner = _deal(layers, samples.tokens, arguments, outputs=True)
        from_gradients(model, left, samples, arguments, directory.parent, owner, _writer(directory, entries))
    return {file: entry for part in all_gather_object(entries) for file, entry in part.items()}


def _from_activations(
    model: Any,
    layers: Sequence[TargetLayer],
    samples: Samples,
    arguments: BasisArguments,
    directory: Path,
    owner: dict[str, int],
) -> Entries:
    """Σ over the counted tokens, then Σ = U Λ Uᵀ on each basis's owner. Returns the entries of this rank's files."""
    if samples.tokens == 0:
        raise ConfigError(
            f"no token of the safety set counts with --token_scope {arguments.token_scope}: use another "
            "scope, more samples, or a longer --max_length (responses may have been cut off)"
        )
    entries: Entries = {}
    few: list[str] = []
    traffic, begun = Traffic(), time.monotonic()
    progress, done = Progress(directory.parent, len(layers), "layers"), 0
    with Background("decomposing the covariances", samples.device) as decompositions:
        for seen in _inputs(model, layers, samples, arguments, directory):
            way = seen.route
            tokens, delivered = deliver(seen, owner[seen.first.name], arguments.torch_dtype, traffic)
            if way == ROUTED:
                few += [f"{seen.first.name} ({tokens})"] if tokens < seen.first.n else []
            elif tokens != samples.tokens:
                raise ConfigError(
                    f"{seen.first.name} saw {tokens} tokens, but the safety set has {samples.tokens}: "
                    "the model runs this layer more than once a pass, or not for every token"
                )
            of_outputs = seen.layers if arguments.output_basis == "activation" else []
            weights = weights_of(model, of_outputs, delivered is not None)
            if delivered is not None:
                decompositions.start(_decomposition(delivered, weights, way, arguments, directory, entries))
            done += len(seen.layers)
            progress.at(done)
            leave_if_asked()  # finished bases stay: a run that goes on makes the others
        decompositions.meet()
    if few:
        logger.warning(
            "%d bases of experts are of fewer tokens of the safety set than they have inputs (%s%s): they hold what was seen, "
            "completed by its complement, of which nothing is frozen",
            len(few),
            ", ".join(few[:4]),
            ", ..." if len(few) > 4 else "",
        )
    log_rate("bases", samples.length(range(len(samples))), begun)
    logger.info("this rank has sent %.3f GB of activations and covariances", traffic.bytes / 1e9)
    return entries


def _inputs(
    model: Any, layers: Sequence[TargetLayer], samples: Samples, arguments: BasisArguments, directory: Path
) -> Iterator[LayerInput]:
    """The distinct layer inputs, layer by layer (--collect walk) or all at once (hooks)."""
    _, blocks = find_blocks(model)
    itemsize, (rows, _) = arguments.torch_dtype.itemsize, micro_batch(arguments)
    if arguments.collect != "hooks":
        walk = BlockWalk(model, list(blocks))
        reason = walk.why_not(samples.few(), layers)
        if reason is None:
            yield from collect_by_walk(walk, layers, samples, rows, directory, itemsize, arguments.expert_basis)
            logger.info("each block's parameters were fetched %d times, twice of it to try the walk", max(walk.fetches))
            return
        if arguments.collect == "walk":
            raise ConfigError(f"--collect walk: this model cannot be run layer by layer ({reason}): use hooks")
        logger.warning(
            "this model cannot be run layer by layer (%s): all layers are collected at once, as with --collect hooks", reason
        )
    yield from collect_with_hooks(model, list(blocks), layers, samples, rows, itemsize, arguments.expert_basis)


def _decomposition(
    delivered: Delivered,
    weights: Sequence[tuple[TargetLayer, Tensor]],
    way: str,
    arguments: BasisArguments,
    directory: Path,
    entries: Entries,
) -> Callable[[], None]:
    """A job that makes the basis of one layer input, and of the outputs of the layers whose ``weights`` are given, writes them
    and enters them into ``entries``."""

    def job() -> None:
        from_outputs(weights, delivered, arguments, _writer(directory, entries))
        begun = time.monotonic()
        n = delivered.layers[0].n
        basis = inputs_basis(n, delivered.x, delivered.sigma, arguments.energy, arguments.max_rank)
        delivered.x = delivered.sigma = None
        entries.update(_write(directory, delivered.layers, basis, delivered.tokens, way, time.monotonic() - begun))

    return job


def _without_data(
    model: Any,
    layers: Sequence[TargetLayer],
    samples: Samples,
    arguments: BasisArguments,
    directory: Path,
    owner: dict[str, int],
) -> Entries:
    """--basis weight (one basis a layer: from its own W) and random (one per shared input)."""
    groups = [[layer] for layer in layers] if arguments.basis == "weight" else shared_inputs(layers, arguments.expert_basis)
    entries: Entries = {}
    weights = dict(model.named_parameters(remove_duplicate=False))
    with Background("making the bases", samples.device) as decompositions:
        for group in groups:
            mine = owner[group[0].name] == rank()
            weight = weights[group[0].parameter]
            with gathered([weight] if arguments.basis == "weight" else []):
                w = group[0].of(weight.detach()).float().clone() if mine and arguments.basis == "weight" else None

            def job(group: list[TargetLayer] = group, w: Any = w) -> None:
                begun = time.monotonic()
                if w is not None:
                    basis = weight_basis(w, arguments.energy, arguments.max_rank)
                else:
                    seed = (
                        1000 * (arguments.seed * 1000 + group[0].layer)
                        + type_order(group[0].type)[0]
                        + 100 * (group[0].expert or 0)
                    )
                    basis = random_basis(group[0].n, seed, arguments.max_rank)
                entries.update(_write(directory, group, basis, 0, arguments.basis, time.monotonic() - begun))

            if mine:
                decompositions.start(job)
        decompositions.meet()
    return entries


def _deal(layers: Sequence[TargetLayer], tokens: int, arguments: BasisArguments, outputs: bool = False) -> dict[str, int]:
    """layer name -> the rank that makes its basis (``outputs``: that of its output gradients). The same whatever is finished
    already: so are the sums then."""
    owners = LeastLoaded(1 if arguments.svd_placement == "rank0" else world_size())
    if outputs:
        return {layer.name: owners.next(decomposition_cost(tokens, layer.m)) for layer in layers}
    groups = [[layer] for layer in layers] if arguments.basis == "weight" else shared_inputs(layers, arguments.expert_basis)
    return {
        layer.name: owner
        for group in groups
        for owner in [owners.next(decomposition_cost(tokens, group[0].n))]
        for layer in group
    }


def _writer(directory: Path, entries: Entries) -> Write:
    """Writes V of a layer as a file of its own, and enters it into ``entries``."""

    def write(layer: TargetLayer, basis: Basis, tokens: int, way: str, seconds: float) -> None:
        entries.update(_write(directory, [layer], basis, tokens, way, seconds, output=True))

    return write


def _write(
    directory: Path, layers: Sequence[TargetLayer], basis: Basis, tokens: int, way: str, seconds: float, output: bool = False
) -> Entries:
    """Writes one basis file, named by its first layer type; returns its entry. ``output``: of the layer's outputs."""
    first = shared_inputs(layers)[0][0]
    file = f"{first.stem}{OUTPUT}" if output else f"{first.stem}_svd.safetensors"
    entry = {
        "n": first.m if output else first.n,
        "rank": basis.rank,
        "tokens": tokens,
        "energy": basis.energy,
        "orthogonality_error": basis.orthogonality_error,
        "residual": basis.residual,
        "from": way,
    }
    names, of_outputs = [layer.name for layer in layers], {"output": True} if output else {}
    # The file says what it is, so that a run that goes on knows it; nothing in it depends on time or ranks.
    header = {_HEADER: json.dumps({**entry, "layers": names, **of_outputs})}
    write_tensors(directory / file, {"U": basis.columns, "S": basis.values}, header)
    entry.update(seconds=round(seconds, 3), bytes=(directory / file).stat().st_size)
    figures = (f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}" for key, value in entry.items())
    logger.info("%s: %s", file, ", ".join(figures))
    return {file: {**entry, "layers": names, **of_outputs}}


_HEADER = "warp_ds.basis"


def _finished(directory: Path) -> Entries:
    """The entries of the bases that a run which was stopped has left; what it had begun to write is removed."""
    entries: Entries = {}
    remove_unfinished(directory)
    for path in sorted(directory.glob("*_svd.safetensors")):
        try:
            with safe_open(str(path), framework="pt") as file:
                entry = json.loads(file.metadata()[_HEADER])
                shapes = [list(file.get_slice(name).get_shape()) for name in ("U", "S")]
            if shapes != [[entry["n"], entry["rank"]], [entry["rank"]]] or not all(isinstance(n, str) for n in entry["layers"]):
                raise ValueError(f"U and S are {shapes}, its own entry says {ascii(entry)[:200]}")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArtifactError(
                f"{path} is not what phase 1 writes ({type(error).__name__}: {error}): remove it, and it is made again"
            ) from error
        entries[path.name] = {**entry, "seconds": None, "bytes": path.stat().st_size}
    return entries


def _check(arguments: BasisArguments) -> None:
    if arguments.basis == "identity":
        raise ConfigError("--basis identity needs no phase 1: give it to phase 2, and leave --basis_dir out")
    check_output_basis(arguments)
