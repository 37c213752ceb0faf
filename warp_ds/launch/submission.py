"""Puts the phases of a chain into the queue, or runs them here; ends them; and what runs in the job."""

from __future__ import annotations

import itertools
import os
import signal
import time
from typing import Any

import submitit
from filelock import FileLock

from warp_ds.cluster import slurm
from warp_ds.errors import ConfigError
from warp_ds.flags.jobs import SubmitArguments
from warp_ds.flags.parsing import parse_phase
from warp_ds.launch.chain import Chain, local_alive
from warp_ds.launch.chain_flags import kind_of, python_words
from warp_ds.registry import PHASES

CPUS_OF_TASKS = '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
"""Since 22.05 srun does not take --cpus-per-task over from sbatch: each rank would be bound to one core."""


def submit(chain: Chain, arguments: SubmitArguments) -> None:
    """Queues (slurm), or runs one after the other (local, debug), every phase that is neither finished nor under way."""
    chain.directory.mkdir(parents=True, exist_ok=True)
    (chain.directory / "submitit").mkdir(mode=0o700, exist_ok=True)  # pickled jobs, which whoever may write there could replace
    # Two submitting programs would queue each phase twice.
    with FileLock(chain.directory / ".submit.lock", timeout=60):
        if (chain.directory / "chain.json").is_file():
            chain.jobs = Chain.load(chain.directory).jobs
        chain.save()
        if chain.cluster == "slurm":
            _submit_slurm(chain, arguments)
        else:
            _submit_here(chain, arguments)


def _submit_slurm(chain: Chain, arguments: SubmitArguments) -> None:
    for phase, lost in _marked_jobs(chain).items():
        if lost not in chain.jobs.get(phase, []):
            chain.jobs.setdefault(phase, []).append(lost)
    states = chain.states()
    before: list[str] = []
    again = False
    for _, together in itertools.groupby(chain.flags, kind_of):
        left = [phase for phase in together if states[phase] != "finished"]
        alive = {phase: job for phase in left if (job := chain.job(phase)) and states[phase] in slurm.ALIVE}
        if again:
            slurm.cancel(list(alive.values()))  # they wait for a job that is dead
            alive = {}
        dead = [phase for phase in left if phase not in alive]
        if dead:
            again = True
            for phase, job in zip(dead, _slurm_jobs(chain, dead, arguments, before), strict=True):
                chain.jobs.setdefault(phase, []).append(job)
            chain.save()
        if left:
            before = [chain.jobs[phase][-1] for phase in left]
    chain.save()


def _slurm_jobs(chain: Chain, phases: list[str], arguments: SubmitArguments, after: list[str]) -> list[str]:
    """Submits one phase as a job, several as a job array; their ids."""
    executor = submitit.AutoExecutor(
        chain.directory / "submitit", cluster="slurm", slurm_python=arguments.python and python_words(arguments.python)
    )
    more: dict[str, Any] = {"requeue": True, "comment": chain.mark(*phases)}
    for option in arguments.slurm:
        name, _, value = option.lstrip("-").partition("=")
        more[name.replace("_", "-")] = value or True
    if after:
        more.update({"dependency": f"afterok:{':'.join(after)}", "kill-on-invalid-dep": "yes"})
    settings: dict[str, Any] = {
        "name": phases[0] if len(phases) == 1 else kind_of(phases[0]),
        "timeout_min": max(1, round(60 * arguments.hours)),
        "nodes": arguments.nodes,
        "tasks_per_node": arguments.ranks_per_node or arguments.gpus_per_node or 1,
        "slurm_signal_delay_s": arguments.warning_seconds,
        "slurm_additional_parameters": more,
        # submitit starts each task with srun: one rank's failure ends all of them.
        "slurm_srun_args": ["--kill-on-bad-exit=1"],
        "slurm_setup": [CPUS_OF_TASKS, *arguments.setup],
        "stderr_to_stdout": True,
        "slurm_partition": arguments.partition,
        "slurm_account": arguments.account,
        "gpus_per_node": arguments.gpus_per_node or None,
        "cpus_per_task": arguments.cpus_per_rank or None,
        "slurm_array_parallelism": arguments.parallel or len(phases),
    }
    executor.update_parameters(**{name: value for name, value in settings.items() if value is not None})
    jobs = executor.map_array(run_phase, phases, [chain.flags[phase] for phase in phases])
    return [str(job.job_id) for job in jobs]


