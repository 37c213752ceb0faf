"""What flags name on this machine's disks, looked for before any rank meets another: a wrong path costs seconds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from warp_ds.cluster.slurm import task_environment
from warp_ds.data.sources import check_source
from warp_ds.errors import ConfigError
from warp_ds.flags.flag import dataclass_fields, nature
from warp_ds.flags.groups import RunArguments
from warp_ds.models.source import check_model_dir, local_model_dir, read_config
from warp_ds.registry import phase_of
from warp_ds.store.hub import is_hub_name
from warp_ds.store.runs import find_artifact
from warp_ds.zero import settings


def check_inputs(arguments: RunArguments) -> None:
    """ConfigError, DataError or ArtifactError for a model, data file, configuration, basis or masks that are not there.

    Names of the hub are left to the phase, which fetches them.
    """
    for name, field in dataclass_fields(arguments).items():
        given, reads = getattr(arguments, name), nature(field).reads
        if reads in ("model", "judge") and given:
            directory = local_model_dir(given, f"--{name}")
            if directory is not None:
                (read_config if reads == "judge" else check_model_dir)(directory, f"--{name}")
        if reads in ("data", "files") and given:
            check_source(given)
        if reads == "text" and given and not Path(given).expanduser().is_file():
            raise ConfigError(f"--{name} {given}: no such file")
    settings.zero3_config(arguments)
    phase = phase_of(arguments)
    for kind in ("basis", "masks"):
        given = getattr(arguments, f"{kind}_dir", None)
        needed = phase is not None and phase.reads == kind and getattr(arguments, "basis", None) != "identity"
        if given != "none" and (needed or given) and not (given and is_hub_name(given)):
            find_artifact(given, kind, arguments.output_dir)


def on_one_machine(env: Any = os.environ) -> bool:
    """Whether all ranks that the launcher starts are known to be on this machine, and so see the same disks."""
    if task_environment(env) is not None and "RANK" not in env:
        return env.get("SLURM_STEP_NUM_NODES") == "1"
    world = env.get("WORLD_SIZE", "1")
    return world == "1" or world in (env.get("LOCAL_WORLD_SIZE"), env.get("LOCAL_SIZE"))
