"""What goes wrong on a cluster, at the template of phase 3: what the user sees, and that the same command finishes the job."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from chain import ROOT, Reference, assert_as_undisturbed, events, flags
from test_slurm_templates import in_the_middle, python_of
from throwaway import ENDED, ThrowAwaySlurm

pytestmark = pytest.mark.slow
FAULTY = Path(__file__).parent / "faulty" / "python.py"


def phase3(
    slurm: ThrowAwaySlurm, reference: Reference, output: Path, *more: str, fault: str = "", options: tuple = (), nodes: int = 2
) -> str:
    """Phase 3 on the undisturbed masks, saving every second step."""
    words = [
        *flags(reference.root, output)["phase3"],
        "--masks_dir",
        f"{reference.runs['phase2']}/masks",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        *more,
    ]
    environment = {"WARP_DS_ROOT": str(output / "root"), "FAULT": fault} if fault else {}
    if fault:
        python_of(output / "root", FAULTY)
    return slurm.sbatch(
        f"--nodes={nodes}",
        "--gpus-per-node=1",
        f"--output={output}/%x_%j.out",
        *options,
        "slurm/phase3.sbatch",
        *words,
        cwd=ROOT,
        **environment,
    )


def printed(output: Path, job: str) -> str:
    return (output / f"phase3_{job}.out").read_text()


def test_a_rank_that_raises_hangs_or_dies(slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path) -> None:
    first = phase3(slurm, reference, tmp_path, fault="raise")
    run = tmp_path / f"phase3_{first}"
    for fault, job, seen in (
        ("raise", first, "ArithmeticError: the fault that rank 1 was given"),
        ("hang", None, "This rank waited --timeout 15 s for another one"),
        ("die", None, "Another rank ended without a word"),
    ):
        begun = time.monotonic()
        job = job or phase3(slurm, reference, tmp_path, "--timeout", "15", fault=fault)
        assert slurm.wait(job) in ("FAILED", "NODE_FAIL"), fault
        print(fault, f"ended after {time.monotonic() - begun:.0f} s in all;", "last lines of the job's output:")
        print("\n".join(printed(tmp_path, job).splitlines()[-6:]))
        assert seen in printed(tmp_path, job), printed(tmp_path, job)
        if fault == "raise":
            log = (tmp_path / "logs" / f"{run.name}.log").read_text().rstrip()
            assert log.endswith(seen), log
            assert printed(tmp_path, job).count("Traceback (most recent call last)") == 1
    # The same command again goes on in the same run.
    last = phase3(slurm, reference, tmp_path, "--timeout", "15")
    assert slurm.wait(last) == "COMPLETED", printed(tmp_path, last)
    print(events(run), assert_as_undisturbed(run, reference))
    assert events(run)[-2:] == ["restarted", "finished"] and not (tmp_path / f"phase3_{last}").exists()


def test_one_run_directory_two_jobs(slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path) -> None:
    name, run = ("--run_name", "mine"), tmp_path / "mine"
    first = phase3(slurm, reference, tmp_path, *name, fault="slow:3", nodes=1)
    in_the_middle(slurm, first, run)
    second = phase3(slurm, reference, tmp_path, *name, nodes=1)
    assert slurm.wait(second) == "FAILED"
    print(printed(tmp_path, second).splitlines()[-5:])
    assert f"in use by process" in printed(tmp_path, second) and f"(Slurm job {first})" in printed(tmp_path, second)  # noqa: F541
    slurm.run("scancel", first)
    assert slurm.wait(first) == "CANCELLED" and slurm.restarts(first) == 0
    third = phase3(slurm, reference, tmp_path, *name, nodes=1)
    assert slurm.wait(third) == "COMPLETED", printed(tmp_path, third)
    print(events(run), assert_as_undisturbed(run, reference))
    assert events(run) == ["started", "stopped", "left", "restarted", "finished"]


def test_time_limit_in_the_middle(slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path) -> None:
    # Twelve steps of at least 14 s do not fit into two minutes.
    job = phase3(slurm, reference, tmp_path, fault="slow:14", options=("--time=2", "--signal=USR2@20"))
    run = tmp_path / f"phase3_{job}"
    state = slurm.wait(job)
    print(state, events(run), [json.loads(x).get("reason") for x in (run / "state.jsonl").read_text().splitlines()])
    assert state == "COMPLETED", printed(tmp_path, job)
    print(assert_as_undisturbed(run, reference), slurm.restarts(job), "restarts")
    assert events(run).count("restarted") == slurm.restarts(job) > 0


def test_no_more_requeues_than_asked(slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path) -> None:
    job = phase3(slurm, reference, tmp_path, "--max_requeues", "0", fault="slow:2")
    run = tmp_path / f"phase3_{job}"
    in_the_middle(slurm, job, run)
    slurm.run("scancel", "--signal=USR2", job)
    assert slurm.wait(job) == "FAILED"
    assert "--max_requeues 0" in printed(tmp_path, job)
    assert events(run) == ["started", "stopped", "left"]


def test_lost_node(slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path) -> None:
    """kill -9 of n2's slurmd: Slurm requeues the job when it counts the node as down, and it goes on when there are two."""
    job = phase3(slurm, reference, tmp_path, fault="slow:4")
    run, begun = tmp_path / f"phase3_{job}", time.monotonic()
    in_the_middle(slurm, job, run, after=2)
    slurm.kill_node("n2")
    try:
        deadline = time.monotonic() + 300
        while slurm.job(job)["JobState"] == "RUNNING" and time.monotonic() < deadline:
            time.sleep(0.5)
        print(f"{slurm.job(job)['JobState']} {time.monotonic() - begun:.0f} s after the kill, n2 {slurm.node_state('n2')}")
    finally:
        slurm.start_node("n2")
    state = slurm.wait(job)
    if state in ENDED and state != "COMPLETED":
        print("ended as", state, ": the same command again")
        job = phase3(slurm, reference, tmp_path)
        state = slurm.wait(job)
    assert state == "COMPLETED", printed(tmp_path, job)
    print(events(run), assert_as_undisturbed(run, reference))


def test_job_array(slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path) -> None:
    job = slurm.sbatch(
        "--array=0-1",
        "--nodes=1",
        "--gpus-per-node=1",
        f"--output={tmp_path}/%x_%A_%a.out",
        "slurm/phase1.sbatch",
        *flags(reference.root, tmp_path)["phase1"],
        cwd=ROOT,
    )
    for task in (0, 1):
        state = slurm.wait(f"{job}_{task}")
        assert state == "COMPLETED", (tmp_path / f"phase1_{job}_{task}.out").read_text()
        print(assert_as_undisturbed(tmp_path / f"phase1_{job}_{task}", reference))
