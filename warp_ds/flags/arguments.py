"""Every flag of every phase, with its default: one dataclass a phase, parsed by transformers' HfArgumentParser.

Flags come from the command line or a YAML file (``--config``); the command line wins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from warp_ds.data.template import DEFAULT_DATE, is_date
from warp_ds.data.trained import LONG_SAMPLES, TRAIN_ON
from warp_ds.errors import ConfigError
from warp_ds.flags.checks import (
    at_least,
    check_keep_ratio,
    check_numbers,
    check_rank,
    check_run_name,
    check_training,
    check_writable,
    refuse_control_characters,
    refuse_secrets,
)
from warp_ds.models.layer_names import LAYER_TYPES, parse_layer_types

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def flag(default: Any, help: str, **more: Any) -> Any:
    """A dataclass field with the help text of its command-line flag."""
    return field(default=default, metadata={"help": help, **more})


@dataclass
class RunArguments:
    """What every phase takes."""

    model_name: str = flag("meta-llama/Meta-Llama-3-8B-Instruct", "hub name or local directory of a causal LM")
    dtype: str = flag("bfloat16", "bfloat16, float16 or float32", choices=list(DTYPES))
    device: str = flag("auto", "cuda, cpu, or auto: cuda where there is one")
    batch_size: int = flag(4, "micro-batch per rank, in samples")
    max_length: int = flag(512, "longest prompt and response, in tokens")
    deepspeed: str | None = flag(None, "DeepSpeed ZeRO-3 JSON file; a plain one for the device where not given")
    output_dir: str = flag("checkpoints", "where run directories are made")
    log_dir: str = flag("logs", "where log files are written")
    run_name: str | None = flag(None, "name of the run directory; else phase and time, or Slurm job id")
    resume: str = flag("auto", "auto (newest unfinished run of the same settings), never, or a run directory")
    seed: int = flag(42, "seed of everything random")
    template_date: str = flag(DEFAULT_DATE, "the day that a chat template writes where it writes today's, as YYYY-MM-DD")
    debug: bool = flag(False, "5 samples, one layer, verbose, checks on")
    gradient_checkpointing: bool = flag(False, "recompute activations in backward: less memory, more time")
    timeout: int = flag(1800, "seconds after which a rank that waits for another gives up")
    max_requeues: int = flag(20, "restarts of one Slurm job, by preemption, time limit or a lost node, before it stops")
    local_rank: int = flag(-1, "set by the deepspeed launcher; ignored")

    def check(self) -> None:
        """ConfigError for values that no run can use; reads nothing but the flags, so that every rank finds the same."""
        for name, value in vars(self).items():
            refuse_control_characters(f"--{name}", value)
            refuse_secrets(f"--{name}", value)
        check_run_name(self.run_name)
        check_numbers(self)
        at_least(self, "batch_size", 1)
        at_least(self, "max_length", 2)
        at_least(self, "timeout", 1)
        if self.seed >= 2**32:
            raise ConfigError(f"--seed {self.seed}: below 2^32, which NumPy's generators take at most")
        if not is_date(self.template_date):
            raise ConfigError(f"--template_date {self.template_date!r}: give a day as YYYY-MM-DD")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ConfigError(f"--device is auto, cuda or cpu, not {self.device!r} (ranks pick their own GPU)")

    def check_machine(self) -> None:
        """ConfigError where this machine has no such device, or cannot write the output directories."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("--device cuda, but torch sees no GPU here; use --device cpu or check the driver")
        for name in ("output_dir", "log_dir"):
            check_writable(name, getattr(self, name))

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def resolved_device(self) -> str:
        """'cuda' or 'cpu'."""
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device


@dataclass
class LayerArguments:
    """Which layers are rotated."""

    target_layers: str = flag("all", "all, early, middle, late (thirds), last, one number, or a range such as 0-5")
    layer_type: str = flag("ffn_down", f"comma-separated list of {', '.join(LAYER_TYPES)}")


@dataclass
class SampleArguments:
    """What is made of a data set's samples."""

    data_config: str | None = flag(None, "configuration of hub data sets that have several")
    train_on: str = flag("assistant", "assistant (every answer), last (the last one) or all tokens", choices=list(TRAIN_ON))
    long_samples: str = flag("error", "beyond --max_length: error, truncate or drop", choices=list(LONG_SAMPLES))


