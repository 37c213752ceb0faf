"""What a job will need, from the model's config alone: memory, bytes moved and disk for each phase, before it is queued.

Every figure is a sum of named parts, and each part is what the code of that phase allocates, sends or writes; what it
does not know (fragmentation, workspaces) shows in ``plan_checked.json``, where ``benchmarks/plan_check.py`` has
recorded predicted over measured.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import BasisArguments, ImportanceArguments, TrainArguments
from warp_ds.flags.groups import DTYPES
from warp_ds.flags.jobs import OFFLOADS, PlanArguments
from warp_ds.method.covariance import kept_entries
from warp_ds.method.importance import tokens_first
from warp_ds.method.rotation import Rotation
from warp_ds.models.targets import find_blocks, find_targets, shared_inputs
from warp_ds.store.checkpoint_index import READ_BUFFER_BYTES
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.collect import REDUCE, route
from warp_ds.zero.fetch import outside
from warp_ds.zero.model import local_model_dir, read_config, snapshot
from warp_ds.zero.partition import RowPartition
from warp_ds.zero.save import GATHER_BYTES
from warp_ds.zero.shard_rotation import CHUNK, CPU, GPU, place_bases, predict_costs

CHECKED = Path(__file__).with_name("plan_checked.json")
GPU_CONTEXT = 1_500_000_000
"""Bytes that the driver's context and NCCL take on a GPU. Not measured by us."""
LIBRARIES = 60_000_000
"""Bytes of host memory that a phase's code and threads take; 20 to 120 MB were measured with a model of no size."""
TRAINER_SAVES = 2
"""How often transformers' Trainer writes a checkpoint under ZeRO-3: again where 16-bit weights are not gathered."""
USABLE = 0.9
"""Share of a GPU's memory that a plan fills: the rest is left to fragmentation, and to the plan's own error."""
MOST_NODES = 1024
CURES = {
    "bases": "use more nodes, lower --max_rank, or choose fewer --layer_type or --target_layers",
    "rotating": "its owner rotates a layer whole: lower --max_rank, so that every rank can hold the bases",
    "decomposition": "fewer tokens than inputs are decomposed in a smaller form: fewer --safety_samples",
    "activations": "use --gradient_checkpointing, or a smaller --batch_size",
    "hidden states": "use more nodes, a smaller --max_length, or fewer --safety_samples",
    "logits": "use a smaller --batch_size or --max_length",
    "masters and moments": "use --offload optimizer, more nodes, or --train_scope warp",
    "weights": "use more nodes, or --offload all",
}
"""part of the memory -> what makes it smaller"""


@dataclass(frozen=True)
class Sharding:
    """The settings of a DeepSpeed config that decide memory (elements, DeepSpeed's names)."""

    config: str
    offload: str
    reduce_bucket_size: int = 500_000_000
    max_live_parameters: int = 1_000_000_000
    sub_group_size: int = 1_000_000_000


SHARDINGS = [
    Sharding("zero3.json", "none"),
    Sharding("zero3_70b.json", "none", 100_000_000, 1_000_000_000, 100_000_000),
    Sharding("zero3_offload_optimizer.json", "optimizer"),
    Sharding("zero3_offload.json", "all"),
]


@dataclass(frozen=True)
class Job:
    """What is to be run: the flags of the phases that change what they need, and the machines."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory: float = 80e9
    """Bytes of one GPU."""
    host_memory: float | None = None
    """Bytes of one node; None: not checked."""
    offload: str = "none"
    dtype: str = "bfloat16"
    layer_type: str = BasisArguments.layer_type
    target_layers: str = BasisArguments.target_layers
    tokens: int = BasisArguments.max_length
    """Of a sample, on average; --max_length is the most that it can be."""
    basis_samples: int = BasisArguments.safety_samples
    importance_samples: int = ImportanceArguments.safety_samples
    utility_samples: int = TrainArguments.utility_samples
    batch_size: int = BasisArguments.batch_size
    train_batch_size: int = TrainArguments.batch_size
    global_batch_size: int = TrainArguments.global_batch_size
    importance_batch_size: int = ImportanceArguments.importance_batch_size
    epochs: float = TrainArguments.epochs
    max_rank: int = BasisArguments.max_rank
    basis_placement: str = TrainArguments.basis_placement
    train_scope: str = TrainArguments.train_scope
    gradient_checkpointing: bool = TrainArguments.gradient_checkpointing
    on_gpu: bool = True
    """False for a CPU, where buffers that are reserved but not filled take no memory."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype]


