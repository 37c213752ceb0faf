"""Estimates of the phases that walk the model layer by layer: bases (1) and importance (2)."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

from warp_ds.launch.planning import both_sides
from warp_ds.launch.planning.estimate import (
    Estimate,
    after_loading,
    basis_bytes,
    basis_rank,
    decomposition_peak,
    forward_activations,
    groups_of,
    keep_hidden_states,
    logits,
    micro_batch,
    others_share,
    quarter_of_free,
    saved_activations,
    seen,
)
from warp_ds.launch.planning.job import Job, Shape, Sharding
from warp_ds.method.covariance import kept_entries
from warp_ds.method.importance import tokens_first
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.collect import REDUCE, ROUTED, route
from warp_ds.zero.expert_inputs import of_expert


def basis(shape: Shape, job: Job, sharding: Sharding) -> Estimate:
    """Phase 1, layer by layer (zero/collect.py, ``collect_by_walk``)."""
    need, n_ranks, b = after_loading("phase 1", shape, job, sharding), job.ranks, job.itemsize
    mine = math.ceil(job.basis_samples / n_ranks) * job.tokens
    tokens = job.basis_samples * job.tokens
    last = max(layer.layer for layer in shape.targets)
    # The embedding is gathered to try the walk and to walk, each block twice more for the trial.
    fetched = 2 * shape.embedding + 3 * sum(shape.blocks[: last + 1])
    need.gpu["gathered"] = (shape.embedding + max(shape.blocks)) * b
    keep_hidden_states(need, mine * shape.hidden * b, job)
    need.gpu["activations"] = forward_activations(shape, micro_batch(job.batch_size, mine, job), b)
    need.sent = fetched * b * others_share(n_ranks)
    by_block: dict[int, float] = {}
    decomposing = 0.0
    for group in groups_of(shape, job):
        first, r = group[0], basis_rank(group[0], shape, job)
        n, own, given = first.n, seen(first, shape, job, mine), seen(first, shape, job, tokens)
        way = ROUTED if of_expert(first, job.expert_basis) else route(tokens, n, n_ranks, b)
        if way == REDUCE:
            kept, sent = 4.0 * n * n, 4.0 * kept_entries(n, "cuda" if job.on_gpu else "cpu") * others_share(n_ranks)
        else:
            kept, sent = float(own * n * b), own * n * b * others_share(n_ranks)
        by_block[first.layer] = by_block.get(first.layer, 0.0) + kept
        weights = outputs = 0.0
        if job.output_basis == "activation":
            weights, outputs = both_sides.of_activations(group, given, shape, job)
            need.sent += both_sides.sent_of_weights(group, job)
        decomposing = max(decomposing, weights + max(outputs, decomposition_peak(given, n, r, b, way)))
        need.sent += sent
        need.disk += basis_bytes(n, r)
    need.gpu["inputs"] = max(by_block.values())
    need.gpu["decomposition"] = decomposing
    if job.output_basis == "gradient":
        _output_gradients(
            need, shape, replace(job, importance_batch_size=1, importance_samples=job.basis_samples), sharding, mine
        )
    need.disk += both_sides.files(shape, job)
    need.written = need.disk
    _try_walk(need, shape, job, sharding)
    return need


def _try_walk(need: Estimate, shape: Shape, job: Job, sharding: Sharding) -> None:
    """Adds what the walk's trial takes beyond all that comes after it: in its plain pass DeepSpeed keeps gathered what
    max_live_parameters lets it (zero/walk.py, ``why_not``)."""
    trial = (min(shape.parameters, sharding.max_live_parameters) + max(shape.blocks)) * job.itemsize
    later = sum(size for part, size in need.gpu.items() if part not in ("weights", "context"))
    need.gpu["trying the walk"] = max(0.0, trial - later)


def _output_gradients(need: Estimate, shape: Shape, job: Job, sharding: Sharding, mine: int) -> None:
    """Phase 1's backward passes, which come before it collects inputs, added to what that ``need``s; an importance batch of
    ``job`` is one sample."""
    passes = after_loading("phase 1", shape, job, sharding)
    steps, of_rank = _steps(job)
    _fetch(passes, shape, job, steps)
    passes.gpu["inputs"], decomposing, sent = both_sides.of_gradients(shape, job, mine)
    decomposed = {**passes.gpu, "decomposition": decomposing}
    _trace(passes, shape, job, steps, of_rank)
    need.sent += passes.sent + sent
    need.gpu = max(need.gpu, passes.gpu, decomposed, key=lambda parts: sum(parts.values()))
    need.host = max(need.host, passes.host, key=lambda parts: sum(parts.values()))


def importance(shape: Shape, job: Job, sharding: Sharding) -> Estimate:
    """Phase 2 (zero/scores.py, ``gradients_by_walk``)."""
    need, n_ranks = after_loading("phase 2", shape, job, sharding), job.ranks
    steps, of_rank = _steps(job)
    _fetch(need, shape, job, steps)
    bases = _scores(need, shape, job, steps, of_rank)
    if job.on_gpu:
        need.gpu["bases"] = min(bases, quarter_of_free(need, job))
    _trace(need, shape, job, steps, of_rank)
    need.gpu["masks being chosen"] = max(4.0 * layer.m * layer.n / n_ranks for layer in shape.targets)
    need.written = need.disk
    return need


def _steps(job: Job) -> tuple[int, int]:
    """(steps, a rank's tokens in one), as plan_steps: whole importance batches in a step wherever one fits."""
    batches = math.ceil(job.importance_samples / job.importance_batch_size)
    capacity = job.batch_size * job.ranks
    together = max(1, capacity // job.importance_batch_size)
    held = together * job.importance_batch_size
    steps = math.ceil(batches / together) * math.ceil(held / capacity)
    return steps, math.ceil(min(held, capacity, job.importance_samples) / job.ranks) * job.tokens


def _fetch(need: Estimate, shape: Shape, job: Job, steps: int) -> None:
    """What backward passes fetch of the model."""
    lowest = min(layer.layer for layer in shape.targets)
    parts = 1 if job.gradient_checkpointing else steps
    walked = sum(shape.blocks[:lowest]) + 2 * sum(shape.blocks[lowest:])
    # To try the walk, embedding and head are gathered at the same time, and each block twice.
    fetched = shape.embedding * (parts + 1) + parts * (shape.head + walked) + shape.head + 2 * sum(shape.blocks)
    need.sent = fetched * job.itemsize * others_share(job.ranks)
    need.gpu["gathered"] = (shape.embedding + shape.head + max(shape.blocks)) * job.itemsize


def _trace(need: Estimate, shape: Shape, job: Job, steps: int, of_rank: int) -> None:
    """What backward passes hold. Bases and hidden states took their quarters before any pass ran: passes come on top."""
    b, traced = job.itemsize, len(shape.blocks) - min(layer.layer for layer in shape.targets)
    kept = (traced + 1) * (steps if job.gradient_checkpointing else 0) + 2
    keep_hidden_states(need, kept * of_rank * shape.hidden * b, job)
    graphs = 1 if job.gradient_checkpointing else traced
    need.gpu["activations"] = graphs * saved_activations(shape, of_rank, b) + forward_activations(shape, of_rank, b)
    need.gpu["logits"] = logits(shape, of_rank, b)


def _scores(need: Estimate, shape: Shape, job: Job, steps: int, of_rank: int) -> float:
    """Adds what scores of all layers take, ``of_rank`` tokens of each rank a step; returns the bytes of all bases."""
    n_ranks, b = job.ranks, job.itemsize
    scores: dict[int, float] = defaultdict(float)
    columns = bases = 0.0
    step_tokens = of_rank * n_ranks
    for group in groups_of(shape, job):
        r = basis_rank(group[0], shape, job)
        columns = max(columns, 4.0 * group[0].n * r)
        bases += 4.0 * group[0].n * r
        # A GPU keeps bases as far as it has room; for a CPU the files are mapped, and read in every step.
        need.read += 4.0 * group[0].n * r * (1 if job.on_gpu else steps)
    lefts = [both_sides.left_bytes(layer, shape, job) for layer in shape.targets]
    columns, bases = columns + max(lefts), bases + sum(lefts)
    need.read += sum(lefts) * (1 if job.on_gpu else steps)
    # Experts of a block share a basis, but each is given tokens of its own (phases/importance.py, ``scored_inputs``).
    apart: dict[tuple[str, int | None], list[TargetLayer]] = {}
    for group in groups_of(shape, job):
        for layer in group:
            apart.setdefault((group[0].name, layer.expert), []).append(layer)
    for group in apart.values():
        n, r = group[0].n, basis_rank(group[0], shape, job)
        share = 1.0 if group[0].expert is None else shape.routed / shape.experts
        rows = [math.ceil(layer.m / n_ranks) for layer in group]
        first = tokens_first(job.importance_batch_size * job.tokens, n_ranks, rows, n, r)
        scores[group[0].layer] += 4.0 * r * sum(rows)
        need.sent += steps * step_tokens * share * (4 * r if first else n * b) * others_share(n_ranks)
        of_gradient = b if job.output_basis == "identity" else 4  # turned by V they are fp32
        need.sent += steps * of_rank * share * sum(layer.m for layer in group) * of_gradient * others_share(n_ranks)
        need.disk += sum(layer.m * math.ceil(layer.n / 8) for layer in group)
    units = job.mask_unit != "entry" or job.adapter == "lora"
    by_block = units and _walks_once(need, shape, job, steps, of_rank)
    need.gpu["scores"] = max(scores.values()) if by_block else sum(scores.values())
    need.gpu["a basis"] = columns
    return bases


def _walks_once(need: Estimate, shape: Shape, job: Job, steps: int, of_rank: int) -> bool:
    """Whether one walk over the blocks shows all importance batches: their hidden states fit in a quarter of the host memory
    that ``need`` leaves (``steps_at_once``). Host memory that is not known is enough."""
    if steps == 1 or not job.gradient_checkpointing or job.host_memory is None:
        return steps == 1 or job.gradient_checkpointing
    depth = len(shape.blocks) - min(layer.layer for layer in shape.targets) + 1
    left = job.host_memory / job.gpus_per_node - need.host_total - (0.0 if job.on_gpu else need.gpu_total)
    return steps * of_rank * shape.hidden * job.itemsize * depth <= left / 4
