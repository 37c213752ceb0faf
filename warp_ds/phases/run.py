"""A run is its directory: named, locked while its process lives, resumed by what it computes, finished by a marker."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
from filelock import FileLock, Timeout

from warp_ds.artifacts import ArtifactError, read_json, write_json
from warp_ds.config import ConfigError, RunArguments, identity_settings
from warp_ds.zero import runtime

logger = logging.getLogger(__name__)
PACKAGES = ("warp_ds", "torch", "transformers", "deepspeed", "accelerate", "datasets", "safetensors")


@dataclass
class Run:
    """One phase's run, the same on every rank."""

    phase: str
    directory: Path
    resumed: bool
    """Goes on with an unfinished run."""
    done: bool
    """Was finished before: nothing is left to do."""
    started: float

    def finish(self) -> None:
        """Marks the run finished and points ``<phase>_latest`` at it. Collective."""
        runtime.barrier()

        def mark() -> None:
            seconds = round(time.time() - self.started, 1)
            write_json(self.directory / "finished.json", {"finished_at": _now(), "seconds": seconds})
            link = self.directory.parent / f"{self.phase}_latest"
            aside = link.with_name(f".{link.name}.{os.getpid()}")
            aside.unlink(missing_ok=True)
            aside.symlink_to(self.directory.name)
            os.replace(aside, link)
            logger.info("%s finished in %.0f s: %s", self.phase, seconds, self.directory)

        runtime.on_rank_0(mark, "marking the run finished")


@contextmanager
def start_run(
    phase: str, arguments: RunArguments, inputs: dict[str, str], passed: dict[str, Any] | None = None
) -> Iterator[Run]:
    """Makes, or goes on with, the run directory of ``phase`` ('phase1'); locked until the block ends. Collective.

    ``inputs`` are the fingerprints of what the run reads (model, data, basis ...): with the settings they decide
    which unfinished run is the same one; ``passed`` are settings besides ``arguments``.
    Raises ConfigError on every rank where --run_name is taken by another run, or the run is alive elsewhere.
    """
    settings = {**identity_settings(arguments), **(passed or {})}
    identity = hashlib.sha256(json.dumps([phase, settings, inputs], sort_keys=True, default=str).encode()).hexdigest()[:16]
    lock: FileLock | None = None

    def choose() -> dict[str, Any]:
        nonlocal lock
        directory, resumed = _choose_directory(phase, arguments, identity, settings)
        directory.mkdir(parents=True, exist_ok=True)
        lock = _lock(directory)
        if not resumed:
            write_json(directory / "config.json", {
                "phase": phase, "identity": identity, "settings": settings, "inputs": inputs,
                "started_at": _now(), "versions": versions(), "command": sys.argv, "world_size": runtime.world_size(),
            })
        return {"directory": str(directory), "resumed": resumed, "done": (directory / "finished.json").is_file()}

    try:
        chosen = runtime.on_rank_0(choose, "opening the run directory")
        directory = Path(chosen["directory"])
        with log_to_file(Path(arguments.log_dir), directory.name):
            if chosen["done"]:
                logger.info("%s is finished already: %s", phase, directory)
            else:
                logger.info("%s: %s %s", phase, "going on in" if chosen["resumed"] else "writing to", directory)
            yield Run(phase, directory, chosen["resumed"], chosen["done"], time.time())
    finally:
        if lock is not None:
            lock.release()


def _choose_directory(
    phase: str, arguments: RunArguments, identity: str, settings: dict[str, Any]
) -> tuple[Path, bool]:
    """(directory, whether a run is gone on with)."""
    root = Path(arguments.output_dir)
    if arguments.resume not in ("auto", "never"):
        wanted = Path(arguments.resume) if Path(arguments.resume).is_dir() else root / arguments.resume
        if not (wanted / "config.json").is_file():
            raise ConfigError(f"--resume {arguments.resume}: no run there (no config.json); use auto, never or a run's "
                              "directory")
        _check_identity(wanted, identity, settings)
        return wanted, True
    job = os.environ.get("SLURM_JOB_ID")
    name = arguments.run_name or (f"{phase}_{_slurm_name(job)}" if job else None)
    if name:
        named = root / name
        if not (named / "config.json").is_file():
            return named, False
        if arguments.resume == "never":
            raise ConfigError(f"--resume never, but {named} exists: choose another --run_name")
        _check_identity(named, identity, settings)
        return named, True
    if arguments.resume == "auto":
        for path in sorted(root.glob("*/config.json"), key=lambda p: p.stat().st_mtime, reverse=True):
            run = path.parent
            if run.is_symlink() or (run / "finished.json").is_file() or _alive(run):
                continue
            try:
                if read_json(path).get("identity") == identity:
                    return run, True
            except ArtifactError:
                continue
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    candidates = [root / f"{phase}_{stamp}"] + [root / f"{phase}_{stamp}_{i}" for i in range(2, 100)]
    return next(path for path in candidates if not path.exists()), False


def _slurm_name(job: str) -> str:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else job


def _check_identity(run: Path, identity: str, settings: dict[str, Any]) -> None:
    config = read_json(run / "config.json")
    if config.get("identity") == identity:
        return
    before = config.get("settings", {})
    changed = [f"{k}: {before.get(k)!r} -> {v!r}" for k, v in settings.items() if before.get(k) != v]
    raise ConfigError(f"{run} was started with other settings or data ({'; '.join(changed) or 'other model or data'}): "
                      "use another --run_name, or the same settings")


def _lock(directory: Path) -> FileLock:
    lock = FileLock(directory / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise ConfigError(f"{directory} is in use by another process that still runs: wait for it, end it, or use "
                          "another --run_name") from error
    return lock


def _alive(run: Path) -> bool:
    try:
        lock = FileLock(run / ".lock", timeout=0)
        lock.acquire()
        lock.release()
        return False
    except Timeout:
        return True


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_terminal(level: int = logging.INFO) -> None:
    """Rank 0's log and progress bars on standard error; the other ranks' logs go to their files alone."""
    root = logging.getLogger("warp_ds")
    root.setLevel(level)
    root.propagate = False
    root.handlers = [h for h in root.handlers if isinstance(h, logging.FileHandler)]
    if runtime.rank() == 0:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        root.addHandler(handler)
    else:
        datasets.disable_progress_bars()


@contextmanager
def log_to_file(log_dir: Path, name: str) -> Iterator[None]:
    """This rank's log file: logs/<run>.log for rank 0, logs/<run>.rank<r>.log beside it for the others."""
    log_dir.mkdir(parents=True, exist_ok=True)
    suffix = "" if runtime.rank() == 0 else f".rank{runtime.rank()}"
    handler = logging.FileHandler(log_dir / f"{name}{suffix}.log")
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger("warp_ds")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
