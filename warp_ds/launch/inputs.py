"""What flags name on this machine's disks, looked for before any rank meets another: a wrong path costs seconds."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from warp_ds.cluster.slurm import task_environment
from warp_ds.data.sources import check_source
from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import ImportanceArguments, RunArguments, TrainArguments
from warp_ds.store.runs import find_artifact
from warp_ds.zero import settings
from warp_ds.zero.model import check_model_dir, local_model_dir, read_config

MODELS = ("model_name", "reference_model", "judge_model", "unaligned_model")
DATA = (
    "safety_data",
    "utility_data",
    "utility_heldout",
    "harmful_data",
    "harmless_data",
    "mix_file",
    "unaligned_data",
    "foundation_data",
    "prompt_file",
)


def check_inputs(arguments: RunArguments) -> None:
    """ConfigError, DataError or ArtifactError for a model, data file, configuration, basis or masks that are not there.

    Names of the hub are left to the phase, which fetches them.
    """
    named = vars(arguments)
    for flag in MODELS:
        if named.get(flag):
            directory = local_model_dir(named[flag], f"--{flag}")
            if directory is not None:
                (read_config if flag == "judge_model" else check_model_dir)(directory, f"--{flag}")
    for flag in DATA:
        if named.get(flag):
            check_source(named[flag])
    if named.get("refusal_file") and not Path(named["refusal_file"]).expanduser().is_file():
        raise ConfigError(f"--refusal_file {named['refusal_file']}: no such file")
    settings.zero3_config(arguments)
    needed = {
        "basis": isinstance(arguments, ImportanceArguments) and arguments.basis != "identity",
        "masks": isinstance(arguments, TrainArguments),
    }
    for kind, always in needed.items():
        given = named.get(f"{kind}_dir")
        if given != "none" and (always or given):
            find_artifact(given, kind, arguments.output_dir)


def on_one_machine(env: Any = os.environ) -> bool:
    """Whether all ranks that the launcher starts are known to be on this machine, and so see the same disks."""
    if task_environment(env) is not None and "RANK" not in env:
        return env.get("SLURM_STEP_NUM_NODES") == "1"
    world = env.get("WORLD_SIZE", "1")
    return world == "1" or world in (env.get("LOCAL_WORLD_SIZE"), env.get("LOCAL_SIZE"))
