"""A chain of phases in one run directory, queued by submitit: each phase's job starts when the one before has finished.
A comparison is a run a seed, compare_seed1 and so on, which are one job array.

    checkpoints/chain_20260101_120000/
        chain.json                  what was asked for, and every job that was submitted for it
        phase1/ phase2/ phase3/ …   the phases' own run directories, with state.jsonl and progress.json
        logs/                       rank 0's log of each phase, the other ranks' beside it
        submitit/                   submitit's own files: scripts, and each task's output
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TypedDict

from warp_ds.cluster import slurm
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.flags.jobs import SubmitArguments
from warp_ds.launch.chain_flags import check_flags, check_submit, parse_phases, phase_flags
from warp_ds.registry import CHAIN_ENTRY
from warp_ds.store.files import read_json, write_json
from warp_ds.store.runs import written_at
from warp_ds.store.schema import SchemaError, check_fields


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
        stored = read_json(path)
        try:
            check_fields(stored, _Recorded)
            odd = [phase for phase in (*stored["flags"], *stored["jobs"]) if not CHAIN_ENTRY.fullmatch(phase)]
            odd += [job for jobs in stored["jobs"].values() for job in jobs if not re.fullmatch(r"\d{1,12}(_\d{1,9})?", job)]
            if odd or stored["cluster"] not in ("slurm", "local", "debug") or not stored["flags"]:
                raise SchemaError(f"{ascii(odd[0] if odd else stored['cluster'])[:60]} is no phase, job or cluster of a chain")
        except SchemaError as error:
            raise ArtifactError(f"{path} is not what launch/submit.py writes ({error}): use another --run_name") from error
        return Chain(directory, **stored)

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
        by_phase = {phase: "finished" for phase in self.flags if phase not in left}
        if self.cluster == "slurm":
            known = slurm.job_states([job for job in left.values() if job])
            by_phase.update({phase: known.get(job or "", "GONE" if job else "NOT SUBMITTED") for phase, job in left.items()})
        else:
            by_phase.update(
                {
                    phase: "RUNNING" if job and local_alive(job) else "STOPPED" if job else "WAITING"
                    for phase, job in left.items()
                }
            )
        return by_phase


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
                loaded = Chain.load(path.parent)
            except (ArtifactError, ConfigError):
                continue
            if (
                loaded.flags == phase_flags(phases, rest, path.parent)
                and loaded.cluster == arguments.cluster
                and not all(map(loaded.finished, loaded.flags))
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


def local_alive(job: str) -> bool:
    """Whether submitit's local controller of this number still runs on this machine."""
    try:
        os.waitpid(int(job), os.WNOHANG)  # our own child, once ended, is no controller any more
    except ChildProcessError:
        pass
    try:
        return b"submitit.local._local" in Path(f"/proc/{job}/cmdline").read_bytes()
    except OSError:
        return False
