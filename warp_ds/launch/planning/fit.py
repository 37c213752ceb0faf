"""Whether the phases fit, what does not and its cure, and the fewest nodes on which they do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from warp_ds.errors import ConfigError
from warp_ds.launch.planning.both_sides import check_output_basis
from warp_ds.launch.planning.estimate import Estimate, gb
from warp_ds.launch.planning.job import OFFLOADS, Job, Shape, Sharding, choose_sharding, read_shape
from warp_ds.launch.planning.training import training
from warp_ds.launch.planning.walks import basis, importance
from warp_ds.models.targets import check_expert_basis

USABLE = 0.9
"""Share of a GPU's memory that a plan fills: the rest is left to fragmentation, and to the plan's own error."""
MOST_NODES = 1024
CURES = {
    "bases": "use more nodes, lower --max_rank, or choose fewer --layer_type or --target_layers",
    "rotating": "its owner rotates a layer whole: lower --max_rank, so that every rank can hold the bases",
    "decomposition": "fewer tokens than inputs are decomposed in a smaller form: fewer --safety_samples",
    "activations": "use --gradient_checkpointing, or a smaller --batch_size",
    "hidden states": "use more nodes, a smaller --max_length, or fewer --safety_samples",
    "scores": "use more nodes; columns or rows (--mask_unit) with --gradient_checkpointing hold one block's",
    "logits": "use a smaller --batch_size or --max_length",
    "masters and moments": "use --offload optimizer or more nodes",
    "weights": "use more nodes, or --offload all",
}
"""part of the memory -> what makes it smaller"""


@dataclass
class Plan:
    """All phases on the given machines, and the fewest nodes that would do."""

    shape: Shape
    job: Job
    phases: list[Estimate]
    ds_config: str
    fits: bool
    smallest: dict[str, tuple[int, str] | None]
    """offload -> (fewest nodes, its ds_config), None where not even ``MOST_NODES`` fit"""
    too_big: list[str]
    """What does not fit, in words."""


def make_plan(model_name: str, **settings: Any) -> Plan:
    """The needs of phases 0 to 3 for a hub name, a local folder or a config.json; ``settings`` are ``Job``'s fields.

    Reads the config alone, and allocates no weight. Raises ConfigError for a model or layers that the phases refuse.
    """
    job = Job(**settings)
    if job.offload not in OFFLOADS:
        raise ConfigError(f"--offload {job.offload}: choose from {', '.join(OFFLOADS)}")
    check_output_basis(job)
    shape = read_shape(model_name, job.layer_type, job.target_layers)
    check_expert_basis(shape.targets, job.expert_basis)
    sharding = choose_sharding(shape, job)
    phases = estimate_phases(shape, job, sharding)
    too_big = _too_big(phases, job)
    smallest = {offload: _smallest(shape, replace(job, offload=offload)) for offload in OFFLOADS}
    return Plan(shape, job, phases, sharding.config, not too_big, smallest, too_big)


def estimate_phases(shape: Shape, job: Job, sharding: Sharding) -> list[Estimate]:
    """Of phases 0, 1, 2 and 3."""
    everything = replace(job, train_scope="all")
    return [
        training(shape, everything, sharding, "phase 0", job.basis_samples, masked=False),
        basis(shape, job, sharding),
        importance(shape, job, sharding),
        training(shape, job, sharding, "phase 3", job.utility_samples, masked=True),
    ]


def _too_big(phases: Iterable[Estimate], job: Job) -> list[str]:
    need = []
    for phase in phases:
        if phase.gpu_total > USABLE * job.gpu_memory:
            part = max(phase.gpu, key=lambda name: phase.gpu[name])
            cure = f"; {CURES[part]}" if part in CURES else ""
            wanted = f"{gb(phase.gpu_total)} GB a GPU of {gb(job.gpu_memory)} (a tenth is left free)"
            need.append(f"{phase.phase}: {wanted}, most of it {part}{cure}")
        node = phase.host_total * job.gpus_per_node
        if job.host_memory is not None and node > job.host_memory:
            need.append(f"{phase.phase}: {gb(node)} GB of host memory a node of {gb(job.host_memory)}")
    return need


def _smallest(shape: Shape, job: Job) -> tuple[int, str] | None:
    for nodes in _node_counts():
        wider = replace(job, nodes=nodes)
        sharding = choose_sharding(shape, wider)
        if not _too_big(estimate_phases(shape, wider, sharding), wider):
            return nodes, sharding.config
    return None


def _node_counts() -> Iterable[int]:
    return [*range(1, 33), *range(36, 129, 4), *range(144, MOST_NODES + 1, 16)]