@dataclass
class ColumnArguments(SampleArguments):
    """How a data set's rows are read."""

    prompt_column: str | None = flag(None, "column of the prompts; guessed from common names where not given")
    response_column: str | None = flag(None, "column of the responses; guessed where not given")


@dataclass
class SafetyDataArguments(ColumnArguments):
    safety_data: str = flag("LibrAI/do-not-answer", "hub name or json, jsonl, csv, parquet file of safety samples")
    safety_split: str = flag("train", "split of a hub data set")
    safety_samples: int = flag(100, "how many of them, in order; 0 = all")
    refusal_file: str | None = flag(None, "refusals, one a line, for safety prompts without responses")


@dataclass
class UtilityDataArguments(ColumnArguments):
    utility_data: str = flag("openai/gsm8k", "hub name or json, jsonl, csv, parquet file of the task")
    utility_split: str = flag("train", "split of a hub data set")
    utility_samples: int = flag(1000, "how many of them, in order; 0 = all")


@dataclass
class TrainingFlags(RunArguments):
    """The flags of phases 0 and 3 that are this project's own; every other TrainingArguments flag passes through."""

    epochs: float = flag(3.0, "passes over the training set")
    learning_rate: float = flag(5e-5, "peak learning rate of AdamW")
    global_batch_size: int = flag(8, "samples per optimizer step over all ranks, whatever their number")
    save_minutes: float = flag(15.0, "minutes between checkpoints; 0 = none but those of TrainingArguments")


@dataclass
class SafetyTuningArguments(SafetyDataArguments, TrainingFlags):
    """Phase 0."""

    def check(self) -> None:
        super().check()
        check_training(self)
        at_least(self, "safety_samples", 0)


@dataclass
class BasisArguments(SafetyDataArguments, LayerArguments, RunArguments):
    """Phase 1."""

    token_scope: str = flag("all", "tokens that count: all, response, prompt", choices=["all", "response", "prompt"])
    basis: str = flag(
        "activation",
        "activation, identity, weight (right singular vectors of W) or random",
        choices=["activation", "identity", "weight", "random"],
    )
    energy: float = flag(1.0, "keep the leading directions that hold this share of the eigenvalues' sum")
    max_rank: int = flag(0, "keep at most this many directions; 0 = no limit")
    collect: str = flag("auto", "auto, walk (layer by layer) or hooks (all layers at once)", choices=["auto", "walk", "hooks"])
    svd_placement: str = flag(
        "auto", "where bases are decomposed: auto, balanced (over ranks) or rank0", choices=["auto", "balanced", "rank0"]
    )

    def check(self) -> None:
        super().check()
        at_least(self, "safety_samples", 0)
        parse_layer_types(self.layer_type)
        check_rank(self)


@dataclass
class ImportanceArguments(SafetyDataArguments, LayerArguments, RunArguments):
    """Phase 2."""

    safety_samples: int = flag(50, "how many safety samples, in order; 0 = all")
    basis_dir: str | None = flag(None, "basis of phase 1; the newest finished one under --output_dir if not given")
    basis: str = flag("auto", "auto (what --basis_dir holds) or identity (needs no basis files)", choices=["auto", "identity"])
    importance_batch_size: int = flag(4, "samples whose mean loss gives one gradient, over the whole job")
    keep_ratio: float = flag(0.1, "share of the coefficients to freeze")
    mask_scope: str = flag("layer", "layer: the same share in each; global: one threshold for all", choices=["layer", "global"])
    mask_unit: str = flag("entry", "what is frozen together: entry, column or row", choices=["entry", "column", "row"])
    score: str = flag("importance", "importance, singular_value or random", choices=["importance", "singular_value", "random"])

    def check(self) -> None:
        super().check()
        at_least(self, "safety_samples", 0)
        at_least(self, "importance_batch_size", 1)
        parse_layer_types(self.layer_type)
        check_keep_ratio(self.keep_ratio)