@dataclass(frozen=True)
class Shape:
    """A model's sizes, in elements."""

    name: str
    parameters: int
    numels: dict[int, int]
    """elements of a parameter -> how many such parameters"""
    blocks: list[int]
    embedding: int
    head: int
    """All that is neither block nor input embedding."""
    hidden: int
    intermediate: int
    vocabulary: int
    stored_itemsize: int
    targets: list[TargetLayer]

    def shard(self, ranks: int) -> int:
        """Elements of all parameters on one rank, padding included."""
        return sum(RowPartition(numel, 1, ranks, 0).length * count for numel, count in self.numels.items())


@dataclass
class Needs:
    """What one phase needs; bytes. ``gpu`` and ``host``: of one rank, by part."""

    phase: str
    gpu: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    read: float = 0.0
    """By one rank, of files."""
    sent: float = 0.0
    """By one rank, to others."""
    written: float = 0.0
    """By all ranks; for training the model and one checkpoint."""
    disk: float = 0.0
    """At most, by all ranks."""
    checkpoint: float = 0.0
    """One checkpoint of all ranks; --save_minutes decides how many are written."""

    @property
    def gpu_total(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())


@dataclass
class Plan:
    """All phases on the given machines, and the fewest nodes that would do."""

    shape: Shape
    job: Job
    phases: list[Needs]
    ds_config: str
    fits: bool
    smallest: dict[str, tuple[int, str] | None]
    """offload -> (fewest nodes, its ds_config), None where not even ``MOST_NODES`` fit"""
    too_big: list[str]
    """What does not fit, in words."""


def plan(model_name: str, **settings: Any) -> Plan:
    """The needs of phases 0 to 3 for a hub name, a local folder or a config.json; ``settings`` are ``Job``'s fields.

    Reads the config alone, and allocates no weight. Raises ConfigError for a model or layers that the phases refuse.
    """
    job = Job(**settings)
    if job.offload not in OFFLOADS:
        raise ConfigError(f"--offload {job.offload}: choose from {', '.join(OFFLOADS)}")
    shape = read_shape(model_name, job.layer_type, job.target_layers)
    sharding = _sharding(shape, job)
    phases = needs(shape, job, sharding)
    too_big = _too_big(phases, job)
    smallest = {offload: _smallest(shape, replace(job, offload=offload)) for offload in OFFLOADS}
    return Plan(shape, job, phases, sharding.config, not too_big, smallest, too_big)


def needs(shape: Shape, job: Job, sharding: Sharding) -> list[Needs]:
    """Of phases 0, 1, 2 and 3."""
    everything = replace(job, train_scope="all")
    return [
        training(shape, everything, sharding, "phase 0", job.basis_samples, masked=False),
        basis(shape, job, sharding),
        importance(shape, job, sharding),
        training(shape, job, sharding, "phase 3", job.utility_samples, masked=True),
    ]


