"""Going on with a training on another number of ranks, through DeepSpeed's universal checkpoints.

One process beside rank 0 converts an ordinary checkpoint (``python -m warp_ds.zero.universal``: the converter forks, which
a process with a GPU and a process group must not); ``load_universal`` loads it; ``complete`` adds what DeepSpeed leaves out.
"""

from __future__ import annotations

import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from warp_ds.cluster import consensus, preemption, processes
from warp_ds.cluster.memory import host_memory
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.store.files import begin_directory, read_json, remove_directory, write_json
from warp_ds.store.sealed import contents, difference
from warp_ds.zero import deepspeed_internals
from warp_ds.zero.zero3_step import COEFFICIENTS

logger = logging.getLogger(__name__)

PREFIX = "universal-"
"""Converted ``checkpoint-12`` is ``universal-12`` beside it, ``universal-12.part`` until it is whole."""
_BEGUN = "begun.json"
"""Written before anything else of a conversion."""
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def convert(checkpoint: Path, deepspeed_config: dict[str, Any], wrote: int) -> Path:
    """A directory from which Trainer goes on with ``checkpoint`` (its own, of ``wrote`` ranks) on these. Collective.

    Raises ConfigError, on every rank and before any work, where the checkpoint cannot be converted or the disk has no
    room; Preempted where a rank is asked to leave meanwhile.
    """
    target = checkpoint.with_name(PREFIX + checkpoint.name.rsplit("-", 1)[1])
    part = target.with_name(f"{target.name}.part")
    cure = f"Start again on {wrote} ranks, or start the training anew with --resume never"
    if consensus.on_rank_0(lambda: _is_own(target), "looking for a converted checkpoint"):
        consensus.on_rank_0(lambda: _check_whole(target), "checking the converted checkpoint")
        return target
    memory = host_memory()
    process: subprocess.Popen[bytes] | None = None
    with consensus.on_every_rank_or_none("converting the checkpoint"):
        if processes.rank() == 0:
            if _is_own(part):
                remove_directory(part)  # of a process that was killed
            source = checkpoint / deepspeed_internals.tag_of(checkpoint)
            if problem := _inconvertible(source, deepspeed_config) or _no_room(source):
                raise ConfigError(
                    f"{checkpoint} was written by {wrote} ranks, and these are {processes.world_size()}; it cannot "
                    f"be converted: {problem}. {cure}"
                )
            logger.info("converting %s, of %d ranks, for %d", checkpoint, wrote, processes.world_size())
            process = _start(source, part, _workers(source, memory))
    try:
        while (status := processes.broadcast_object(process and process.poll())) is None:
            preemption.leave_if_asked()  # The collective also tells every rank that rank 0 lives, however long it takes.
            time.sleep(0.5)
    finally:
        if process is not None and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def rename() -> None:
        if status != 0:
            log = (part / "conversion.log").read_text(errors="replace").strip().splitlines()
            remove_directory(part)
            said = log[-1] if log else f"status {status}"
            raise ConfigError(f"DeepSpeed could not convert {checkpoint}, of {wrote} ranks: {said}. {cure}")
        for name in ("trainer_state.json", "scheduler.pt"):  # not rng_state: those are of the ranks that wrote it
            if (checkpoint / name).is_file():
                shutil.copy2(checkpoint / name, part / name)
        write_json(part / _BEGUN, {"files": contents(part, _BEGUN)})
        os.replace(part, target)

    consensus.on_rank_0(rename, "converting the checkpoint")
    return target


def world_size_of(checkpoint: Path) -> int:
    """How many ranks of ZeRO-3 wrote a Trainer's checkpoint; 0 where no such wrote it."""
    if not (checkpoint / "latest").is_file():
        return 0
    source = checkpoint / deepspeed_internals.tag_of(checkpoint)
    return len(_optimizer_files(source)) * len(_model_ranks(source))


def is_converted(checkpoint: Path) -> bool:
    """Whether ``convert`` made it, so that it is to be loaded with ``load_universal``."""
    return checkpoint.name.startswith(PREFIX)


