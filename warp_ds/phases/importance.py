"""Phase 2: the importance of every rotated coefficient, and which are frozen (sections 2.4 and 2.5 of the method)."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.modeling_layers import GradientCheckpointingLayer

from warp_ds.artifacts import (
    BasisStore,
    MasksMetadata,
    TargetLayer,
    find_artifact,
    fingerprint_model,
    fingerprint_rows,
    layer_entry,
    metadata_dict,
    write_json,
    write_tensors,
)
from warp_ds.config import ConfigError, ImportanceArguments
from warp_ds.data.formats import IGNORE, encode_dataset
from warp_ds.method.importance import response_loss, rotated_inputs
from warp_ds.method.mask import frozen_count, pack_bits
from warp_ds.method.selection import random_scores
from warp_ds.phases.basis import safety_pairs
from warp_ds.phases.run import start_run
from warp_ds.phases.targets import find_blocks, find_targets, shared_inputs
from warp_ds.zero.batches import Batch, Samples
from warp_ds.zero.collect import Background, stop_together
from warp_ds.zero.fetch import FetchHooks, outside
from warp_ds.zero.model import context_length, load_model, resolve_model_dir
from warp_ds.zero.runtime import (
    all_reduce_sum,
    collective_device,
    init_distributed,
    on_every_rank_or_none,
    on_rank_0,
    rank,
    world_size,
    zero3_config,
)
from warp_ds.zero.scores import (
    GradientTaps,
    Rows,
    RowScores,
    Step,
    first_not_finite,
    gather_rows,
    gather_tokens,
    plan_steps,
)
from warp_ds.zero.select import Chosen, choose, gather_packed

logger = logging.getLogger(__name__)


def run_importance(arguments: ImportanceArguments, pairs: Any = None) -> Path:
    """Runs phase 2 and returns its run directory; ``pairs`` (rows of prompt and response) replace --safety_data."""
    arguments.check()
    init_distributed(arguments.resolved_device, arguments.timeout)
    ds_config = zero3_config(arguments)
    basis = None
    if arguments.basis != "identity":
        with on_every_rank_or_none("reading the basis"):
            basis = BasisStore(find_artifact(arguments.basis_dir, "basis", arguments.output_dir))
    pairs = safety_pairs(arguments) if pairs is None else pairs
    model_dir = resolve_model_dir(arguments.model_name)
    inputs = {"model": on_rank_0(lambda: fingerprint_model(model_dir), "reading the model"),
              "data": fingerprint_rows(pairs)}
    if basis is not None:
        inputs["basis"] = on_rank_0(basis.fingerprint, "reading the basis")
    with start_run("phase2", arguments, inputs=inputs) as run:
        if run.done:
            return run.directory
        model, tokenizer = load_model(arguments, ds_config)
        layers = find_targets(model, arguments.target_layers, arguments.layer_type)
        dataset = encode_dataset(pairs, tokenizer, arguments.max_length, context_length(model.config))
        compute_masks(model, tokenizer, layers, dataset, basis, arguments, run.directory / "masks", inputs)
        run.finish()
    return run.directory


def compute_masks(
    model: Any, tokenizer: Any, layers: Sequence[TargetLayer], dataset: Any, basis: BasisStore | None,
    arguments: ImportanceArguments, directory: Path, fingerprints: dict[str, str],
) -> MasksMetadata:
    """Writes the masks of ``layers`` into ``directory``; every rank calls it, with the same arguments.

    ``dataset``: rows of input_ids and labels, in order. ``basis`` None: the identity. ``fingerprints``: of 'model',
    'data' and 'basis'. Raises ArtifactError where the basis belongs to another model or layers, NotFinite, ConfigError.
    """
    with on_every_rank_or_none("checking the basis"):
        if basis is not None:
            basis.check(layers, fingerprints["model"], arguments.model_name)
        elif arguments.score == "singular_value":
            raise ConfigError("--score singular_value needs a basis with singular values: leave --basis identity out")
    notes: list[str] = []
    if arguments.score == "importance":
        scores = importance_scores(model, tokenizer, layers, dataset, basis, arguments, notes)
    else:
        scores = _scores_without_data(layers, basis, arguments)
    metadata = MasksMetadata(
        keep_ratio=arguments.keep_ratio, scope=arguments.mask_scope, unit=arguments.mask_unit, score=arguments.score,
        basis="identity" if basis is None else basis.metadata.basis,
        basis_dir=None if basis is None else str(basis.directory), basis_fingerprint=fingerprints.get("basis"),
        model_fingerprint=fingerprints["model"], data_fingerprint=fingerprints["data"],
        model_name=arguments.model_name, notes=notes,
    )
    freeze(layers, scores, arguments, directory, metadata)
    return metadata


def importance_scores(
    model: Any, tokenizer: Any, layers: Sequence[TargetLayer], dataset: Any, basis: BasisStore | None,
    arguments: ImportanceArguments, notes: list[str],
) -> dict[str, Tensor]:
    """S = Σ_b |∂L_b/∂C|: this rank's rows of each layer, fp32 [rows, r]."""
    samples = Samples(dataset, tokenizer, arguments.resolved_device)
    steps, silent = plan_steps(samples, arguments.batch_size, arguments.importance_batch_size, world_size())
    if silent:
        notes.append(f"{len(silent)} importance batches have no response token and add nothing")
        logger.warning("%s (batches %s): their responses may have been cut off by --max_length", notes[-1], silent[:10])
    if not steps:
        raise ConfigError("no sample has a response token, so there is no importance: raise --max_length, or give a "
                          "safety set with responses")
    weights = loss_weights(samples, arguments.importance_batch_size)
    groups = _groups(layers, basis)
    scores = RowScores(layers, _ranks(layers, basis), samples.device)
    # fp16 gradients of a mean over many tokens would underflow.
    scale = 2.0**12 if arguments.dtype == "float16" else 1.0
    _, blocks = find_blocks(model)
    with frozen_model(model, arguments.gradient_checkpointing), GradientTaps(model, layers) as taps, \
            FetchHooks(outside(model, list(blocks)), list(blocks), backward=True):
        for step in tqdm(steps, desc="importance", unit="step", disable=rank() != 0):
            batch = samples.batch(step.parts[rank()])
            loss = batch_loss(model, batch, weights)
            (loss * scale).backward()
            _add(scores, groups, taps, batch, step, basis, 1.0 / scale)
    return scores.sums


