"""slurm/phase*.sbatch, as they are, over two nodes: the results of one process without Slurm, disturbed or not."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from chain import ROOT, Reference, assert_as_undisturbed, events, flags
from throwaway import ENDED, ThrowAwaySlurm

from warp_ds.flags.jobs import SubmitArguments
from warp_ds.launch.chain import Chain
from warp_ds.launch.submission import CPUS_OF_TASKS, _slurm_jobs


def submit(slurm: ThrowAwaySlurm, phase: str, reference: Reference, output: Path, *more: str, options: tuple = ()) -> str:
    """The template unedited; what a user would edit in its head comes from the command line."""
    return slurm.sbatch(
        "--nodes=2",
        "--gpus-per-node=1",
        f"--output={output}/%x_%j.out",
        *options,
        f"slurm/{phase}.sbatch",
        *flags(reference.root, output)[phase],
        *more,
        cwd=ROOT,
    )


def python_of(root: Path, program: Path) -> None:
    """A Python that runs ``program`` in whatever's place, where the templates look for one under WARP_DS_ROOT."""
    shim = root / ".venv" / "bin" / "python"
    shim.parent.mkdir(parents=True, exist_ok=True)
    shim.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n')
    shim.chmod(0o755)


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


@pytest.mark.parametrize(
    ("phase", "disturb", "after"),
    [
        pytest.param("phase1", requeue_from_outside, 0, marks=pytest.mark.slow),
        ("phase2", warn, 0),
        pytest.param("phase2", requeue_from_outside, 0, marks=pytest.mark.slow),
        ("phase3", requeue_from_outside, 2),
    ],
)
def test_disturbed_phase_ends_as_an_undisturbed_one(
    slurm: ThrowAwaySlurm,
    reference: Reference,
    tmp_path: Path,
    phase: str,
    disturb: Callable[[ThrowAwaySlurm, str], None],
    after: float,
) -> None:
    artefacts = {
        "phase2": ("--basis_dir", f"{reference.runs['phase1']}/basis"),
        "phase3": ("--masks_dir", f"{reference.runs['phase2']}/masks"),
    }
    job = submit(slurm, phase, reference, tmp_path, *artefacts.get(phase, ()))
    run = tmp_path / f"{phase}_{job}"
    in_the_middle(slurm, job, run, after)
    disturb(slurm, job)
    state = slurm.wait(job)
    assert state == "COMPLETED", (tmp_path / f"{phase}_{job}.out").read_text()
    print(phase, disturb.__name__, assert_as_undisturbed(run, reference), events(run))
    assert events(run)[:2] == ["started", "stopped"] and events(run)[-2:] == ["restarted", "finished"], events(run)
    assert slurm.restarts(job) == 1, "requeued more than once"


#: What a task is given: of the step that it is in, cores a task.
SAYS_ITS_CORES = """
import os, subprocess
step = f"{os.environ['SLURM_JOB_ID']}.{os.environ['SLURM_STEP_ID']}"
found = dict(word.split("=", 1) for word in subprocess.run(
    ["scontrol", "-o", "show", "step", step], capture_output=True, text=True, check=True).stdout.split() if "=" in word)
print("cores of this step:", found["CPUs"], "asked of srun:", os.environ.get("SRUN_CPUS_PER_TASK"))
"""


@pytest.mark.parametrize("cores", [3, None])
def test_cores_of_a_task_reach_srun(slurm: ThrowAwaySlurm, tmp_path: Path, cores: int | None) -> None:
    """A template, with a program in the phase's place that says what it was given; the others have the same line."""
    templates = {path.stem: path.read_text() for path in (ROOT / "slurm").glob("*.sbatch")}
    assert len(templates) == 5 and all(CPUS_OF_TASKS in text.splitlines() for text in templates.values())
    (tmp_path / "says.py").write_text(SAYS_ITS_CORES)
    python_of(tmp_path, tmp_path / "says.py")
    asked = () if cores is None else (f"--cpus-per-task={cores}",)
    job = slurm.sbatch(
        "--nodes=1",
        "--gpus-per-node=1",
        f"--output={tmp_path}/%x.out",
        *asked,
        "slurm/phase1.sbatch",
        cwd=ROOT,
        WARP_DS_ROOT=str(tmp_path),
    )
    state, text = slurm.wait(job), (tmp_path / "phase1.out").read_text()
    assert state == "COMPLETED" and f"asked of srun: {cores}" in text, text
    if cores is not None:
        assert f"cores of this step: {cores}" in text, text


def test_cores_of_a_task_reach_the_srun_of_a_chain(
    slurm: ThrowAwaySlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.environment[name])
    (tmp_path / "says.py").write_text(SAYS_ITS_CORES)
    chain = Chain(tmp_path / "chain", "slurm", {"phase1": []})
    chain.directory.mkdir()
    asked = SubmitArguments(cpus_per_rank=3, ranks_per_node=1, hours=0.1, python=f"{sys.executable} {tmp_path / 'says.py'}")
    (job,) = _slurm_jobs(chain, ["phase1"], asked, [])
    slurm.wait(job)
    text = next((chain.directory / "submitit").glob(f"{job}*.out")).read_text()
    assert "cores of this step: 3 asked of srun: 3" in text, text


@pytest.mark.slow
def test_chain_of_templates(slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path) -> None:
    for phase in ("phase1", "phase2", "phase3"):
        job = submit(slurm, phase, reference, tmp_path)
        assert slurm.wait(job) == "COMPLETED", (tmp_path / f"{phase}_{job}.out").read_text()
        print(phase, assert_as_undisturbed(tmp_path / f"{phase}_{job}", reference))
