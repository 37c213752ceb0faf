"""A run is its directory: named, locked while its process lives, resumed by what it computes, finished by a marker."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets

from warp_ds.artifacts import ArtifactError, read_json, write_json
from warp_ds.cluster import slurm
from warp_ds.cluster.preemption import Preempted
from warp_ds.config import ConfigError, RunArguments, identity_settings
from warp_ds.phases.lock import RunLock, alive
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

    def note(self, event: str, **more: Any) -> None:
        """One line in the run's state: what happened to it, when, in which job. Rank 0 alone writes."""
        if runtime.rank() == 0:
            note(self.directory, event, **more)

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
            self.note("finished")
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
    lock: RunLock | None = None

    def choose() -> dict[str, Any]:
        nonlocal lock
        for directory, goes_on, certain in _candidates(phase, arguments, identity, settings):
            directory.mkdir(parents=True, exist_ok=True)
            candidate = RunLock(directory)
            try:
                candidate.acquire()
            except ConfigError:
                if certain:
                    raise
                continue  # another process went on with it first
            lock, resumed = candidate, goes_on
            break
        if not resumed:
            write_json(directory / "config.json", {
                "phase": phase, "identity": identity, "settings": settings, "inputs": inputs,
                "started_at": _now(), "versions": versions(), "command": sys.argv, "world_size": runtime.world_size(),
            })
        (directory / FAILURE).unlink(missing_ok=True)
        return {"directory": str(directory), "resumed": resumed, "done": (directory / "finished.json").is_file()}

    try:
        chosen = runtime.on_rank_0(choose, "opening the run directory")
        run = Run(phase, Path(chosen["directory"]), chosen["resumed"], chosen["done"], time.time())
        with log_to_file(Path(arguments.log_dir), run.directory.name):
            if run.done:
                logger.info("%s is finished already: %s", phase, run.directory)
            else:
                logger.info("%s: %s %s", phase, "going on in" if run.resumed else "writing to", run.directory)
                run.note("restarted" if run.resumed else "started", world_size=runtime.world_size())
            try:
                yield run
            except Preempted as stop:
                stop.add_note(str(run.directory))
                run.note("stopped", reason=str(stop))
                logger.info("%s: %s has come, and every rank has saved what it had", run.directory.name, stop)
                raise
            except Exception as error:
                explain(error, arguments)
                _record_failure(run, error, Path(arguments.log_dir))
                raise
    finally:
        if lock is not None:
            lock.release()


STATE, FAILURE, PROGRESS = "state.jsonl", ".failure", "progress.json"


class Progress:
    """How far a phase is, for ``launch/submit.py --status``: rank 0 writes it, every two seconds at most."""

    def __init__(self, directory: Path, total: float, unit: str):
        self.path, self.total, self.unit = directory / PROGRESS, total, unit
        self._shown = -1e9

    def at(self, done: float) -> None:
        """``done`` of the total are finished."""
        if runtime.rank() == 0 and (time.monotonic() - self._shown > 2.0 or done >= self.total):
            self._shown = time.monotonic()
            try:
                write_json(self.path, {"done": done, "total": self.total, "unit": self.unit})
            except OSError as error:
                logger.warning("the progress could not be written: %s", error)


