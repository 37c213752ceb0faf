"""Every file of a run, mutated: each field by type, bytes, pipes and directories in its place. Nothing but a refusal by name or
the same result comes out of it, and nothing waits."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.evaluation.answers import AnswerLog
from warp_ds.flags.arguments import BasisArguments, TrainArguments
from warp_ds.launch import chain, progress
from warp_ds.phases import basis, checkpoints
from warp_ds.phases.run import start_run
from warp_ds.phases.training import find_checkpoint
from warp_ds.store.files import write_tensors
from warp_ds.store.held import held
from warp_ds.store.layers import TargetLayer
from warp_ds.store.lock import RunLock
from warp_ds.store.state import Progress
from warp_ds.zero.saved_scores import SavedScores
from warp_ds.zero.scores import RowScores

VALUES: tuple[Any, ...] = (None, True, 0, -1, 7, 2**70, 0.5, float("nan"), "", "../..", "a\nb", "\ud800", [], [1], {}, {"x": 1})
INNER: tuple[Any, ...] = (None, 2**70, "[/b]", [[]])
"""Below the first level, where there are many fields."""
BYTES = (
    b"",
    b"\x00",
    b"{",
    b"[]",
    b"null",
    b"NaN",
    b"\xff\xfe{}",
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"9" * 5000,
    b'"x"',
    b"{}",
)


@contextmanager
def in_time(seconds: int = 20) -> Iterator[None]:
    """TimeoutError in a block that waits for ever: a pipe that was opened, say."""

    def late(*_: Any) -> None:
        raise TimeoutError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def json_mutants(content: Any, values: Sequence[Any] = VALUES, depth: int = 0) -> Iterator[Any]:
    """``content`` with each of its fields, at any depth, missing, beside an unknown one, or of another type or value."""
    yield from values
    if isinstance(content, dict):
        yield {**content, "unknown": 1}
        for name, value in content.items():
            yield {k: v for k, v in content.items() if k != name}
            for other in json_mutants(value, values if depth == 0 else INNER, depth + 1):
                yield {**content, name: other}
    elif isinstance(content, list) and content:
        for other in json_mutants(content[0], INNER, depth + 1):
            yield [other, *content[1:]]


def spoil(path: Path) -> Iterator[str]:
    """Puts one thing after the other in a file's place; the file is as it was in the end."""
    whole = path.read_bytes()
    try:
        for data in BYTES:
            path.write_bytes(data)
            yield f"bytes {data[:10]!r}"
        if path.suffix == ".json":
            for mutant in json_mutants(json.loads(whole)):
                path.write_text(json.dumps(mutant))
                yield f"JSON {json.dumps(mutant)[:300]}"
        for mode, make in PLACES.items():
            _remove(path)
            make(path)
            yield mode
        _remove(path)
        yield "nothing"
    finally:
        _remove(path)
        path.write_bytes(whole)


def _huge(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 42)


PLACES: dict[str, Callable[[Path], Any]] = {
    "a pipe": os.mkfifo,
    "a directory": Path.mkdir,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": lambda path: path.symlink_to(path),
    "four terabytes": _huge,
}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


class Outcomes:
    """What came of every change of a file; ``check`` fails where one was neither refused by name nor without effect."""

    def __init__(self) -> None:
        self.refused, self.same = 0, 0
        self.wrong: list[str] = []

    def of(self, result: Callable[[], Any], right: Any, what: str, file: Path) -> None:
        """Counts ``result()``: a refusal of one line that names the file or its directory, or ``right``."""
        try:
            with in_time():
                found = result()
        except (ConfigError, ArtifactError) as error:
            text = str(error)
            named = any(name in text for name in (str(file.parent), file.name, file.parent.name))
            if named and text.isprintable() and len(text) < 2000:
                self.refused += 1
            else:
                self.wrong.append(f"{file.name} is {what}: not one line that names it: {text!r}")
        except Exception as error:  # noqa: BLE001
            self.wrong.append(f"{file.name} is {what}: {type(error).__name__}: {error}")
        else:
            self.same += found == right
            if found != right:
                self.wrong.append(f"{file.name} is {what}: accepted, with another result")

    def check(self, refused: int = 1) -> None:
        """``refused``: how many refusals there must be at least, so that the test has tested something."""
        assert not self.wrong, f"{len(self.wrong)} of them, such as:\n" + "\n".join(self.wrong[:20])
        assert self.refused >= refused


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with open_run(tmp_path) as found:
        found.note("stopped")
        Progress(found.directory, 2.0, "steps").at(2)
        with held(found.directory):
            pass
    for name, value in (
        ("metrics.jsonl", {"step": 1, "loss": 0.5}),
        ("owner.json", {"host": "other", "pid": 1, "token": "t", "beat": 3, "job": None}),
    ):
        (tmp_path / "out" / "r" / name).write_text(json.dumps(value) + "\n")
    return tmp_path / "out" / "r"


