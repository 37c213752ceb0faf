"""Which settings decide a run's result, and their one spelling."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warp_ds.flags.arguments import RunArguments

#: Flags that do not change what a run computes: two runs that differ in these alone may resume one another.
NOT_IDENTITY = (
    "output_dir",
    "log_dir",
    "run_name",
    "resume",
    "debug",
    "device",
    "timeout",
    "local_rank",
    "deepspeed",
    "save_minutes",
    "max_requeues",
    "arms",
    "learning_rates",
    "arm_rates",
    "seeds",
    "at_utility",
    "keep_models",
    "batch_size",
    "eval_batch_size",
    "gradient_checkpointing",
    "basis_placement",
    "collect",
    "svd_placement",
)
#: Of what lies on this machine's disks, a run knows the contents (``start_run``'s fingerprints), whatever the path.
BY_CONTENT = (
    "model_name",
    "safety_data",
    "utility_data",
    "utility_heldout",
    "harmful_data",
    "harmless_data",
    "refusal_file",
    "basis_dir",
    "masks_dir",
    "reference_model",
    "judge_model",
    "unaligned_model",
    "unaligned_data",
    "mix_file",
    "foundation_data",
    "prompt_file",
)


def identity_settings(arguments: RunArguments) -> dict[str, Any]:
    """The flags that decide what a run computes, in one spelling each."""
    return in_one_spelling(dataclasses.asdict(arguments))


def in_one_spelling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As ``identity_settings``, of flags that a run has written down."""
    return {name: _plain(name, value) for name, value in settings.items() if name not in NOT_IDENTITY}


def _plain(name: str, value: Any) -> Any:
    if name in ("basis_dir", "masks_dir"):
        return "none" if value == "none" else "by content"  # given, or the newest: the fingerprint says which
    if name in BY_CONTENT and value and all(Path(part).expanduser().exists() for part in str(value).split(",")):
        return "by content"
    if name == "lm_eval_include" and value:
        return str(Path(value).expanduser().resolve())
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 3.0 epochs are 3
