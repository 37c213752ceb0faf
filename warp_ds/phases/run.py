"""A run is its directory: named, locked while its process lives, resumed by what it computes, finished by a marker."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import datasets

from warp_ds.cluster import consensus, peaks, processes, slurm
from warp_ds.cluster.preemption import Preempted
from warp_ds.errors import ConfigError
from warp_ds.flags.groups import RunArguments
from warp_ds.phases.failures import FAILURE, explain, log_file, record_failure
from warp_ds.phases.identity import Identity, identify, read_named, unfinished
from warp_ds.phases.versions import installed_versions
from warp_ds.secrets import Redacting
from warp_ds.store.files import begin_directory, is_aside, remove_unfinished, write_json, written_aside
from warp_ds.store.held import check_there, held
from warp_ds.store.lock import RunLock
from warp_ds.store.runs import is_run
from warp_ds.store.state import STATE, note, now
from warp_ds.store.written import check_written

logger = logging.getLogger(__name__)


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
    memory: peaks.PeakMemory

    def note(self, event: str, **more: Any) -> None:
        """One line in the run's state: what happened to it, when, in which job. Rank 0 alone writes."""
        if processes.rank() == 0:
            note(self.directory, event, **more)

    def begin(self) -> None:
        """Says whether it is new, goes on, or is finished."""
        if self.done:
            logger.info("%s is finished already: %s", self.phase, self.directory)
        else:
            logger.info("%s: %s %s", self.phase, "going on in" if self.resumed else "writing to", self.directory)
            self.note("restarted" if self.resumed else "started", world_size=processes.world_size())

    def finish(self, **more: Any) -> None:
        """Marks the run finished and points ``<phase>_latest`` at it; ``more`` stands in its finished.json. Collective."""
        memory = self.memory.of_all_ranks()  # all of them are here then

        def mark() -> None:
            seconds = round(time.time() - self.started, 1)
            marked = {"finished_at": now(), "seconds": seconds, "peak_memory": memory, **more}
            write_json(self.directory / "finished.json", marked)
            link_latest(self.phase, self.directory)
            self.note("finished")
            logger.info("%s finished in %.0f s: %s", self.phase, seconds, self.directory)

        consensus.on_rank_0(mark, "marking the run finished")


def link_latest(phase: str, run: Path) -> None:
    """Points ``<phase>_latest``, beside the run, at it. Rank 0 alone calls it."""
    link = run.parent / f"{phase}_latest"
    if link.exists() and not link.is_symlink():
        logger.warning("%s is not this program's link, and stays as it is", link)
        return
    with written_aside(link) as aside:
        aside.symlink_to(run.name)


@contextmanager
def start_run(
    phase: str, arguments: RunArguments, inputs: dict[str, str], passed: dict[str, Any] | None = None
) -> Iterator[Run]:
    """Makes, or goes on with, the run directory of ``phase`` ('phase1'); locked until the block ends. Collective.

    ``inputs`` are the fingerprints of what the run reads (model, data, basis ...): with the settings they decide
    which unfinished run is the same one (``phases.identity``); ``passed`` are settings besides ``arguments``.
    Raises ConfigError on every rank where --run_name is taken by another run, or the run is alive elsewhere.
    """
    lock: list[RunLock] = []
    try:
        read_named(arguments, inputs)
        chosen = consensus.on_rank_0(lambda: _open(phase, arguments, inputs, passed or {}, lock), "opening the run directory")
        directory = Path(chosen["directory"])
        with _held_by_all(directory), peaks.peak_memory() as memory, log_to_file(Path(arguments.log_dir), directory.name):
            run = Run(phase, directory, chosen["resumed"], chosen["done"], time.time(), memory)
            if chosen["near"]:
                logger.warning("%s: %s", phase, chosen["near"])
            run.begin()
            try:
                yield run
            except Preempted as stop:
                stop.add_note(str(run.directory))
                run.note("stopped", reason=str(stop))
                logger.info("%s: %s has come, and every rank has saved what it had", run.directory.name, stop)
                raise
            except Exception as error:
                check_there(directory)  # whatever failed, failed for that
                explain(error, arguments)
                record_failure(run.directory, error, Path(arguments.log_dir))
                raise
    finally:
        for one in lock:
            one.release()