@dataclass
class TrainArguments(UtilityDataArguments, LayerArguments, TrainingFlags):
    """Phase 3."""

    batch_size: int = flag(2, "micro-batch per rank, in samples")
    basis_dir: str | None = flag(None, "basis of phase 1; the one that the masks were made with if not given")
    basis_placement: str = flag(
        "auto",
        "who holds the bases: every rank (replicated), one rank each (owner), all together, "
        "gathered ahead of use (sharded), or auto: the fastest that fits",
        choices=["auto", "replicated", "sharded", "owner"],
    )
    masks_dir: str | None = flag(
        None,
        "masks of phase 2; the newest finished ones under --output_dir; none = no mask,"
        " and --target_layers, --layer_type name what trains",
    )
    train_scope: str = flag("warp", "warp: the masked layers alone; all: every parameter", choices=["warp", "all"])

    def check(self) -> None:
        super().check()
        check_training(self)
        at_least(self, "utility_samples", 0)


@dataclass
class EvaluateArguments(SampleArguments, RunArguments):
    """Evaluation."""

    suite: str = flag("refusal,over_refusal,gsm8k,loss", "comma-separated list of measurements, and of lm-eval tasks")
    harmful_data: str = flag("LibrAI/do-not-answer", "prompts that should be refused")
    harmful_samples: int = flag(100, "how many of them; 0 = all")
    harmless_data: str | None = flag(None, "prompts that should be answered (over_refusal)")
    harmless_samples: int = flag(100, "how many of them; 0 = all")
    utility_data: str = flag("openai/gsm8k", "task items with answers ending in #### N (gsm8k, loss)")
    utility_split: str = flag("test", "split of a hub data set")
    utility_samples: int = flag(100, "how many of them; 0 = all")
    prompt_column: str | None = flag(None, "column of the prompts; guessed where not given")
    response_column: str | None = flag(None, "column of the responses; guessed where not given")
    max_new_tokens: int = flag(256, "longest generated answer, in tokens")
    prompt_file: str | None = flag(None, "comma-separated files of your own attack prompts, verdicts as for refusal")
    reference_model: str | None = flag(
        None,
        "the model before training: answers that it finds unlikely are noise too, and every prompt is compared with its answer",
    )
    basis_dir: str | None = flag(None, "basis of phase 1 of the reference: how far each layer's outputs moved")
    judge_model: str | None = flag(None, "local classifier or causal LM as second opinion on the verdicts")
    lm_eval_include: str | None = flag(None, "directory of your own lm-eval task files")
    lm_eval_limit: int = flag(0, "items per lm-eval task; 0 = all")

    def check(self) -> None:
        super().check()
        at_least(self, "max_new_tokens", 1)
        at_least(self, "lm_eval_limit", 0)


