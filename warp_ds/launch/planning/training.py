"""Estimates of the phases that train: 0, and 3 with its masked step."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from warp_ds.flags.controls import REPLAYS
from warp_ds.launch.planning import both_sides
from warp_ds.launch.planning.estimate import (
    Estimate,
    after_loading,
    basis_rank,
    groups_of,
    logits,
    others_share,
    saved_activations,
)
from warp_ds.launch.planning.job import Job, Shape, Sharding
from warp_ds.method.mask import frozen_count
from warp_ds.method.rotation import Rotation
from warp_ds.zero.placement_costs import CPU, GPU, Dtypes
from warp_ds.zero.placements import Placement, place_bases
from warp_ds.zero.protected_layer import CHUNK
from warp_ds.zero.save import GATHER_BYTES

TRAINER_SAVES = 2
"""How often transformers' Trainer writes a checkpoint under ZeRO-3: again where 16-bit weights are not gathered."""


def training(shape: Shape, job: Job, sharding: Sharding, phase: str, samples: int, masked: bool) -> Estimate:
    """Phases 0 and 3: DeepSpeed's ZeRO-3 with AdamW, and the masked step around its own."""
    need, b = after_loading(phase, shape, job, sharding), job.itemsize
    lora = job.adapter == "lora"
    trained = _trained(shape, job)
    if lora:
        need.gpu["adapters"] = trained * b / job.ranks
    steps = math.ceil(job.epochs * samples / job.global_batch_size)
    step = _optimizer(need, trained, job, sharding)
    passes = _passes(shape, job, sharding)
    if lora:
        passes["activations"] += _adapter_activations(shape, job)
    if masked:
        step["rotating"] = _masked_step(need, shape, job, steps)
    # Passes and steps take turns.
    need.gpu.update(passes if sum(passes.values()) > sum(step.values()) else step)
    micro = math.ceil(job.global_batch_size / (job.train_batch_size * job.ranks))
    # Parameters stay gathered between forward and backward as far as max_live_parameters goes.
    fetches = 1 if shape.parameters <= sharding.max_live_parameters else 2
    # Nothing is kept in the first forward pass, in which DeepSpeed learns the order.
    gathers = steps * micro * fetches + (2 - fetches)
    need.sent += (gathers * shape.parameters + steps * micro * trained) * b * others_share(job.ranks)
    model = (trained + shape.parameters * job.merge_adapter if lora else shape.parameters) * b
    # The export is gathered once more; its writers hold four buffers.
    need.sent += model * others_share(job.ranks)
    need.host["export"] = min(4.0 * GATHER_BYTES, model)
    # Masters, moments, and C beside them; weights that do not train, but for those that an adapter is put on.
    need.checkpoint = (16.0 if masked else 12.0) * trained + (trained if lora else shape.parameters - trained) * b
    need.written = model + (1 if lora else TRAINER_SAVES) * need.checkpoint
    # While a checkpoint replaces the one before, both exist; the last one stays beside the model.
    need.disk = need.checkpoint + max(model, need.checkpoint)
    if masked:
        kept = _start_logits(shape, job)
        need.written, need.disk = need.written + kept, need.disk + kept
    return need


def _start_logits(shape: Shape, job: Job) -> float:
    """Bytes kept of the start model until the run ends (phases/start_model.py), if every token is trained."""
    if job.objective == "constrained":
        return 4.0 * job.utility_samples * job.tokens
    return float(job.basis_samples * job.tokens * shape.vocabulary * job.itemsize) if job.objective in REPLAYS else 0.0


def _trained(shape: Shape, job: Job) -> int:
    """Elements that train."""
    if job.adapter == "lora":
        return sum(job.lora_r * (layer.m + layer.n) for layer in shape.targets)
    return shape.parameters if job.train_scope == "all" else sum(layer.m * layer.n for layer in shape.targets)


def _adapter_activations(shape: Shape, job: Job) -> float:
    """What the adapters' graph keeps besides: A x, and under dropout a copy of x and its mask for each."""
    by_block: dict[int, float] = {}
    for layer in shape.targets:
        kept = job.lora_r * job.itemsize + (layer.n * (job.itemsize + 1) if job.lora_dropout else 0)
        by_block[layer.layer] = by_block.get(layer.layer, 0.0) + kept
    blocks = max(by_block.values()) if job.gradient_checkpointing else sum(by_block.values())
    return blocks * job.train_batch_size * job.tokens