def _open(
    phase: str, arguments: RunArguments, inputs: dict[str, str], passed: dict[str, Any], lock: list[RunLock]
) -> dict[str, Any]:
    """Chooses and locks the run's directory, and writes config.json into a new one; what all ranks need to know of it.
    Rank 0 alone calls it. ``lock`` gets the lock, also where what follows fails."""
    identity = identify(phase, arguments, inputs, passed)
    for directory, resumed, certain in _candidates(phase, arguments, identity):
        if resumed:
            check_written(directory)
        begin_directory(directory, ".lock")  # an empty one would be taken for somebody else's
        candidate = RunLock(directory)
        try:
            candidate.acquire()
        except ConfigError:
            if certain:
                raise
            continue  # another process went on with it first
        lock.append(candidate)
        break
    if not resumed:
        config = {
            **identity.record,
            "settings": {**dataclasses.asdict(arguments), **passed},
            "started_at": now(),
            "versions": installed_versions(),
            "command": sys.argv,
            "world_size": processes.world_size(),
            "working_directory": os.getcwd(),
        }
        write_json(directory / "config.json", config, private=True)
    (directory / FAILURE).unlink(missing_ok=True)
    remove_unfinished(directory)
    near = "" if resumed or arguments.resume != "auto" or arguments.run_name else identity.nearest(directory)
    return {"directory": str(directory), "resumed": resumed, "done": (directory / "finished.json").is_file(), "near": near}


@contextmanager
def _held_by_all(directory: Path) -> Iterator[None]:
    """``held`` on every rank, or an error on every rank. Collective."""
    with ExitStack() as stack:
        with consensus.on_every_rank_or_none("opening the run directory"):
            deadline = time.monotonic() + 30  # network file systems remember for a while that a file was not there
            while not directory.is_dir() and time.monotonic() < deadline:
                time.sleep(0.2)
                os.listdir(directory.parent)
            stack.enter_context(held(directory))
        yield


def _candidates(phase: str, arguments: RunArguments, identity: Identity) -> Iterator[tuple[Path, bool, bool]]:
    """(directory, whether a run is gone on with, whether no other directory will do), the best first."""
    root = Path(arguments.output_dir)
    if arguments.resume not in ("auto", "never"):
        wanted = Path(arguments.resume) if Path(arguments.resume).is_dir() else root / arguments.resume
        if not is_run(wanted):
            raise ConfigError(
                f"--resume {arguments.resume}: no run of this program there (no config.json of one); "
                "use auto, never or a run's directory"
            )
        identity.check(wanted)
        yield wanted.resolve() if wanted.is_symlink() else wanted, True, True
        return
    job = slurm.job_id()
    # A requeued job keeps its id, and goes on in its own directory.
    named = root / (arguments.run_name or f"{phase}_{job}") if arguments.run_name or job else None
    if named is not None:
        _refuse_foreign(named)
    if named is not None and (named / "config.json").is_file():
        if arguments.resume == "never" and (arguments.run_name or not os.environ.get("SLURM_RESTART_COUNT")):
            raise ConfigError(f"--resume never, but {named} exists: choose another --run_name")
        identity.check(named)
        yield named, True, True
        return
    if arguments.resume == "auto" and not arguments.run_name:
        for run in unfinished(root):
            if identity.differences(run) == []:
                yield run, True, False
    if named is not None:
        yield named, False, True
        return
    stamp = datetime.now().strftime("%Y%m%d_%H%M%S")
    candidates = [root / f"{phase}_{stamp}"] + [root / f"{phase}_{stamp}_{i}" for i in range(2, 100)]
    yield next(path for path in candidates if not path.exists()), False, True


def _refuse_foreign(directory: Path) -> None:
    """ConfigError where ``directory`` is there already and no run of this program, or one that was only begun."""
    begun = (
        (directory / ".lock").is_file()
        and not (directory / "config.json").exists()
        and all(path.name in (".lock", "owner.json", FAILURE, STATE) or is_aside(path.name) for path in directory.iterdir())
    )
    if (directory.exists() or directory.is_symlink()) and (directory.is_symlink() or not (begun or is_run(directory))):
        raise ConfigError(f"{directory} is there already, and no run of this program: use another --run_name")


_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_terminal(level: int = logging.INFO) -> None:
    """Rank 0's log and progress bars on standard error; the other ranks' logs go to their files alone."""
    root = logging.getLogger("warp_ds")
    root.setLevel(level)
    root.propagate = False
    root.handlers = [h for h in root.handlers if isinstance(h, logging.FileHandler)]
    if processes.rank() == 0:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        handler.addFilter(Redacting())
        root.addHandler(handler)
    else:
        root.addHandler(logging.NullHandler())
        datasets.disable_progress_bars()


@contextmanager
def log_to_file(log_dir: Path, name: str) -> Iterator[None]:
    """This rank's log file: logs/<run>.log for rank 0, logs/<run>.rank<r>.log beside it for the others."""
    path = log_file(log_dir, name, processes.rank())
    with consensus.on_every_rank_or_none("opening the log"):
        log_dir.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}, which would be the run's log, is no file: move it, or give another --log_dir")
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(Redacting())
    root = logging.getLogger("warp_ds")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        try:
            handler.close()
        except OSError:
            pass  # a full disk: the error that says so is on its way already
