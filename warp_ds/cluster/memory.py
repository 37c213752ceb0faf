"""Host memory that a process may still take: of the machine, or of a control group's limit above it, whichever is less.

Slurm's jobs, containers and systemd's units set such limits (cgroup v1 and v2, kernel documentation cgroup-v2.rst,
cgroup-v1/memory.rst); /proc/meminfo knows none of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def available(root: Path = Path("/")) -> int:
    """Bytes of host memory that are left for this process. ``root``: where /proc and /sys are looked for."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([found, *left_in_groups(root)])


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
