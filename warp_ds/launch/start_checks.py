"""What every rank of a job finds out before any work: its machine, the shared directories, one set of versions, the network."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from pathlib import Path

import torch

from warp_ds.cluster import consensus, processes
from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import RunArguments
from warp_ds.launch.machine import writable
from warp_ds.launch.resources import check_resources
from warp_ds.phases.versions import shown_versions

logger = logging.getLogger(__name__)


def start_checks(arguments: RunArguments, phase: str) -> None:
    """The same on every rank, before any work: ConfigError on all of them where one cannot do its part. Collective.

    What only may go wrong (memory, disk for what is not written yet) is logged as a warning with its cure.
    """
    token = processes.broadcast_object(uuid.uuid4().hex[:8])
    mark = Path(arguments.output_dir) / f".reach.{token}"
    consensus.on_rank_0(mark.touch, "writing to --output_dir")
    try:
        with consensus.on_every_rank_or_none("checking this rank's machine"):
            _of_this_rank(arguments, mark)
    finally:
        consensus.on_rank_0(lambda: mark.unlink(missing_ok=True), "cleaning up")
    _check_model_path(arguments.model_name)
    ranks = processes.all_gather_object((socket.gethostname(), shown_versions("warp_ds", "torch", "transformers", "deepspeed")))
    different = [f"rank {r}: {v}" for r, (_, v) in enumerate(ranks) if v != ranks[0][1]]
    if different:
        raise ConfigError(
            f"other versions than rank 0's ({ranks[0][1]}): {'; '.join(different[:3])}: one environment for all "
            "nodes, on a shared file system or in a container"
        )
    begun = time.monotonic()
    processes.all_reduce_sum(torch.ones(1 << 20, device=processes.collective_device()))
    hosts = len({host for host, _ in ranks})
    if processes.rank() == 0:
        logger.info(
            "%d ranks on %d host%s meet: 4 MB all-reduced in %.0f ms",
            len(ranks),
            hosts,
            "s" * (hosts > 1),
            1000 * (time.monotonic() - begun),
        )
    path = Path(arguments.model_name).expanduser()
    if path.is_dir():
        consensus.on_rank_0(lambda: _warn(arguments, path, hosts, -(-len(ranks) // hosts), phase), "counting the needs")


def _of_this_rank(arguments: RunArguments, mark: Path) -> None:
    if arguments.resolved_device == "cuda" and processes.local_rank() >= torch.cuda.device_count():
        raise ConfigError(
            f"rank {processes.rank()} on {socket.gethostname()} has no GPU of its own: local rank "
            f"{processes.local_rank()}, but torch sees {torch.cuda.device_count()}: as many ranks a node as GPUs"
        )
    for name in ("output_dir", "log_dir"):
        trouble = writable(name, getattr(arguments, name))
        if trouble.cure:
            raise ConfigError(f"{trouble.name} {trouble.found} on {socket.gethostname()}: {trouble.cure}")
    deadline = time.monotonic() + 30  # network file systems remember for a while that a file was not there
    while not mark.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"--output_dir {arguments.output_dir} on {socket.gethostname()} is not rank 0's: give a "
                "directory on a file system that all nodes share"
            )
        os.listdir(mark.parent)
        time.sleep(0.2)


def _check_model_path(name: str) -> None:
    """ConfigError on every rank where a path is no directory on some host. Collective."""
    if not name.startswith(("/", "./", "../", "~")):
        return
    on_hosts = processes.all_gather_object((socket.gethostname(), Path(name).expanduser().is_dir()))
    without = sorted({host for host, there in on_hosts if not there})
    if not without:
        return
    shown = ", ".join(without[:5]) + (f" and {len(without) - 5} more" if len(without) > 5 else "")
    somewhere = next((host for host, there in on_hosts if there), None)
    raise ConfigError(
        f"--model_name {name}: no such directory on {shown}"
        + (f", though there is on {somewhere}: give a directory on a file system that all nodes share" if somewhere else "")
    )


def _warn(arguments: RunArguments, directory: Path, nodes: int, ranks_per_node: int, phase: str) -> None:
    for finding in check_resources(arguments, directory, nodes, ranks_per_node, phase):
        if finding.cure:
            logger.warning("%s: %s; %s", finding.name, finding.found, finding.cure)
