"""launch/submit.py: the chain over two nodes by submitit, its table, a requeue from outside, failures, cancelling."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chain import ROOT, Reference, assert_as_undisturbed, events, flags, make_inputs, words_of
from test_slurm_templates import in_the_middle, requeue_from_outside
from throwaway import PLAIN_GLOO, ThrowAwaySlurm

from warp_ds.report.runs import comparisons, find_runs

FAULTY_PYTHON = Path(__file__).parent / "faulty" / "python.py"
OWN = ("--output_dir", "--log_dir")


def phase_words(reference: Reference, output: Path, phases: tuple[str, ...] = ("phase1", "phase2", "phase3")) -> list[str]:
    """The chain's flags in launch/submit.py's spelling: each phase's own."""
    words = []
    for phase in phases:
        given = flags(reference.root, output)[phase]
        for name, value in zip(given[::2], given[1::2], strict=True):
            if name not in OWN:
                words += [f"--{phase}.{name[2:]}", value]
    return words


def launch_submit(environment: dict[str, str], *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "launch/submit.py", *words],
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
        env={**environment, "COLUMNS": "200"},
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def jobs_of(table: str) -> dict[str, str]:
    """phase -> job id, from the table that was printed."""
    return dict(re.findall(r"│ (phase\d|evaluate|compare_seed\d+) +│ (\d+(?:_\d+)?)", table))


def forget_jobs(run: Path) -> None:
    """As where the submitting program was killed between queueing and writing: what it queues for is written before."""
    kept = json.loads((run / "chain.json").read_text())
    (run / "chain.json").write_text(json.dumps({**kept, "jobs": {}}))


def run_chain(slurm: ThrowAwaySlurm, reference: Reference, output: Path, disturb: dict) -> Path:
    """Submits the chain and disturbs phases in their middle; prints the table at each stage."""
    words = [
        *words_of(phases="1,2,3", nodes="2", gpus_per_node="1", hours="0.2", output_dir=str(output), run_name="chain"),
        *phase_words(reference, output),
    ]
    submitted = launch_submit(slurm.environment, *words)
    print(submitted.stdout)
    jobs, run = jobs_of(submitted.stdout), output / "chain"
    assert set(jobs) == {"phase1", "phase2", "phase3"}
    for phase, (how, after) in disturb.items():
        in_the_middle(slurm, jobs[phase], run / phase, after)
        how(slurm, jobs[phase])
        print(launch_submit(slurm.environment, "--status", str(run)).stdout)
    for phase, job in jobs.items():
        state = slurm.wait(job)
        assert state == "COMPLETED", (phase, state, launch_submit(slurm.environment, "--status", str(run)).stdout)
        print(phase, assert_as_undisturbed(run / phase, reference), events(run / phase))
        assert slurm.restarts(job) == int(phase in disturb)
    table = launch_submit(slurm.environment, "--status", str(run)).stdout
    print(table)
    assert table.count("finished") >= 3
    return run


@pytest.mark.slow
def test_chain_requeued_in_every_phase(slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path) -> None:
    run_chain(
        slurm,
        reference,
        tmp_path,
        {"phase1": (requeue_from_outside, 0), "phase2": (requeue_from_outside, 0), "phase3": (requeue_from_outside, 2)},
    )


def test_a_failed_phase_ends_the_chain(slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path) -> None:
    words = [
        *words_of(phases="2,3", ranks_per_node="2", hours="0.2", output_dir=str(tmp_path), run_name="chain"),
        *phase_words(reference, tmp_path, ("phase2", "phase3")),
    ]
    jobs = jobs_of(launch_submit(slurm.environment, *words).stdout)
    assert slurm.wait(jobs["phase2"]) == "FAILED"  # no basis
    assert slurm.wait(jobs["phase3"]) == "CANCELLED"
    shown = launch_submit(slurm.environment, "--status", str(tmp_path / "chain"), check=False)
    print(shown.stdout)
    assert shown.returncode == 1 and "FAILED" in shown.stdout and "no finished phase1" in shown.stdout
    # A queue that does not answer kills nothing, and nothing is queued twice.
    silent = {**slurm.environment, "SLURM_CONF": str(tmp_path / "nowhere.conf")}
    shown = launch_submit(silent, "--status", str(tmp_path / "chain"))
    print(shown.stdout)
    assert "unknown" in shown.stdout
    assert launch_submit(silent, *words, check=False).returncode == 2