def loss_weights(samples: Samples, importance_batch_size: int) -> list[float]:
    """sample -> 1 / (response tokens of its importance batch), 0 for a batch without any."""
    weights: list[float] = []
    for first in range(0, len(samples), importance_batch_size):
        batch = range(first, min(first + importance_batch_size, len(samples)))
        tokens = sum(samples.responses(i) for i in batch)
        weights += [1.0 / tokens if tokens else 0.0] * len(batch)
    return weights


def batch_loss(model: Any, batch: Batch, weights: Sequence[float]) -> Tensor:
    """This micro-batch's part of Σ_b L_b."""
    labels, first = batch.labels, 0
    keep: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        chosen = (labels != IGNORE).any(dim=0).nonzero()
        first = max(0, int(chosen[0]) - 1) if len(chosen) else labels.shape[1] - 1
        keep["logits_to_keep"] = labels.shape[1] - first
    logits = model(**batch.inputs, use_cache=False, **keep).logits
    per_row = torch.tensor([weights[i] if i >= 0 else 0.0 for i in batch.samples], device=labels.device)
    return response_loss(logits, labels[:, first:], per_row.unsqueeze(1).expand(-1, labels.shape[1] - first))


@contextmanager
def frozen_model(model: Any, checkpointing: bool) -> Iterator[None]:
    """No parameter has a gradient, dropout is off; the embedding's output has one, so that every layer does.

    With ``checkpointing``, blocks recompute their activations: transformers does so only for modules in training mode,
    so the block modules alone are, and dropout, which lies inside them, stays off.
    """
    wanted = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.eval()
    model.requires_grad_(False)
    handle = model.get_input_embeddings().register_forward_hook(lambda module, inputs, y: y.requires_grad_(True))
    if checkpointing:
        _checkpointing(model, True)
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True
    try:
        yield
    finally:
        handle.remove()
        if checkpointing:
            _checkpointing(model, False)
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


