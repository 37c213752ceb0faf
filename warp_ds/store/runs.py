"""Run directories: which is finished, which is the newest, and where its bases and masks are."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from warp_ds.errors import ArtifactError
from warp_ds.registry import maker_of
from warp_ds.store.files import read_json
from warp_ds.store.hub import fetched, is_hub_name

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- run directories


def newest(output_dir: str | Path, phase: str) -> Path | None:
    """The newest finished run of ``phase`` ('phase1') under ``output_dir``: itself, not the link that follows runs."""
    finished_runs = (p.parent for p in Path(output_dir).glob("*/finished.json") if not p.parent.is_symlink())
    finished = [run for run in finished_runs if phase_of(run) == phase]
    return next(iter(newest_first(finished, "finished.json", "finished_at")), None)


CLOCKS = timedelta(minutes=5)
"""By which the clocks of hosts may differ."""


def written_at(path: Path) -> float:
    """When a file was written, in seconds, by the file system; 0 where that has not come yet."""
    try:
        written = path.stat().st_mtime
    except OSError:
        return 0.0
    return written if written < time.time() + CLOCKS.total_seconds() else 0.0


def newest_first(runs: Iterable[Path], file: str, key: str) -> list[Path]:
    """By the time that each run's ``file`` has under ``key``, and by name where two are the same.

    Not by the files' own times, which copying and touching change. A run that recorded none, or one that has not come yet,
    says nothing about when it was: it comes last.
    """
    latest = datetime.now().astimezone() + CLOCKS

    def when(run: Path) -> tuple[bool, float, str]:
        try:
            recorded = datetime.fromisoformat(read_json(run / file)[key]).astimezone()
            known = recorded <= latest
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, OSError):
            known = False
        return known, recorded.timestamp() if known else 0.0, run.name

    return sorted(runs, key=when, reverse=True)


def phase_of(run: Path) -> str | None:
    """'phase3', say; None where ``run`` is no run's directory."""
    return run_config(run).get("phase")


def is_run(directory: Path) -> bool:
    """Whether ``directory`` is a run's: a model's directory, say, has a config.json too."""
    config = run_config(directory)
    return isinstance(config.get("phase"), str) and isinstance(config.get("identity"), str)


def run_config(run: Path) -> dict[str, Any]:
    """A run's config.json; empty where ``run`` is no run's directory, or is another user's, which is said."""
    try:
        config = read_json(run / "config.json")
    except ArtifactError as error:
        if isinstance(error.__cause__, PermissionError):
            logger.warning(
                "%s is another user's, and its config.json is for its owner alone (chmod g+r): it is passed over; "
                "its basis or masks can be named with --basis_dir or --masks_dir",
                run,
            )
        return {}
    return config if isinstance(config, dict) else {}


def find_artifact(given: str | None, kind: str, output_dir: str | Path) -> Path:
    """Where the 'basis' or 'masks' lie: ``given``, or the newest finished run's.

    Takes the artefact's directory, its run directory, the original project's spelling (phase1_…/checkpoints/basis), and
    a data set on the hub (OWNER/NAME, OWNER/NAME@REVISION). Raises ArtifactError with the cure where there is none.
    """
    phase = maker_of(kind).name
    if given is None:
        run = newest(output_dir, phase)
        if run is None:
            raise ArtifactError(f"no finished {phase} under {output_dir}: run launch/{phase}.py first, or give --{kind}_dir")
        return run / kind
    path = Path(given)
    original = Path(re.sub(rf"/checkpoints/({kind})/?$", r"/\1", str(path)))
    for candidate in (path, original, path / kind):
        if (candidate / "metadata.json").is_file():
            return candidate
    if is_hub_name(given):
        return fetched(given, kind)
    raise ArtifactError(f"no {kind} in {given} (no metadata.json there): run launch/{phase}.py first, or check --{kind}_dir")


def path_of_run(config: Mapping[str, Any], name: str) -> Path:
    """What a setting in a run's config.json names: a relative path starts where the run was started."""
    path = Path(config.get("working_directory", ""), Path(name).expanduser())
    return path if path.exists() else Path(name)
