"""What Slurm says: rank and address inside a task, a job's state, and requeueing. No accounting (sacct) is needed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence

from warp_ds.errors import SlurmError

RETRY_SECONDS = 20
ALIVE = (
    "PENDING",
    "RUNNING",
    "REQUEUED",
    "COMPLETING",
    "CONFIGURING",
    "SUSPENDED",
    "RESIZING",
    "STOPPED",
    "SIGNALING",
    "STAGE_OUT",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
)


def task_environment(env: Mapping[str, str]) -> dict[str, str] | None:
    """RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT of an srun task; None elsewhere.

    In the batch shell itself SLURM_PROCID is 0 too, so it is no task. What is set already stays as it is.
    """
    if not {"SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"} <= env.keys():
        return None
    tasks = int(env["SLURM_STEP_NUM_TASKS"])
    # Below the ephemeral range; another one for every job, and for every step of it.
    port = 20000 + (int(env["SLURM_JOB_ID"]) + 997 * int(env["SLURM_STEP_ID"])) % 12000
    return {
        "RANK": env["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": "0" if _has_own_gpu(env) else env["SLURM_LOCALID"],
        "MASTER_ADDR": env.get("MASTER_ADDR") or ("127.0.0.1" if tasks == 1 else address_of_first(env)),
        "MASTER_PORT": env.get("MASTER_PORT", str(port)),
    }


def _has_own_gpu(env: Mapping[str, str]) -> bool:
    """Whether the task sees one of the node's GPUs alone, as its device 0 (--gpus-per-task=1, --gpu-bind=single:1)."""
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    return visible != "" and "," not in visible and int(env.get("SLURM_GPUS_ON_NODE", "1")) > 1


def address_of_first(env: Mapping[str, str]) -> str:
    """Where the other ranks reach rank 0's node: its name, or the address Slurm has for it, as names need not resolve."""
    first = first_host(env["SLURM_STEP_NODELIST"])
    try:
        socket.getaddrinfo(first, None)
        return first
    except OSError:
        pass
    try:
        return run("scontrol", "-o", "show", "node", first).split("NodeAddr=", 1)[1].split()[0]
    except (SlurmError, IndexError):
        # No scontrol (in a container): srun ran on the first node, unless it was called on a login node.
        return env.get("SLURM_LAUNCH_NODE_IPADDR", first)


def first_host(nodelist: str) -> str:
    """'n[03-05,9],m1' -> 'n03'."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodelist)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first else nodelist


def job_id(env: Mapping[str, str] = os.environ) -> str | None:
    """The job that this process runs in, as scontrol and scancel take it; an array's task as ARRAY_TASK."""
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else env.get("SLURM_JOB_ID")


def job_fields(job: str) -> dict[str, str]:
    """``scontrol show job`` as a mapping. SlurmError where Slurm does not answer, or knows the job no longer."""
    return dict(word.split("=", 1) for word in run("scontrol", "-o", "show", "job", job).split() if "=" in word)


def job_states(jobs: Sequence[str]) -> dict[str, str]:
    """job (12; 12_0 of an array) -> state, of those that Slurm knows still: from squeue's one call, then scontrol, then
    sacct where there is one.

    SlurmError where squeue does not answer: then nothing is known, and no job may be taken for ended.
    """
    queued = dict(line.split("|") for line in run("squeue", "--me", "--array", "--noheader", "--format=%i|%T").splitlines())
    states = {}
    for job in jobs:
        if job in queued:
            states[job] = queued[job]
            continue
        try:
            states[job] = job_fields(job)["JobState"]
        except (SlurmError, KeyError):
            state = _accounted(job)
            if state:
                states[job] = state
    return states


def _accounted(job: str) -> str | None:
    if shutil.which("sacct") is None:
        return None
    try:
        lines = run("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", "--format=State").splitlines()
    except SlurmError:
        return None
    return lines[-1].split()[0] if lines else None


def cancel(jobs: Sequence[str]) -> None:
    if jobs:
        run("scancel", *jobs)


def requeue(job: str) -> None:
    """Puts this running job back into the queue; Slurm ends its processes. SlurmError where it refuses."""
    run("scontrol", "requeue", job)


def run(*command: str) -> str:
    """A Slurm command's output; SlurmError with its message where it fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RETRY_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} does not answer within {RETRY_SECONDS} s") from error
    except OSError as error:
        raise SlurmError(f"{command[0]}: {error.strerror or error}") from error
    if done.returncode:
        raise SlurmError(f"{command[0]}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout
