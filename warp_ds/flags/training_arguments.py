"""Every flag of transformers' TrainingArguments: what works here, and what is refused, with the reason.

Checked field by field with transformers 5.23. A field in none of the lists (of a newer transformers) is refused as not
checked; ``tests/test_trainer_flags.py`` fails when the installed transformers has one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

from warp_ds.flags.flag import default_of

CHANGES_TRAINING = frozenset(
    {
        "max_steps",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        "label_smoothing_factor",
    }
)
#: Saving, logging and reading: two runs that differ in these alone are one run.
CHANGES_NO_TRAINING = frozenset(
    {
        "torch_empty_cache_steps",
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "logging_nan_inf_filter",
        "log_level",
        "log_level_replica",
        "disable_tqdm",
        "report_to",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
    }
)
#: Evaluation during training: part of what a run is only where it decides which weights come out (``training_settings``).
EVALUATES = frozenset(
    {
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "per_device_eval_batch_size",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
    }
)
WORKS = CHANGES_TRAINING | CHANGES_NO_TRAINING | EVALUATES

#: Where they are not given: other than TrainingArguments' own.
DEFAULTS: dict[str, Any] = {
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "logging_nan_inf_filter": False,  # else a training that has come apart says that its loss is 0
}

#: Field -> the flag of this project that decides it.
OURS = {
    "output_dir": "--output_dir",
    "run_name": "--run_name",
    "seed": "--seed",
    "deepspeed": "--deepspeed",
    "debug": "--debug",
    "local_rank": "the launcher",
    "learning_rate": "--learning_rates",  # of compare and sweep: phases 0 and 3 have it themselves
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch_size",
    "gradient_accumulation_steps": "--global_batch_size",
    "gradient_checkpointing": "--gradient_checkpointing",
    "activation_checkpointing": "--gradient_checkpointing",
    "activation_checkpointing_kwargs": "--gradient_checkpointing alone",
    "gradient_checkpointing_kwargs": "--gradient_checkpointing alone",
    "resume_from_checkpoint": "--resume",
    "bf16": "--dtype bfloat16",
    "fp16": "--dtype float16",
    "use_cpu": "--device cpu",
    "ddp_timeout": "--timeout",
    "optim": "the optimizer section of the DeepSpeed configuration",
    "optim_args": "the optimizer section of the DeepSpeed configuration",
}

_OUR_EVALUATION = "evaluation during training is asked for by --eval_data, --eval_safety and --eval_strategy"
_NO_HUB = "a comparison sends nothing to the hub; use `warp-ds push RUN OWNER/NAME` on a finished run"
DATA_PARALLEL = (
    "training is data-parallel (ZeRO-3) alone: its global batches are dealt to every rank, and take one token mean, where "
    "sequence parallelism (ALST, Ulysses) takes one a micro-batch; leave it out"
)
_NO_FSDP = "training runs on DeepSpeed ZeRO-3 alone; leave it out"
_NOT_CHECKED = "it was not checked with the masked step under ZeRO-3; leave it out"
_NO_TRACKIO = "it was not checked here; set Trackio's own environment variables"
#: Field -> why it is refused, and what to do.
REFUSED = {
    **{name: f"set by this project: use {flag}" for name, flag in OURS.items()},
    "average_tokens_across_devices": "without it the training depends on the number of ranks; leave it out",
    "auto_find_batch_size": "ranks that start anew by themselves lose each other; give a smaller --batch_size, which does not "
    "change the training",
    "neftune_noise_alpha": "its noise would depend on the number of ranks and the micro-batch; leave it out",
    "optim_target_modules": "GaLore's and APOLLO's optimizers do not take the masked step; leave it out",
    "torch_compile": _NOT_CHECKED,
    "torch_compile_backend": _NOT_CHECKED,
    "torch_compile_mode": _NOT_CHECKED,
    "use_liger_kernel": _NOT_CHECKED,
    "liger_kernel_config": _NOT_CHECKED,
    "full_determinism": _NOT_CHECKED,
    "tf32": "it would stay on for whatever the process does next, the bases of a comparison among it; leave it out",
    "include_num_input_tokens_seen": "it counts the padding of micro-batches, which differs with the number of ranks",
    "trackio_space_id": _NO_TRACKIO,
    "trackio_bucket_id": _NO_TRACKIO,
    "trackio_static_space_id": _NO_TRACKIO,
    "project": _NO_TRACKIO,
    "do_eval": _OUR_EVALUATION,
    "do_predict": "use launch/evaluate.py on the model that training writes",
    "save_only_model": "a run could never go on from such checkpoints; the model is written without it, to RUN/model",
    "save_on_each_node": "checkpoints lie on a file system that all nodes share; leave it out",
    "enable_jit_checkpoint": "runs save by themselves when they are asked to leave (SIGTERM, USR2); leave it out",
    "push_to_hub": _NO_HUB,
    "ignore_data_skip": "a run that goes on would see samples of its epoch twice; leave it out",
    "skip_memory_metrics": "it resets the peaks that every phase writes into finished.json; read them there",
    "dataloader_drop_last": "no sample is dropped: the last global batch may be short; leave it out",
    "dataloader_in_order": "the order of the samples is that of --seed; leave it out",
    "train_sampling_strategy": "the order of the samples is that of --seed, on any number of ranks; leave it out",
    "accelerator_config": "the global batches are this project's, the same on any number of ranks; leave it out",
    "parallelism_config": DATA_PARALLEL,
    "ddp_backend": "ranks meet over NCCL on GPUs and gloo on CPUs; leave it out",
    "fsdp": _NO_FSDP,
    "fsdp_config": _NO_FSDP,
}
_ONE_MEAN = "evaluation takes one mean over the held-out tokens of all ranks, whatever this says; leave it out"
_WITH_HUB = "a finished run goes to the hub whole, by --push_to_hub OWNER/NAME (--hub_private_repo false: for everybody)"
_WITH_DDP = "it belongs to DDP, and training runs on DeepSpeed ZeRO-3; leave it out"
#: Field -> why it changes nothing here; refused too.
NO_EFFECT = {
    **dict.fromkeys(
        (
            "prediction_loss_only",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "include_for_metrics",
            "batch_eval_metrics",
            "bf16_full_eval",
            "fp16_full_eval",
            "label_names",
        ),
        _ONE_MEAN,
    ),
    **dict.fromkeys(
        ("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"), _WITH_HUB
    ),
    **dict.fromkeys(
        ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph"), _WITH_DDP
    ),
    "data_seed": "--seed decides the order of the samples; leave it out",
    "do_train": "phases 0 and 3 always train; leave it out",
    "length_column_name": "no column of lengths is read; leave it out",
    "log_on_each_node": "rank 0 alone logs on the terminal; leave it out",
    "remove_unused_columns": "the samples have no other columns; leave it out",
    "restore_callback_states_from_checkpoint": "what callbacks keep in checkpoints (counts of tokens and FLOPs, early "
    "stopping's patience) is restored in any case; leave it out",
    "use_cache": "a training pass has no use for a cache; leave it out",
}
#: Besides a default written out, what says no more than what is done anyway.
_HARMLESS: dict[str, tuple[str, ...]] = {"do_train": ("true",), "tf32": ("none", "false")}


@cache
def fields() -> dict[str, dataclasses.Field[Any]]:
    """TrainingArguments' own, by name. Imports torch, which who only asks for help need not wait for."""
    from transformers import TrainingArguments

    return {f.name: f for f in dataclasses.fields(TrainingArguments) if f.init}