def note(directory: Path, event: str, **more: Any) -> None:
    """Appends a line to the run's state; a full disk must not end the run that would say so."""
    line = {"at": _now(), "event": event, "job": slurm.job_id(), "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            "host": socket.gethostname(), "pid": os.getpid(), **more}
    try:
        with open(directory / STATE, "a") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        logger.warning("the run's state could not be written: %s", error)


class LaterFailure(RuntimeError):
    """This rank failed after another one had: of the first alone the traceback is shown."""


def explain(error: Exception, arguments: RunArguments) -> None:
    """Notes on ``error`` what a user can do about it, where its own text does not say."""
    if getattr(error, "__notes__", None) or isinstance(error, LaterFailure):
        return
    text = str(error)
    if "timed out" in text.lower():
        error.add_note(f"This rank waited --timeout {arguments.timeout} s for another one in a collective. The rank that "
                       f"hangs is one whose log in {arguments.log_dir} ends earlier than the others'.")
    elif "Connection closed by peer" in text or "Connection reset" in text:
        error.add_note("Another rank ended without a word (killed, out of memory, its node lost): see Slurm's or the kernel's "
                       "log of its node. The same command goes on from the last good state.")
    elif getattr(error, "errno", None) in _DISK_ERRORS or any(words in text for words in _DISK_WORDS):
        error.add_note(f"Is there space, and write access, in {arguments.output_dir} and {arguments.log_dir}? Once there is, "
                       "the same command goes on from the last good state.")


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
#: How safetensors and torch.save say the same.
_DISK_WORDS = ("No space left", "os error 28", "Disk quota", "PytorchStreamWriter failed", "inline_container.cc")


def _record_failure(run: Run, error: Exception, log_dir: Path) -> None:
    """Puts a traceback last in this rank's log, and the first failing rank's in rank 0's too and into the run's state.

    Raises LaterFailure on the ranks that fail because the first did.
    """
    if isinstance(error, runtime.OtherRankError):
        return
    text = f"rank {runtime.rank()} failed:\n{''.join(traceback.format_exception(error))}"
    own, main = (_log_file(log_dir, run.directory.name, rank) for rank in (runtime.rank(), 0))
    try:
        os.close(os.open(run.directory / FAILURE, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        if own != main:
            _append(own, text)
        raise LaterFailure(f"{type(error).__name__}: {error}") from error
    except OSError:
        pass  # a full or read-only file system: every rank says what it saw
    note(run.directory, "failed", rank=runtime.rank(), error=f"{type(error).__name__}: {str(error)[:500]}")
    for log in {own, main}:
        _append(log, text)


def _append(log: Path, text: str) -> None:
    try:
        with open(log, "a") as file:
            file.write(text)
    except OSError as full:
        logger.warning("%s could not be written: %s", log, full)


def _candidates(
    phase: str, arguments: RunArguments, identity: str, settings: dict[str, Any]
) -> Iterator[tuple[Path, bool, bool]]:
    """(directory, whether a run is gone on with, whether no other directory will do), the best first."""
    root = Path(arguments.output_dir)
    if arguments.resume not in ("auto", "never"):
        wanted = Path(arguments.resume) if Path(arguments.resume).is_dir() else root / arguments.resume
        if not (wanted / "config.json").is_file():
            raise ConfigError(f"--resume {arguments.resume}: no run there (no config.json); use auto, never or a run's "
                              "directory")
        _check_identity(wanted, identity, settings)
        yield wanted, True, True
        return
    job = slurm.job_id()
    # A requeued job keeps its id, and goes on in its own directory.
    named = root / (arguments.run_name or f"{phase}_{job}") if arguments.run_name or job else None
    if named is not None and (named / "config.json").is_file():
        if arguments.resume == "never" and (arguments.run_name or not os.environ.get("SLURM_RESTART_COUNT")):
            raise ConfigError(f"--resume never, but {named} exists: choose another --run_name")
        _check_identity(named, identity, settings)
        yield named, True, True
        return
    if arguments.resume == "auto" and not arguments.run_name:
        for path in sorted(root.glob("*/config.json"), key=lambda p: p.stat().st_mtime, reverse=True):
            run = path.parent
            if run.is_symlink() or (run / "finished.json").is_file() or alive(run):
                continue
            try:
                if read_json(path).get("identity") == identity:
                    yield run, True, False
            except ArtifactError:
                continue
    if named is not None:
        yield named, False, True
        return
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    candidates = [root / f"{phase}_{stamp}"] + [root / f"{phase}_{stamp}_{i}" for i in range(2, 100)]
    yield next(path for path in candidates if not path.exists()), False, True


def _check_identity(run: Path, identity: str, settings: dict[str, Any]) -> None:
    config = read_json(run / "config.json")
    if config.get("identity") == identity:
        return
    before = config.get("settings", {})
    changed = [f"{k}: {before.get(k)!r} -> {v!r}" for k, v in settings.items() if before.get(k) != v]
    raise ConfigError(f"{run} was started with other settings or data ({'; '.join(changed) or 'other model or data'}): "
                      "use another --run_name, or the same settings")


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
        root.addHandler(logging.NullHandler())
        datasets.disable_progress_bars()


def _log_file(log_dir: Path, name: str, rank: int) -> Path:
    return log_dir / f"{name}{f'.rank{rank}' if rank else ''}.log"


@contextmanager
def log_to_file(log_dir: Path, name: str) -> Iterator[None]:
    """This rank's log file: logs/<run>.log for rank 0, logs/<run>.rank<r>.log beside it for the others."""
    log_dir.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(_log_file(log_dir, name, runtime.rank()))
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger("warp_ds")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()