def open_run(root: Path, resume: str = "auto", name: str | None = "r") -> Any:
    arguments = BasisArguments(
        output_dir=str(root / "out"), log_dir=str(root / "logs"), run_name=name, device="cpu", resume=resume
    )
    return start_run("phase1", arguments, {"model": "m"})


@pytest.mark.parametrize("file", ["config.json", "owner.json", "progress.json", "state.jsonl", "metrics.jsonl", ".lock"])
def test_going_on_with_a_run_whose_files_were_changed(
    tmp_path: Path, run: Path, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunLock.__init__, "__defaults__", (10.0, 0.01))  # nobody beats there: no patience is wanted
    owner = (run / "owner.json").read_bytes()
    outcomes = Outcomes()

    def go_on(**how: Any) -> tuple[str, bool]:
        with open_run(tmp_path, **how) as found:
            return found.directory.name, found.done

    for what in spoil(run / file):
        if file != "owner.json":
            (run / "owner.json").write_bytes(owner)
        outcomes.of(go_on, ("r", False), what, run / file)
        assert not (run / "finished.json").exists()
    outcomes.check()
    assert go_on() == ("r", False), "and as it was, it goes on"


def test_a_finished_run_whose_mark_was_changed(tmp_path: Path, run: Path) -> None:
    (run / "owner.json").unlink()  # whose heartbeat would be waited for
    with open_run(tmp_path) as found:
        found.finish()

    def done() -> bool:
        with open_run(tmp_path) as found:
            return bool(found.done)

    outcomes = Outcomes()
    for what in spoil(run / "finished.json"):
        outcomes.of(done, what != "nothing", what, run / "finished.json")
    outcomes.check(refused=20)


def test_auto_passes_over_a_run_that_cannot_be_read(tmp_path: Path, run: Path) -> None:
    """Under no name: nothing is gone on with that is not this run, and nothing stands in the way of a new one."""
    made: set[str] = set()

    def go_on() -> bool:
        with open_run(tmp_path, name=None) as found:
            made.add(found.directory.name)
            return True

    (run / "owner.json").unlink()
    outcomes = Outcomes()
    whole = (run / "config.json").read_text()
    (run / "config.json").write_text(json.dumps({**json.loads(whole), "started_at": "2020-01-01T00:00:00"}))
    outcomes.of(go_on, True, "another start", run / "config.json")
    (run / "config.json").write_text(whole)
    for number, what in enumerate(spoil(run / "config.json")):
        if number % 40 == 0 or "JSON" not in what:
            outcomes.of(go_on, True, what, run / "config.json")
    outcomes.check(refused=0)
    assert made > {"r"}, "with what changes nothing it goes on, and else begins anew"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    found = tmp_path / "run" / "trainer" / "checkpoint-4"
    checkpoints.begin(found)
    (found / "global_step4").mkdir()
    torch.save({"param_shapes": [{}]}, found / "global_step4" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save({"x": torch.ones(3)}, found / "global_step4" / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({"last_epoch": 4}, found / "scheduler.pt")
    (found / "latest").write_text("global_step4")
    (found / "trainer_state.json").write_text(json.dumps({"global_step": 4, "epoch": 1.0, "log_history": [{"loss": 0.5}]}))
    checkpoints.finish(found, 1)
    return found


def test_going_on_from_a_checkpoint_whose_files_were_changed(tmp_path: Path, checkpoint: Path) -> None:
    def found() -> Path | None:
        return find_checkpoint(tmp_path / "run", TrainArguments(device="cpu"))

    assert found() == checkpoint
    outcomes = Outcomes()
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        if path.name == checkpoints.BEGUN:
            continue
        for what in spoil(path):
            if path.name == checkpoints.WHOLE and what in (
                "nothing",
                "a pipe",
                "a directory",
                "a link to nowhere",
                "a link to itself",
                "a link to a device",
            ):
                continue  # a checkpoint without a mark is a half-written one, and is removed
            outcomes.of(found, checkpoint, what, path)
    outcomes.check(refused=200)
    assert found() == checkpoint
    for name in ("extra.pt", "global_step4/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", "global_step9/x"):
        extra = checkpoint / name
        extra.parent.mkdir(exist_ok=True)
        torch.save({}, extra)
        with pytest.raises(ArtifactError, match="was added"):
            found()
        extra.unlink()


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-",
        "checkpoint-1e3",
        "checkpoint-\u0664",
        "checkpoint-99999999999999999",
        "checkpoint--1",
        "checkpoint-4.0",
        "checkpoint-4 ",
    ],
)
def test_a_name_that_is_no_checkpoints_is_passed_over(tmp_path: Path, checkpoint: Path, name: str) -> None:
    shutil.copytree(checkpoint, checkpoint.with_name(name))
    assert find_checkpoint(tmp_path / "run", TrainArguments(device="cpu")) == checkpoint
    assert checkpoint.with_name(name).is_dir()


