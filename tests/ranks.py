"""Run a function on several real ranks (processes joined by gloo) and see every rank's outcome."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

# Before the fork server starts: its children inherit these.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The fork server imports the heavy libraries once for all ranks of all tests; it never runs them, so forking is safe.
_context = multiprocessing.get_context("forkserver")
# Muon's module, which every engine of DeepSpeed imports, calls torch.compile: 1 s of processor for each rank by itself.
_context.set_forkserver_preload(
    [
        "transformers.models.llama.modeling_llama",
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "peft",
        "warp_ds.phases.compare",
        "warp_ds.phases.audit",
    ]
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(rank: int, world_size: int, port: int, pipe: Connection, function: Callable, args: tuple) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    try:
        import torch

        from warp_ds.cluster import compiled_operators, processes

        if world_size > (os.cpu_count() or 1):
            # Its waiting ranks spin, which takes the cores from those they wait for.
            compiled_operators.disable_shm_collective()
        torch.set_num_threads(1)
        # Long enough for the first use of a DeepSpeed operator, which one rank compiles while the others wait.
        processes.init_distributed("cpu", timeout_seconds=600)
        gc.freeze()  # DeepSpeed collects garbage at every engine's end: 1 s each if it walks all that was imported.
        result = function(*args)
        processes.shutdown()
        pipe.send((True, result))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def start_ranks(world_size: int, function: Callable, *args: Any) -> tuple[list, list[Connection]]:
    """Start without waiting; for tests that kill ranks."""
    port = free_port()
    processes, pipes = [], []
    for rank in range(world_size):
        ours, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank, args=(rank, world_size, port, theirs, function, args), daemon=True)
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    return processes, pipes


def run_ranks(world_size: int, function: Callable, *args: Any, timeout: float = 900) -> list[Any]:
    """Each rank's return value, in rank order; ``function`` must be importable (module level).

    Fails the test with the first failing rank's traceback, or when the ranks take longer than ``timeout`` seconds.
    """
    processes, pipes = start_ranks(world_size, function, *args)
    results: dict[int, Any] = {}
    try:
        while len(results) < world_size:
            waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in results}
            ready = wait(list(waiting), timeout)
            if not ready:
                pytest.fail(f"ranks {sorted(waiting.values())} of {world_size} hang in {function.__name__}")
            for pipe in ready:
                rank = waiting[pipe]  # type: ignore[index]
                try:
                    fine, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    fine, value = False, "died without a word"
                if not fine:
                    pytest.fail(f"rank {rank} of {world_size} in {function.__name__}: {value}", pytrace=False)
                results[rank] = value
    finally:
        for process in processes:
            process.join(10 if len(results) == world_size else 0)
            if process.is_alive():
                process.kill()
                process.join()
    return [results[rank] for rank in range(world_size)]
