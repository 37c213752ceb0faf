"""What a job will take, as ``warp-ds plan`` counts it, against what this machine has left: disk, host memory, GPU memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from warp_ds.cluster import memory
from warp_ds.errors import ConfigError
from warp_ds.launch.machine import Finding
from warp_ds.launch.planning.estimate import Estimate
from warp_ds.launch.planning.fit import estimate_phases
from warp_ds.launch.planning.job import OFFLOADS, Job, choose_sharding, read_shape
from warp_ds.launch.planning.said import of_model
from warp_ds.zero import settings


def check_resources(
    arguments: Any, directory: Path, nodes: int, ranks_per_node: int, phase: str | None = None
) -> Iterator[Finding]:
    """Disk, memory and GPU memory of one phase ('phase3'; '' has none), or of the greediest but for the optional phase 0."""
    import torch

    on_gpu = torch.cuda.is_available() and arguments.resolved_device == "cuda"
    try:
        job = _job(arguments, nodes, ranks_per_node, on_gpu)
        shape = read_shape(str(directory), job.layer_type, job.target_layers)
        estimates = estimate_phases(shape, job, choose_sharding(shape, job))
    except (ConfigError, ValueError, OSError, KeyError, AttributeError) as error:
        fails = isinstance(error, ConfigError)  # the phases say the same
        yield Finding("needs", f"not counted: {error}", "change that flag" if fails else "see warp-ds plan", fatal=fails)
        return
    if phase is None:
        yield Finding("layers", "; ".join([f"{len(shape.targets)} to rotate", *of_model(shape, job)]))
    estimates = [e for e in estimates if e.phase.replace(" ", "") == phase] if phase is not None else estimates[1:]
    if estimates:
        yield _disk(arguments.output_dir, estimates)
        yield _host(estimates, ranks_per_node, on_gpu)
        if on_gpu:
            yield _gpu(estimates, torch.cuda.get_device_properties(0).total_memory)


def _job(arguments: Any, nodes: int, ranks_per_node: int, on_gpu: bool) -> Job:
    """The flags that are given; raises what a wrong one makes of it."""
    zero = settings.zero3_config(arguments)["zero_optimization"]
    offloaded = [zero.get(part, {}).get("device", "none") != "none" for part in ("offload_param", "offload_optimizer")]
    return Job(
        nodes=nodes,
        gpus_per_node=ranks_per_node,
        dtype=arguments.dtype,
        tokens=arguments.max_length,
        on_gpu=on_gpu,
        host_memory=float(memory.available()),
        gradient_checkpointing=arguments.gradient_checkpointing,
        offload=OFFLOADS[sum(offloaded)],
        **{
            name: getattr(arguments, name)
            for name in ("layer_type", "target_layers", "train_scope", "expert_basis", "mask_unit")
            if hasattr(arguments, name)
        },
    )


def _disk(output_dir: str, estimates: Sequence[Estimate]) -> Finding:
    most = max(estimates, key=lambda e: e.disk)
    directory = Path(output_dir).absolute()
    # One that cannot be made is a finding of its own.
    free = shutil.disk_usage(next(path for path in (directory, *directory.parents) if path.exists())).free
    return Finding(
        "disk",
        f"{free / 1e9:.1f} GB free in {output_dir}, {most.disk / 1e9:.1f} GB needed by {most.phase}",
        "free some, or another --output_dir" if free < most.disk else "",
    )


def _host(estimates: Sequence[Estimate], ranks_per_node: int, on_gpu: bool) -> Finding:
    """Of one node; without GPUs everything lies in host memory."""

    def of_rank(estimate: Estimate) -> float:
        return estimate.host_total + (0 if on_gpu else estimate.gpu_total)

    most = max(estimates, key=of_rank)
    wanted, left = ranks_per_node * of_rank(most), memory.available()
    return Finding(
        "memory",
        f"{left / 1e9:.1f} GB available to this job here, {wanted / 1e9:.1f} GB needed by {most.phase}",
        "more nodes, fewer ranks a node, or a smaller --batch_size: see warp-ds plan" if left < wanted else "",
        fatal=False,
    )


def _gpu(estimates: Sequence[Estimate], total: int) -> Finding:
    most = max(estimates, key=lambda e: e.gpu_total)
    return Finding(
        "GPU memory",
        f"{total / 1e9:.1f} GB a GPU, {most.gpu_total / 1e9:.1f} GB needed by {most.phase}",
        "more nodes, --gradient_checkpointing or an offloading ds_config: see warp-ds plan" if total < most.gpu_total else "",
        fatal=False,
    )
