"""How far a chain is: one line a phase."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warp_ds import errors
from warp_ds.cluster import slurm
from warp_ds.errors import ArtifactError
from warp_ds.launch.chain import Chain
from warp_ds.store.files import read_json, read_lines


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
        stored = read_json(run / "progress.json")
        return f"{stored['done']:g} of {stored['total']:g} {stored['unit']}"
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
