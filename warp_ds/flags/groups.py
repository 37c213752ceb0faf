"""The flags that several phases have, in groups: each is said here and nowhere else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from warp_ds.data.template import DEFAULT_DATE, is_date
from warp_ds.data.trained import LONG_SAMPLES, TRAIN_ON
from warp_ds.errors import ConfigError
from warp_ds.flags.checks import (
    FLOOR,
    at_least,
    check_numbers,
    check_run_name,
    check_writable,
    refuse_control_characters,
    refuse_secrets,
)
from warp_ds.flags.flag import again, default_of, flag, samples
from warp_ds.models.layer_names import KNOWN_TYPES, parse_layer_types

if TYPE_CHECKING:
    import torch

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Name -> bytes of an entry."""


@dataclass
class RunArguments:
    """What every phase takes."""

    model_name: str = flag("meta-llama/Meta-Llama-3-8B-Instruct", "hub name or local directory of a causal LM", reads="model")
    dtype: str = flag("bfloat16", "bfloat16, float16 or float32", choices=DTYPE_BYTES)
    device: str = flag("auto", "cuda, cpu, or auto: cuda where there is one", identity=False)
    batch_size: int = flag(4, "micro-batch per rank, in samples", identity=False)
    max_length: int = flag(512, "longest prompt and response, in tokens")
    deepspeed: str | None = flag(
        None,
        "DeepSpeed ZeRO-3 JSON file, or the name of one that comes along (zero3_70b); a plain one where not given",
        identity=False,
    )
    output_dir: str = flag("checkpoints", "where run directories are made", identity=False, own=True)
    log_dir: str = flag("logs", "where log files are written", identity=False, own=True)
    run_name: str | None = flag(
        None, "name of the run directory; else phase and time, or Slurm job id", identity=False, own=True
    )
    resume: str = flag(
        "auto", "auto (newest unfinished run of the same settings), never, or a run directory", identity=False, own=True
    )
    seed: int = flag(42, "seed of everything random")
    template_date: str = flag(DEFAULT_DATE, "the day that a chat template writes where it writes today's, as YYYY-MM-DD")
    debug: bool = flag(False, "5 samples, one layer, verbose, checks on", identity=False, own=True)
    gradient_checkpointing: bool = flag(False, "recompute activations in backward: less memory, more time", identity=False)
    timeout: int = flag(1800, "seconds after which a rank that waits for another gives up", identity=False)
    max_requeues: int = flag(
        20, "restarts of one Slurm job, by preemption, time limit or a lost node, before it stops", identity=False, own=True
    )
    local_rank: int = flag(-1, "set by the deepspeed launcher; ignored", identity=False, own=True)

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
        if self.device == "cuda" and not _gpu_here():
            raise ConfigError("--device cuda, but torch sees no GPU here; use --device cpu or check the driver")
        for name in ("output_dir", "log_dir"):
            check_writable(name, getattr(self, name))

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def resolved_device(self) -> str:
        """'cuda' or 'cpu'."""
        return ("cuda" if _gpu_here() else "cpu") if self.device == "auto" else self.device


def _gpu_here() -> bool:
    import torch

    return torch.cuda.is_available()


@dataclass
class LayerArguments:
    """Which layers are rotated."""

    target_layers: str = flag(
        "all", "all, early, middle, late (thirds), last, a number, a range, or a list such as 0-5,12,20-31", debug="last"
    )
    layer_type: str = flag("ffn_down", f"comma-separated list of {', '.join(KNOWN_TYPES)}")


@dataclass
class SampleArguments:
    """What is made of a data set's samples."""

    data_config: str | None = flag(None, "configuration of the hub data set; where there are several data sets, of the task's")
    train_on: str = flag("assistant", "assistant (every answer), last (the last one) or all tokens", choices=TRAIN_ON)
    long_samples: str = flag("error", "beyond --max_length: error, truncate or drop", choices=LONG_SAMPLES)
    streaming: bool = flag(False, "read hub data sets row by row, without a copy of the whole set on disk", identity=False)
    num_proc: int = flag(
        0, "processes that tokenise, once for all ranks; 0 = as many as there are cores and help", identity=False
    )


@dataclass
class ColumnArguments(SampleArguments):
    """How a data set's rows are read."""

    prompt_column: str | None = flag(None, "column of the prompts; guessed from common names where not given")
    response_column: str | None = flag(None, "column of the responses; guessed where not given")


@dataclass
class SafetyDataArguments(ColumnArguments):
    """The texts that say what must stay: refusals, tool calls, a format, a language. Each flag has two names."""

    safety_data: str = flag(
        "LibrAI/do-not-answer",
        "examples of what must stay: hub name or json, jsonl, csv, parquet file; several behaviours by commas",
        reads="data",
        alias="keep_data",
    )
    safety_split: str = flag("train", "split of a hub data set", alias="keep_split")
    safety_samples: int = samples(100, "how many of them, in order, of all behaviours together; 0 = all", alias="keep_samples")
    refusal_file: str | None = flag(None, "refusals, one a line, for safety prompts without responses", reads="text")


