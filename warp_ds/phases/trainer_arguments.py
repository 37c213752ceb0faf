"""What Trainer is told: its arguments and DeepSpeed configuration, and what in them contradicts the flags."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from warp_ds.cluster import consensus, processes
from warp_ds.data.collate import GlobalBatchSampler
from warp_ds.errors import ConfigError
from warp_ds.flags import training_arguments
from warp_ds.flags.arguments import RunArguments, TrainingFlags
from warp_ds.phases import watching
from warp_ds.secrets import redact
from warp_ds.zero import settings
from warp_ds.zero.deepspeed_internals import is_built


class TrackedArguments(TrainingArguments):
    """TrainingArguments that tell every tracker what the run is: all of them log what ``to_dict`` says."""

    facts: Mapping[str, Any] = {}

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), **{f"warp_ds/{name}": value for name, value in self.facts.items()}}


def run_facts(arguments: RunArguments, inputs: Mapping[str, str], **more: Any) -> dict[str, Any]:
    """The flags of a run that are its own, and the fingerprints of what it read, for trackers."""
    flags = {name: value for name, value in vars(arguments).items() if value is not None}
    return redact({**flags, **{f"fingerprint of {name}": value for name, value in inputs.items()}, **more})


def trainer_arguments(
    arguments: TrainingFlags,
    passed: Mapping[str, Any],
    directory: Path,
    accumulation_steps: int,
    converted: bool = False,
    facts: Mapping[str, Any] | None = None,
) -> TrainingArguments:
    """What Trainer is told; ``passed`` are TrainingArguments of the user's, and training_arguments.DEFAULTS.

    ``facts`` are what trackers are told besides.
    """
    config = _trainer_config(arguments, converted)
    options = {"disable_tqdm": processes.rank() != 0, **passed}
    clipping = config["gradient_clipping"]
    if clipping != "auto":
        options.setdefault("max_grad_norm", clipping)
    made = TrackedArguments(
        output_dir=str(directory / "trainer"),
        run_name=directory.name,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=accumulation_steps,
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        **_checkpointing(arguments.gradient_checkpointing),
        bf16=arguments.dtype == "bfloat16",
        fp16=arguments.dtype == "float16",
        use_cpu=arguments.resolved_device == "cpu",
        seed=arguments.seed,
        deepspeed=config,
        remove_unused_columns=False,
        ddp_timeout=arguments.timeout,
        **options,
    )
    made.facts = facts or {}
    return made


def check_training(arguments: TrainingFlags, passed: Mapping[str, Any] | None) -> dict[str, Any]:
    """The TrainingArguments to pass on: ``passed``, and what follows from the flags. ConfigError, on every rank and before any
    work, for flags that Trainer or the DeepSpeed configuration contradict. Collective."""
    with consensus.on_every_rank_or_none("checking the flags of the training"):
        if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true":
            raise ConfigError(
                "accelerate's parallelism (sequence, context, tensor; --use_parallelism_config of accelerate launch) is "
                f"refused: {training_arguments.DATA_PARALLEL}"
            )
        passed = watching.settle(arguments, passed or {})
        sampler = GlobalBatchSampler(1, arguments.global_batch_size, arguments.batch_size, processes.world_size())
        given = {**training_arguments.DEFAULTS, **passed}
        given.pop("save_total_limit", None)
        config = _trainer_config(arguments, converted=False)
        _check_sections(config, passed)
        _check_operators(config)
        try:
            training_arguments.check_scheduler(given, arguments.learning_rate)
            made = trainer_arguments(arguments, given, Path(arguments.output_dir) / "run", sampler.accumulation_steps)
        except (ValueError, TypeError, OSError, ImportError) as error:
            raise ConfigError(f"these flags do not go together: {error}") from error
        mismatches = made.hf_deepspeed_config.mismatches  # which Trainer would find once the model is loaded
        if mismatches:
            said = "; ".join(line.strip(" -") for line in mismatches)
            raise ConfigError(
                f"--deepspeed {arguments.deepspeed} contradicts the flags ({said}): set these values of the file "
                "to 'auto', and give the flags"
            )
        return passed


#: Flags that fill the optimizer's and the scheduler's section of a DeepSpeed configuration, and the keys that they fill.
_FILLED = {
    "optimizer": {
        "learning_rate": "lr",
        "adam_beta1": "betas",
        "adam_beta2": "betas",
        "adam_epsilon": "eps",
        "weight_decay": "weight_decay",
    },
    "scheduler": {"learning_rate": "warmup_max_lr", "warmup_steps": "warmup_num_steps"},
}


def _check_sections(config: Mapping[str, Any], passed: Mapping[str, Any]) -> None:
    """ConfigError for a flag that the optimizer's or scheduler's section of the DeepSpeed configuration overrules."""
    for section, keys in _FILLED.items():
        params = config.get(section, {}).get("params", {})
        for name in ("learning_rate", *passed):
            key = keys.get(name)
            if section in config and key and key not in params and not _has_no(key, config[section].get("type")):
                raise ConfigError(
                    f"--{name} has no effect: the {section} section of the DeepSpeed configuration decides it, "
                    f'without params.{key}; write "{key}": "auto" there'
                )
    if "scheduler" not in config:
        return
    for name in ("lr_scheduler_type", "lr_scheduler_kwargs"):
        if name in passed:
            raise ConfigError(
                f"--{name} has no effect: the scheduler section of the DeepSpeed configuration decides it; leave "
                "one of them out"
            )
    warmup = passed.get("warmup_steps", 0)
    for key, wanted in (("total_num_steps", "auto"), ("warmup_num_steps", max(1, warmup) if warmup == int(warmup) else "auto")):
        given = config["scheduler"].get("params", {}).get(key, "auto")
        if given not in ("auto", wanted):
            raise ConfigError(
                f"the DeepSpeed configuration sets scheduler.params.{key} to {given}, which the flags decide: "
                'write "auto" there'
            )


def _check_operators(config: Mapping[str, Any]) -> None:
    """ConfigError where the configuration's optimizer is one that DeepSpeed compiles, and there is no compiler."""
    section = config.get("optimizer", {})
    compiled = str(section.get("type", "")).lower() in ("adam", "adamw", "lamb", "lion", "adagrad", "fusedadam", "muon")
    offloaded = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none") != "none"
    if (
        compiled
        and not (section.get("params", {}).get("torch_adam") and not offloaded)
        and not (processes.has_compiler() or is_built("cpu_adam" if offloaded else "fused_adam"))
    ):
        raise ConfigError(
            f"the DeepSpeed configuration's optimizer.type {section['type']} is compiled at its first use, and "
            "there is no C++ compiler, or no ninja, here: install them (apt-get install g++ ninja-build), leave "
            'the optimizer section out, or write "torch_adam": true into its params (without offloading)'
        )


def _has_no(key: str, kind: str | None) -> bool:
    """Whether DeepSpeed's optimizer or scheduler ``kind`` has no such parameter, so that the flag reaches it otherwise."""
    return key == "warmup_max_lr" and kind not in ("WarmupLR", "WarmupDecayLR")


def _trainer_config(arguments: RunArguments, converted: bool) -> dict[str, Any]:
    """The DeepSpeed configuration with what Trainer fills in left to it; ``converted``: it loads a universal checkpoint."""
    config = settings.zero3_config(arguments, for_trainer=True)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if config.setdefault(key, "auto") != "auto":
            raise ConfigError(
                f"the DeepSpeed configuration sets {key}: leave it out or 'auto'; --batch_size and "
                "--global_batch_size decide it"
            )
    config.setdefault("gradient_clipping", "auto")
    config.setdefault("zero_allow_untested_optimizer", True)
    if converted:
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    return config


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Trainer's flags for gradient checkpointing, by the name that this transformers has."""
    name = "activation_checkpointing"
    if not any(f.name == name for f in dataclasses.fields(TrainingArguments)):
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}
