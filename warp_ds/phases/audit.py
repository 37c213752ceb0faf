"""Which task samples cost safety: each one's gradient against the safety gradient, in the frozen coordinates.

A step of plain gradient descent at rate η on sample s changes the safety loss by -η <∂L_s/∂C, ∂L_safety/∂C>, to first
order; counted over the coefficients that the masks freeze, it is what those coefficients would have taken part in. The
samples are ranked by the rise, the worst first.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from warp_ds.cluster import consensus
from warp_ds.cluster.preemption import leave_if_asked
from warp_ds.cluster.processes import all_reduce_sum, collective_device, init_distributed, rank
from warp_ds.data.sample import Sample
from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import AuditArguments
from warp_ds.method.mask import unpack_bits
from warp_ds.phases.importance import frozen_model, loss_weights, passes, scaled_loss, scored_inputs
from warp_ds.phases.publish import fetch_shared
from warp_ds.phases.run import start_run
from warp_ds.phases.texts import safety_texts, task_texts, tokenise
from warp_ds.phases.training import artefacts, find_masks
from warp_ds.report.audit_section import FORMAT, audit_blocks
from warp_ds.report.tables import to_terminal
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import write_json, write_text
from warp_ds.store.fingerprints import fingerprint_rows
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore
from warp_ds.zero.batches import Batch, Samples
from warp_ds.zero.collect import stop_together
from warp_ds.zero.gradients import Tapped
from warp_ds.zero.importance_steps import Step, importance_batches
from warp_ds.zero.influence import GradientSums, SampleProducts, own_rows
from warp_ds.zero.model import load_model, resolve_model_dir
from warp_ds.zero.scores import Finite
from warp_ds.zero.settings import zero3_config
from warp_ds.zero.shared_reading import model_fingerprint, read_together

logger = logging.getLogger(__name__)
Add = Callable[[Sequence[TargetLayer], dict[str, Tapped], Batch, Step], None]


def run_audit(arguments: AuditArguments) -> Path:
    """Returns the run directory with audit.json and audit.csv. Collective."""
    arguments.check()
    init_distributed(arguments.resolved_device, arguments.timeout)
    ds_config = zero3_config(arguments)
    model_dir = resolve_model_dir(arguments.model_name)
    fingerprint = model_fingerprint(model_dir)
    fetch_shared(arguments)
    safety = safety_texts(arguments)
    read_together(lambda: artefacts(arguments), "reading basis and masks")
    task = task_texts(arguments)
    with consensus.on_every_rank_or_none("checking the inputs"):
        masks_dir, basis_dir = find_masks(arguments, fingerprint)
        if masks_dir is None:
            raise ConfigError("--masks_dir none: an audit is of the coefficients that masks freeze: give those of phase 2")
        masks = MaskStore(masks_dir)
        data = fingerprint_rows([list(safety), list(task)])
        inputs = {"model": fingerprint, "data": data, "masks": masks.fingerprint()}
    with start_run("audit", arguments, inputs) as run:
        if run.done:
            return run.directory
        rows = tokenise(safety, arguments), tokenise(task, arguments)
        model, tokenizer = load_model(arguments, ds_config)
        samples = [Samples(dataset, tokenizer, arguments.resolved_device) for dataset in rows]
        basis = None if basis_dir is None else BasisStore(basis_dir)
        costs, cosines = sample_costs(model, samples[0], samples[1], masks, basis, arguments, run.directory)
        found = _found(arguments, masks, len(samples[0]), samples[1], task, costs, cosines)
        consensus.on_rank_0(partial(_write, run.directory, found, task), "writing the audit")
        run.finish()
        if rank() == 0:
            to_terminal(audit_blocks(found, with_texts=False))
        return run.directory


def sample_costs(
    model: Any,
    safety: Samples,
    task: Samples,
    masks: MaskStore,
    basis: BasisStore | None,
    arguments: AuditArguments,
    scratch: Path,
) -> tuple[Tensor, Tensor]:
    """Of each task sample, fp64 [samples]: minus the inner product with the safety gradient, and the cosine's negative.

    Both losses are means over samples of the mean over a sample's response tokens. The cosine is against the whole gradient
    of the masked layers. A sample without a response token has 0 and 0. Collective. Raises NotFinite.
    """
    layers = masks.layers
    gradient = GradientSums(layers, safety.device)
    scale = 2.0**12 if arguments.dtype == "float16" else 1.0
    with frozen_model(model):
        groups = [seen.layers for seen in scored_inputs(layers, basis, 1.0)]
        count = _run(model, groups, safety, gradient.add, arguments, scratch, scale)
        kept = {layer.name: _in_frozen(gradient.sums.pop(layer.name), layer, masks, basis) for layer in layers}
        products = SampleProducts(kept, len(task))
        _run(model, groups, task, products.add, arguments, scratch, scale)
    square = torch.tensor([sum(float(part.double().square().sum()) for part in kept.values())], dtype=torch.float64)
    whole = float(all_reduce_sum(square.to(collective_device()))) ** 0.5
    inner, squares = products.meet()
    # A gradient of zero has no direction.
    norms = squares.sqrt() * whole
    cosines = torch.where(norms > 0, inner / norms, torch.zeros_like(inner))
    return -inner / (scale * scale * count), -cosines


def _run(
    model: Any,
    groups: Sequence[Sequence[TargetLayer]],
    samples: Samples,
    add: Add,
    arguments: AuditArguments,
    scratch: Path,
    scale: float,
) -> int:
    """Backward passes of every sample that has a response token; how many have. ConfigError where none has.

    ``groups``: layers that see one input.
    """
    batches, _ = importance_batches(samples, 1)
    if not batches:
        raise ConfigError("no sample has a response token: raise --max_length, or give data with responses")
    loss = partial(scaled_loss, loss_weights(batches, samples), scale)
    layers = [layer for group in groups for layer in group]
    with tqdm(total=len(batches), desc="gradients", unit="sample", disable=rank() != 0) as bar:
        for steps, shown in passes(model, layers, batches, samples, loss, arguments, scratch, arguments.batch_size):
            finite = Finite()
            for step, batch, taken in shown:
                for group in (group for group in groups if group[0].name in taken):
                    for layer in group:
                        finite.watch(layer, batch, taken[layer.name])
                    add(group, taken, batch, step)
            stop_together(finite.failure(), "inputs or output gradients", samples)
            bar.update(sum(len(step.segments) for step in steps))
            leave_if_asked()
    return len(batches)


def _in_frozen(gradient: Tensor, layer: TargetLayer, masks: MaskStore, basis: BasisStore | None) -> Tensor:
    """This rank's rows of (F ∘ (G U)) Uᵀ, fp32 [rows, n]; of V (F ∘ (Vᵀ G U)) Uᵀ with an output basis. Collective."""
    rows = own_rows(layer).block
    if basis is not None and basis.two_sided:  # V mixes the rows
        whole = gradient.new_zeros(layer.m, layer.n)
        whole[rows.start : rows.stop] = gradient
        whole = all_reduce_sum(whole.to(collective_device())).to(gradient.device)
        return _kept(whole, range(layer.m), layer, masks, basis)[rows.start : rows.stop].contiguous()
    return _kept(gradient, rows, layer, masks, basis)