def _checkpointing(model: Any, on: bool) -> None:
    """transformers 5.23 has new names for these methods, and warns of the old ones."""
    new, old = (f"{kind}_checkpointing_{'enable' if on else 'disable'}" for kind in ("activation", "gradient"))
    method = getattr(model, new, None) or getattr(model, old)
    method(*([{"use_reentrant": False}] if on else []))


def _add(
    scores: RowScores, groups: Sequence[Sequence[TargetLayer]], taps: GradientTaps, batch: Batch, step: Step,
    basis: BasisStore | None, scale: float,
) -> None:
    """Adds one step's |∂L_b/∂C|, layers of one input together: its rotation is shared."""
    failures = [
        (layer.layer, layer.name, sample)
        for group in groups for layer in group
        if (sample := first_not_finite(taps.taken[layer.name], batch)) is not None
    ]
    # Of gradients, the last block's are the first.
    stop_together(max(failures, default=None), "inputs or output gradients")
    for group in groups:
        xu: Tensor | None = None
        for layer in group:
            tapped = taps.taken.pop(layer.name)
            if xu is None:
                columns = None if basis is None else basis.columns(layer.name)[0].to(tapped.x.device)
                xu = gather_tokens(rotated_inputs(tapped.x[batch.counted], columns), step)
            g = gather_rows(tapped.g[batch.counted], step, scores.rows[layer.name])
            scores.add(layer.name, g, xu, step, scale)


def _groups(layers: Sequence[TargetLayer], basis: BasisStore | None) -> list[list[TargetLayer]]:
    """The layers by the input they see: as phase 1 found it, or as the known architectures have it."""
    if basis is None:
        return shared_inputs(layers)
    groups: dict[str, list[TargetLayer]] = {}
    for layer in layers:
        groups.setdefault(basis.metadata.layers[layer.name]["file"], []).append(layer)
    return list(groups.values())


def _ranks(layers: Sequence[TargetLayer], basis: BasisStore | None) -> dict[str, int]:
    """layer name -> columns that can have a score: those of U, or all inputs."""
    if basis is None:
        return {layer.name: layer.n for layer in layers}
    entries, bases = basis.metadata.layers, basis.metadata.bases
    return {layer.name: int(bases[entries[layer.name]["file"]]["rank"]) for layer in layers}


def _scores_without_data(
    layers: Sequence[TargetLayer], basis: BasisStore | None, arguments: ImportanceArguments
) -> dict[str, Tensor]:
    """--score singular_value: every entry of a column scores its S; --score random: the same on any world size."""
    scores: dict[str, Tensor] = {}
    for number, layer in enumerate(layers):
        rows = Rows(layer.m, world_size(), rank()).block
        if arguments.score == "random":
            flat = random_scores(arguments.seed * 1_000_003 + number, rows.start * layer.n, len(rows) * layer.n)
            scores[layer.name] = flat.view(len(rows), layer.n)
        elif basis is not None:
            scores[layer.name] = basis.columns(layer.name)[1].float().expand(len(rows), -1).contiguous()
        scores[layer.name] = scores[layer.name].to(arguments.resolved_device)
    return scores