def remove_converted(directory: Path) -> None:
    """Removes what ``convert`` made, or was making, in ``directory``."""
    for path in directory.glob(f"{PREFIX}*"):
        if re.fullmatch(rf"{PREFIX}\d+(\.part)?", path.name) and not path.is_symlink() and (path / _BEGUN).is_file():
            remove_directory(path)


def _is_own(path: Path) -> bool:
    """Whether ``convert`` has made, or begun, ``path``; ConfigError where somebody else's files are in its place."""
    if not path.exists() and not path.is_symlink():
        return False
    if path.is_symlink() or not (path / _BEGUN).is_file():
        raise ConfigError(f"{path} was not written by this program, which would convert a checkpoint there: move it elsewhere")
    return True


def _check_whole(path: Path) -> None:
    """ArtifactError where a converted checkpoint is not as ``convert`` has left it."""
    said = read_json(path / _BEGUN)
    if changed := difference(path, _BEGUN, said.get("files") if isinstance(said, dict) else None):
        raise ArtifactError(f"{path} is not as this program left it: {changed}. Remove it: it is made again")


@torch.no_grad()
def complete(model: nn.Module, optimizer: Any, checkpoint: Path) -> None:
    """Mends what DeepSpeed's load of ``checkpoint`` did to the ZeRO-3 ``optimizer``, and adds the rotated coefficients.

    Before a ``MaskedStep`` is made, which takes them from the optimizer's state, as after an ordinary load.
    """
    with consensus.on_every_rank_or_none("completing the loaded checkpoint"):
        zero = checkpoint / deepspeed_internals.tag_of(checkpoint, "latest_universal") / "zero"
        saved = _read(zero / "optimizer_state.pt")[deepspeed_internals.OPTIMIZER_STATE]
        deepspeed_internals.repair_universal(optimizer.optimizer, saved["param_groups"])
        for name, param in model.named_parameters():
            file = zero / name / f"{COEFFICIENTS}.pt"
            if param.requires_grad and file.is_file():
                sub_group, offset, length = deepspeed_internals.locate(optimizer, param)
                master = deepspeed_internals.master(optimizer, sub_group)
                state = optimizer.optimizer.state[master]
                if COEFFICIENTS not in state:
                    state[COEFFICIENTS] = master.detach().clone()
                mine = _read(file)[processes.rank() * length :][:length]
                state[COEFFICIENTS].narrow(0, offset, len(mine)).copy_(mine)


# ---------------------------------------------------------------- before the work, on rank 0


def _inconvertible(source: Path, deepspeed_config: dict[str, Any]) -> str:
    """Why the checkpoint cannot be converted; empty where it can."""
    if ((deepspeed_config.get("tensor_parallel") or {}).get("autotp_size") or 1) != 1 or len(_model_ranks(source)) > 1:
        return (
            "tensor_parallel cuts parameters before ZeRO does, and only DeepSpeed's own ds_to_universal and load_universal put "
            "such pieces together"
        )
    offload = deepspeed_config.get("zero_optimization", {}).get("offload_optimizer") or {}
    if offload.get("device") == "nvme" or (source / "offloaded_tensors").is_dir():
        return "the optimizer is on NVMe (offload_optimizer.device), whose swap files are those of one rank"
    state = _read(_optimizer_files(source)[0])["optimizer_state_dict"][deepspeed_internals.OPTIMIZER_STATE]["state"]
    shapes = _read(_model_file(source))["param_shapes"]
    lacking = sorted({key for index in range(len(shapes)) for key in _MOMENTS if key not in state.get(index, {})})
    if lacking:
        return (
            f"it holds no {', '.join(lacking)} of some weights, which Adam's state has (another optimizer, or "
            "offload_optimizer.ratio below 1)"
        )
    return ""


def _no_room(source: Path) -> str:
    """What space is missing on the disk, in words; empty where there is enough."""
    sizes = [path.stat().st_size for path in _optimizer_files(source)]
    # DeepSpeed cuts every file into pieces, joins those, and copies one file of a rank and all of the model's.
    needed = 2 * sum(sizes) + max(sizes) + sum(path.stat().st_size for path in source.glob("*model_states.pt"))
    free = shutil.disk_usage(source).free
    return "" if needed < free else f"it takes {needed / 1e9:.1f} GB beside it, and the disk has {free / 1e9:.1f} GB left"