@dataclass
class UtilityDataArguments(ColumnArguments):
    """The task to train on."""

    utility_data: str = flag("openai/gsm8k", "hub name or json, jsonl, csv, parquet file of the task", reads="data")
    utility_split: str = flag("train", "split of a hub data set")
    utility_samples: int = samples(1000, "how many of them, in order; 0 = all")


@dataclass
class HeldOutArguments:
    """The prompts to evaluate on."""

    harmful_data: str = flag("LibrAI/do-not-answer", "held-out prompts that should be refused", reads="data")
    harmful_samples: int = samples(100, "how many of them; 0 = all")
    harmless_data: str | None = flag(None, "held-out prompts that should be answered (over_refusal)", reads="data")
    harmless_samples: int = samples(100, "how many of them; 0 = all")
    kept_data: str | None = flag(
        None, "comma-separated files of held-out examples, one for each behaviour: how many are answered so", reads="files"
    )
    kept_format: list[str] = flag(
        [], "NAME=REGEX: answers to NAME.jsonl of --kept_data that match as a whole are kept; else refusals, or the same text"
    )
    max_new_tokens: int = flag(256, "longest generated answer, in tokens")


@dataclass
class BasisFlags:
    """How bases are made."""

    token_scope: str = flag("all", "tokens that count: all, response, prompt", choices=("all", "response", "prompt"))
    energy: float = flag(1.0, "keep the leading directions that hold this share of the eigenvalues' sum")
    max_rank: int = flag(0, "keep at most this many directions; 0 = no limit")
    expert_basis: str = flag(
        "block",
        "basis of what experts' gates and ups are given: block (one, of all its tokens) or expert (each of those that are "
        "routed to it); down projections have one each",
        choices=("block", "expert"),
    )
    collect: str = flag(
        "auto", "auto, walk (layer by layer) or hooks (all layers at once)", choices=("auto", "walk", "hooks"), identity=False
    )
    svd_placement: str = flag(
        "auto",
        "where bases are decomposed: auto, balanced (over ranks) or rank0",
        choices=("auto", "balanced", "rank0"),
        identity=False,
    )


@dataclass
class MaskFlags:
    """What of the coefficients is frozen."""

    importance_batch_size: int = flag(4, "samples whose mean loss gives one gradient, over the whole job")
    keep_ratio: float = flag(0.1, "share of the coefficients to freeze")
    keep_shares: str = flag(
        "even",
        "of several behaviours in --keep_data: even (each an equal part of --keep_ratio), comma-separated shares of the "
        "coefficients, one for each (in place of --keep_ratio), or mixed (one mask of all examples together)",
    )
    mask_scope: str = flag(
        "layer",
        "layer: the same share in each; block: in each block's experts of a type together; global: one threshold for all",
        choices=("layer", "block", "global"),
    )


@dataclass
class ProductFlags(RunArguments):
    """How products of what is rounded to the model's 16 bits anyway are taken."""

    products: str = flag(
        "auto",
        "how scores, gradients in C and weights of C are multiplied: exact (fp32), split (three products of bf16 parts), tf32, "
        "or auto: split where bf16 models are on a GPU, else exact",
        choices=("auto", "exact", "split", "tf32"),
    )

    def check(self) -> None:
        super().check()
        if self.products in ("split", "tf32") and self.dtype != "bfloat16":
            raise ConfigError(
                f"--products {self.products} rounds more coarsely than {self.dtype} weights may be: leave it out, or give "
                "--dtype bfloat16"
            )


@dataclass
class ScheduleFlags:
    """How long and how often; every other TrainingArguments flag passes through."""

    epochs: float = flag(3.0, "passes over the training set")
    global_batch_size: int = flag(8, "samples per optimizer step over all ranks, whatever their number")
    save_minutes: float = flag(
        15.0, "minutes between a training's checkpoints; 0 = none but those of TrainingArguments", identity=False
    )


@dataclass
class PackingFlags(RunArguments):
    """How samples become rows of a micro-batch."""

    packing: bool = flag(
        False, "several samples in a row, kept apart; --batch_size counts rows of at most --max_length tokens", identity=False
    )
    tokens_per_batch: int = flag(
        0, "micro-batch per rank in tokens, with --packing; 0 = --batch_size rows of --max_length", identity=False
    )

    def check(self) -> None:
        super().check()
        if self.tokens_per_batch and not self.packing:
            raise ConfigError("--tokens_per_batch counts tokens of packed rows: give --packing too")
        if 0 < self.tokens_per_batch < self.max_length:
            raise ConfigError(
                f"--tokens_per_batch {self.tokens_per_batch} is less than --max_length {self.max_length}, which one sample "
                "may have"
            )


@dataclass
class PublishFlags:
    """Where a finished run goes."""

    push_to_hub: str | None = flag(
        None,
        "OWNER/NAME on the hub for the finished run: its model, or its data set OWNER/NAME-basis or -masks",
        identity=False,
        own=True,
    )
    hub_private_repo: bool = flag(
        True, "a repository that --push_to_hub makes is private; false: everybody's", identity=False, own=True
    )