def why_refused(name: str, words: Sequence[str]) -> str | None:
    """Why ``--name words…`` cannot be given, a field of TrainingArguments; None where it works, or says nothing."""
    if name in WORKS:
        return None
    reason = REFUSED.get(name) or NO_EFFECT.get(name)
    if reason is None:
        return f"--{name} was not checked with warp_ds (its transformers knew no such flag): leave it out"
    if name not in OURS and _is_default(name, " ".join(words)):
        return None
    return f"--{name} is {reason}" if name in OURS else f"--{name} is refused: {reason}"


def _is_default(name: str, word: str) -> bool:
    word = (word or "true").lower()
    if name in _HARMLESS:
        return word in _HARMLESS[name]
    default = default_of(fields()[name])
    if isinstance(default, bool):
        return word in (("true", "1", "yes", "y", "t") if default else ("false", "0", "no", "n", "f"))
    if isinstance(default, int | float):
        try:
            return float(word) == default
        except ValueError:
            return False
    return word in (("none", "null", "false") if default is None else (str(default).lower(),))


def several_words(parser: argparse.ArgumentParser) -> None:
    """Lets --report_to take several reporters, which transformers' own parser does not."""
    for action in parser._actions:
        if action.dest == "report_to":
            action.nargs, action.type = "+", str