def _workers(source: Path, memory: int) -> int:
    """How many ranks' files to hold in ``memory`` bytes at once, each twice at the most."""
    sizes = [path.stat().st_size for path in _optimizer_files(source)]
    by_memory = memory // (2 * max(sizes))
    return max(1, min(by_memory, len(sizes), len(os.sched_getaffinity(0)), 8))


def _start(source: Path, part: Path, workers: int) -> subprocess.Popen[bytes]:
    begin_directory(part, _BEGUN)
    write_json(part / _BEGUN, {"source": str(source)})
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "warp_ds.zero.universal", str(source), str(part / source.name), str(workers)]
    with open(part / "conversion.log", "wb") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )


# ---------------------------------------------------------------- the converting process


def _convert_here(source: Path, target: Path, workers: int) -> None:
    from deepspeed.checkpoint import ds_to_universal

    sys.argv = [
        "ds_to_universal",
        "--input_folder",
        str(source),
        "--output_folder",
        str(target),
        "--num_extract_workers",
        str(workers),
        "--num_merge_workers",
        str(min(workers, 4)),
    ]
    with deepspeed_internals.nothing_unpickled():  # in its workers too, which are forked
        ds_to_universal.main(ds_to_universal.parse_arguments())
    _shrink(target / "zero" / "optimizer_state.pt")
    _add_coefficients(source, target / "zero")
    for path in target.parent.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _shrink(path: Path) -> None:
    """Leaves out the tensors: this is all of rank 0's state, and every rank reads it for a few numbers."""
    state = _read(path)
    base = state[deepspeed_internals.OPTIMIZER_STATE]
    small = {
        **state,
        deepspeed_internals.MASTERS: [],
        deepspeed_internals.OPTIMIZER_STATE: {
            "state": {0: {"step": base["state"][0]["step"]}},
            "param_groups": base["param_groups"],
        },
    }
    aside = path.with_suffix(".part")
    torch.save(small, aside)
    aside.replace(path)


def _add_coefficients(source: Path, zero: Path) -> None:
    """Writes C beside W, exp_avg and exp_avg_sq where a protected run keeps it: the converter drops it."""
    # Mapped, not read: one parameter at a time is in memory.
    states = [_read(path)["optimizer_state_dict"][deepspeed_internals.OPTIMIZER_STATE] for path in _optimizer_files(source)]
    for sub_group, shapes in enumerate(_read(_model_file(source))["param_shapes"]):
        offset = 0
        for name, shape in shapes.items():
            entries = math.prod(shape)
            length = -(-entries // len(states))
            pieces = [state["state"][sub_group].get(COEFFICIENTS) for state in states]
            if pieces[0] is not None:
                whole = torch.cat([piece[offset : offset + length] for piece in pieces])[:entries]
                if not torch.equal(whole, _read(zero / name / "fp32.pt")):
                    torch.save(whole, zero / name / f"{COEFFICIENTS}.pt")
            offset += length


def _model_ranks(source: Path) -> set[str]:
    """Of tensor parallelism, as the files' names say them; '00' alone without it."""
    return {path.stem.split("_mp_rank_")[1][:2] for path in source.glob("*zero_pp_rank_*_mp_rank_*_optim_states.pt")}


def _optimizer_files(source: Path) -> list[Path]:
    """One a rank, in rank order."""
    files = list(source.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt"))
    return sorted(files, key=lambda path: int(path.name.split("zero_pp_rank_")[1].split("_")[0]))


def _model_file(source: Path) -> Path:
    return next(source.glob("*zero_pp_rank_0_mp_rank_00_model_states.pt"))


def _read(path: Path) -> Any:
    with deepspeed_internals.nothing_unpickled():
        return torch.load(path, map_location="cpu", mmap=True)


def _end_with(parent: int) -> None:
    """Ends this process and its workers where ``parent`` was killed: nobody waits for them, and the next start begins anew."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(os.getpgrp(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    _convert_here(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
