"""Memory that is left, in one reading for all: of the host, under the limits of its control groups, and of a GPU.

Slurm's jobs, containers and systemd's units set such limits (cgroup v1 and v2, kernel documentation cgroup-v2.rst,
cgroup-v1/memory.rst), of which psutil and /proc/meminfo know nothing.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    import torch


def available(root: Path = Path("/"), machine: int | None = None) -> int:
    """Bytes of host memory that are left for this process: the machine's, or what the tightest control group leaves.

    ``root``: where /proc and /sys are looked for. ``machine``: bytes that the machine has left; asked of psutil if None.
    """
    return min([psutil.virtual_memory().available if machine is None else machine, *left_in_groups(root)])


def host_memory() -> int:
    """Bytes of host memory for this rank: what is ``available``, shared evenly with this machine's other ranks. Collective."""
    from warp_ds.cluster.processes import all_gather_object

    left = available()
    hosts = all_gather_object(socket.gethostname())
    return left // hosts.count(socket.gethostname())


def free_gpu_memory(device: torch.device) -> int:
    """Bytes that torch can still give out on a GPU: the driver's, and its own that are not in use."""
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def left_in_groups(root: Path = Path("/")) -> Iterator[int]:
    """Bytes left under each memory limit of this process's control groups and of those above them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, own = (line.split(":", 2) + ["", ""])[:3]
        if not controllers:  # v2; "unified" where v1 is mounted beside it
            for top in (mount, mount / "unified"):
                yield from _levels(top, own, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            for top in (mount / "memory", mount / controllers):
                yield from _levels(top, own, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _levels(top: Path, own: str, limit: str, used: str, cache: str) -> Iterator[int]:
    """What is left at ``own`` and at every level above it, up to ``top``: in a container those may be all there is."""
    parts = [part for part in own.split("/") if part not in ("", "..")]
    for depth in range(len(parts), -1, -1):
        group = top.joinpath(*parts[:depth])
        try:
            most, taken = int((group / limit).read_text()), int((group / used).read_text())
        except (OSError, ValueError):
            continue  # no such level here, or "max"
        yield max(0, most - max(0, taken - _reclaimable(group / "memory.stat", cache)))


def _reclaimable(statistics: Path, name: str) -> int:
    """Bytes of files that were read and that the kernel gives up first: they count as taken."""
    try:
        return next(int(line.split()[1]) for line in statistics.read_text().splitlines() if line.split()[:1] == [name])
    except (OSError, StopIteration, ValueError, IndexError):
        return 0