def test_cancelled_chain(slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path) -> None:
    """A running job and one that waits for it; the first would take days, so that no machine is too slow to cancel it."""
    earlier = {
        name: str(Path(reference.runs[phase]) / folder)
        for name, phase, folder in (("basis_dir", "phase1", "basis"), ("masks_dir", "phase2", "masks"))
    }
    words = [
        *words_of(phases="3,evaluate", hours="0.2", output_dir=str(tmp_path), run_name="chain"),
        *phase_words(reference, tmp_path, ("phase3",)),
        "--phase3.epochs",
        "1000000",
        *(word for name, path in earlier.items() for word in (f"--phase3.{name}", path)),
        "--evaluate.suite",
        "refusal",
        "--evaluate.harmful_data",
        str(reference.root / "refusals_fit.jsonl"),
    ]
    slurm.run("scontrol", "update", "partitionname=main", "state=down")  # nothing begins before it is let
    try:
        jobs = jobs_of(launch_submit(slurm.environment, *words).stdout)
        assert set(jobs) == {"phase3", "evaluate"}
        # The same command again finds its jobs, even those whose numbers were never written down.
        forget_jobs(tmp_path / "chain")
        assert jobs_of(launch_submit(slurm.environment, *words).stdout) == jobs
    finally:
        slurm.run("scontrol", "update", "partitionname=main", "state=up")
    assert slurm.wait(jobs["phase3"], "RUNNING") == "RUNNING"
    print(launch_submit(slurm.environment, "--cancel", str(tmp_path / "chain")).stdout)
    assert {slurm.wait(job) for job in jobs.values()} == {"CANCELLED"}


def test_comparison_as_a_job_array(slurm: ThrowAwaySlurm, tmp_path: Path) -> None:
    """A task a seed: found again, one requeued in its middle, one cancelled and queued again alone; one report."""
    data, run = make_inputs(tmp_path, depth=2), tmp_path / "chain"
    safety, task = str(data / "refusals_fit.jsonl"), str(data / "utility_train.jsonl")
    words = [
        *words_of(
            phases="compare",
            seeds="1,2",
            parallel="1",
            hours="0.2",
            output_dir=str(tmp_path),
            run_name="chain",
            model_name=str(data / "m"),
            dtype="float32",
            device="cpu",
            arms="before,layers",
            learning_rates="1e-3",
            epochs="1",
            max_length="120",
            safety_data=safety,
            safety_samples="4",
            utility_data=task,
            utility_samples="8",
            utility_heldout=task,
            heldout_samples="2",
            harmful_data=safety,
            harmful_samples="2",
            max_new_tokens="2",
        )
    ]
    jobs = jobs_of(launch_submit(slurm.environment, *words).stdout)
    array = jobs["compare_seed1"].partition("_")[0]
    assert jobs == {"compare_seed1": f"{array}_0", "compare_seed2": f"{array}_1"}
    in_the_middle(slurm, jobs["compare_seed1"], run / "compare_seed1")
    slurm.run("scontrol", "suspend", jobs["compare_seed1"])  # however slow this machine is, it does not end meanwhile
    # The same command finds its tasks, the begun and the waiting one, though their numbers were never written down.
    forget_jobs(run)
    found = launch_submit(slurm.environment, *words).stdout
    assert jobs_of(found) == jobs and "SUSPENDED" in found, found
    slurm.run("scontrol", "resume", jobs["compare_seed1"])
    slurm.run("scancel", jobs["compare_seed2"])
    requeue_from_outside(slurm, jobs["compare_seed1"])
    gone_on = jobs_of(launch_submit(slurm.environment, *words).stdout)
    assert gone_on["compare_seed1"] == jobs["compare_seed1"] and gone_on["compare_seed2"].isdigit(), gone_on
    jobs = gone_on
    for seed, job in jobs.items():
        assert slurm.wait(job) == "COMPLETED", (run / "logs" / f"{seed}.log").read_text()
    assert [slurm.restarts(job) for job in jobs.values()] == [1, 0]
    happened = events(run / "compare_seed1")
    assert happened[:2] == ["started", "stopped"] and happened[-2:] == ["restarted", "finished"], happened
    again = launch_submit(slurm.environment, *words).stdout
    shown = launch_submit(slurm.environment, "--status", str(run)).stdout
    print(shown)
    for table in (again, shown):
        assert jobs_of(table) == jobs and table.count("finished") >= 2 and table.count("2 of 2 points") == 2, table
    assert slurm.run("squeue", "--noheader") == ""
    ((sources, report),) = comparisons(find_runs(sorted(run.glob("compare_seed*"))))
    assert len(sources) == 2 and f"warp-ds report {run}/compare_seed*" in shown
    assert {(point.arm, point.seed) for point in report.points} >= {("layers", 1), ("layers", 2)}