def _marked_jobs(chain: Chain) -> dict[str, str]:
    """phase -> id, of this user's jobs in the queue that have the chain's mark."""
    jobs = {}
    for line in slurm.run("squeue", "--me", "--array", "--noheader", "--format=%i|%k").splitlines():
        job, _, comment = line.partition("|")
        if comment.startswith(chain.mark()):
            phases, (_, _, task) = comment.removeprefix(chain.mark()).split(","), job.partition("_")
            jobs[phases[int(task or 0)]] = job
    return jobs


def _submit_here(chain: Chain, arguments: SubmitArguments) -> None:
    executor = submitit.AutoExecutor(chain.directory / "submitit", cluster=chain.cluster)
    if chain.cluster == "local":
        if arguments.nodes != 1:
            raise ConfigError("--cluster local is this machine alone: leave --nodes out")
        settings: dict[str, Any] = {
            "tasks_per_node": arguments.ranks_per_node or arguments.gpus_per_node or 1,
            "timeout_min": max(1, round(60 * arguments.hours)),
            "stderr_to_stdout": True,
        }
        if arguments.gpus_per_node:
            settings["gpus_per_node"] = arguments.gpus_per_node
        executor.update_parameters(**settings)
    for phase in chain.flags:
        if chain.finished(phase):
            continue
        job = chain.job(phase)
        if chain.cluster == "debug":
            executor.submit(run_directly, phase, chain.flags[phase]).result()
        elif job is None or not local_alive(job):
            submitted = executor.submit(run_phase, phase, chain.flags[phase])
            job = str(submitted.job_id)
            chain.jobs.setdefault(phase, []).append(job)
            chain.save()
        if job is not None:
            while local_alive(job):  # it outlives this program, whose next start waits for it again
                time.sleep(0.5)
        if not chain.finished(phase):
            raise ConfigError(
                f"{phase} did not finish: see {chain.directory / 'logs' / f'{phase}.log'} and "
                f"{chain.directory / 'submitit'}; the same command goes on from there"
            )


def cancel(chain: Chain) -> list[str]:
    """Ends every job of the chain; their ids. What they have saved stays."""
    jobs = [job for phase in chain.flags if not chain.finished(phase) for job in chain.jobs.get(phase, [])]
    if chain.cluster == "slurm":
        states = slurm.job_states(jobs)
        jobs = [job for job in jobs if states.get(job) in slurm.ALIVE]
        slurm.cancel(list(reversed(jobs)))
        return jobs
    jobs = [job for job in jobs if local_alive(job)]
    for number, patience in ((signal.SIGTERM, 60.0), (signal.SIGKILL, 5.0)):
        for job in filter(local_alive, jobs):
            os.kill(int(job), number)
        deadline = time.monotonic() + patience
        while any(map(local_alive, jobs)) and time.monotonic() < deadline:
            time.sleep(0.2)
    return jobs


def run_phase(phase: str, words: list[str]) -> None:
    """What each task of a job runs: the phase, as launch/<phase>.py does it."""
    from warp_ds.launch.launcher import main

    if "SUBMITIT_LOCAL_NTASKS" in os.environ and os.environ.get("SUBMITIT_EXECUTOR") == "local":
        job = submitit.JobEnvironment()
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            del os.environ[name]  # of the job that the submitting program runs in
        os.environ.update(
            RANK=str(job.global_rank),
            LOCAL_RANK=str(job.local_rank),
            WORLD_SIZE=str(job.num_tasks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(20000 + int(job.job_id) % 12000),
        )
    main(kind_of(phase), words)


def run_directly(phase: str, words: list[str]) -> None:
    """The phase in this process, one rank; its errors are raised."""
    from warp_ds.cluster.processes import init_distributed
    from warp_ds.flags.flag import apply_debug

    arguments, passed = parse_phase(PHASES[kind_of(phase)], words)
    apply_debug(arguments)
    init_distributed(arguments.resolved_device, arguments.timeout)
    kind = PHASES[kind_of(phase)]
    kind.function(arguments, *([passed] if kind.trains else []))
