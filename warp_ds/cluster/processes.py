"""The process group and the few collectives that the phases need; one process needs no launcher."""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from warp_ds.cluster.slurm import task_environment
from warp_ds.errors import ConfigError

T = TypeVar("T")
logger = logging.getLogger(__name__)


def init_distributed(device: str, timeout_seconds: int = 1800) -> None:
    """Joins the process group of the launcher (deepspeed, torchrun, accelerate, srun), or makes one of one process.

    ``device`` is 'cuda' or 'cpu'. Calling it again does nothing. Raises ConfigError where DeepSpeed cannot run here.
    """
    if dist.is_initialized():
        return
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _check_compiler()
    check_launch(os.environ)
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    if "RANK" not in os.environ:
        os.environ.update(task_environment(os.environ) or {**defaults, "MASTER_PORT": str(free_port())})
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 is retiring: one warning a call, thousands a run.
    warnings.filterwarnings("ignore", message=r".*is deprecated. Please use `torch\.distributed", category=FutureWarning)
    import deepspeed

    from warp_ds.cluster.compiled_operators import survive_kills_while_loading_operators

    survive_kills_while_loading_operators()
    with _saying_where_ranks_meet():
        deepspeed.init_distributed(
            dist_backend="nccl" if device == "cuda" else "gloo",
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=timeout_seconds),
        )
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())


def check_launch(env: Mapping[str, str]) -> None:
    """ConfigError where what a launcher, or the user, has set for the ranks to find one another is none of that."""
    cure = "in the environment: unset it, or start the ranks with deepspeed, torchrun, accelerate or srun"
    for name in _NUMBERS:
        value = env.get(name)
        if value is not None and not re.fullmatch("[0-9]{1,12}", value):
            raise ConfigError(f"{name} is {ascii(value)[:60]}, no number, {cure}")
    if "RANK" in env and int(env["RANK"]) >= int(env.get("WORLD_SIZE", 1)):
        raise ConfigError(f"RANK is {env['RANK']} and WORLD_SIZE {env.get('WORLD_SIZE', 1)} {cure} (RANK is below WORLD_SIZE)")
    if int(env.get("MASTER_PORT", 1)) > 65535:
        raise ConfigError(f"MASTER_PORT is {env['MASTER_PORT']} {cure} (MASTER_PORT below 65536)")


_NUMBERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_PORT",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
)


@contextmanager
def _saying_where_ranks_meet() -> Iterator[None]:
    """A block that joins the process group: what the network refuses is a ConfigError with the cure."""
    try:
        yield
    except dist.DistNetworkError as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        said = str(error).splitlines()[0]
        if "EADDRINUSE" in said:
            cause = "that port is taken by another program, or another run on this machine"
            cure = "give the launcher another port (--master_port, or MASTER_PORT in the environment)"
        else:
            cause, cure = f"they cannot ({said[:200]})", "check MASTER_ADDR, MASTER_PORT and the network"
        raise ConfigError(f"the ranks are to meet at {where}, and {cause}: {cure}") from error


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _check_compiler() -> None:
    """Without a C++ compiler DeepSpeed's shared-memory collective cannot be built: run without it, on plain gloo."""
    if not has_compiler():
        from warp_ds.cluster.compiled_operators import disable_shm_collective

        disable_shm_collective()
        logger.warning(
            "no C++ compiler or no ninja found: collectives between ranks of this machine will be slower; "
            "install g++ and ninja (apt-get install g++ ninja-build) to speed them up"
        )


def has_compiler() -> bool:
    """Whether DeepSpeed's operators can be built here."""
    return bool(shutil.which(os.environ.get("CXX", "c++")) and shutil.which("ninja"))


def shutdown() -> None:
    """Ends the process group; without the barrier finished runs sometimes abort at exit."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def barrier() -> None:
    """Waits for every rank (an all-reduce: gloo's own barrier has a fixed timeout)."""
    if world_size() > 1:
        all_reduce_sum(torch.zeros(1, device=collective_device()))


def collective_device() -> torch.device:
    """Where tensors must lie for collectives."""
    return torch.device("cuda", torch.cuda.current_device()) if _nccl() else torch.device("cpu")


def _nccl() -> bool:
    return dist.is_initialized() and dist.get_backend() == "nccl"


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sums ``tensor`` over ranks in place; returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_gather_object(value: T) -> list[T]:
    """Every rank's (small) value, in rank order, on every rank. Values come from our own ranks only."""
    if world_size() == 1:
        return [value]
    of_ranks: list[Any] = [None] * world_size()
    dist.all_gather_object(of_ranks, value)
    return of_ranks


def broadcast_object(value: T, source: int = 0) -> T:
    """Rank ``source``'s value on every rank."""
    return all_gather_object(value if rank() == source else None)[source]  # type: ignore[return-value]
