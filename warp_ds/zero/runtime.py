"""The process group and the few collectives that the phases need; one process needs no launcher."""

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import resource
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from warp_ds.artifacts import read_text
from warp_ds.cluster.slurm import task_environment
from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import RunArguments
from warp_ds.flags.checks import refuse_secrets

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

    from warp_ds.cluster.torch_internals import survive_kills_while_loading_operators

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


_NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS",
            "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")


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
        from warp_ds.zero.deepspeed_internals import disable_shm_collective

        disable_shm_collective()
        logger.warning("no C++ compiler or no ninja found: collectives between ranks of this machine will be slower; "
                       "install g++ and ninja (apt-get install g++ ninja-build) to speed them up")


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


LARGE_PIECE = 8 << 20
"""Bytes from which ``returning_large_pieces`` gives each piece of memory back by itself. (Passes that are cut to half as much
take a tenth longer, at 1,024 to 2,816 units; phase 1's memory is as flat.)"""


@contextmanager
def returning_large_pieces() -> Iterator[None]:
    """Lets the C library (glibc) take pieces of LARGE_PIECE and more from the system one by one, and give them back.

    Else it moves that limit up to 32 MB once such a piece is freed, and keeps the smaller ones in an arena a thread, where
    activations and bases that come and go leave holes between the hidden states that stay: phase 1 held up to twice as
    much, and more the longer it ran. Each such piece costs page faults, so what comes and goes often should be smaller
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
    found = _high_water_mark()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if found is None else found


def _high_water_mark() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


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
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def broadcast_object(value: T, source: int = 0) -> T:
    """Rank ``source``'s value on every rank."""
    return all_gather_object(value if rank() == source else None)[source]  # type: ignore[return-value]


class OtherRankError(RuntimeError):
    """Another rank failed; its message is repeated here, so that no rank waits for it."""


@contextmanager
def on_every_rank_or_none(what: str) -> Iterator[None]:
    """A block that some ranks may fail: all leave it together, each with its own error or that of the first rank.

    The block must hold no collective.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001
        error = caught
    messages = all_gather_object(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [(r, m) for r, m in enumerate(messages) if m is not None]
    if failed:
        raise OtherRankError(f"{what} failed on rank {failed[0][0]}: {failed[0][1]}")


def on_rank_0(function: Callable[[], T], what: str) -> T:
    """Runs ``function`` on rank 0 alone; its result, or its failure, is every rank's."""
    result: T | None = None
    with on_every_rank_or_none(what):
        if rank() == 0:
            result = function()
    return broadcast_object(result)  # type: ignore[return-value]


def zero3_config(arguments: RunArguments, for_trainer: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration: the file given with --deepspeed, or a plain ZeRO-3 one; dtype from --dtype.

    What the file leaves to transformers' Trainer (``"auto"``) stays only ``for_trainer``. Raises ConfigError where the
    file is missing, is no JSON, or asks for another ZeRO stage or dtype.
    """
    if arguments.deepspeed is None:
        config: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    else:
        try:
            config = json.loads(read_text(Path(arguments.deepspeed)))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"--deepspeed {arguments.deepspeed} cannot be read as JSON: {error}") from error
        for name in ("", "zero_optimization", "bf16", "fp16", "data_types", "checkpoint"):
            section = config.get(name, {}) if name else config
            if not isinstance(section, dict):
                raise ConfigError(f"--deepspeed {arguments.deepspeed}: {name or 'the whole'} is no JSON object")
    refuse_secrets(f"--deepspeed {arguments.deepspeed}", config)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 3:
        raise ConfigError(f"--deepspeed {arguments.deepspeed} asks for ZeRO stage {stage}; the phases run on stage 3 "
                          "(the WarpCallback also works without DeepSpeed)")
    enabled = [kind for kind in ("bf16", "fp16") if _enabled(config.get(kind, {}))]
    wanted = {"bfloat16": ["bf16"], "float16": ["fp16"], "float32": []}[arguments.dtype]
    if enabled and enabled != wanted:
        raise ConfigError(f"--deepspeed {arguments.deepspeed} enables {' and '.join(enabled)}, but --dtype is "
                          f"{arguments.dtype}: change one of them")
    for kind in ("bf16", "fp16"):
        config[kind] = {**config.get(kind, {}), "enabled": kind in wanted}
    if wanted == ["fp16"] and arguments.resolved_device == "cpu":
        raise ConfigError("--dtype float16 needs a GPU: DeepSpeed refuses it on CPUs; use bfloat16 or float32")
    config.pop("_comment", None)
    if wanted:
        # DeepSpeed would sum micro-batches in 16 bits, so that the sum depended on how many of them a step has.
        config["data_types"] = {"grad_accum_dtype": "fp32", **config.get("data_types", {})}
    if for_trainer:
        return config
    for training_only in ("optimizer", "scheduler"):
        config.pop(training_only, None)
    return _without_auto(config)


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in section.items() if v != "auto"}


def _enabled(section: dict[str, Any]) -> bool:
    return section.get("enabled", False) is True
