"""Memory in use at its highest, on host and GPU, and freed memory given back to the system."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from warp_ds.cluster.processes import all_gather_object

LARGE_PIECE = 8 << 20
"""Bytes from which ``returning_large_pieces`` gives each piece of memory back by itself; a smaller limit costs page faults."""


@contextmanager
def returning_large_pieces() -> Iterator[None]:
    """Lets the C library (glibc) take pieces of LARGE_PIECE and more from the system one by one, and give them back.

    Else it moves that limit up to 32 MB once such a piece is freed, and keeps the smaller ones in an arena a thread, where
    activations and bases that come and go leave holes between the hidden states that stay, and phase 1
    holds more the longer it runs. Each such piece costs page faults, so what comes and goes often should be smaller
    (``collect.in_small_pieces``), and what comes after the block has the limits that the library would have found.
    """
    trim_threshold, mmap_threshold = -1, -3
    _call_libc("mallopt", mmap_threshold, LARGE_PIECE)
    try:
        yield
    finally:
        _call_libc("mallopt", mmap_threshold, 32 << 20)
        # Setting one limit ends the library's own care for both, and the other is 128 KB until then: what is freed at the
        # heap's end would go back to the system after every layer of a forward pass.
        _call_libc("mallopt", trim_threshold, 64 << 20)


def return_freed_memory() -> None:
    """Gives what this process has freed back to the system, where the C library can (glibc)."""
    _call_libc("malloc_trim", 0)


def _call_libc(name: str, *arguments: int) -> None:
    try:
        function = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):
        return
    function(*arguments)


class PeakMemory:
    """The most memory that this rank has held within a ``peak_memory`` block, in bytes."""

    def __init__(self) -> None:
        self.host = self.gpu = 0
        self.of_process = not _forget_peaks()
        """The system does not let the host's peak begin anew: it is the process's so far."""

    def look(self) -> None:
        """Takes note of what was held up to now."""
        self.host = max(self.host, _host_peak())
        if torch.cuda.is_initialized():
            self.gpu = max(self.gpu, torch.cuda.max_memory_allocated())

    def of_all_ranks(self) -> dict[str, Any]:
        """host, gpu (where there is one): of the rank that held most; of_process. Collective."""
        self.look()
        ranks = all_gather_object((self.host, self.gpu, self.of_process))
        host, gpu, of_process = (max(values) for values in zip(*ranks, strict=True))
        return {"host": host, **({"gpu": gpu} if gpu else {}), "of_process": of_process}


_peaks: list[PeakMemory] = []


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Follows the memory that this rank holds in the block. Blocks may lie in one another: a phase, in a comparison."""
    for outer in _peaks:
        outer.look()
    return_freed_memory()  # else it counts, whoever freed it
    own = PeakMemory()
    _peaks.append(own)
    try:
        yield own
    finally:
        _peaks.remove(own)


def _forget_peaks() -> bool:
    """Lets peaks begin anew; False where the host's cannot."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return _high_water_mark() is not None


def _host_peak() -> int:
    """Most resident bytes of this process since they were last forgotten."""
    peak = _high_water_mark()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if peak is None else peak


def _high_water_mark() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