def freeze(
    layers: Sequence[TargetLayer], scores: dict[str, Tensor], arguments: ImportanceArguments, directory: Path,
    metadata: MasksMetadata,
) -> None:
    """Chooses the highest scores, writes the masks and, last, their metadata. ``scores``: this rank's rows."""
    unit = arguments.mask_unit
    values = {layer.name: _unit_scores(scores.pop(layer.name), unit) for layer in layers}
    units = {layer.name: {"entry": layer.m * layer.n, "row": layer.m, "column": layer.n}[unit] for layer in layers}
    groups = [list(layers)] if arguments.mask_scope == "global" else [[layer] for layer in layers]
    wanted = [frozen_count(arguments.keep_ratio, sum(units[layer.name] for layer in group)) for group in groups]
    chosen = choose([[values[layer.name] for layer in group] for group in groups], wanted)

    counts: dict[str, int] = {}
    with Background("writing the masks") as writing:
        # Groups hold the layers in order, so one flat list of choices belongs to them.
        for number, (layer, choice) in enumerate(zip(layers, [c for choices in chosen for c in choices], strict=True)):
            rows = Rows(layer.m, world_size(), rank())
            mask = _whole_rows(choice, values.pop(layer.name), unit, len(rows.block), layer.n)
            counts[layer.name] = int(mask.sum())
            packed = gather_packed(pack_bits(mask), layer.m, rows.most, number % world_size())
            if packed is not None:
                path = directory / f"{layer.stem}_mask.safetensors"
                writing.start(partial(write_tensors, path, {"frozen": packed}))
        writing.meet()

    frozen = all_reduce_sum(torch.tensor([counts[layer.name] for layer in layers], device=collective_device())).tolist()
    _describe(layers, groups, chosen, wanted, units, dict(zip(counts, frozen, strict=True)), unit, metadata)
    on_rank_0(lambda: write_json(directory / "metadata.json", metadata_dict(metadata)), "writing the masks' metadata")


def _unit_scores(scores: Tensor, unit: str) -> Tensor:
    """What is compared: entries [rows, c], rows' norms [rows, 1], or all columns' norms [1, c], on rank 0 alone."""
    if unit == "entry":
        return scores
    if unit == "row":
        return torch.linalg.vector_norm(scores, dim=1, keepdim=True)
    squares = all_reduce_sum(scores.double().square().sum(dim=0).to(collective_device()))
    norms = squares.sqrt().float().to(scores.device).unsqueeze(0)
    return norms if rank() == 0 else norms[:0]


def _whole_rows(choice: Chosen, values: Tensor, unit: str, rows: int, n: int) -> Tensor:
    """bool [rows, n]: this rank's rows of the mask."""
    mask = torch.zeros(rows, n, dtype=torch.bool, device=values.device)
    taken = choice.mask(values)
    if unit == "column":
        columns = torch.zeros(values.shape[1], dtype=torch.float32, device=collective_device())
        if len(taken):
            columns[:] = taken[0]
        mask[:, : values.shape[1]] = all_reduce_sum(columns).bool().to(mask.device)
    elif unit == "row":
        mask |= taken
    else:
        mask[:, : values.shape[1]] = taken
    return mask


def _describe(
    layers: Sequence[TargetLayer], groups: Sequence[Sequence[TargetLayer]], chosen: Sequence[Sequence[Chosen]],
    wanted: Sequence[int], units: dict[str, int], frozen: dict[str, int], unit: str, metadata: MasksMetadata,
) -> None:
    """Fills the metadata's entries, counts and notes."""
    for group, choices, k in zip(groups, chosen, wanted, strict=True):
        per_unit = {layer.name: layer.m * layer.n // units[layer.name] for layer in group}
        got = sum(frozen[layer.name] // per_unit[layer.name] for layer in group)
        if got < k:
            where = group[0].name if len(group) == 1 else f"all {len(group)} layers"
            metadata.notes.append(f"{where}: only {got} of {k} wanted {unit} units are frozen: no more score above 0")
        for layer, choice in zip(group, choices, strict=True):
            metadata.layers[layer.name] = layer_entry(
                layer, f"{layer.stem}_mask.safetensors", frozen=frozen[layer.name],
                wanted=k * per_unit[layer.name] if len(group) == 1 else None, threshold=choice.value,
            )
    metadata.layers = {layer.name: metadata.layers[layer.name] for layer in layers}
    metadata.frozen = sum(frozen.values())
    metadata.entries = sum(layer.m * layer.n for layer in layers)
    for note in metadata.notes:
        logger.info("%s", note)
    logger.info("%d of %d coefficients are frozen", metadata.frozen, metadata.entries)