def test_a_chain_whose_files_were_changed(tmp_path: Path) -> None:
    words = {"phase1": ["--dtype", "float32"], "evaluate": []}
    made = chain.Chain(tmp_path / "c", "local", words, {"phase1": ["4000000"]})
    made.save()
    for name, text in (
        ("state.jsonl", '{"event": "failed", "error": "x"}\n'),
        ("progress.json", '{"done": 1, "total": 2, "unit": "s"}'),
    ):
        (tmp_path / "c" / "phase1").mkdir(exist_ok=True)
        (tmp_path / "c" / "phase1" / name).write_text(text)

    def load() -> bool:
        found = chain.Chain.load(tmp_path / "c")
        assert [line.phase for line in progress.status(found)[0]] == list(found.flags)
        return True

    outcomes = Outcomes()
    for path in (tmp_path / "c" / "chain.json", *(tmp_path / "c" / "phase1").iterdir()):
        for what in spoil(path):
            outcomes.of(load, True, what, path)
    outcomes.check(refused=20)


def test_saved_scores_whose_files_were_changed(tmp_path: Path) -> None:
    layer = TargetLayer("model.layers.0.mlp.down_proj", 0, "ffn_down", 4, 8)
    inputs: Any = [SimpleNamespace(layers=[layer], rank=3)]
    scores = RowScores(inputs, "cpu")
    scores.of(layer.name).add_(torch.arange(12.0).view(4, 3))
    saved = SavedScores(tmp_path / "scores")
    saved.save(scores, 7)

    def load() -> tuple[int, list[list[float]]]:
        found = RowScores(inputs, "cpu")
        return saved.load(found), found.of(layer.name).tolist()

    right, outcomes = load(), Outcomes()
    assert right == (7, torch.arange(12.0).view(4, 3).tolist())
    for path in sorted((tmp_path / "scores").iterdir()):
        for what in spoil(path):
            if path == saved.progress and what in (*PLACES, "nothing") and not path.is_file():
                continue  # none are taken for saved; a run's own look (check_written) refuses what is there instead
            outcomes.of(load, right, what, path)
    outcomes.check(refused=20)
    (tmp_path / "scores" / "8_rank_0.safetensors").touch()  # a process was killed as it saved the next ones
    assert load() == right
    for others in (torch.zeros(4, 3, dtype=torch.int32), torch.zeros(3, 3), torch.zeros(4, 2)):
        write_tensors(tmp_path / "scores" / "7_rank_0.safetensors", {layer.name: others})
        with pytest.raises(ArtifactError, match="is not as this program left it"):
            load()


def test_bases_and_answers_of_a_run_that_was_stopped(tmp_path: Path) -> None:
    entry = {"n": 4, "rank": 2, "tokens": 9, "layers": ["a"]}
    tensors = {"U": torch.zeros(4, 2), "S": torch.zeros(2)}
    path = tmp_path / "layer_00_ffn_down_svd.safetensors"
    mutants = [json.dumps(mutant) for mutant in json_mutants(entry)]
    for text in (*mutants, "", "{", "[" * 10_000):
        write_tensors(path, tensors, {"warp_ds.basis": text})
        try:
            found = basis._finished(tmp_path)[path.name]
        except ArtifactError as error:
            assert path.name in str(error) and str(error).isprintable()
        else:
            assert (found["n"], found["rank"]) == (4, 2)
    for data in BYTES:
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=path.name):
            basis._finished(tmp_path)
    log = AnswerLog(tmp_path / "answers.partial.jsonl")
    log.append("refusal", 0, ["one", "two"])
    whole = (tmp_path / "answers.partial.jsonl").read_text()
    for mutant in json_mutants({"suite": "refusal", "number": 2, "answer": "x"}):
        (tmp_path / "answers.partial.jsonl").write_text(whole + json.dumps(mutant) + "\n")
        assert log.done("refusal")[:2] == ["one", "two"]