def _optimizer(need: Estimate, trained: int, job: Job, sharding: Sharding) -> dict[str, float]:
    """Adds what an optimizer of ``trained`` elements holds throughout; returns what its step takes on the GPU beyond that."""
    share = trained / job.ranks
    # Gradients accumulate in fp32, as ds_configs has it; on CPUs in the weights' dtype.
    gradient = 4 if job.on_gpu else job.itemsize
    state = {"gradients": gradient * share, "masters and moments": 12.0 * share}
    (need.gpu if sharding.offload == "none" else need.host).update(state)
    bucket = sharding.reduce_bucket_size if job.on_gpu else min(sharding.reduce_bucket_size, trained)
    need.gpu["reduce bucket"] = bucket * job.itemsize
    return {"a sub-group's step": 8.0 * min(share, sharding.sub_group_size) * (sharding.offload == "none")}


def _passes(shape: Shape, job: Job, sharding: Sharding) -> dict[str, float]:
    """What a forward and backward pass takes on the GPU."""
    b, tokens, depth = job.itemsize, job.train_batch_size * job.tokens, len(shape.blocks)
    of_block = saved_activations(shape, tokens, b)
    live = min(shape.parameters, sharding.max_live_parameters)
    return {
        "gathered": (live + max(shape.blocks)) * b,
        # Parameters that are fetched together arrive as one tensor, of which each is then a copy.
        "being fetched": min(live, sharding.prefetch_bucket_size) * b * (job.ranks > 1),
        "activations": depth * tokens * shape.hidden * b + of_block if job.gradient_checkpointing else depth * of_block,
        "logits": logits(shape, tokens, b),
    }


def _masked_step(need: Estimate, shape: Shape, job: Job, steps: int) -> float:
    """Adds bases, masks and what ``steps`` rotations move; returns what one takes on the GPU beyond that."""
    ranks, targets = job.ranks, shape.targets
    held = {
        layer.name: (group[0].name, Rotation.held_bytes(layer.n, basis_rank(group[0], shape, job)))
        for group in groups_of(shape, job)
        for layer in group
    }
    if job.adapter == "lora":
        # A [r, n] of each layer, with a basis of its own frozen columns (masked_parameters.py).
        targets = [replace(layer, m=job.lora_r) for layer in shape.targets]
        held = {t.name: (t.name, Rotation.held_bytes(t.n, frozen_count(job.keep_ratio, t.n))) for t in targets}
    placement: Placement
    machine = GPU if job.on_gpu else CPU
    if job.output_basis == "identity":
        # Gradients accumulate in fp32, as ds_configs has it.
        dtypes = Dtypes(weights=getattr(torch, job.dtype))
        placement, _ = place_bases(job.basis_placement, targets, held, ranks, machine, dtypes=dtypes)
    else:
        placement, held = both_sides.place(held, shape, job)
    need.rotating = placement.cost().seconds(machine)
    need.gpu["bases"] = float(placement.kept())
    need.gpu["masks"] = sum(layer.m * math.ceil(layer.n / 8) for layer in targets) / ranks
    need.sent += steps * placement.cost().sent
    stored = {
        held[layer.name][0]: 4.0 * layer.n * basis_rank(layer, shape, job) + both_sides.left_bytes(layer, shape, job)
        for layer in targets
    }
    read: dict[range, float] = {}
    for key, size in stored.items():
        who = placement.readers(key)
        read[who] = read.get(who, 0.0) + size
    need.read += max(read.values())
    largest = 4.0 * max(layer.m * layer.n for layer in targets)
    if job.output_basis != "identity":
        # Whole, turned by V, then by U; and the shards that are sent.
        return 3 * largest + largest / ranks
    if placement.name == "owner":
        # An owner gets its layer whole, and gives its own shards away; one piece of rows is rotated at a time.
        return 2 * largest + 4.0 * CHUNK
    # A gradient shard and what it becomes; of sharded bases the one in use and the next, whole.
    in_use = 2 * max(nbytes for _, nbytes in held.values()) if placement.name == "sharded" else 0
    return 3 * largest / ranks + in_use
