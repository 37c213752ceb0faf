"""A run's own files: a directory that vanishes, clocks that are wrong, and files that hold what nobody wrote."""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.flags.arguments import BasisArguments
from warp_ds.flags.jobs import SubmitArguments
from warp_ds.launch.chain import Chain, find_chain
from warp_ds.launch.progress import status
from warp_ds.phases import checkpoints
from warp_ds.phases.identity import unfinished
from warp_ds.phases.run import start_run
from warp_ds.phases.trainer import MetricsFile
from warp_ds.store.files import read_json, read_lines, write_json
from warp_ds.store.lock import RunLock
from warp_ds.store.runs import newest, run_config
from warp_ds.store.state import Progress


def arguments(root: Path, **more: Any) -> BasisArguments:
    return BasisArguments(output_dir=str(root / "out"), log_dir=str(root / "logs"), device="cpu", **more)


def test_times_from_the_future_are_never_the_newest(tmp_path: Path) -> None:
    for name, ahead in (("old", -1000), ("right", -10), ("future", 10**7)):
        run = tmp_path / name
        write_json(run / "config.json", {"phase": "phase1", "identity": "x", "settings": {}})
        for mark in ("config.json", "finished.json"):
            write_json(run / mark, read_json(run / "config.json"))
            os.utime(run / mark, (time.time() + ahead,) * 2)
    assert newest(tmp_path, "phase1") == tmp_path / "right"
    for name in ("old", "right", "future"):
        (tmp_path / name / "finished.json").unlink()
    assert [run.name for run in unfinished(tmp_path)] == ["right", "old", "future"]


VALUES: list[Any] = [None, True, 0, -1, 1e400, 1.5, "", "x", "\ud800", [], [1], {}, {"a": 1}, [[]], float("nan"), 10**30]


def mutations(good: Any) -> list[str]:
    """Texts of JSON in place of ``good``: of every type as a whole, and in each of its fields; cut off, and no JSON."""
    found = [json.dumps(value) for value in VALUES]
    if isinstance(good, dict):
        found += [json.dumps({**good, key: value}) for key in good for value in VALUES]
        found += [json.dumps({k: v for k, v in good.items() if k != key}) for key in good]
        found.append(json.dumps({**good, "unknown": 1}))
    text = json.dumps(good)
    return [*found, text[:-1], "", "\x00", "[" * 100_000, text + text]


REFUSALS = (ArtifactError, ConfigError)


def refused_or(what: Any) -> Any:
    """The result, or the refusal's one line; any other exception fails the test."""
    try:
        return what()
    except REFUSALS as error:
        assert "\n" not in str(error), error
        return error


def started(root: Path, **more: Any) -> tuple[str, bool]:
    with start_run("phase1", arguments(root, **more), {"model": "m"}) as run:
        return run.directory.name, run.done


def in_place(path: Path, text: str) -> None:
    path.write_text(text, errors="surrogatepass")


@pytest.mark.parametrize("name", ["config.json", "finished.json", "owner.json", "progress.json"])
def test_files_of_a_run_are_refused_or_make_no_difference(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="warp_ds")  # until the test ends
    with start_run("phase1", arguments(tmp_path, run_name="r"), {"model": "m"}) as run:
        run.finish() if name == "finished.json" else Progress(run.directory, 4, "steps").at(2)
    path = tmp_path / "out" / "r" / name
    good = read_json(path) if path.is_file() else {"host": "gone", "pid": 1, "token": "t", "beat": 3, "job": None}
    expected = ("r", name == "finished.json")
    for text in mutations(good):
        in_place(path, text)
        if name == "owner.json":
            lock = RunLock(path.parent, beat_seconds=60, dead_seconds=0.02)
            assert refused_or(lock.acquire) is None, text[:80]
            lock.release()
            continue
        found = refused_or(lambda: started(tmp_path, run_name="r"))
        assert found == expected or isinstance(found, REFUSALS) and "r" in str(found), text[:80]
        assert isinstance(run_config(path.parent), dict)
        list(unfinished(tmp_path / "out"))
        newest(tmp_path / "out", "phase1")
        shutil.rmtree(tmp_path / "logs", ignore_errors=True)


@pytest.mark.parametrize("name", ["config.json", "finished.json", "owner.json", "state.jsonl", ".lock"])
@pytest.mark.parametrize("kind", ["pipe", "directory", "link to nowhere"])
def test_what_is_no_file_is_refused_and_waits_for_nobody(tmp_path: Path, name: str, kind: str) -> None:
    assert started(tmp_path, run_name="r") == ("r", False)
    path = tmp_path / "out" / "r" / name
    path.unlink(missing_ok=True)
    {"pipe": os.mkfifo, "directory": os.mkdir, "link to nowhere": lambda p: p.symlink_to(tmp_path / "no")}[kind](path)
    found = refused_or(lambda: started(tmp_path, run_name="r"))
    assert found == ("r", False) or isinstance(found, REFUSALS) and str(path.parent) in str(found), found


def test_marks_of_checkpoints(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    checkpoints.begin(checkpoint)
    checkpoints.finish(checkpoint, 2)
    good = read_json(checkpoint / checkpoints.WHOLE)
    for text in mutations(good):
        in_place(checkpoint / checkpoints.WHOLE, text)
        found = refused_or(lambda: checkpoints.world_size_of(checkpoint))
        assert (
            isinstance(found, REFUSALS)
            or json.loads(text) == {**good, "unknown": 1}
            or (type(found) is int and found >= 1 and json.loads(text)["step"] == 4)
        ), text[:80]


def test_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = {"step": 3, "loss": 1.5}
    for text in mutations(good):
        in_place(path, json.dumps(good) + "\n" + text + "\n")
        assert all(isinstance(line, dict) for line in read_lines(path))
        MetricsFile(path).keep_until(3)
        assert read_lines(path)[0] == good
    path.unlink()
    path.mkdir()
    with pytest.raises(ArtifactError, match="metrics.jsonl cannot be read"):
        read_lines(path)


def test_chains(tmp_path: Path) -> None:
    words = ["--device", "cpu", "--model_name", str(tmp_path)]

    def find(name: str | None = "c") -> Chain:
        return find_chain(SubmitArguments(phases="1", cluster="local", output_dir=str(tmp_path), run_name=name), words)

    chain = find()
    chain.directory.mkdir(exist_ok=True)
    chain.jobs = {"phase1": ["999999999"]}
    chain.save()
    good = read_json(chain.directory / "chain.json")
    assert find().flags == chain.flags
    for text in mutations(good):
        in_place(chain.directory / "chain.json", text)
        found = refused_or(find)
        if isinstance(found, Chain):
            assert found.flags == chain.flags
            status(found)
        else:
            assert str(chain.directory) in str(found), text[:80]
        assert isinstance(find(None), Chain)
    (chain.directory / "chain.json").unlink()
    os.mkfifo(chain.directory / "chain.json")
    assert isinstance(refused_or(find), REFUSALS)
    for name in ("state.jsonl", "progress.json"):
        for text in mutations({"done": 1, "total": 2, "unit": "steps", "event": "restarted", "error": "x"}):
            write_json(chain.directory / "chain.json.x", {})
            (chain.directory / "phase1").mkdir(exist_ok=True)
            in_place(chain.directory / "phase1" / name, text)
            status(Chain(chain.directory, "local", chain.flags, {}))