@pytest.mark.slow
def test_time_limit_in_the_middle(slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path) -> None:
    # Twelve steps of at least 14 s do not fit into two minutes.
    words = [
        *words_of(
            phases="3",
            nodes="2",
            gpus_per_node="1",
            hours="0.034",
            warning_seconds="20",
            output_dir=str(tmp_path),
            run_name="chain",
            python=f"{sys.executable} {FAULTY_PYTHON}",
        ),
        *phase_words(reference, tmp_path, ("phase3",)),
        "--masks_dir",
        f"{reference.runs['phase2']}/masks",
    ]
    job = jobs_of(launch_submit({**slurm.environment, "FAULT": "slow:14"}, *words).stdout)["phase3"]
    run = tmp_path / "chain" / "phase3"
    state = slurm.wait(job)
    print(state, slurm.restarts(job), "restarts", events(run))
    print(launch_submit(slurm.environment, "--status", str(run.parent), check=False).stdout)
    assert state == "COMPLETED"
    print(assert_as_undisturbed(run, reference))
    assert events(run).count("restarted") == slurm.restarts(job) > 0


@pytest.mark.slow
def test_chain_from_safety_tuning_to_evaluation(slurm: ThrowAwaySlurm, reference: Reference, tmp_path: Path) -> None:
    """Each phase works on what the one before it made: phase 0's model, its basis, its masks, phase 3's model."""
    data = reference.root
    words = [
        *words_of(phases="0,1,2,3,evaluate", ranks_per_node="2", hours="0.2", output_dir=str(tmp_path), run_name="chain"),
        *phase_words(reference, tmp_path),
        "--phase0.model_name",
        str(data / "m"),
        "--phase0.safety_data",
        str(data / "refusals_fit.jsonl"),
        "--phase0.safety_samples",
        "8",
        "--phase0.global_batch_size",
        "8",
        "--phase0.epochs",
        "1",
        "--phase0.dtype",
        "float32",
        "--phase0.device",
        "cpu",
        "--phase0.max_length",
        "120",
        "--evaluate.suite",
        "refusal,loss",
        "--evaluate.harmful_data",
        str(data / "refusals_fit.jsonl"),
        "--evaluate.harmful_samples",
        "4",
        "--evaluate.utility_data",
        str(data / "utility_train.jsonl"),
        "--evaluate.max_new_tokens",
        "4",
        "--evaluate.max_length",
        "120",
        "--evaluate.dtype",
        "float32",
        "--evaluate.device",
        "cpu",
    ]
    jobs = jobs_of(launch_submit(slurm.environment, *words).stdout)
    run = tmp_path / "chain"
    for job in jobs.values():
        assert slurm.wait(job) == "COMPLETED", launch_submit(slurm.environment, "--status", str(run), check=False).stdout
    print(launch_submit(slurm.environment, "--status", str(run)).stdout)
    for phase, model in {"phase1": "phase0", "phase2": "phase0", "phase3": "phase0", "evaluate": "phase3"}.items():
        assert json.loads((run / phase / "config.json").read_text())["settings"]["model_name"] == str(run / model / "model")
    assert "refusal_rate" in json.loads((run / "evaluate" / "metrics.json").read_text())


@pytest.mark.slow
def test_local_and_debug(reference: Reference, tmp_path: Path) -> None:
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **PLAIN_GLOO}
    for cluster, ranks in (("local", "2"), ("debug", "1")):
        words = [
            *words_of(phases="1,2,3", cluster=cluster, ranks_per_node=ranks, output_dir=str(tmp_path), run_name=cluster),
            *phase_words(reference, tmp_path),
        ]
        if cluster == "local":
            # kill -9 of the submitting program: its job lives on, and the same command goes on from it.
            first = subprocess.Popen([sys.executable, "launch/submit.py", *words], cwd=ROOT, env=environment)
            deadline = time.monotonic() + 600
            while not (tmp_path / cluster / "phase1" / "config.json").is_file() and time.monotonic() < deadline:
                time.sleep(0.2)
            first.kill()
            first.wait()
        print(launch_submit(environment, *words).stdout)
        for phase in ("phase1", "phase2", "phase3"):
            print(phase, assert_as_undisturbed(tmp_path / cluster / phase, reference))
            assert events(tmp_path / cluster / phase) == ["started", "finished"]
