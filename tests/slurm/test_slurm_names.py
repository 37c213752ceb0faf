"""Rank and address from Slurm's variables; the chain's flags; no cluster needed, but scontrol checks where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
from throwaway import ThrowAwaySlurm

from warp_ds.cluster.slurm import ALIVE, cancel, first_host, job_states, task_environment
from warp_ds.errors import ConfigError
from warp_ds.flags.jobs import SubmitArguments
from warp_ds.flags.parsing import FlagParser
from warp_ds.launch.chain import Chain, find_chain
from warp_ds.launch.chain_flags import parse_phases, phase_flags
from warp_ds.launch.submission import _marked_jobs

TASK = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "MASTER_ADDR": "10.0.0.1",
}


def test_first_host_is_scontrols(slurm: ThrowAwaySlurm) -> None:
    for nodelist in ("n[1-2]", "n1", "gpu[03-05,9],cpu1", "a,b", "rack[2-3]node[07-09]", "n[007]"):
        assert first_host(nodelist) == slurm.run("scontrol", "show", "hostnames", nodelist).split()[0]


def test_tasks_of_an_array_are_told_apart(slurm: ThrowAwaySlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that wait too, which squeue shows as one line, 12_[1-2%1]."""
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, slurm.environment[name])
    chain = Chain(tmp_path, "slurm", {})
    phases = [f"compare_seed{seed}" for seed in (1, 2, 3)]
    job = slurm.sbatch("--array=0-2%1", f"--comment={chain.mark(*phases)}", "--output=/dev/null", "--wrap", "sleep 600")
    tasks = [f"{job}_{task}" for task in range(3)]
    try:
        slurm.wait(tasks[0], "RUNNING")
        assert _marked_jobs(chain) == dict(zip(phases, tasks, strict=True))
        assert job_states(tasks) == dict(zip(tasks, ["RUNNING", "PENDING", "PENDING"], strict=True))
        cancel(tasks)
        # Without accounting Slurm does not know tasks any more that were cancelled before they began.
        assert not {job_states(tasks[1:]).get(task) for task in tasks[1:]} & set(ALIVE)
    finally:
        slurm.run("scancel", job)


def test_task_environment() -> None:
    found = task_environment(TASK)
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "20345"}
    # The batch shell has SLURM_PROCID=0, but is no task.
    assert task_environment({k: v for k, v in TASK.items() if k != "SLURM_STEP_ID"}) is None
    assert task_environment({}) is None
    ports = {
        task_environment({**TASK, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"]  # type: ignore[index]
        for job in range(100, 110)
        for step in range(3)
    }
    assert len(ports) == 30 and all(20000 <= int(port) < 32000 for port in ports)


def test_local_rank_is_the_device_that_the_task_sees() -> None:
    """As Slurm 22.05 sets these variables for the second of two tasks of a node."""
    for visible, on_node, device in (
        ("0,1", "2", "1"),  # --gpus-per-node=2: both tasks see both
        ("1", "2", "0"),  # --gpus-per-task=1, --gpu-bind=single:1: its own one, whatever its number
        ("0", "2", "0"),  # the same where cgroups hide the other
        ("0", "1", "1"),  # one GPU for two tasks: the doctor refuses
        ("", "2", "1"),
    ):
        found = task_environment({**TASK, "CUDA_VISIBLE_DEVICES": visible, "SLURM_GPUS_ON_NODE": on_node})
        assert found is not None and found["LOCAL_RANK"] == device, (visible, on_node)


def test_flags_go_to_the_phases_that_have_them() -> None:
    words = ["--model_name", "m", "--keep_ratio", "0.2", "--phase3.batch_size", "1", "--lr_scheduler_type=cosine", "--debug"]
    found = phase_flags(parse_phases("3,evaluate,0,2"), words, Path("r"))
    where = ["--output_dir", "r", "--log_dir", "r/logs", "--run_name"]
    assert list(found) == ["phase0", "phase2", "phase3", "evaluate"]
    assert found["phase0"] == ["--model_name", "m", "--lr_scheduler_type", "cosine", "--debug", *where, "phase0"]
    assert found["phase2"] == [
        "--model_name",
        "m",
        "--keep_ratio",
        "0.2",
        "--debug",
        *where,
        "phase2",
        "--model_name",
        "r/phase0/model",
    ]
    assert found["phase3"][:6] == ["--model_name", "m", "--batch_size", "1", "--lr_scheduler_type", "cosine"]
    assert found["evaluate"][-2:] == ["--model_name", "r/phase3/model"]
    for wrong in (["--no_such_flag", "1"], ["--phase1.batch_size", "1"], ["--log_dir", "x"], ["word"]):
        with pytest.raises(ConfigError):
            phase_flags(["phase2"], wrong, Path("r"))
    with pytest.raises(ConfigError):
        parse_phases("4")


def test_a_comparison_is_a_run_a_seed() -> None:
    words = [
        "--model_name",
        "m",
        "--learning_rate",
        "1e-4",
        "--learning_rates",
        "1e-5",
        "--seeds",
        "3,1",
        "--epochs",
        "1",
        "--lr_scheduler_type",
        "cosine",
    ]
    found = phase_flags(parse_phases("compare,0"), words, Path("r"))
    assert list(found) == ["phase0", "compare_seed1", "compare_seed3"]
    # Phase 0's rate is not passed on to the trainings of the comparison, whose rates are its grid.
    assert found["phase0"][2:6] == ["--learning_rate", "1e-4", "--epochs", "1"]
    assert found["compare_seed3"] == [
        "--model_name",
        "m",
        "--learning_rates",
        "1e-5",
        "--seeds",
        "3,1",
        "--epochs",
        "1",
        "--lr_scheduler_type",
        "cosine",
        "--seeds",
        "3",
        "--output_dir",
        "r",
        "--log_dir",
        "r/logs",
        "--run_name",
        "compare_seed3",
        "--model_name",
        "r/phase0/model",
    ]
    assert list(phase_flags(["compare"], [], Path("r"))) == ["compare_seed42"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "1,two"], "no comma-separated list of numbers"),
        (["--seeds", "1,2.5"], "whole numbers"),
        (["--seeds", "1,1"], "each value once"),
        (["--seed_list", "1"], "unknown flag --seed_list"),
        (["--learning_rate", "1e-5"], "use --learning_rates"),
        (["--arms", "before,rotate"], "--arms rotate: choose from"),
        (["--arms", "before", "--arm_rates", "full=1e-5"], "for arms of --arms"),
        (["--parallel", "-1"], "--parallel is a number of seeds"),
    ],
)
def test_wrong_flags_of_a_comparison_queue_nothing(tmp_path: Path, words: list[str], said: str) -> None:
    parser = FlagParser(SubmitArguments)
    arguments, rest = parser.parse_args_into_dataclasses(
        ["--phases", "compare", "--output_dir", str(tmp_path), *words], look_for_args_file=False, return_remaining_strings=True
    )
    with pytest.raises(ConfigError, match=said):
        find_chain(arguments, rest)
