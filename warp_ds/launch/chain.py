"""A chain of phases in one run directory, queued by submitit: each phase's job starts when the one before has finished.
A comparison is a run a seed, compare_seed1 and so on, which are one job array.

    checkpoints/chain_20260101_120000/
        chain.json                  what was asked for, and every job that was submitted for it
        phase1/ phase2/ phase3/ …   the phases' own run directories, with state.jsonl and progress.json
        logs/                       rank 0's log of each phase, the other ranks' beside it
        submitit/                   submitit's own files: scripts, and each task's output
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import re
import shlex
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

import submitit
from filelock import FileLock
from transformers import TrainingArguments

from warp_ds import errors
from warp_ds.cluster import slurm
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.flags.checks import check_run_name, refuse_control_characters, refuse_secrets
from warp_ds.flags.comparison import CompareArguments
from warp_ds.flags.flag import flag
from warp_ds.flags.parsing import grouped, names_of, parse_phase, refuse_words, unknown_flags
from warp_ds.phases.arms import parse_arms
from warp_ds.registry import CHAIN_ENTRY, CHAINED, PHASES
from warp_ds.store.files import read_json, read_lines, write_json
from warp_ds.store.runs import written_at
from warp_ds.store.schema import SchemaError, check_fields

CPUS_OF_TASKS = '[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"'
"""Since 22.05 srun does not take --cpus-per-task over from sbatch: each rank would be bound to one core."""


@dataclass
class SubmitArguments:
    """What is queued, and where; every other flag goes to the phases that have it."""

    phases: str = flag("1,2,3", "which phases, comma-separated: 0, 1, 2, 3, evaluate, compare")
    cluster: str = flag(
        "slurm",
        "slurm, local (ranks of this machine) or debug (one rank, in this process)",
        choices=["slurm", "local", "debug"],
    )
    nodes: int = flag(1, "nodes of each job")
    gpus_per_node: int = flag(0, "GPUs of each node; one rank each")
    ranks_per_node: int = flag(0, "ranks of each node where they are not its GPUs (CPU nodes)")
    cpus_per_rank: int = flag(0, "cores of each rank; 0 leaves it to Slurm")
    parallel: int = flag(0, "seeds of a comparison (tasks of its job array) that run at once; 0 = all")
    hours: float = flag(8.0, "time limit of each job; a job that reaches it saves, and goes on in another")
    warning_seconds: int = flag(120, "how long before the time limit the ranks are told to save")
    partition: str | None = flag(None, "Slurm partition")
    account: str | None = flag(None, "Slurm account")
    slurm: list[str] = flag([], "further sbatch options, as NAME=VALUE or NAME")
    setup: list[str] = flag([], "shell lines before the ranks start, such as 'module load cuda'")
    python: str | None = flag(None, "what starts Python in the job: 'apptainer exec --nv image.sif python'; else this one")
    output_dir: str = flag("checkpoints", "where the chain's directory is made")
    run_name: str | None = flag(None, "its name; else by time, or the newest unfinished one of the same command")
    status: str | None = flag(None, "show a chain's state, following it, and do nothing else")
    cancel: str | None = flag(None, "end a chain's jobs, and do nothing else")


class _Recorded(TypedDict):
    """chain.json"""

    cluster: str
    flags: dict[str, list[str]]
    jobs: dict[str, list[str]]


@dataclass
class Chain:
    """One run directory with its phases and their jobs."""

    directory: Path
    cluster: str
    flags: dict[str, list[str]]
    """phase -> its flags, in order; of a comparison compare_seed1, compare_seed2 … -> theirs"""
    jobs: dict[str, list[str]] = field(default_factory=dict)
    """phase -> ids of the jobs submitted for it, the newest last (Slurm's, 12_0 for the first task of an array; or the
    local controller's process)"""

    def save(self) -> None:
        kept = {"cluster": self.cluster, "flags": self.flags, "jobs": self.jobs}
        write_json(self.directory / "chain.json", kept, private=True)

    @staticmethod
    def load(directory: Path) -> Chain:
        if not (directory / "chain.json").is_file():
            raise ConfigError(f"{directory} is no chain of launch/submit.py (no chain.json there)")
        path = directory / "chain.json"
        found = read_json(path)
        try:
            check_fields(found, _Recorded)
            odd = [phase for phase in (*found["flags"], *found["jobs"]) if not CHAIN_ENTRY.fullmatch(phase)]
            odd += [job for jobs in found["jobs"].values() for job in jobs if not re.fullmatch(r"\d{1,12}(_\d{1,9})?", job)]
            if odd or found["cluster"] not in ("slurm", "local", "debug") or not found["flags"]:
                raise SchemaError(f"{ascii(odd[0] if odd else found['cluster'])[:60]} is no phase, job or cluster of a chain")
        except SchemaError as error:
            raise ArtifactError(f"{path} is not what launch/submit.py writes ({error}): use another --run_name") from error
        return Chain(directory, **found)

    def finished(self, phase: str) -> bool:
        return (self.directory / phase / "finished.json").is_file()

    def job(self, phase: str) -> str | None:
        return self.jobs[phase][-1] if self.jobs.get(phase) else None

    def mark(self, *phases: str) -> str:
        """The comment of the job of these phases, a task each: by it a job is found whose id was never written down."""
        return f"warp_ds:{hashlib.sha256(str(self.directory.resolve()).encode()).hexdigest()[:16]}:{','.join(phases)}"

    def states(self) -> dict[str, str]:
        """phase -> its job's state, 'finished' where nothing is left to do. SlurmError where Slurm does not answer."""
        left = {phase: self.job(phase) for phase in self.flags if not self.finished(phase)}
        found = {phase: "finished" for phase in self.flags if phase not in left}
        if self.cluster == "slurm":
            known = slurm.job_states([job for job in left.values() if job])
            found.update({phase: known.get(job or "", "GONE" if job else "NOT SUBMITTED") for phase, job in left.items()})
        else:
            found.update(
                {
                    phase: "RUNNING" if job and _local_alive(job) else "STOPPED" if job else "WAITING"
                    for phase, job in left.items()
                }
            )
        return found


def find_chain(arguments: SubmitArguments, rest: Sequence[str]) -> Chain:
    """The chain of these flags: the one named, the newest unfinished one of the same command, or a new one."""
    phases = parse_phases(arguments.phases)
    if arguments.parallel < 0:
        raise ConfigError(f"--parallel is a number of seeds, 0 for all, not {arguments.parallel}")
    check_submit(arguments, rest)
    root = Path(arguments.output_dir)
    if arguments.run_name:
        directory = root / arguments.run_name
        begun = directory.is_dir() and {path.name for path in directory.iterdir()} <= {"logs", "submitit", ".submit.lock"}
        if directory.is_symlink() or (directory.exists() and not begun and not (directory / "chain.json").is_file()):
            raise ConfigError(f"{directory} is there already, and no chain of launch/submit.py: use another --run_name")
    else:
        directory = root / f"chain_{datetime.now():%Y%m%d_%H%M%S}"
        for path in sorted(root.glob("*/chain.json"), key=written_at, reverse=True):
            try:
                found = Chain.load(path.parent)
            except (ArtifactError, ConfigError):
                continue
            if (
                found.flags == phase_flags(phases, rest, path.parent)
                and found.cluster == arguments.cluster
                and not all(map(found.finished, found.flags))
            ):
                directory = path.parent
                break
    chain = Chain(directory, arguments.cluster, phase_flags(phases, rest, directory))
    check_flags(chain.flags)
    if (directory / "chain.json").is_file():
        before = Chain.load(directory)
        if before.flags != chain.flags or before.cluster != chain.cluster:
            raise ConfigError(f"{directory} holds a chain of another command: use another --run_name, or the same flags")
        return before
    return chain


def check_submit(arguments: SubmitArguments, rest: Sequence[str]) -> None:
    """ConfigError for a value that would be more than one value in the batch script, or in the shell that runs it."""
    for name, value in vars(arguments).items():
        refuse_control_characters(f"--{name}", value)
        refuse_secrets(f"--{name}", value)
    refuse_words(rest)
    check_run_name(arguments.run_name)
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("ranks_per_node", 0), ("cpus_per_rank", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, not {getattr(arguments, name)}")
    if not 0 < arguments.hours < 24 * 365:
        raise ConfigError(f"--hours {arguments.hours}: above 0, and less than a year")
    for name in ("partition", "account"):
        value = getattr(arguments, name)
        if value is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,:@+-]*", value):
            raise ConfigError(f"--{name} {value!r} is no name that Slurm knows: letters, digits and _ . , : @ + -")
    for option in arguments.slurm:
        name = option.lstrip("-").partition("=")[0].replace("_", "-")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
            raise ConfigError(f"--slurm {option!r}: give an option of sbatch as NAME=VALUE or NAME")
        ours = [known for known in _OURS if known.startswith(name)]  # sbatch takes the beginnings of its options, too
        if ours:
            raise ConfigError(f"--slurm {option!r}: the chain itself sets {ours[0]}; it would lose its jobs, or their order")
        if name in _NO_JOB:
            raise ConfigError(f"--slurm {option!r}: with it sbatch submits nothing, or not as a chain waits for it")
    for name, value in (
        ("output_dir", arguments.output_dir),
        ("run_name", arguments.run_name or ""),
        *(("slurm", option) for option in arguments.slurm),
    ):
        # In paths it replaces what follows a %; quotes within quotes it reads in its own way.
        wrong = re.search("['\"\\\\]" if name == "slurm" else "['\"\\\\%]", value)
        if arguments.cluster == "slurm" and wrong:
            raise ConfigError(f"--{name} {value!r}: Slurm reads {wrong[0]} as more than itself; leave it out")
    if arguments.python is not None:
        _python_words(arguments.python)


#: Options of sbatch without which a chain does not find its jobs, their output or their order.
_OURS = (
    "array",
    "chdir",
    "comment",
    "dependency",
    "error",
    "input",
    "job-name",
    "kill-on-invalid-dep",
    "nodes",
    "no-requeue",
    "ntasks",
    "open-mode",
    "output",
    "signal",
    "time",
    "wrap",
)
_NO_JOB = ("help", "usage", "version", "parsable", "test-only", "wait", "quiet")


def _python_words(text: str) -> str:
    """--python as one command of a shell, each of its words quoted; ConfigError where it is more than that."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--python {text!r}: {error}") from error
    if not words or re.search(r"[;&|<>`$()]", text):
        raise ConfigError(
            f"--python {text!r} is one command and its words, without ; & | < > ` $ ( ): put the rest into --setup"
        )
    return shlex.join(words)


def parse_phases(text: str) -> list[str]:
    """'1,2,evaluate' -> ['phase1', 'phase2', 'evaluate'], in the order of the job."""
    given = [part.strip() for part in text.split(",") if part.strip()]
    names = [part if part in CHAINED else f"phase{part}" for part in given]
    unknown = [part for part, name in zip(given, names, strict=True) if name not in CHAINED]
    if unknown or not names:
        raise ConfigError(f"--phases {text!r}: a comma-separated list of 0, 1, 2, 3, evaluate, compare")
    return [phase for phase in CHAINED if phase in names]


def phase_flags(phases: Sequence[str], rest: Sequence[str], directory: Path) -> dict[str, list[str]]:
    """Each phase's flags: those of ``rest`` that it has, and where it reads and writes within ``directory``.

    ``--phase3.batch_size 2`` is for one phase alone. ConfigError for a flag that no phase has.
    """
    groups = grouped(rest)
    if groups and not groups[0][0].startswith("--"):
        raise ConfigError(f"{groups[0][0]!r} belongs to no flag")
    has = {phase: {f.name for f in dataclasses.fields(PHASES[phase].arguments)} for phase in phases}
    # What one phase has as its own, no other passes on to transformers: phase 0's --learning_rate beside compare.
    passed = {f.name for f in dataclasses.fields(TrainingArguments)}.difference(*has.values())
    has = {phase: names | passed if PHASES[phase].trains else names for phase, names in has.items()}
    found: dict[str, list[str]] = {phase: [] for phase in phases}
    for name, *values in groups:
        only, _, own = name[2:].replace("-", "_").rpartition(".")
        takers = [phase for phase in phases if own in has[phase] and only in ("", phase, phase.removeprefix("phase"))]
        if not takers and not any(own in names for names in has.values()):
            known = set().union(*has.values(), names_of(SubmitArguments))
            raise unknown_flags([name], {f"{only}.{n}".lstrip(".") for n in known})
        if not takers or own in ("run_name", "log_dir", "resume"):
            raise ConfigError(
                f"{name}: no phase of {', '.join(phases)} has this flag" + (" here: the chain sets it" if takers else "")
            )
        for phase in takers:
            found[phase] += [f"--{own}", *values]
    if "compare" in found:
        words = found.pop("compare")
        seeds = parse_phase(PHASES["compare"], words)[0].seed_list
        found |= {f"compare_seed{seed}": [*words, "--seeds", str(seed)] for seed in seeds}
    for phase, words in found.items():
        words += ["--output_dir", str(directory), "--log_dir", str(directory / "logs"), "--run_name", phase]
        # What a phase before it in the chain makes, it takes.
        if phase == "evaluate" and "phase3" in phases:
            words += ["--model_name", str(directory / "phase3" / "model")]
        elif "phase0" in phases and phase != "phase0":
            words += ["--model_name", str(directory / "phase0" / "model")]
    return found


def kind_of(phase: str) -> str:
    """The phase in PHASES: that of compare_seed1 is compare."""
    return phase.partition("_seed")[0]


def check_flags(flags: dict[str, list[str]]) -> None:
    """What can be known before anything is queued; ConfigError for a value that cannot be."""
    for phase, words in flags.items():
        arguments: Any = parse_phase(PHASES[kind_of(phase)], words)[0]
        if arguments.device == "cuda":
            arguments.device = "auto"  # a login node has no GPU
        arguments.check()
        arguments.check_machine()
        if isinstance(arguments, CompareArguments):
            arguments.rates([arm.name for arm in parse_arms(arguments.arms)])


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
        chain.directory / "submitit", cluster="slurm", slurm_python=arguments.python and _python_words(arguments.python)
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
    found = {}
    for line in slurm.run("squeue", "--me", "--array", "--noheader", "--format=%i|%k").splitlines():
        job, _, comment = line.partition("|")
        if comment.startswith(chain.mark()):
            phases, (_, _, task) = comment.removeprefix(chain.mark()).split(","), job.partition("_")
            found[phases[int(task or 0)]] = job
    return found


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
        elif job is None or not _local_alive(job):
            submitted = executor.submit(run_phase, phase, chain.flags[phase])
            job = str(submitted.job_id)
            chain.jobs.setdefault(phase, []).append(job)
            chain.save()
        if job is not None:
            while _local_alive(job):  # it outlives this program, whose next start waits for it again
                time.sleep(0.5)
        if not chain.finished(phase):
            raise ConfigError(
                f"{phase} did not finish: see {chain.directory / 'logs' / f'{phase}.log'} and "
                f"{chain.directory / 'submitit'}; the same command goes on from there"
            )


def _local_alive(job: str) -> bool:
    """Whether submitit's local controller of this number still runs on this machine."""
    try:
        os.waitpid(int(job), os.WNOHANG)  # our own child, once ended, is no controller any more
    except ChildProcessError:
        pass
    try:
        return b"submitit.local._local" in Path(f"/proc/{job}/cmdline").read_bytes()
    except OSError:
        return False


def cancel(chain: Chain) -> list[str]:
    """Ends every job of the chain; their ids. What they have saved stays."""
    jobs = [job for phase in chain.flags if not chain.finished(phase) for job in chain.jobs.get(phase, [])]
    if chain.cluster == "slurm":
        states = slurm.job_states(jobs)
        jobs = [job for job in jobs if states.get(job) in slurm.ALIVE]
        slurm.cancel(list(reversed(jobs)))
        return jobs
    jobs = [job for job in jobs if _local_alive(job)]
    for number, patience in ((signal.SIGTERM, 60.0), (signal.SIGKILL, 5.0)):
        for job in filter(_local_alive, jobs):
            os.kill(int(job), number)
        deadline = time.monotonic() + patience
        while any(map(_local_alive, jobs)) and time.monotonic() < deadline:
            time.sleep(0.2)
    return jobs


# ---------------------------------------------------------------- in the job


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
    from warp_ds.launch.launcher import apply_debug

    arguments, passed = parse_phase(PHASES[kind_of(phase)], words)
    apply_debug(arguments)
    init_distributed(arguments.resolved_device, arguments.timeout)
    kind = PHASES[kind_of(phase)]
    kind.function(arguments, *([passed] if kind.trains else []))


# ---------------------------------------------------------------- its state


@dataclass
class PhaseState:
    """One line of the status table."""

    phase: str
    job: str
    state: str
    progress: str
    last_line: str


def status(chain: Chain) -> tuple[list[PhaseState], bool]:
    """(every phase's line, whether any of its jobs may still do something). Where Slurm does not answer, none is dead."""
    try:
        states, unknown = chain.states(), ""
    except errors.SlurmError as error:
        unknown = f"unknown ({str(error)[:60]})"
        states = {phase: "finished" if chain.finished(phase) else unknown for phase in chain.flags}
    lines = []
    for phase, state in states.items():
        events = _events(chain.directory / phase)
        restarts = sum(event.get("event") == "restarted" for event in events)
        last = events[-1] if events else {}
        if state not in ("finished", unknown, *slurm.ALIVE) and last.get("event") in ("failed", "left"):
            state = f"{state}: {last.get('error') or last.get('reason')}"
        progress = _progress(chain.directory / phase)
        if restarts:
            progress += f" ({restarts} restart{'s' if restarts > 1 else ''})"
        lines.append(
            PhaseState(
                phase,
                chain.job(phase) or "-",
                state,
                progress.strip(),
                _last_line(chain.directory / "logs" / f"{phase}.log")
                or _last_line(chain.directory / "submitit" / f"{chain.job(phase)}_0_log.out"),
            )
        )
    under_way = bool(unknown) or any(state in (*slurm.ALIVE, "WAITING") for state in states.values())
    return lines, under_way


def _events(run: Path) -> list[dict[str, Any]]:
    try:
        return [line for line in read_lines(run / "state.jsonl") if isinstance(line.get("event"), str)]
    except ArtifactError:
        return []


def _progress(run: Path) -> str:
    try:
        found = read_json(run / "progress.json")
        return f"{found['done']:g} of {found['total']:g} {found['unit']}"
    except (ArtifactError, ValueError, KeyError, TypeError, IndexError):
        return ""


def _last_line(log: Path) -> str:
    try:
        if not log.is_file():
            return ""
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").strip().splitlines()
        # What srun says after a rank has failed is not why.
        own = [line for line in lines if not line.startswith(("srun: ", "slurmstepd"))]
        return (own or lines or [""])[-1]
    except OSError:
        return ""
