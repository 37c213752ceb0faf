"""What a run's own files must be before the run is gone on with, or counts as finished."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from warp_ds.errors import ArtifactError
from warp_ds.store.files import read_json
from warp_ds.store.schema import SchemaError, check_type
from warp_ds.store.sealed import odd_file

CONFIG = {"phase": str, "identity": str, "settings": dict[str, Any], "inputs": dict[str, str]}
LATER = {
    "compared": dict[str, Any],
    "contents": dict[str, str],
    "started_at": str,
    "command": list[str],
    "versions": dict[str, str],
    "world_size": int,
    "working_directory": str,
}
"""Of config.json; what an earlier version did not write may be missing."""
FINISHED = {"finished_at": str, "seconds": float, "peak_memory": dict[str, Any]}
OWNER = {"host": str, "pid": int, "token": str, "beat": int}
IDENTIFIED = ("phase", "inputs", "compared", "contents")


def digest_of(known: dict[str, Any]) -> str:
    """A run's identity: 16 hex digits of what decides its result (IDENTIFIED)."""
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]


def config_problem(config: dict[str, Any]) -> str:
    """What in a run's config.json is not as this program wrote it, in words; '' where all is."""
    problem = _problem(config, CONFIG, LATER)
    if not problem and all(name in config for name in IDENTIFIED):
        if digest_of({name: config[name] for name in IDENTIFIED}) != config["identity"]:
            return "its settings are not those of its identity"
    return problem


def check_written(run: Path) -> None:
    """ArtifactError, naming the file, where something in ``run`` is not what a run has."""
    if odd := odd_file(run):
        raise ArtifactError(f"{odd}, and {run} is no run to go on with: remove it, or use another --run_name")
    if (run / "finished.json").is_file():
        finished = read_json(run / "finished.json")
        problem = _problem(finished, FINISHED, {}) if isinstance(finished, dict) else "it is no object"
        if problem:
            raise ArtifactError(
                f"{run / 'finished.json'} is not what this program writes ({problem}): remove it, and the same "
                "command goes on with the run"
            )


def is_owner(value: Any) -> bool:
    """Whether that is what a lock's owner.json holds."""
    return isinstance(value, dict) and not _problem(value, OWNER, {})


def _problem(values: dict[str, Any], required: dict[str, Any], optional: dict[str, Any]) -> str:
    try:
        for name, kind in {**required, **optional}.items():
            if name in values:
                check_type(values[name], kind, name)
            elif name in required:
                return f"{name} is missing"
    except SchemaError as error:
        return str(error)
    return ""