def read_shape(model_name: str, layer_type: str, target_layers: str) -> Shape:
    """A model's sizes from its config; builds it on meta. ConfigError where there is none."""
    name = str(Path(model_name).parent) if Path(model_name).name == "config.json" else model_name
    directory = local_model_dir(name) or snapshot(name, files=["config.json"])
    config = read_config(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    text = config.get_text_config()
    blocks = list(find_blocks(model)[1])
    embedding = model.get_input_embeddings()
    rest = {id(p): p for m in outside(model, blocks) if m is not embedding for p in m.parameters(recurse=False)}
    numels = [p.numel() for p in model.parameters()]
    stored = getattr(config, "dtype", None) or torch.bfloat16
    return Shape(
        name=model_name,
        parameters=sum(numels),
        numels=dict(Counter(numels)),
        blocks=[sum(p.numel() for p in block.parameters()) for block in blocks],
        embedding=embedding.weight.numel(),
        head=sum(p.numel() for p in rest.values()),
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        vocabulary=text.vocab_size,
        stored_itemsize=(getattr(torch, stored) if isinstance(stored, str) else stored).itemsize,
        targets=find_targets(model, target_layers, layer_type),
    )


# Phases -----------------------------------------------------------------------------------------------------------


def basis(shape: Shape, job: Job, sharding: Sharding) -> Needs:
    """Phase 1, layer by layer (zero/collect.py, ``collect_by_walk``)."""
    found, n_ranks, b = _loaded("phase 1", shape, job, sharding), job.ranks, job.itemsize
    mine = math.ceil(job.basis_samples / n_ranks) * job.tokens
    tokens = job.basis_samples * job.tokens
    last = max(layer.layer for layer in shape.targets)
    # The embedding is gathered to find out whether the model can be walked, and to walk it.
    fetched = 2 * shape.embedding + sum(shape.blocks[: last + 1])
    found.gpu["gathered"] = max(shape.embedding, *shape.blocks) * b
    _keep_hidden_states(found, mine * shape.hidden * b, job)
    found.gpu["activations"] = _forward_activations(shape, _micro_batch(job.batch_size, mine, job), b)
    found.sent = fetched * b * _others(n_ranks)
    by_block: dict[int, float] = {}
    decomposing = 0.0
    for group in shared_inputs(shape.targets):
        first, r = group[0], _rank_of(group[0].n, job)
        n = first.n
        if route(tokens, n, n_ranks, b) == REDUCE:
            kept, sent = 4.0 * n * n, 4.0 * kept_entries(n, "cuda" if job.on_gpu else "cpu") * _others(n_ranks)
        else:
            kept, sent = float(mine * n * b), mine * n * b * _others(n_ranks)
        by_block[first.layer] = by_block.get(first.layer, 0.0) + kept
        decomposing = max(decomposing, _decomposition(tokens, n, r, b, route(tokens, n, n_ranks, b)))
        found.sent += sent
        found.disk += 4.0 * (n * r + r)
    found.gpu["inputs"] = max(by_block.values())
    found.gpu["decomposition"] = decomposing
    found.written = found.disk
    return found


def importance(shape: Shape, job: Job, sharding: Sharding) -> Needs:
    """Phase 2 (zero/scores.py, ``gradients_by_walk``)."""
    found, n_ranks, b = _loaded("phase 2", shape, job, sharding), job.ranks, job.itemsize
    batches = math.ceil(job.importance_samples / job.importance_batch_size)
    capacity = job.batch_size * n_ranks
    together = max(1, capacity // job.importance_batch_size)
    # As plan_steps: whole importance batches in a step wherever one fits.
    held = together * job.importance_batch_size
    steps = math.ceil(batches / together) * math.ceil(held / capacity)
    of_rank = math.ceil(min(held, capacity, job.importance_samples) / n_ranks) * job.tokens
    lowest = min(layer.layer for layer in shape.targets)
    parts = 1 if job.gradient_checkpointing else steps
    walked = sum(shape.blocks[:lowest]) + 2 * sum(shape.blocks[lowest:])
    fetched = shape.embedding * (parts + 1) + parts * (shape.head + walked)
    found.sent = fetched * b * _others(n_ranks)
    found.gpu["gathered"] = max(shape.embedding, shape.head, *shape.blocks) * b
    deep = len(shape.blocks) - lowest + 1
    kept = deep * (steps if job.gradient_checkpointing else 0) + 2
    scores = columns = bases = 0.0
    step_tokens = of_rank * n_ranks
    for group in shared_inputs(shape.targets):
        n, r = group[0].n, _rank_of(group[0].n, job)
        rows = [math.ceil(layer.m / n_ranks) for layer in group]
        first = tokens_first(job.importance_batch_size * job.tokens, n_ranks, rows, n, r)
        scores += 4.0 * r * sum(rows)
        columns = max(columns, 4.0 * n * r)
        bases += 4.0 * n * r
        # A GPU keeps bases as far as it has room; for a CPU the files are mapped, and read in every step.
        found.read += 4.0 * n * r * (1 if job.on_gpu else steps)
        found.sent += steps * step_tokens * (4 * r if first else n * b) * _others(n_ranks)
        found.sent += steps * of_rank * sum(layer.m for layer in group) * b * _others(n_ranks)
        found.disk += sum(layer.m * math.ceil(layer.n / 8) for layer in group)
    found.gpu["scores"] = scores
    found.gpu["a basis"] = columns
    if job.on_gpu:
        found.gpu["bases"] = min(bases, _quarter(found, job))
    _keep_hidden_states(found, kept * of_rank * shape.hidden * b, job)
    # Bases and hidden states took their quarters before any pass ran: what passes need comes on top.
    traced = 1 if job.gradient_checkpointing else len(shape.blocks) - lowest
    found.gpu["activations"] = traced * _saved_activations(shape, of_rank, b) + _forward_activations(shape, of_rank, b)
    found.gpu["logits"] = _logits(shape, of_rank, b)
    found.gpu["masks being chosen"] = max(4.0 * layer.m * layer.n / n_ranks for layer in shape.targets)
    found.written = found.disk
    return found


def training(shape: Shape, job: Job, sharding: Sharding, phase: str, samples: int, masked: bool) -> Needs:
    """Phases 0 and 3: DeepSpeed's ZeRO-3 with AdamW, and the masked step around its own."""
    found, n_ranks, b = _loaded(phase, shape, job, sharding), job.ranks, job.itemsize
    trained = shape.parameters if job.train_scope == "all" else sum(layer.m * layer.n for layer in shape.targets)
    share = trained / n_ranks
    # Gradients accumulate in fp32, as ds_configs has it; on CPUs in the weights' dtype.
    gradient = 4 if job.on_gpu else b
    optimizer = {"gradients": gradient * share, "masters and moments": 12.0 * share}
    (found.gpu if sharding.offload == "none" else found.host).update(optimizer)
    bucket = sharding.reduce_bucket_size if job.on_gpu else min(sharding.reduce_bucket_size, trained)
    found.gpu["reduce bucket"] = bucket * b
    of_rank = job.train_batch_size * job.tokens
    depth = len(shape.blocks)
    if job.gradient_checkpointing:
        activations = depth * of_rank * shape.hidden * b + _saved_activations(shape, of_rank, b)
    else:
        activations = depth * _saved_activations(shape, of_rank, b)
    live = min(shape.parameters, sharding.max_live_parameters)
    passes: dict[str, float] = {"gathered": (live + max(shape.blocks)) * b, "activations": activations}
    passes["logits"] = _logits(shape, of_rank, b)
    step = {"a sub-group's step": 8.0 * min(share, sharding.sub_group_size) * (sharding.offload == "none")}
    steps = math.ceil(job.epochs * samples / job.global_batch_size)
    moved = 0.0
    if masked:
        held = {
            layer.name: (group[0].name, Rotation.held_bytes(layer.n, _rank_of(layer.n, job)))
            for group in shared_inputs(shape.targets)
            for layer in group
        }
        machine = GPU if job.on_gpu else CPU
        placed = place_bases(job.basis_placement, shape.targets, held, n_ranks, machine)
        placement, owners = placed.placement, placed.owners
        largest = 4.0 * max(layer.m * layer.n for layer in shape.targets)
        of_owner: Counter[int | None] = Counter()
        for key, nbytes in dict(held.values()).items():
            of_owner[owners[key]] += nbytes
        found.gpu["bases"] = float(max(of_owner.values())) / (n_ranks if placement == "sharded" else 1)
        found.gpu["masks"] = sum(layer.m * math.ceil(layer.n / 8) for layer in shape.targets) / n_ranks
        if placement == "owner":
            # An owner gets its layer whole, and gives its own shards away; one piece of rows is rotated at a time.
            step["rotating"] = 2 * largest + 4.0 * CHUNK
        else:
            # A gradient shard and what it becomes; of sharded bases the one in use and the next, whole.
            step["rotating"] = 3 * largest / n_ranks
            if placement == "sharded":
                step["rotating"] += 2 * max(nbytes for _, nbytes in held.values())
        moved = steps * predict_costs(shape.targets, held, n_ranks)[placement].sent
        widths = {key: (layer.n, _rank_of(layer.n, job)) for layer in shape.targets for key in [held[layer.name][0]]}
        found.read += max(sum(4.0 * n * r for key, (n, r) in widths.items() if owners[key] == owner) for owner in of_owner)
    # Passes and steps take turns.
    found.gpu.update(passes if sum(passes.values()) > sum(step.values()) else step)
    micro = math.ceil(job.global_batch_size / (job.train_batch_size * n_ranks))
    # Parameters stay gathered between forward and backward as far as max_live_parameters goes.
    fetches = 1 if shape.parameters <= sharding.max_live_parameters else 2
    # Nothing is kept in the first forward pass, in which DeepSpeed learns the order.
    gathers = steps * micro * fetches + (2 - fetches)
    found.sent = moved + (gathers * shape.parameters + steps * micro * trained) * b * _others(n_ranks)
    model = shape.parameters * b
    # The export is gathered once more; its writers hold four buffers.
    found.sent += model * _others(n_ranks)
    found.host["export"] = min(4.0 * GATHER_BYTES, model)
    # Masters, moments, and C beside them; weights that do not train.
    found.checkpoint = (16.0 if masked else 12.0) * trained + (shape.parameters - trained) * b
    found.written = model + TRAINER_SAVES * found.checkpoint
    # While a checkpoint replaces the one before, both exist; the last one stays beside the model.
    found.disk = found.checkpoint + max(model, found.checkpoint)
    return found


def _loaded(phase: str, shape: Shape, job: Job, sharding: Sharding) -> Needs:
    """A phase that has loaded its model."""
    found = Needs(phase)
    shard = shape.shard(job.ranks)
    (found.host if sharding.offload == "all" else found.gpu)["weights"] = shard * job.itemsize
    found.host["libraries"] = LIBRARIES
    if job.on_gpu:
        found.gpu["context"] = GPU_CONTEXT
        found.host["reading"] = READ_BUFFER_BYTES
    found.read = shape.parameters * shape.stored_itemsize / job.ranks
    return found


# Parts ------------------------------------------------------------------------------------------------------------


def _others(ranks: int) -> float:
    """Share of a gathered or scattered tensor that crosses from each rank to others (a ring)."""
    return (ranks - 1) / ranks


def _micro_batch(batch_size: int, tokens_of_rank: int, job: Job) -> int:
    return min(batch_size * job.tokens, tokens_of_rank)


def _rank_of(n: int, job: Job) -> int:
    """Columns of a stored basis: no more than there are tokens."""
    r = min(n, job.basis_samples * job.tokens)
    return min(r, job.max_rank) if job.max_rank else r


def _quarter(found: Needs, job: Job) -> float:
    return max(0.0, job.gpu_memory - found.gpu_total) / 4


def _keep_hidden_states(found: Needs, size: float, job: Job) -> None:
    """Of zero/walk.py's ``HiddenStates``: on a GPU up to a quarter of what is free so far, the rest in host memory."""
    on_gpu = min(size, _quarter(found, job)) if job.on_gpu else 0.0
    if on_gpu:
        found.gpu["hidden states"] = on_gpu
    found.host["hidden states"] = size - on_gpu


def _decomposition(tokens: int, n: int, r: int, b: int, way: str) -> float:
    """Peak of method/eigenbasis.py on the owner: what it is given, and its workspaces."""
    if tokens < n:
        # x, x in fp64; the Gram matrix, its eigenvectors and LAPACK's workspace, then the eigenvectors, u, and its QR.
        return tokens * n * (b + 8.0) + max(8.0 * 5 * tokens * tokens, 8.0 * tokens * tokens + 8.0 * 3 * n * r)
    gathered = 0.0 if way == REDUCE else float(tokens * n * b)
    # Σ in fp32 and, as the spectra of real models mostly want, in fp64; its eigenvectors and LAPACK's workspace.
    return max(gathered + 4.0 * n * n, (4.0 + 8.0 * 4) * n * n)


def _forward_activations(shape: Shape, tokens: int, b: int) -> float:
    """Alive at once inside a block without a graph: its input, norms in fp32, and the feed-forward part."""
    return tokens * (3 * shape.intermediate * b + 4 * shape.hidden * b + 8 * shape.hidden)


def _saved_activations(shape: Shape, tokens: int, b: int) -> float:
    """Kept by a block's graph: inputs of its linear layers, gate, up and their product, queries, keys and values, and
    two norms in fp32."""
    return tokens * (4 * shape.intermediate * b + 8 * shape.hidden * b + 2 * 8 * shape.hidden)


def _logits(shape: Shape, tokens: int, b: int) -> float:
    """Logits and their gradient in the weights' dtype, and both in fp32 for the loss."""
    return tokens * shape.vocabulary * 2.0 * (b + 4)


# Choosing ---------------------------------------------------------------------------------------------------------


def _sharding(shape: Shape, job: Job) -> Sharding:
    """The ds_config for the offload asked for; large models take the one with small buckets."""
    fitting = [sharding for sharding in SHARDINGS if sharding.offload == job.offload]
    return fitting[-1] if shape.parameters > 30e9 else fitting[0]


def _too_big(phases: Iterable[Needs], job: Job) -> list[str]:
    found = []
    for phase in phases:
        if phase.gpu_total > USABLE * job.gpu_memory:
            part = max(phase.gpu, key=lambda name: phase.gpu[name])
            cure = f"; {CURES[part]}" if part in CURES else ""
            found.append(f"{phase.phase}: {_gb(phase.gpu_total)} GB a GPU of {_gb(job.gpu_memory)}, most of it {part}{cure}")
        node = phase.host_total * job.gpus_per_node
        if job.host_memory is not None and node > job.host_memory:
            found.append(f"{phase.phase}: {_gb(node)} GB of host memory a node of {_gb(job.host_memory)}")
    return found


def _smallest(shape: Shape, job: Job) -> tuple[int, str] | None:
    for nodes in _node_counts():
        wider = replace(job, nodes=nodes)
        sharding = _sharding(shape, wider)
        if not _too_big(needs(shape, wider, sharding), wider):
            return nodes, sharding.config
    return None


def _node_counts() -> Iterable[int]:
    return [*range(1, 33), *range(36, 129, 4), *range(144, MOST_NODES + 1, 16)]


# On the terminal --------------------------------------------------------------------------------------------------


def run(arguments: PlanArguments) -> int:
    """``warp-ds plan``; exit status 1 where the job does not fit."""
    known = {f.name for f in fields(Job)}
    given = {name: value for name, value in vars(arguments).items() if name in known and name != "batch_size"}
    given.update(
        gpu_memory=arguments.gpu_memory * 1e9,
        host_memory=None if arguments.host_memory is None else arguments.host_memory * 1e9,
        tokens=arguments.max_length,
    )
    if arguments.safety_samples is not None:
        given.update(basis_samples=arguments.safety_samples, importance_samples=arguments.safety_samples)
    if arguments.batch_size is not None:
        given.update(batch_size=arguments.batch_size, train_batch_size=arguments.batch_size)
    made = plan(arguments.model_name, **given)
    print_plan(made)
    return 0 if made.fits else 1


def print_plan(made: Plan) -> None:
    """The table, what does not fit, and the smallest machine."""
    from rich.console import Console
    from rich.table import Table

    console, job, checked = Console(markup=False), made.job, _checked()
    title = (
        f"{made.shape.name}: {made.shape.parameters / 1e9:.2f} B parameters, {job.dtype}, {job.nodes} x "
        f"{job.gpus_per_node} GPUs of {_gb(job.gpu_memory)} GB, offload {job.offload}, {made.ds_config}"
    )
    table = Table(title=title, caption=_caption(checked))
    for column in ("GB", "GPU, a rank", "host, a rank", "read, a rank", "sent, a rank", "written, all", "disk, all"):
        table.add_column(column, justify="left" if column == "GB" else "right")
    for phase in made.phases:
        figures = [phase.gpu_total, phase.host_total, phase.read, phase.sent, phase.written, phase.disk]
        table.add_row(phase.phase, *(_gb(figure) for figure in figures))
        ratios = checked.get(phase.phase, {})
        if ratios:
            of_memory = _percent(ratios.get("memory"))
            rest = (_percent(ratios.get(name)) for name in ("read", "sent", "written", "disk"))
            table.add_row("  off by", of_memory, "(with GPU)", *rest, style="dim")
    console.print(table)
    for phase in made.phases:
        for place, parts in (("GPU", phase.gpu), ("host", phase.host)):
            named = ", ".join(f"{name} {_gb(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1]) if size)
            console.print(f"{phase.phase} {place}: {named}", style="dim", highlight=False)
    for text in made.too_big:
        console.print(f"does not fit: {text}", style="bold", highlight=False)
    for offload, least in made.smallest.items():
        needed = f"none up to {MOST_NODES} nodes" if least is None else f"{least[0]} nodes, {least[1]}"
        console.print(f"smallest with offload {offload}: {needed}", highlight=False)


def _checked() -> dict[str, Any]:
    return json.loads(CHECKED.read_text()) if CHECKED.exists() else {}


def _caption(checked: dict[str, Any]) -> str:
    if not checked:
        return "not checked against a run"
    where = dict.fromkeys(str(phase["where"]) for phase in checked.values())
    return f"off by: predicted against measured with {'; '.join(where)}"


def _percent(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{100 * (ratio - 1):+.0f} %"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}" if size < 100e9 else f"{size / 1e9:.0f}"