def _kept(gradient: Tensor, rows: range, layer: TargetLayer, masks: MaskStore, basis: BasisStore | None) -> Tensor:
    frozen = unpack_bits(masks.packed(layer.name, rows.start, rows.stop), layer.n).to(gradient.device)
    if basis is None:
        return gradient.masked_fill(~frozen, 0.0)
    rotation = basis.rotation(layer.name, device=gradient.device)
    return rotation.unrotate(rotation.rotate(gradient).masked_fill(~frozen, 0.0))


def _found(
    arguments: AuditArguments,
    masks: MaskStore,
    safety: int,
    samples: Samples,
    task: Sequence[Sample],
    costs: Tensor,
    cosines: Tensor,
) -> dict[str, Any]:
    """The content of audit.json."""
    order = sorted(range(len(samples)), key=lambda i: (-float(costs[i]), i))
    ranked = [
        {
            "row": task[samples.places[i]].row,
            "cost": float(costs[i]),
            "opposed": float(cosines[i]),
            "tokens": samples.responses(i),
            "place": samples.places[i],
        }
        for i in order
    ]
    shown = [{**row, "prompt": task[row["place"]].prompt, "response": task[row["place"]].response} for row in ranked]
    return {
        "format": FORMAT,
        "version": 1,
        "utility_data": arguments.utility_data,
        "safety_data": arguments.safety_data,
        "safety_samples": safety,
        "masks": str(masks.directory),
        "frozen": masks.metadata.frozen,
        "raising": sum(row["cost"] > 0 for row in ranked),
        "shown": shown[: arguments.show or None],
        "ranked": ranked,
    }


def _write(directory: Path, found: dict[str, Any], task: Sequence[Sample]) -> None:
    """audit.json, and audit.csv with every sample's text. Rank 0 alone calls it."""
    text = io.StringIO()
    lines = csv.writer(text)
    lines.writerow(["rank", "row", "cost", "opposed", "tokens", "prompt", "response"])
    for number, row in enumerate(found["ranked"], 1):
        sample = task[row["place"]]
        lines.writerow([number, *(row[k] for k in ("row", "cost", "opposed", "tokens")), sample.prompt, sample.response])
    write_text(directory / "audit.csv", text.getvalue())
    write_json(directory / "audit.json", found)
    logger.info("%d of %d samples raise the safety loss; all are in %s", found["raising"], len(task), directory / "audit.csv")
