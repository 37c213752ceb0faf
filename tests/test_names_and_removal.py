"""What may name a run, what a value may hold, and that nothing is removed which this program did not write."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.flags.arguments import BasisArguments, TrainArguments
from warp_ds.flags.parsing import parse_arguments, parse_training
from warp_ds.launch.cli import main
from warp_ds.phases import checkpoints
from warp_ds.phases.run import link_latest, start_run
from warp_ds.store import files as store_files
from warp_ds.store.lock import alive
from warp_ds.zero import universal
from warp_ds.zero.walk import HiddenStates


def started(root: Path, name: str | None, **more: Any) -> str:
    """The directory that a run of that name has taken, within ``root``."""
    arguments = BasisArguments(output_dir=str(root / "out"), log_dir=str(root / "logs"), run_name=name, device="cpu", **more)
    arguments.check()
    with start_run("phase1", arguments, {"model": "m"}) as run:
        return run.directory.name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../out2",
        "a/b",
        "/tmp/x",
        "a\\b",
        ".hidden",
        "-rf",
        "~",
        " a",
        "a ",
        "x" * 300,
        "phase1_latest",
        "a\nb",
        "a\x1b[2J",
        "a\u2028b",
        "a\u202eb",
        "a\udc80",
    ],
)
def test_a_name_that_is_no_directory_of_its_own_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="--run_name"):
        started(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a", "run-1", "Über uns", "7", "phase1_20260101_000000", "a=b+c@d"])
def test_an_ordinary_name_is_taken(tmp_path: Path, name: str) -> None:
    assert started(tmp_path, name) == name == started(tmp_path, name)


def files(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*")) if path.is_file()}


def a_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[1]")


def a_thesis(folder: Path) -> None:
    (folder / "thesis.tex").write_text("x")


@pytest.mark.parametrize("fill", [lambda folder: None, a_thesis, a_model, a_list])
def test_a_directory_that_is_no_run_is_refused_and_left_as_it_is(tmp_path: Path, fill: Any) -> None:
    taken = tmp_path / "out" / "taken"
    taken.mkdir(parents=True)
    fill(taken)
    before = files(taken)
    for more in ({"name": "taken"}, {"name": None, "resume": "taken"}, {"name": None, "resume": str(taken)}):
        with pytest.raises(ConfigError, match="no run of this program"):
            started(tmp_path, **more)
    assert started(tmp_path, None).startswith("phase1_2")  # looks at what is unfinished, and touches nothing of it
    assert files(taken) == before


def test_a_link_to_somebody_elses_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no run of this program"):
        started(tmp_path, "link")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_run_that_was_killed_as_it_began_is_taken_over(tmp_path: Path) -> None:
    begun = tmp_path / "out" / "begun"
    begun.mkdir(parents=True)
    for name in (".lock", ".config.json.0123abcd.warp_ds.tmp"):
        (begun / name).touch()
    assert started(tmp_path, "begun") == "begun"
    assert not list(begun.glob(".*.tmp"))


def test_only_what_was_begun_here_is_removed(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    own = run / "masks" / ".layer_00.0123abcd.warp_ds.tmp"
    directory = run / "trainer" / ".checkpoint-6.0123abcd.warp_ds.tmp"
    directory.mkdir(parents=True)
    (directory / "begun.json").touch()
    kept = [run / ".x.tmp", run / ".x.0123abcd.tmp", run / "masks" / "y.warp_ds.tmp", other / own.name]
    for path in (own, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (run / "link").symlink_to(other)
    (run / f"{own.name[:-13]}99.warp_ds.tmp").symlink_to(other)
    store_files.remove_unfinished(run)
    assert not own.exists() and not directory.exists() and all(path.exists() for path in kept)
    assert (run / "link").is_symlink()

    for make in (Path.touch, Path.mkdir, lambda aside: aside.symlink_to("nowhere")):
        with pytest.raises(KeyboardInterrupt), store_files.written_aside(run / "a.json") as aside:
            make(aside)
            raise KeyboardInterrupt
        assert store_files.is_aside(aside.name)  # the pattern is that of what is written
        assert not aside.exists() and not aside.is_symlink() and not (run / "a.json").exists()
        with store_files.written_aside(run / f"{make.__name__}.json") as aside:
            make(aside)
        assert not aside.exists() and os.path.lexists(run / f"{make.__name__}.json")


def killed_at(call: int, work: Callable[[], Any]) -> bool:
    """Whether a process that does ``work`` was ended, as killed, at its ``call``-th call that may change the disk."""

    def dying(real: Any) -> Any:
        def change(*args: Any, **kwargs: Any) -> Any:
            nonlocal call
            call -= 1
            return os._exit(9) if call < 0 else real(*args, **kwargs)

        return change

    if (child := os.fork()) == 0:
        for name in ("mkdir", "open", "replace", "rename", "unlink", "rmdir"):
            setattr(os, name, dying(getattr(os, name)))
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize("work", ["begin", "keep_newest", "newest_whole"])
def test_a_kill_at_any_moment_leaves_no_checkpoint_that_is_taken_for_somebody_elses(tmp_path: Path, work: str) -> None:
    for call in range(100):
        trainer = tmp_path / str(call) / "trainer"
        for step in (2, 4):
            checkpoints.begin(trainer / f"checkpoint-{step}")
            (trainer / f"checkpoint-{step}" / "a").touch()
            if work != "newest_whole":
                checkpoints.finish(trainer / f"checkpoint-{step}", 2)
        works = {
            "begin": lambda trainer=trainer: checkpoints.begin(trainer / "checkpoint-6"),
            "keep_newest": lambda trainer=trainer: checkpoints.keep_newest(trainer, 1),
            "newest_whole": lambda trainer=trainer: checkpoints.newest_whole(trainer),
        }
        died = killed_at(call, works[work])
        store_files.remove_unfinished(tmp_path / str(call))
        checkpoints.refuse_foreign(trainer, 12)
        assert not list(trainer.glob(".*"))
        if not died:
            break
    assert 2 <= call < 99


def test_a_kill_at_any_moment_leaves_no_run_that_is_taken_for_somebody_elses(tmp_path: Path) -> None:
    for call in range(100):
        died = killed_at(call, partial(started, tmp_path / str(call), "r"))
        assert started(tmp_path / str(call), "r") == "r"
        if not died:
            break
    assert 5 <= call < 99


def test_a_kill_at_any_moment_leaves_no_conversion_that_is_taken_for_somebody_elses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to where the converting process would start."""
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: None)
    for call in range(100):
        part = tmp_path / str(call) / "universal-6.part"
        died = killed_at(call, partial(universal._start, tmp_path / "global_step6", part, 1))
        assert not part.exists() or universal._is_own(part)
        if not died:
            break
    assert 5 <= call < 99


