"""Phase 2: the importance of every rotated coefficient, and which are frozen."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from warp_ds.cluster.consensus import on_every_rank_or_none, on_rank_0
from warp_ds.cluster.processes import all_reduce_sum, collective_device, init_distributed, rank, world_size
from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import ImportanceArguments
from warp_ds.flags.groups import RunArguments
from warp_ds.method.importance import response_loss, tokens_first
from warp_ds.method.mask import frozen_count, pack_bits
from warp_ds.method.products import products
from warp_ds.method.selection import DECADE, random_scores
from warp_ds.models.targets import check_targets, find_blocks, find_targets, shared_inputs
from warp_ds.phases import behaviours
from warp_ds.phases.behaviours import groups_of, units_of
from warp_ds.phases.columns import Columns
from warp_ds.phases.packing import attention_of, check_apart, check_packing, micro_batch
from warp_ds.phases.publish import fetch_shared, published
from warp_ds.phases.run import start_run
from warp_ds.phases.speed import log_rate
from warp_ds.phases.texts import behaviour_texts, tokenise
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import remove_unfinished, write_json
from warp_ds.store.fingerprints import fingerprint_sets
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore, write_mask
from warp_ds.store.metadata import MasksMetadata, layer_entry, metadata_dict
from warp_ds.store.runs import find_artifact
from warp_ds.store.state import Progress
from warp_ds.zero.batches import Batch, Samples
from warp_ds.zero.collect import Background, stop_together
from warp_ds.zero.gradients import GradientWalk, Loss, Shown, gradients_with_hooks, steps_at_once
from warp_ds.zero.importance_steps import Step, importance_batches, plan_steps
from warp_ds.zero.model import load_model, resolve_model_dir
from warp_ds.zero.saved_scores import SavedScores
from warp_ds.zero.scores import Finite, Rows, RowScores, ScoredInput, of_units
from warp_ds.zero.select import Chosen, choose, gather_packed
from warp_ds.zero.settings import zero3_config
from warp_ds.zero.shared_reading import model_fingerprint, read_together
from warp_ds.zero.walk import BlockWalk

logger = logging.getLogger(__name__)
SAVE_SECONDS = 300.0
"""Between two savings of the scores so far."""


@published
def run_importance(arguments: ImportanceArguments, pairs: Any = None) -> Path:
    """Runs phase 2 and returns its run directory; ``pairs`` (rows of prompt and response) replace --safety_data."""
    arguments.check()
    init_distributed(arguments.resolved_device, arguments.timeout)
    ds_config = zero3_config(arguments)
    fetch_shared(arguments)
    basis = None
    if arguments.basis != "identity":
        with on_every_rank_or_none("reading the basis"):
            basis = BasisStore(find_artifact(arguments.basis_dir, "basis", arguments.output_dir))
    sets = behaviour_texts(arguments) if pairs is None else [pairs]
    model_dir = resolve_model_dir(arguments.model_name)
    with on_every_rank_or_none("looking for the layers"):
        check_targets(model_dir, arguments.target_layers, arguments.layer_type)
        check_packing(arguments, model_dir)
    inputs = {"model": model_fingerprint(model_dir), "data": fingerprint_sets(sets)}
    if basis is not None:
        read_together(lambda: [basis.contents()], "reading the basis")
        inputs["basis"] = on_rank_0(basis.fingerprint, "reading the basis")
    with start_run("phase2", arguments, inputs=inputs) as run:
        if run.done:
            return run.directory
        datasets = [tokenise(texts, arguments) for texts in sets]
        model, tokenizer = load_model(arguments, ds_config, attention_of(arguments))
        for dataset in datasets:
            check_apart(arguments, model, dataset)
        layers = find_targets(model, arguments.target_layers, arguments.layer_type)
        compute_masks(model, tokenizer, layers, datasets, basis, arguments, run.directory / "masks", inputs)
        run.finish()
    return run.directory


def compute_masks(
    model: Any,
    tokenizer: Any,
    layers: Sequence[TargetLayer],
    datasets: Sequence[Any],
    basis: BasisStore | None,
    arguments: ImportanceArguments,
    directory: Path,
    fingerprints: dict[str, str],
) -> MasksMetadata:
    """Writes the masks of ``layers`` into ``directory``; every rank calls it, with the same arguments.

    ``datasets``: of each behaviour, rows of input_ids and labels, in order. ``basis`` None: the identity. ``fingerprints``:
    of 'model', 'data' and 'basis'. Raises ArtifactError where the basis is of another model or layers, NotFinite, ConfigError.
    """
    with on_every_rank_or_none("checking the basis"):
        if basis is not None:
            basis.check(layers, fingerprints["model"], arguments.model_name)
        elif arguments.score == "singular_value":
            raise ConfigError("--score singular_value needs a basis with singular values: leave --basis identity out")
    on_rank_0(lambda: remove_unfinished(directory), "looking for unfinished masks")
    notes: list[str] = []
    scores, report = _compared(model, tokenizer, layers, datasets, basis, arguments, notes, directory.parent)
    if report is not None:
        arguments = replace(arguments, keep_ratio=sum(behaviour["share"] for behaviour in report["behaviours"]))
    metadata = MasksMetadata(
        keep_ratio=arguments.keep_ratio,
        scope=arguments.mask_scope,
        unit=arguments.mask_unit,
        score=arguments.score,
        basis="identity" if basis is None else basis.metadata.basis,
        basis_dir=None if basis is None else str(basis.directory.resolve()),
        basis_fingerprint=fingerprints.get("basis"),
        model_fingerprint=fingerprints["model"],
        data_fingerprint=fingerprints["data"],
        model_name=arguments.model_name,
        notes=notes,
    )
    freeze(layers, scores, arguments, directory, metadata)
    if report is not None:
        on_rank_0(lambda: write_json(directory / behaviours.FILE, report), "writing what the behaviours froze")
    for name in ["scores", *(f"scores_{number}" for number in range(len(datasets)))]:
        SavedScores(directory.parent / name).remove()
    return metadata


def _compared(
    model: Any,
    tokenizer: Any,
    layers: Sequence[TargetLayer],
    datasets: Sequence[Any],
    basis: BasisStore | None,
    arguments: ImportanceArguments,
    notes: list[str],
    scratch: Path,
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """(this rank's units of each layer by what is compared, what several behaviours froze)"""
    unit = arguments.mask_unit
    if arguments.score != "importance":
        return {layer.name: of_units(rows, unit) for layer, rows in _scores_without_data(layers, basis, arguments)}, None
    if len(datasets) == 1:
        return importance_scores(model, tokenizer, layers, datasets[0], basis, arguments, notes, scratch), None
    groups = [[layer.name for layer in group] for group in groups_of(layers, arguments)]
    union = behaviours.Union(groups, units_of(layers, unit), behaviours.shares_of(arguments, len(datasets)))
    for number, dataset in enumerate(datasets):
        place = scratch, f"scores_{number}"
        union.add(importance_scores(model, tokenizer, layers, dataset, basis, arguments, notes, *place))
    report = union.overlap(behaviours.named_apart(arguments), unit)
    notes += [behaviours.overlap_note(report, pair) for pair in report["both"]]
    return union.scores, report


def importance_scores(
    model: Any,
    tokenizer: Any,
    layers: Sequence[TargetLayer],
    dataset: Any,
    basis: BasisStore | None,
    arguments: ImportanceArguments,
    notes: list[str],
    scratch: Path,
    saved_as: str | None = "scores",
) -> dict[str, Tensor]:
    """What is compared (``of_units``) of S = Σ_b |∂L_b/∂C|, of each layer, of which this rank has some rows.

    Where one walk over the blocks shows all batches, the rows of one block are held at a time, but for masks of entries.
    ``scratch``: where finished importance batches are saved, in ``saved_as`` (None: nowhere), for a run that goes on.
    """
    rows, capacity = micro_batch(arguments)
    samples = Samples(dataset, tokenizer, arguments.resolved_device, capacity=capacity)
    batches = _speaking_batches(samples, arguments, notes)
    inputs = scored_inputs(layers, basis, samples.tokens / len(batches))
    taken = products(arguments.products, arguments.torch_dtype, samples.device)
    scores = RowScores(inputs, samples.device, taken, arguments.mask_unit)
    saved = SavedScores(scratch / saved_as) if saved_as else None
    done = saved.load(scores) if saved else 0
    if done:
        logger.info("%d of %d importance batches were done before", done, len(batches))
    columns = Columns(basis, samples.device)
    # fp16 gradients of a mean over many tokens would underflow.
    scale = 2.0**12 if arguments.dtype == "float16" else 1.0
    loss = partial(scaled_loss, loss_weights(batches, samples), scale)
    begun, tokens = time.monotonic(), sum(map(samples.length, batches[done:]))
    last_save, progress = begun, Progress(scratch, len(batches), "batches") if saved else None
    with (
        frozen_model(model),
        tqdm(total=len(batches), initial=done, desc="importance", unit="batch", disable=rank() != 0) as bar,
    ):
        for steps, shown in passes(model, layers, batches[done:], samples, loss, arguments, scratch, rows):
            finished = sum(last for step in steps for _, _, last in step.segments)
            last = steps[-1] if finished == len(batches) else None
            _add_shown(scores, inputs, shown, columns, 1.0 / scale, samples, last)
            done += finished
            bar.update(finished)
            if progress:
                progress.at(done)
            if saved and scores.complete and done < len(batches):
                last_save = saved.save_in_time(scores, done, last_save, SAVE_SECONDS)
    log_rate("importance", tokens, begun)
    return scores.compared()


def _speaking_batches(samples: Samples, arguments: ImportanceArguments, notes: list[str]) -> list[range]:
    """The importance batches that have a response token. ConfigError where none has."""
    batches, silent = importance_batches(samples, arguments.importance_batch_size)
    if silent:
        notes.append(f"{len(silent)} importance batches have no response token and add nothing")
        logger.warning(
            "%s (the first: samples %d to %d): were their responses cut off by --max_length?",
            notes[-1],
            samples.places[silent[0].start],
            samples.places[silent[0].stop - 1],
        )
    if not batches:
        raise ConfigError(
            "no sample has a response token, so there is no importance: raise --max_length, or give a safety set with responses"
        )
    return batches


def scaled_loss(weights: dict[int, float], scale: float, logits: Tensor, batch: Batch, last: int) -> Tensor:
    """A micro-batch's part of scale x Σ_b L_b, of the logits of its ``last`` positions; ``weights``: ``loss_weights``."""
    of_tokens = batch.of_samples(torch.tensor([weights.get(i, 0.0) for i in batch.samples], device=logits.device))
    return scale * response_loss(logits, batch.labels[:, -last:], of_tokens[:, -last:])


def _add_shown(
    scores: RowScores,
    inputs: Sequence[ScoredInput],
    shown: Shown,
    columns: Columns,
    scale: float,
    samples: Samples,
    last: Step | None,
) -> None:
    """Adds |∂L_b/∂C| of all that backward passes show; ``last``: the step after which a layer that it shows is finished.

    NotFinite, on every rank, where something is NaN or infinite.
    """
    finite = Finite()
    for step, batch, taken in shown:
        for seen in inputs:
            if seen.layers[0].name in taken:
                for layer in seen.layers:
                    finite.watch(layer, batch, taken[layer.name])
                scores.add(seen, taken, batch, step, columns.get(seen.layers[0].name), scale, columns.left)
                if step is last:
                    for layer in seen.layers:
                        scores.finish(layer.name)
    stop_together(finite.failure(), "inputs or output gradients", samples)


def passes(
    model: Any,
    layers: Sequence[TargetLayer],
    batches: Sequence[range],
    samples: Samples,
    loss: Loss,
    arguments: RunArguments,
    scratch: Path,
    rows: int,
) -> Iterator[tuple[Sequence[Step], Shown]]:
    """Forward and backward passes over ``batches``, ``rows`` at a time: the steps that go together, and what they show."""
    steps = plan_steps(batches, samples, rows, world_size())
    blocks = list(find_blocks(model)[1])
    walk = BlockWalk(model, blocks)
    reason = walk.why_not(samples.few(), layers, logits=True)
    if reason is not None:
        logger.warning("this model cannot be run layer by layer (%s): it is run as a whole", reason)
        for step in steps:
            yield [step], gradients_with_hooks(model, blocks, layers, [step], samples, loss)
        return
    recompute = arguments.gradient_checkpointing
    parts: list[Sequence[Step]] = [[step] for step in steps]
    if recompute:
        parts = steps_at_once(walk, layers, steps, samples, arguments.torch_dtype.itemsize)
    for part in parts:
        yield part, GradientWalk(walk, layers, part, samples, loss, recompute, scratch).shown()
    logger.info("each block's parameters were fetched at most %d times", max(walk.fetches))


def loss_weights(batches: Sequence[range], samples: Samples) -> dict[int, float]:
    """sample -> 1 / (response tokens of its importance batch)."""
    tokens = [sum(samples.responses(i) for i in batch) for batch in batches]
    return {i: 1.0 / count for batch, count in zip(batches, tokens, strict=True) for i in batch}


@contextmanager
def frozen_model(model: Any) -> Iterator[None]:
    """No parameter has a gradient, and dropout is off."""
    wanted, training = [p for p in model.parameters() if p.requires_grad], model.training
    model.eval()
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


def scored_inputs(layers: Sequence[TargetLayer], basis: BasisStore | None, tokens: float) -> list[ScoredInput]:
    """The layers by the input they see: as phase 1 found it, or as the known architectures have it.

    ``tokens``: of an importance batch, on average.
    """
    groups = shared_inputs(layers)
    if basis is not None:
        by_file: dict[str, list[TargetLayer]] = {}
        for layer in layers:
            by_file.setdefault(basis.metadata.layers[layer.name]["file"], []).append(layer)
        groups = list(by_file.values())
    # Experts of a block share a basis, but each is given tokens of its own.
    apart: dict[tuple[int, int | None], list[TargetLayer]] = {}
    for number, group in enumerate(groups):
        for layer in group:
            apart.setdefault((number, layer.expert), []).append(layer)
    inputs = []
    for group in apart.values():
        n = r = group[0].n
        if basis is not None:
            r = basis.rank(group[0].name)
        rows = [-(-layer.m // world_size()) for layer in group]
        inputs.append(ScoredInput(group, r, tokens_first(tokens, world_size(), rows, n, r)))
    return inputs


def _scores_without_data(
    layers: Sequence[TargetLayer], basis: BasisStore | None, arguments: ImportanceArguments
) -> Iterator[tuple[TargetLayer, Tensor]]:
    """Each layer with this rank's rows. --score singular_value: every entry of a column scores its S; --score random: the same
    on any world size. Both of the stored columns of U, and of V, alone: what completes them has a score of 0, as importances
    have."""
    for number, layer in enumerate(layers):
        block = Rows(layer.m, world_size(), rank()).block
        if arguments.score == "random":
            flat = random_scores(arguments.seed * 1_000_003 + number, block.start * layer.n, len(block) * layer.n)
            rows = flat.view(len(block), layer.n)[:, : basis.rank(layer.name) if basis else layer.n].contiguous()
        else:
            assert basis is not None, "compute_masks refuses singular values without a basis"
            rows = basis.columns(layer.name)[1].float().expand(len(block), -1).contiguous()
        rows = rows.to(arguments.resolved_device)
        if basis is not None and basis.two_sided:
            rows[max(0, basis.left_rank(layer.name) - block.start) :] = 0.0
        yield layer, rows


def freeze(
    layers: Sequence[TargetLayer],
    values: dict[str, Tensor],
    arguments: ImportanceArguments,
    directory: Path,
    metadata: MasksMetadata,
    scores: bool = True,
) -> None:
    """Chooses the highest ``values`` (this rank's, ``of_units``), writes masks, how ``scores`` lie and, last, metadata."""
    unit, units, groups = arguments.mask_unit, units_of(layers, arguments.mask_unit), groups_of(layers, arguments)
    wanted = [frozen_count(arguments.keep_ratio, sum(units[layer.name] for layer in group)) for group in groups]
    chosen = choose([[values[layer.name] for layer in group] for group in groups], wanted)
    choices = [choice for of_group in chosen for choice in of_group]  # groups hold the layers in order

    counts: dict[str, int] = {}
    with Background("writing the masks") as writing:
        for number, (layer, choice) in enumerate(zip(layers, choices, strict=True)):
            rows = Rows(layer.m, world_size(), rank())
            mask = _whole_rows(choice, values.pop(layer.name), unit, len(rows.block), layer.n)
            counts[layer.name] = int(mask.sum())
            packed = gather_packed(pack_bits(mask), layer.m, rows.most, number % world_size())
            if packed is not None:
                writing.start(partial(write_mask, directory, layer, packed))
        writing.meet()

    frozen = all_reduce_sum(torch.tensor([counts[layer.name] for layer in layers], device=collective_device())).tolist()
    _describe(layers, groups, chosen, wanted, units, dict(zip(counts, frozen, strict=True)), unit, metadata)
    logs = {layer.name: choice.log_counts(units[layer.name]) for layer, choice in zip(layers, choices, strict=True)}

    def write() -> None:
        if scores:
            write_json(directory / MaskStore.SCORES, {"bins_per_decade": DECADE, "layers": logs})
        write_json(directory / "metadata.json", metadata_dict(metadata))

    on_rank_0(write, "writing the masks' metadata")


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
    layers: Sequence[TargetLayer],
    groups: Sequence[Sequence[TargetLayer]],
    chosen: Sequence[Sequence[Chosen]],
    wanted: Sequence[int],
    units: dict[str, int],
    frozen: dict[str, int],
    unit: str,
    metadata: MasksMetadata,
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
                layer,
                layer.mask_file,
                frozen=frozen[layer.name],
                wanted=k * per_unit[layer.name] if len(group) == 1 else None,
                threshold=choice.value,
            )
    metadata.layers = {layer.name: metadata.layers[layer.name] for layer in layers}
    metadata.frozen = sum(frozen.values())
    metadata.entries = sum(layer.m * layer.n for layer in layers)
    for note in metadata.notes:
        logger.info("%s", note)
    logger.info("%d of %d coefficients are frozen", metadata.frozen, metadata.entries)
