"""DeepSpeed's settings for a run: the file of --deepspeed, or a plain one, filled in and checked."""

from __future__ import annotations

import json
from typing import Any

from warp_ds.cluster.templates import config_path
from warp_ds.errors import ConfigError
from warp_ds.flags.checks import refuse_secrets
from warp_ds.flags.groups import RunArguments
from warp_ds.store.files import read_text


def zero3_config(arguments: RunArguments, for_trainer: bool = False) -> dict[str, Any]:
    """The DeepSpeed configuration: the file given with --deepspeed, or a plain ZeRO-3 one; dtype from --dtype.

    What the file leaves to transformers' Trainer (``"auto"``) stays only ``for_trainer``. Raises ConfigError where the
    file is missing, is no JSON, or asks for another ZeRO stage or dtype.
    """
    if arguments.deepspeed is None:
        config: dict[str, Any] = {"zero_optimization": {"stage": 3}}
    else:
        try:
            config = json.loads(read_text(config_path(arguments.deepspeed)))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"--deepspeed {arguments.deepspeed} cannot be read as JSON: {error}") from error
        for name in ("", "zero_optimization", "bf16", "fp16", "data_types", "checkpoint"):
            section = config.get(name, {}) if name else config
            if not isinstance(section, dict):
                raise ConfigError(f"--deepspeed {arguments.deepspeed}: {name or 'the whole'} is no JSON object")
    refuse_secrets(f"--deepspeed {arguments.deepspeed}", config)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 3:
        raise ConfigError(
            f"--deepspeed {arguments.deepspeed} asks for ZeRO stage {stage}; the phases run on stage 3 "
            "(the WarpCallback also works without DeepSpeed)"
        )
    enabled = [kind for kind in ("bf16", "fp16") if _enabled(config.get(kind, {}))]
    wanted = {"bfloat16": ["bf16"], "float16": ["fp16"], "float32": []}[arguments.dtype]
    if enabled and enabled != wanted:
        raise ConfigError(
            f"--deepspeed {arguments.deepspeed} enables {' and '.join(enabled)}, but --dtype is "
            f"{arguments.dtype}: change one of them"
        )
    for kind in ("bf16", "fp16"):
        config[kind] = {**config.get(kind, {}), "enabled": kind in wanted}
    if wanted == ["fp16"] and arguments.resolved_device == "cpu":
        raise ConfigError("--dtype float16 needs a GPU: DeepSpeed refuses it on CPUs; use bfloat16 or float32")
    config.pop("_comment", None)
    if wanted:
        # DeepSpeed would sum micro-batches in 16 bits, so that the sum depended on how many of them a step has.
        config["data_types"] = {"grad_accum_dtype": "fp32", **config.get("data_types", {})}
    if for_trainer:
        return config
    for training_only in ("optimizer", "scheduler"):
        config.pop(training_only, None)
    return _without_auto(config)


def _without_auto(section: dict[str, Any]) -> dict[str, Any]:
    return {k: _without_auto(v) if isinstance(v, dict) else v for k, v in section.items() if v != "auto"}


def _enabled(section: dict[str, Any]) -> bool:
    return section.get("enabled", False) is True
