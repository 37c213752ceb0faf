"""A signal to one rank: all leave together with what they have, and the same command goes on from there."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from evaluation_jobs import evaluate, make_models
from ranks import run_ranks

from warp_ds.cluster import preemption, processes
from warp_ds.evaluation import generate
from warp_ds.phases.trainer import MetricsFile


def left_by(run: Any) -> bool:
    try:
        run()
        return False
    except preemption.Preempted:
        return True
    finally:
        preemption._asked = None


def leave_and_go_on(root: Path) -> dict[str, Any]:
    from phase3_jobs import phase3

    preemption.watch()
    pad, calls = generate.pad_batch, [0]

    def asking(*arguments: Any, **named: Any) -> Any:
        calls[0] += named.get("side") == "left"
        if calls[0] == 1 and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        return pad(*arguments, **named)

    words = {"batch_size": 2, "suite": "refusal"}
    generate.pad_batch = asking
    found = {"evaluation left": left_by(lambda: evaluate(root, root / "e", "moved", **words))}
    generate.pad_batch = pad
    found["kept"] = [p.name for p in (root / "e").glob("*/*partial*")]
    found["answers"] = len(evaluate(root, root / "e", "moved", **words)["answers"])

    def at_last_step(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    on_step_end = MetricsFile.on_step_end
    MetricsFile.on_step_end = at_last_step  # type: ignore[method-assign]
    train = lambda: phase3(root, root, root / "t", masks_dir="none", utility_data=str(root / "utility.jsonl"))  # noqa: E731
    found["training left"] = left_by(train)
    MetricsFile.on_step_end = on_step_end  # type: ignore[method-assign]
    found["exported"] = (train() / "model" / "config.json").is_file()
    found["runs"] = len(list((root / "t").glob("phase3_2*")))
    preemption.unwatch()
    return found


def test_evaluation_and_the_last_step(tmp_path: Path) -> None:
    make_models(tmp_path)
    found = run_ranks(2, leave_and_go_on, tmp_path)[0]
    assert found == {
        "evaluation left": True,
        "kept": ["reference_answers.partial.jsonl"],
        "answers": 7,
        "training left": True,
        "exported": True,
        "runs": 1,
    }


RUNNING = {"JobState": "RUNNING", "Reason": "None"}


@pytest.mark.parametrize(
    ("job", "cancelled"),
    [
        (RUNNING, False),
        ({**RUNNING, "JobState": "COMPLETING", "PreemptTime": "None"}, True),
        ({**RUNNING, "JobState": "COMPLETING"}, True),
        ({**RUNNING, "JobState": "COMPLETING", "Reason": "TimeLimit", "PreemptTime": "None"}, False),
        ({**RUNNING, "JobState": "COMPLETING", "PreemptTime": "2026-11-24T20:30:32"}, False),
        ({**RUNNING, "JobState": "CANCELLED"}, True),
    ],
)
def test_a_cancelled_job_is_told_from_one_that_goes_on(job: Mapping[str, str], cancelled: bool) -> None:
    """As a job saw itself on Slurm 22.05 after TERM: scancel, time limit, PreemptMode=CANCEL."""
    assert preemption.being_cancelled(job) is cancelled