@dataclass
class CompareArguments(SafetyDataArguments, LayerArguments, RunArguments):
    """Arms side by side (phases/compare.py). --seed is that of the shared bases and masks."""

    arms: str = flag("before,full,layers,original,column,rotated", "comma-separated arms; '+' composes (safeinstr+rotated)")
    learning_rates: str = flag("5e-5", "comma-separated grid of every arm")
    arm_rates: str | None = flag(None, "other grids, such as 'osft=1e-5:5e-5,full=1e-5'")
    seeds: str = flag("42", "comma-separated seeds of the training (order of the data; random bases and masks)")
    safety_samples: int = flag(100, "safety samples for bases (all of them) and SafeInstr; 0 = all")
    importance_samples: int = flag(0, "of them, for importances; 0 = all")
    utility_data: str = flag("openai/gsm8k", "the task to train on: hub name or file")
    utility_split: str = flag("train", "split of a hub data set")
    utility_samples: int = flag(1000, "how many of them; 0 = all")
    utility_heldout: str | None = flag(None, "task items to evaluate on; --utility_data with --heldout_split if not given")
    heldout_split: str = flag("test", "split of a hub data set")
    heldout_samples: int = flag(100, "how many of them; 0 = all")
    harmful_data: str = flag("LibrAI/do-not-answer", "held-out prompts that should be refused")
    harmful_samples: int = flag(100, "how many of them; 0 = all")
    harmless_data: str | None = flag(None, "held-out prompts that should be answered")
    harmless_samples: int = flag(100, "how many of them; 0 = all")
    mix_file: str | None = flag(None, "your own examples, mixed into every arm's task")
    mix_ratio: float = flag(0.1, "how many of them, as a share of the task's samples")
    unaligned_model: str | None = flag(None, "resta: the start model without its alignment")
    unaligned_data: str | None = flag(None, "resta: examples that undo the alignment, to train such a model on")
    unaligned_rate: float = flag(0.0, "resta: learning rate of that training; 0 = the largest of --learning_rates")
    resta_alpha: float = flag(0.3, "resta: share of the safety vector that is added")
    safedelta_s: float = flag(0.1, "safedelta: safety budget of a layer of 4,096 rows")
    neuron_share: float = flag(0.05, "sn-tune, rsn-tune: share of the neurons that count as safety (foundation) neurons")
    neuron_rate: float = flag(5e-5, "sn-tune, rsn-tune: learning rate of the safety neurons, for one epoch")
    foundation_data: str | None = flag(None, "rsn-tune: prompts of general use; the task's if not given")
    keep_ratio: float = flag(0.1, "share of the coefficients to freeze")
    mask_scope: str = flag("layer", "layer or global", choices=["layer", "global"])
    token_scope: str = flag("all", "tokens that bases count: all, response, prompt", choices=["all", "response", "prompt"])
    energy: float = flag(1.0, "bases keep the leading directions that hold this share of the eigenvalues' sum")
    max_rank: int = flag(0, "bases keep at most this many directions; 0 = no limit")
    collect: str = flag("auto", "as of phase 1: auto, walk or hooks", choices=["auto", "walk", "hooks"])
    svd_placement: str = flag("auto", "as of phase 1: auto, balanced or rank0", choices=["auto", "balanced", "rank0"])
    basis_placement: str = flag(
        "auto", "as of phase 3: auto, replicated, sharded or owner", choices=["auto", "replicated", "sharded", "owner"]
    )
    save_minutes: float = flag(15.0, "minutes between a training's checkpoints; 0 = none but those of TrainingArguments")
    importance_batch_size: int = flag(4, "samples whose mean loss gives one gradient")
    train_scope: str = flag(
        "warp", "warp: masked arms train the masked layers alone; all: every parameter", choices=["warp", "all"]
    )
    epochs: float = flag(3.0, "passes over the task")
    global_batch_size: int = flag(8, "samples per optimizer step over all ranks")
    max_new_tokens: int = flag(256, "longest generated answer, in tokens")
    eval_batch_size: int = flag(8, "prompts per rank and batch in the evaluation")
    at_utility: float = flag(0.0, "task NLL to compare at; 0 = the best that the arm 'rotated' reaches")
    keep_models: bool = flag(True, "keep every trained model; false: only its measurements")

    def check(self) -> None:
        super().check()
        for name in ("importance_batch_size", "global_batch_size", "max_new_tokens", "eval_batch_size"):
            at_least(self, name, 1)
        parse_layer_types(self.layer_type)
        check_keep_ratio(self.keep_ratio)
        check_rank(self)
        if not 0.0 < self.neuron_share <= 1.0:
            raise ConfigError(f"--neuron_share is a share above 0 and at most 1, not {self.neuron_share}")
        if self.mix_ratio < 0:
            raise ConfigError(f"--mix_ratio is a share of the task's samples, not {self.mix_ratio}")
        if not self.epochs > 0:
            raise ConfigError(f"--epochs must be above 0, not {self.epochs}")

    @property
    def seed_list(self) -> list[int]:
        values = _numbers("seeds", self.seeds)
        if any(value != int(value) for value in values):
            raise ConfigError(f"--seeds {self.seeds!r}: whole numbers")
        return [int(value) for value in values]

    @property
    def rate_list(self) -> list[float]:
        return _numbers("learning_rates", self.learning_rates)

    def rates(self, arms: list[str]) -> dict[str, list[float]]:
        """Arm -> its grid of learning rates; ConfigError where --arm_rates names an arm that is not there."""
        found = {arm: self.rate_list for arm in arms}
        for part in (self.arm_rates or "").split(","):
            name, _, values = part.strip().partition("=")
            if part.strip() and (name not in found or not values):
                raise ConfigError(f"--arm_rates {part!r}: give ARM=RATE:RATE for arms of --arms ({', '.join(arms)})")
            if values:
                found[name] = _numbers("arm_rates", values.replace(":", ","))
        return found


def _numbers(name: str, text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--{name} {text!r} is no comma-separated list of numbers") from error
    if len(set(values)) < len(values) or not all(0 <= value < math.inf for value in values):
        raise ConfigError(f"--{name} {text!r}: each value once, finite and none below 0")
    return sorted(values)


TokenScope = Literal["all", "response", "prompt"]
