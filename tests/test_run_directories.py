"""A run's directory that vanishes in mid-run, and which of several runs is the newest."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from warp_ds.errors import DirectoryGoneError
from warp_ds.flags.arguments import BasisArguments
from warp_ds.phases.identity import unfinished
from warp_ds.phases.run import Run, start_run
from warp_ds.phases.trainer import MetricsFile
from warp_ds.store.files import write_json, write_text
from warp_ds.store.held import held
from warp_ds.store.lock import RunLock
from warp_ds.store.runs import find_artifact, newest
from warp_ds.store.state import Progress
from warp_ds.zero import saved_directory


def begin(root: Path) -> Any:
    arguments = BasisArguments(output_dir=str(root / "out"), log_dir=str(root / "logs"), run_name="r", device="cpu")
    return start_run("phase1", arguments, {"model": "m"})


def finish(run: Run) -> None:
    run.finish()


def show_progress(run: Run) -> None:
    Progress(run.directory, 1, "steps").at(1)


def log_a_step(run: Run) -> None:
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=1)
    MetricsFile(run.directory / "metrics.jsonl").on_log(None, state, None, {"loss": 1.0})  # type: ignore[arg-type]


def write_an_artefact(run: Run) -> None:
    write_text(run.directory / "basis" / "x.txt", "x")


def export(run: Run) -> None:
    saved_directory._prepare(run.directory / "model", run.directory / ".model.saving")


def fail_by_itself(run: Run) -> None:
    (run.directory / "points").mkdir()  # as code does that writes by its own means


def move_away(directory: Path) -> None:
    directory.rename(directory.with_name("moved"))


def replace_by_another(directory: Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


@pytest.mark.parametrize("vanish", [shutil.rmtree, move_away, replace_by_another, lambda path: shutil.rmtree(path.parent)])
@pytest.mark.parametrize("step", [finish, show_progress, log_a_step, write_an_artefact, export, fail_by_itself])
def test_a_run_whose_directory_vanishes_ends_with_an_error(
    tmp_path: Path, step: Callable[[Run], None], vanish: Callable[[Path], None]
) -> None:
    if (step, vanish) == (fail_by_itself, replace_by_another):
        pytest.skip("it does not fail: what is written next by this program does")
    with pytest.raises(DirectoryGoneError, match="out/r has vanished while the run wrote to it"), begin(tmp_path) as run:
        vanish(run.directory)
        step(run)
    left = tmp_path / "out" / "r"
    assert not left.exists() or not list(left.iterdir()), "nothing is written where the run's directory was"
    if left.exists():
        left.rmdir()
    with begin(tmp_path) as again:  # and the same command begins anew
        assert not again.resumed
        again.finish()


def test_a_heartbeat_ends_a_run_that_computes_on(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    child = os.fork()
    if child == 0:  # the heartbeat ends its process
        lock = RunLock(tmp_path / "r", beat_seconds=0.05)
        lock.acquire()
        with held(tmp_path / "r"):
            shutil.rmtree(tmp_path / "r")
            time.sleep(20)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    assert not (tmp_path / "r").exists()


def test_held_directories_are_let_go(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    with held(tmp_path / "a"), held(inner):
        with held(inner):
            pass
        shutil.rmtree(inner)
        write_text(tmp_path / "a" / "x", "x")  # what vanished is not on its way
        with pytest.raises(DirectoryGoneError):
            write_text(inner / "x", "x")
    write_text(inner / "x", "x")


def finished(root: Path, name: str, at: Any, touched: float = 0.0) -> Path:
    """A finished phase 1 whose files were touched ``touched`` seconds from now."""
    run = root / name
    write_json(run / "basis" / "metadata.json", {})
    write_json(run / "config.json", {"phase": "phase1", "identity": "i", "started_at": at})
    write_json(run / "finished.json", {"finished_at": at} if at is not None else {})
    for path in run.iterdir():
        os.utime(path, (time.time() + touched,) * 2)
    return run


def seconds_ago(seconds: float) -> str:
    return (datetime.now() - timedelta(seconds=seconds)).isoformat(timespec="seconds")


@pytest.mark.parametrize(
    "later",
    [
        "9999-12-31T23:59:59",
        "tomorrow",
        "2999-01-01T00:00:00+14:00",
        "soon",
        1e300,
        None,
        [],
        "0001-01-01T00:00:00",
        "99999-01-01",
    ],
)
def test_a_time_that_has_not_come_does_not_make_a_run_the_newest(tmp_path: Path, later: Any) -> None:
    finished(tmp_path, "phase1_3_old", seconds_ago(9000), touched=5e8)
    right = finished(tmp_path, "phase1_2", seconds_ago(3000), touched=-9000)
    finished(tmp_path, "phase1_4_odd", seconds_ago(-86400) if later == "tomorrow" else later, touched=1e9)
    assert newest(tmp_path, "phase1") == right
    assert find_artifact(None, "basis", tmp_path) == right / "basis"
    for run in tmp_path.iterdir():
        (run / "finished.json").unlink()
    assert next(unfinished(tmp_path)) == right


def test_runs_of_one_second_go_by_name_and_clocks_may_differ(tmp_path: Path) -> None:
    at = seconds_ago(60)
    finished(tmp_path, "phase1_20260101_000000", at)
    second = finished(tmp_path, "phase1_20260101_000001", at)
    assert newest(tmp_path, "phase1") == second
    ahead = finished(tmp_path, "phase1_0", seconds_ago(-60))  # another host's clock
    assert newest(tmp_path, "phase1") == ahead
    assert json.loads((ahead / "finished.json").read_text())