def test_a_checkpoint_that_is_written_once_more_is_not_whole_until_it_is_finished(tmp_path: Path) -> None:
    for step in (2, 4):
        checkpoints.begin(tmp_path / f"checkpoint-{step}")
        checkpoints.finish(tmp_path / f"checkpoint-{step}", 1)
    checkpoints.begin(tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "half").touch()
    assert checkpoints.newest_whole(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists()


def test_only_own_checkpoints_are_removed_or_gone_on_with(tmp_path: Path) -> None:
    for step, whole in ((3, True), (5, True), (7, False)):
        checkpoints.begin(tmp_path / f"checkpoint-{step}")
        if whole:
            checkpoints.finish(tmp_path / f"checkpoint-{step}", 2)
    for name in ("checkpoint-500", "checkpoint-x", "checkpoint-4 (copy)", "universal-3", "universal-x"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "theirs").touch()
    (tmp_path / "universal-5").mkdir()
    (tmp_path / "universal-5" / "begun.json").touch()
    (tmp_path / "checkpoint-6").symlink_to(tmp_path / "checkpoint-5")
    assert checkpoints.newest_whole(tmp_path) == str(tmp_path / "checkpoint-5")
    assert not (tmp_path / "checkpoint-7").exists()
    checkpoints.keep_newest(tmp_path, 1)
    universal.remove_converted(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        "checkpoint-4 (copy)",
        "checkpoint-5",
        "checkpoint-500",
        "checkpoint-6",
        "checkpoint-x",
        "universal-3",
        "universal-x",
    ]
    (tmp_path / "checkpoint-6").unlink()
    checkpoints.refuse_foreign(tmp_path, steps=499)
    with pytest.raises(ArtifactError, match="checkpoint-500 was not written by this program"):
        checkpoints.refuse_foreign(tmp_path, steps=500)


def test_a_link_is_set_over_nothing_but_a_link(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "phase1_latest").write_text("theirs")
    link_latest("phase1", tmp_path / "out" / "run")
    assert (tmp_path / "out" / "phase1_latest").read_text() == "theirs"
    link_latest("phase2", tmp_path / "out" / "run")
    link_latest("phase2", tmp_path / "out" / "run2")
    assert os.readlink(tmp_path / "out" / "phase2_latest") == "run2"


def test_scratch_directories_keep_what_is_not_theirs(tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "notes.txt").touch()
    states = HiddenStates(tmp_path / "hidden", 0)
    states._new_file().touch()
    states.close()
    assert [path.name for path in (tmp_path / "hidden").iterdir()] == ["notes.txt"]


def test_looking_whether_a_run_lives_writes_nothing(tmp_path: Path) -> None:
    assert not alive(tmp_path)
    os.mkfifo(tmp_path / ".lock")
    alive(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


STRINGS = [
    ("--output_dir", "out\nput"),
    ("--log_dir", "a\tb"),
    ("--model_name", "m\r"),
    ("--safety_data", "x\x00y"),
    ("--target_layers", "all\x7f"),
    ("--resume", "auto\u0085"),
]


@pytest.mark.parametrize("flag, value", STRINGS)
def test_control_characters_are_refused_in_flags_and_files(tmp_path: Path, flag: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{flag} holds the character U\\+"):
        parse_arguments(BasisArguments, [flag, value])
    with pytest.raises(ConfigError, match=f"{flag} holds the character U\\+"):
        parse_arguments(BasisArguments, [f"{flag}={value}"])
    (tmp_path / "c.yaml").write_text(json.dumps({flag[2:]: value}))
    with pytest.raises(ConfigError, match=f"{flag} holds the character U\\+"):
        parse_arguments(BasisArguments, ["--config", str(tmp_path / "c.yaml")])
    with pytest.raises(ConfigError, match=f"{flag} holds the character U\\+"):
        BasisArguments(**{flag[2:]: value}).check()


def test_control_characters_are_refused_in_what_is_passed_on_and_on_the_console(capsys: Any) -> None:
    with pytest.raises(ConfigError, match="--lr_scheduler_type holds the character U\\+000A"):
        parse_training(TrainArguments, ["--lr_scheduler_type", "linear\n"])
    with pytest.raises(SystemExit):
        main(["report", "a\nb"])
    assert "U+000A" in capsys.readouterr().err
