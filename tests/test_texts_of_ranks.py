"""A job's texts: one rank of a machine tokenises, all map the result; what is too long is told before a model is loaded."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from phase3_jobs import common, make_model
from ranks import run_ranks

from warp_ds.cluster import processes
from warp_ds.data import tokens
from warp_ds.flags.arguments import BasisArguments, TrainArguments
from warp_ds.phases import texts, training
from warp_ds.phases.texts import read_texts, tokenise
from warp_ds.phases.training import run_training


class NoModel(Exception):
    """In a model's place: it would be loaded now."""


def said(function: Callable[[], Any]) -> str:
    """What a call logs, and how it ends."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep()
    logging.getLogger().addHandler(handler)
    logging.getLogger("warp_ds").setLevel(logging.INFO)
    try:
        lines.append(f"returned {function()}")
    except Exception as error:
        lines.append(f"{type(error).__name__}: {error}")
    logging.getLogger().removeHandler(handler)
    return "\n".join(lines)


def arguments(root: Path, name: str, **more: Any) -> TrainArguments:
    shared = common(root, root / name, utility_data=str(root / f"{name}.jsonl"), utility_samples=0, masks_dir="none")
    return TrainArguments(**shared, train_scope="all", global_batch_size=2, resume="never", **more)


def job(root: Path) -> dict[str, Any]:
    datasets.config.HF_DATASETS_CACHE = str(root / "cache")
    made: list[int] = []
    write, load = tokens._write, training.load_model
    tokens._write = lambda *given: (made.append(processes.rank()), write(*given))[1]  # type: ignore[assignment]

    def no_model(*_: Any) -> Any:
        raise NoModel

    found: dict[str, Any] = {}
    training.load_model = no_model
    for way in ("error", "truncate", "drop"):
        found[way] = said(lambda way=way: run_training(arguments(root, "thousand", long_samples=way)))  # type: ignore[misc]
    found["bad"] = said(lambda: run_training(arguments(root, "tools")))
    training.load_model = load
    found["run"] = said(lambda: run_training(arguments(root, "thousand", long_samples="drop", num_proc=2), {"max_steps": 1}))
    found["made"] = list(made)
    # A launcher whose ranks of a machine do not count from 0.
    os.environ["LOCAL_RANK"] = "5"
    texts = read_texts(str(root / "refusals_fit.jsonl"))
    found["files"] = [file["filename"] for file in tokenise(texts, arguments(root, "thousand")).cache_files]
    found["others"] = len(texts)
    # Two machines that share no cache, whose files of one name differ.
    os.environ["LOCAL_RANK"] = "0"
    os.chdir(root / str(processes.rank()))
    datasets.config.HF_DATASETS_CACHE = "cache"
    found["differ"] = said(lambda: read_texts("texts.jsonl"))
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("job")
    make_model(root)
    rows = [{"prompt": f"How {i}?", "response": f"So {i}."} for i in range(1000)]
    rows[412]["prompt"] = "How do I bake? " * 100
    (root / "thousand.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    tools = [{"messages": turns, "tools": [{"name": "f"}] * (i == 3)} for i in range(4)]
    (root / "tools.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tools))
    for rank in (0, 1):
        (root / str(rank)).mkdir()
        (root / str(rank) / "texts.jsonl").write_text(json.dumps({"prompt": f"of {rank}", "response": "b"}))
    return run_ranks(2, job, root)


def test_one_too_long_in_a_thousand_is_refused_cut_or_dropped_before_a_model_is_loaded(ranks: list[dict[str, Any]]) -> None:
    for of_rank in ranks:
        assert of_rank["error"].splitlines()[-1].startswith("DataError: 1 of 1000 prompts (row 412: ")
        assert "leave no room for a response in --max_length 200" in of_rank["error"]
        assert "1 of 1000 prompts lose their beginning at --max_length 200 (row 412: " in of_rank["truncate"]
        assert "1 of 1000 samples are longer than --max_length 200 and are dropped (row 412: " in of_rank["drop"]
        for way in ("truncate", "drop"):
            assert of_rank[way].splitlines()[-1] == "NoModel: ", "it was said first"


def test_dropped_it_trains_on_the_others(ranks: list[dict[str, Any]]) -> None:
    for of_rank in ranks:
        assert "training: 999 samples" in of_rank["run"] and "returned " in of_rank["run"]


def test_one_rank_tokenises_once_and_its_failure_is_every_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert (first["made"], second["made"]) == ([0, 0], []), "the thousand, whatever becomes of the long one, and the bad ones"
    assert first["bad"].splitlines()[-1].startswith("DataError: row 3: tools need a chat template")
    assert second["bad"].splitlines()[-1].startswith("OtherRankError: tokenising failed on rank 0: DataError: row 3: tools")


def test_ranks_map_the_same_files_however_they_are_counted(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first["files"] == second["files"] and first["files"] and first["others"] == second["others"] == 7


def test_machines_with_other_texts_are_refused(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert second["differ"].startswith("DataError: texts.jsonl holds other texts on ")
    assert "failed on rank 1: DataError: texts.jsonl holds other texts" in first["differ"]


def opened_by_one(root: Path) -> str:
    """Rank 1 cannot open what rank 0 has made, which both see."""
    datasets.config.HF_DATASETS_CACHE = str(root / "cache")
    opened, here = texts.StoredSamples, processes.rank()

    def fails_on_rank_1(directory: Path) -> Any:
        if here == 1:
            raise PermissionError("not for rank 1")
        return opened(directory)

    texts.StoredSamples = fails_on_rank_1  # type: ignore[assignment, misc]
    return said(lambda: len(read_texts(str(root / "some.jsonl"))))


def test_texts_that_one_rank_cannot_open_are_every_ranks_error(tmp_path: Path) -> None:
    (tmp_path / "some.jsonl").write_text(json.dumps({"prompt": "a", "response": "b"}) + "\n")
    zero, one = run_ranks(2, opened_by_one, tmp_path)
    assert "OtherRankError: " in zero and "failed on rank 1: PermissionError: not for rank 1" in zero
    assert one.endswith("PermissionError: not for rank 1")


def test_flags_say_how_texts_are_read(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"q": f"How {i}?", "a": f"So {i}."}) + "\n" for i in range(3)))
    (tmp_path / "no.txt").write_text("No.\n")
    asked = {"prompt_column": "q", "model_name": "m"}
    safety = BasisArguments(
        **asked, safety_data=str(tmp_path / "asked.jsonl"), safety_samples=2, refusal_file=str(tmp_path / "no.txt")
    )
    assert [sample.response for sample in texts.safety_texts(safety)] == ["No.", "No."]
    task = TrainArguments(**asked, response_column="a", utility_data=str(tmp_path / "asked.jsonl"), utility_samples=2)
    assert [(sample.prompt, sample.response) for sample in texts.task_texts(task)] == [("How 0?", "So 0."), ("How 1?", "So 1.")]
