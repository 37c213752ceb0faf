"""slurm/phase*.sbatch, as they are, over two nodes: the results of one process without Slurm, disturbed or not."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chain import ROOT, Reference, assert_as_undisturbed, events, flags
from throwaway import ENDED, ThrowAwaySlurm


def submit(slurm: ThrowAwaySlurm, phase: str, reference: Reference, output: Path, *more: str, options: tuple = ()) -> str:
    """The template unedited; what a user would edit in its head comes from the command line."""
    return slurm.sbatch("--nodes=2", "--gpus-per-node=1", f"--output={output}/%x_%j.out", *options,
                        f"slurm/{phase}.sbatch", *flags(reference.root, output)[phase], *more, cwd=ROOT)


def in_the_middle(slurm: ThrowAwaySlurm, job: str, run: Path, after: float = 0, seconds: float = 600) -> None:
    """Returns once the phase's own progress says that it has begun (and passed ``after``) and is not at its end."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (run / "progress.json").is_file():
            progress = json.loads((run / "progress.json").read_text())
            if after < progress["done"] < progress["total"]:
                return
        assert slurm.job(job)["JobState"] not in ENDED, f"job {job} ended before its middle"
        time.sleep(0.03)
    raise TimeoutError(f"{run}: no progress")


def requeue_from_outside(slurm: ThrowAwaySlurm, job: str) -> None:
    slurm.run("scontrol", "requeue", job)


def warn(slurm: ThrowAwaySlurm, job: str) -> None:
    """What --signal=USR2@N does before a time limit."""
    slurm.run("scancel", "--signal=USR2", job)


@pytest.mark.parametrize(("phase", "disturb", "after"), [
    pytest.param("phase1", requeue_from_outside, 0, marks=pytest.mark.slow),
    ("phase2", warn, 0),
    pytest.param("phase2", requeue_from_outside, 0, marks=pytest.mark.slow),
    ("phase3", requeue_from_outside, 2),
])
def test_disturbed_phase_ends_as_an_undisturbed_one(
    slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path, phase: str, disturb: Callable[[ThrowAwaySlurm, str], None],
    after: float,
) -> None:
    artefacts = {"phase2": ("--basis_dir", f"{reference.runs['phase1']}/basis"),
                 "phase3": ("--masks_dir", f"{reference.runs['phase2']}/masks")}
    job = submit(slurm, phase, reference, tmp_path, *artefacts.get(phase, ()))
    run = tmp_path / f"{phase}_{job}"
    in_the_middle(slurm, job, run, after)
    disturb(slurm, job)
    state = slurm.wait(job)
    assert state == "COMPLETED", (tmp_path / f"{phase}_{job}.out").read_text()
    print(phase, disturb.__name__, assert_as_undisturbed(run, reference), events(run))
    assert events(run)[:2] == ["started", "stopped"] and events(run)[-2:] == ["restarted", "finished"], events(run)
    assert slurm.restarts(job) == 1, "requeued more than once"


@pytest.mark.slow
def test_chain_of_templates(slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path) -> None:
    for phase in ("phase1", "phase2", "phase3"):
        job = submit(slurm, phase, reference, tmp_path)
        assert slurm.wait(job) == "COMPLETED", (tmp_path / f"{phase}_{job}.out").read_text()
        print(phase, assert_as_undisturbed(tmp_path / f"{phase}_{job}", reference))