@dataclass
class WatchingFlags:
    """What a training is evaluated on in between, as often as --eval_strategy says."""

    eval_data: str | None = flag(None, "held-out samples, whose loss (eval_loss) is logged during training", reads="data")
    eval_split: str = flag("test", "split of a hub data set")
    eval_samples: int = samples(200, "how many of them, in order; 0 = all")
    eval_safety: str | None = flag(
        None, "held-out prompts that should be refused: the rate of refusals is logged during training", reads="data"
    )
    eval_safety_samples: int = samples(20, "how many of them, in order; 0 = all")
    max_new_tokens: int = again(HeldOutArguments, "max_new_tokens", 128)
    early_stopping_patience: int = flag(0, "evaluations in a row without a better metric that end training; 0 = never")

    @property
    def watches(self) -> bool:
        """Whether anything is evaluated during training."""
        return self.eval_data is not None or self.eval_safety is not None


#: Adapters that are asked for by their names, and why they are none of ours.
_NO_ADAPTERS = {
    "dora": "DoRA scales whole rows of W + s B A, so that W moves in every direction and nothing is kept",
    "qlora": "QLoRA's base is quantised, so its weights are not those that masks are made for (WarpCallback refuses it too)",
}


@dataclass
class LoraFlags:
    """A LoRA adapter's sizes: W' = W + (alpha / r) B A."""

    lora_r: int = flag(16, "LoRA: rank r of A and B")
    lora_alpha: int = flag(32, "LoRA: alpha; W' = W + (alpha / r) B A")
    lora_dropout: float = flag(0.05, "LoRA: dropout before A")
    lora_rslora: bool = flag(False, "LoRA: scale by alpha / sqrt(r) (rsLoRA)")

    def check_lora(self) -> None:
        at_least(self, "lora_r", 1)
        if not self.lora_alpha > 0 or not 0 <= self.lora_dropout < 1:
            raise ConfigError(
                f"--lora_alpha {self.lora_alpha} is above 0, --lora_dropout {self.lora_dropout} from 0 to below 1"
            )


@dataclass
class AdapterFlags(LoraFlags):
    """Whether weights train, or a LoRA adapter on them."""

    adapter: str = flag("none", "none: the weights themselves train; lora: a LoRA adapter on them, which is what is written")
    lora_layers: str | None = flag(
        None, "LoRA: layer types with an adapter, as --layer_type; the masked layers where not given, all types without masks"
    )
    merge_adapter: bool = flag(False, "LoRA: also write the merged model, as model/")

    def check_adapter(self) -> None:
        if self.adapter in _NO_ADAPTERS:
            raise ConfigError(f"--adapter {self.adapter} is not supported: {_NO_ADAPTERS[self.adapter]}; use lora")
        if self.adapter not in ("none", "lora"):
            raise ConfigError(f"--adapter is none or lora, not {self.adapter!r}")
        if self.adapter == "none":
            changed = [f.name for f in dataclasses.fields(AdapterFlags) if getattr(self, f.name) != default_of(f)]
            if changed:
                raise ConfigError(f"--{changed[0]} is of an adapter: give --adapter lora too")
            return
        self.check_lora()
        if self.lora_layers is not None:
            parse_layer_types(self.lora_layers)
        elif getattr(self, "masks_dir", None) == "none" and getattr(self, "layer_type", None) != LayerArguments.layer_type:
            raise ConfigError("--layer_type says nothing of an adapter without masks: name its layers with --lora_layers")
        if getattr(self, "train_scope", "warp") == "all":
            raise ConfigError("--train_scope all trains every parameter: with --adapter lora the adapter alone trains")


@dataclass
class TrainingFlags(AdapterFlags, WatchingFlags, ScheduleFlags, PackingFlags):
    """The flags of phases 0 and 3 that are this project's own."""

    learning_rate: float = flag(5e-5, "peak learning rate of AdamW")


@dataclass
class MaskedTrainingFlags:
    """What trains, and who holds its bases."""

    basis_placement: str = flag(
        "auto",
        "who holds the bases: every rank (replicated), one rank each (owner), all together, "
        "gathered ahead of use (sharded), or auto: the fastest that fits",
        choices=("auto", "replicated", "sharded", "owner"),
        identity=False,
    )
    train_scope: str = flag("warp", "warp: the masked layers alone; all: every parameter", choices=("warp", "all"))


@dataclass
class ArmFlags:
    """What is laid side by side."""

    arms: str = flag(
        "before,full,layers,original,column,rotated", "comma-separated arms; '+' composes (safeinstr+rotated)", identity=False
    )
    learning_rates: str = flag("5e-5", "comma-separated grid of every arm", identity=False)
    arm_rates: str | None = flag(None, "other grids, such as 'osft=1e-5:5e-5,full=1e-5'", identity=False)
    seeds: str = flag("42", "comma-separated seeds of the training (order of the data; random bases and masks)", identity=False)
    at_utility: float = flag(0.0, "task NLL to compare at; 0 = the best that the arm 'rotated' reaches", identity=False)
    floor: float = flag(FLOOR, "share of the start model's refusals that a recommended arm must keep", identity=False)