def settle(given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags as Trainer takes them; ValueError, with cause and cure, for a value or a combination that cannot be.

    --save_steps alone asks for saving by steps, as it does with transformers' own default of --save_strategy.
    """
    settled = {name: getattr(value, "value", value) for name, value in given.items()}
    for name, (good, wanted) in _RANGES.items():
        value = settled.get(name)
        if value is not None and not (math.isfinite(value) and good(value)):
            raise ValueError(f"--{name} is {wanted}, not {value}")
    for kind in ("save", "logging", "eval"):
        strategy = settled.get(f"{kind}_strategy")
        if strategy == "best" and not settled.get("load_best_model_at_end"):
            raise ValueError("--save_strategy best is refused without --load_best_model_at_end: use steps or epoch")
        if f"{kind}_steps" in settled:
            if strategy not in (None, "steps"):
                raise ValueError(f"--{kind}_steps says nothing under --{kind}_strategy {strategy}: leave one of them out")
            settled[f"{kind}_strategy"] = "steps"
    if settled.get("logging_strategy") == "no" and settled.get("logging_first_step"):
        raise ValueError("--logging_first_step contradicts --logging_strategy no: leave one of them out")
    if isinstance(settled.get("lr_scheduler_kwargs"), str):
        settled["lr_scheduler_kwargs"] = _mapping("lr_scheduler_kwargs", settled["lr_scheduler_kwargs"])
    check_scheduler(settled)
    if not settled.get("dataloader_num_workers"):
        for name in ("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context"):
            if settled.get(name):
                raise ValueError(f"--{name} needs workers: give --dataloader_num_workers")
    if "report_to" in settled:
        settled["report_to"] = reporters(settled["report_to"])
    return settled


_RANGES: dict[str, tuple[Any, str]] = {
    "max_steps": (lambda v: v == -1 or v >= 1, "a number of steps, at least 1 (or -1: --epochs decides)"),
    "warmup_steps": (lambda v: 0 <= v < 1 or v == int(v) >= 1, "a number of steps, or a share of them below 1"),
    "weight_decay": (lambda v: v >= 0, "at least 0"),
    "adam_beta1": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "adam_beta2": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "adam_epsilon": (lambda v: v > 0, "above 0"),
    "max_grad_norm": (lambda v: v >= 0, "at least 0 (0: no clipping)"),
    "label_smoothing_factor": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "logging_steps": (lambda v: 0 < v < 1 or v == int(v) >= 1, "a number of steps, or a share of them below 1"),
    "save_steps": (lambda v: 0 < v < 1 or v == int(v) >= 1, "a number of steps, or a share of them below 1"),
    "eval_steps": (lambda v: 0 < v < 1 or v == int(v) >= 1, "a number of steps, or a share of them below 1"),
    "eval_delay": (lambda v: v >= 0, "a number of steps or epochs, at least 0"),
    "per_device_eval_batch_size": (lambda v: v >= 1, "at least 1"),
    "save_total_limit": (lambda v: v >= 1, "how many checkpoints are kept, at least 1"),
    "dataloader_num_workers": (lambda v: v >= 0, "at least 0"),
    "dataloader_prefetch_factor": (lambda v: v >= 1, "at least 1"),
    "torch_empty_cache_steps": (lambda v: v >= 1, "at least 1"),
}


def _mapping(name: str, text: str) -> dict[str, Any]:
    try:
        mapping = json.loads(text)
    except json.JSONDecodeError:
        mapping = None
    if not isinstance(mapping, dict):
        raise ValueError(f"--{name} {text!r} is no JSON mapping, such as '{{\"min_lr_rate\": 0.1}}'")
    return mapping


def check_scheduler(settings: Mapping[str, Any], learning_rate: float = 1.0) -> None:
    """ValueError where the scheduler of these flags cannot be made; some look at the learning rate."""
    kind = settings.get("lr_scheduler_type", "linear")
    if kind in ("reduce_lr_on_plateau", "greedy"):
        raise ValueError(f"--lr_scheduler_type {kind} is refused: {_NOT_CHECKED}")
    if "lr_scheduler_type" not in settings and "lr_scheduler_kwargs" not in settings:
        return
    import torch
    from transformers import get_scheduler

    some = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=learning_rate)
    try:
        get_scheduler(kind, some, 2, 10, settings.get("lr_scheduler_kwargs") or {})
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"--lr_scheduler_type {kind} with --lr_scheduler_kwargs {settings.get('lr_scheduler_kwargs')}: {error}; "
            "its arguments are a JSON mapping, such as '{\"min_lr_rate\": 0.1}'"
        ) from error


def reporters(given: str | Sequence[str]) -> list[str]:
    """Names from words and comma-separated lists; [] for none. ValueError for one that is unknown or not installed."""
    words = [given] if isinstance(given, str) else list(given)
    names = list(dict.fromkeys(part.strip() for word in words for part in word.split(",") if part.strip()))
    if not names or names == ["none"]:
        return []
    from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

    here = get_available_reporting_integrations()
    if names == ["all"]:
        return list(here)
    here = [*here, *(["flyte"] if find_spec("flytekit") else [])]  # transformers does not look for it
    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ValueError(f"--report_to {name}: choose from none, all, {', '.join(sorted(INTEGRATION_TO_CALLBACK))}")
        if name not in here:
            raise ValueError(f"--report_to {name}: its package is not installed here; install it, or leave {name} out")
    return names


def training_settings(given: Mapping[str, Any], chooses: bool = False) -> dict[str, Any]:
    """What of ``given`` changes the training and is no default: by it a run is known again.

    ``chooses``: evaluation decides which weights come out.
    """
    settings = {}
    for name, value in given.items():
        counts = name not in CHANGES_NO_TRAINING and (chooses or name not in EVALUATES)
        counts = counts and name != "per_device_eval_batch_size"  # a micro-batch: results do not depend on it
        if counts and value is not None and value != default_of(fields()[name]):
            settings[name] = getattr(value, "value", value)
    return settings
