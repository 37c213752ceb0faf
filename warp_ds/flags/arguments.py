"""Every flag of every phase, with its default: one dataclass a phase, parsed by transformers' HfArgumentParser.

Flags come from the command line or a YAML file (``--config``); the command line wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from warp_ds.data.template import DEFAULT_DATE, is_date
from warp_ds.errors import ConfigError
from warp_ds.flags import training_arguments
from warp_ds.names import control_character, problem_of_name
from warp_ds.secrets import holds_secret, redact

Arguments = TypeVar("Arguments", bound="RunArguments")

LAYER_TYPES = ("ffn_down", "ffn_up", "ffn_gate", "attn_q", "attn_k", "attn_v", "attn_o")
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
        _check_numbers(self)
        _at_least(self, "batch_size", 1)
        _at_least(self, "max_length", 2)
        _at_least(self, "timeout", 1)
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
            _check_writable(name, getattr(self, name))

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
class ColumnArguments:
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
        _check_training(self)
        _at_least(self, "safety_samples", 0)


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
    collect: str = flag("auto", "auto, walk (layer by layer) or hooks (all layers at once)",
                         choices=["auto", "walk", "hooks"])
    svd_placement: str = flag("auto", "where bases are decomposed: auto, balanced (over ranks) or rank0",
                               choices=["auto", "balanced", "rank0"])

    def check(self) -> None:
        super().check()
        _at_least(self, "safety_samples", 0)
        parse_layer_types(self.layer_type)
        _check_rank(self)


@dataclass
class ImportanceArguments(SafetyDataArguments, LayerArguments, RunArguments):
    """Phase 2."""

    safety_samples: int = flag(50, "how many safety samples, in order; 0 = all")
    basis_dir: str | None = flag(None, "basis of phase 1; the newest finished one under --output_dir if not given")
    basis: str = flag("auto", "auto (what --basis_dir holds) or identity (needs no basis files)",
                       choices=["auto", "identity"])
    importance_batch_size: int = flag(4, "samples whose mean loss gives one gradient, over the whole job")
    keep_ratio: float = flag(0.1, "share of the coefficients to freeze")
    mask_scope: str = flag("layer", "layer: the same share in each; global: one threshold for all",
                            choices=["layer", "global"])
    mask_unit: str = flag("entry", "what is frozen together: entry, column or row",
                           choices=["entry", "column", "row"])
    score: str = flag("importance", "importance, singular_value or random",
                       choices=["importance", "singular_value", "random"])

    def check(self) -> None:
        super().check()
        _at_least(self, "safety_samples", 0)
        _at_least(self, "importance_batch_size", 1)
        parse_layer_types(self.layer_type)
        check_keep_ratio(self.keep_ratio)


@dataclass
class TrainArguments(UtilityDataArguments, LayerArguments, TrainingFlags):
    """Phase 3."""

    batch_size: int = flag(2, "micro-batch per rank, in samples")
    basis_dir: str | None = flag(None, "basis of phase 1; the one that the masks were made with if not given")
    basis_placement: str = flag("auto", "who holds the bases: every rank (replicated), one rank each (owner), all together, "
                                        "gathered ahead of use (sharded), or auto: the fastest that fits",
                                choices=["auto", "replicated", "sharded", "owner"])
    masks_dir: str | None = flag(None, "masks of phase 2; the newest finished ones under --output_dir; none = no mask,"
                                    " and --target_layers, --layer_type name what trains")
    train_scope: str = flag("warp", "warp: the masked layers alone; all: every parameter", choices=["warp", "all"])

    def check(self) -> None:
        super().check()
        _check_training(self)
        _at_least(self, "utility_samples", 0)


@dataclass
class EvaluateArguments(RunArguments):
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
    reference_model: str | None = flag(None, "the model before training: answers that it finds unlikely are noise too,"
                                          " and every prompt is compared with its answer")
    basis_dir: str | None = flag(None, "basis of phase 1 of the reference: how far each layer's outputs moved")
    judge_model: str | None = flag(None, "local classifier or causal LM as second opinion on the verdicts")
    lm_eval_include: str | None = flag(None, "directory of your own lm-eval task files")
    lm_eval_limit: int = flag(0, "items per lm-eval task; 0 = all")

    def check(self) -> None:
        super().check()
        _at_least(self, "max_new_tokens", 1)
        _at_least(self, "lm_eval_limit", 0)


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
    basis_placement: str = flag("auto", "as of phase 3: auto, replicated, sharded or owner",
                                choices=["auto", "replicated", "sharded", "owner"])
    save_minutes: float = flag(15.0, "minutes between a training's checkpoints; 0 = none but those of TrainingArguments")
    importance_batch_size: int = flag(4, "samples whose mean loss gives one gradient")
    train_scope: str = flag("warp", "warp: masked arms train the masked layers alone; all: every parameter",
                             choices=["warp", "all"])
    epochs: float = flag(3.0, "passes over the task")
    global_batch_size: int = flag(8, "samples per optimizer step over all ranks")
    max_new_tokens: int = flag(256, "longest generated answer, in tokens")
    eval_batch_size: int = flag(8, "prompts per rank and batch in the evaluation")
    at_utility: float = flag(0.0, "task NLL to compare at; 0 = the best that the arm 'rotated' reaches")
    keep_models: bool = flag(True, "keep every trained model; false: only its measurements")

    def check(self) -> None:
        super().check()
        for name in ("importance_batch_size", "global_batch_size", "max_new_tokens", "eval_batch_size"):
            _at_least(self, name, 1)
        parse_layer_types(self.layer_type)
        check_keep_ratio(self.keep_ratio)
        _check_rank(self)
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
#: Flags that do not change what a run computes: two runs that differ in these alone may resume one another.
NOT_IDENTITY = ("output_dir", "log_dir", "run_name", "resume", "debug", "device", "timeout", "local_rank", "deepspeed",
                "save_minutes", "max_requeues", "arms", "learning_rates", "arm_rates", "seeds", "at_utility",
                "keep_models", "batch_size", "eval_batch_size", "gradient_checkpointing", "basis_placement", "collect",
                "svd_placement")
#: Of what lies on this machine's disks, a run knows the contents (``start_run``'s fingerprints), whatever the path.
BY_CONTENT = ("model_name", "safety_data", "utility_data", "utility_heldout", "harmful_data", "harmless_data", "refusal_file",
              "basis_dir", "masks_dir", "reference_model", "judge_model", "unaligned_model", "unaligned_data", "mix_file",
              "foundation_data", "prompt_file")


class FlagParser(HfArgumentParser):
    """Dataclasses to flags, whole names only; what is wrong with a flag is a ConfigError."""

    def __init__(self, kinds: Any, **more: Any):
        super().__init__(kinds, allow_abbrev=False, **more)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        refuse_words(words)
        return super().parse_known_args(words, namespace)


def refuse_words(words: Sequence[str]) -> None:
    """ConfigError, naming the flag, for a word of a command line that holds a control character or a secret."""
    flag = "the command line"
    for word in words:
        if word.startswith("--"):
            flag = word.split("=")[0] if not control_character(word.split("=")[0]) else "a flag"
        refuse_control_characters(flag, word)
        refuse_secrets(flag, word.removeprefix(f"{flag}="))


def refuse_secrets(what: str, value: Any) -> None:
    """ConfigError where ``value`` (of the flag ``what``) holds what looks like a token, a password or a key."""
    if not str(value).startswith("--") and holds_secret(value, what.removeprefix("--")):
        raise ConfigError(f"{redact(what)} holds what looks like a token, a password or a key: the command line is seen by "
                          "every user of the machine, and stored with the run. Leave it out, and give it in the environment "
                          "(HF_TOKEN, say, or `hf auth login`), which jobs inherit")


def refuse_control_characters(what: str, value: Any) -> None:
    """ConfigError where ``value`` (of the flag ``what``), or anything in it, holds a line end or another control character."""
    if found := control_character(value):
        raise ConfigError(f"{what} holds the character {found}, a line end or another control character, which no value of "
                          f"this program has: {ascii(value)[:120]}")


def check_run_name(name: str | None) -> None:
    """ConfigError for a --run_name that is no plain name of a directory."""
    if name is not None and (problem := problem_of_name(name)):
        raise ConfigError(f"--run_name {ascii(name)[:120]}: {problem}; --output_dir says where runs lie")


CONFIG_HELP = "--config FILE reads flags from a YAML file, such as 'keep_ratio: 0.1'; those on the command line win."
PASSED_HELP = ("Flags of transformers' TrainingArguments are taken too, such as --lr_scheduler_type cosine --warmup_steps 50 "
               f"--report_to tensorboard wandb: {', '.join(sorted(training_arguments.WORKS))}.")


def parse_arguments(kind: type[Arguments], argv: list[str] | None = None) -> Arguments:
    """The flags of one phase; ConfigError for one that it does not have."""
    arguments, rest = _parse(kind, argv, CONFIG_HELP, [kind])
    if rest:
        raise unknown_flags(rest, names_of(kind))
    return arguments


def parse_training(kind: type[Arguments], argv: list[str] | None = None) -> tuple[Arguments, dict[str, Any]]:
    """The flags of phase 0 or 3, and what else of transformers' TrainingArguments was given (name -> value)."""
    arguments, rest = _parse(kind, argv, f"{CONFIG_HELP} {PASSED_HELP}", [TrainingArguments, kind])
    return arguments, _passed(rest, kind)


def _passed(rest: list[str], kind: type[Arguments]) -> dict[str, Any]:
    """The TrainingArguments in ``rest``; ConfigError for what is unknown, refused, or has no effect here."""
    if not rest:
        return {}
    kept: list[str] = []
    unknown: list[str] = []
    problems: list[str] = []
    for words in grouped(rest):
        name = words[0].lstrip("-").replace("-", "_")
        field = name if name in training_arguments.FIELDS else name.removeprefix("no_")
        value = words[1:] if field == name else ["false"]
        if hasattr(kind, "arms") and (instead := DECIDED_BY_ARMS.get(name)):
            problems.append(f"--{name} is decided by {instead}")
        elif not words[0].startswith("--") or field not in training_arguments.FIELDS:
            unknown += words
        elif field in training_arguments.WORKS:
            kept += words
        elif reason := training_arguments.why_refused(field, value):
            problems.append(reason)
    if unknown:
        raise unknown_flags(unknown, [*names_of(kind), *training_arguments.WORKS])
    if problems:
        raise ConfigError("; ".join(problems))
    passed = FlagParser(TrainingArguments)
    training_arguments.several_words(passed)
    for action in passed._actions:
        action.default, action.required = argparse.SUPPRESS, False
    found, more = passed.parse_known_args(kept)
    if more:
        raise unknown_flags(more, names_of(kind))
    try:
        return training_arguments.settle(vars(found))
    except ValueError as error:
        raise ConfigError(str(error)) from error


#: Flags of the phases that a comparison and a sweep do not take, and what decides them there.
DECIDED_BY_ARMS = {
    "basis": "--arms (original, osft, random-basis), and --bases of a sweep",
    "mask_unit": "--arms (column), and --units of a sweep", "score": "--arms (osft, random-mask)",
    "basis_dir": "the comparison, which makes its own bases", "masks_dir": "the comparison, which makes its own masks",
}


def grouped(words: Sequence[str]) -> list[list[str]]:
    """Each flag with its values: ['--a=1', '--b', '2', '3'] -> [['--a', '1'], ['--b', '2', '3']]. Words before the first flag
    are groups by themselves."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") and word != "--":
            groups.append(word.split("=", 1))
        elif groups and groups[-1][0].startswith("--"):
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def _parse(
    kind: type[Arguments], argv: list[str] | None, epilog: str, kinds: Sequence[Any]
) -> tuple[Arguments, list[str]]:
    """The flags of ``kind``, and the words that belong to none of them; a configuration file may have those of ``kinds``."""
    parser = FlagParser(kind, description=kind.__doc__, epilog=epilog)
    arguments, rest = parser.parse_args_into_dataclasses(
        args=_with_config_file(argv, kinds), look_for_args_file=False, return_remaining_strings=True
    )
    return arguments, rest


def names_of(kind: Any) -> list[str]:
    """The flags of a dataclass, without dashes; and --config."""
    return [*(f.name for f in dataclasses.fields(kind) if f.init), "config"]


def unknown_flags(words: Sequence[str], known: Iterable[str]) -> ConfigError:
    """The error that names the flags in ``words``, each with the nearest of ``known``."""
    known = list(known)
    found = []
    for name in (word.split("=")[0] for word in words if word.startswith("-")):
        near = difflib.get_close_matches(name.lstrip("-").replace("-", "_").lower(), known, n=1)
        found.append(f"unknown flag {name}: " + (f"did you mean --{near[0]}?" if near else "--help lists all"))
    return ConfigError("; ".join(found) or f"{words[0]!r} belongs to no flag: --help lists all")


def _with_config_file(argv: list[str] | None, kinds: Sequence[Any]) -> list[str]:
    """Puts the flags of ``--config FILE`` (YAML mapping of the names of ``kinds``' fields to values) before the others."""
    parser = FlagParser([], add_help=False)
    parser.add_argument("--config", metavar="FILE")
    found, argv = parser.parse_known_args(argv)
    if found.config is None:
        return argv
    path = Path(found.config)
    try:
        # Composed and not loaded: every value stays as it is written, where YAML would make 34 of 042 and a day of 2021-05-03.
        top = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(top, yaml.MappingNode):
        raise ConfigError(f"--config {path} must be a mapping of flag names to values, such as 'keep_ratio: 0.1'")
    fields = {f.name: f for kind in kinds for f in reversed(dataclasses.fields(kind)) if f.init}
    flags: list[str] = []
    lines: dict[str, int] = {}
    for key, value in top.value:
        where = f"--config {path}, line {key.start_mark.line + 1}"
        name = _yaml_text(key, where).replace("-", "_")
        if name.startswith("_"):
            raise ConfigError(f"{where}: {key.value!r}: write names without dashes before them, such as 'keep_ratio: 0.1'")
        if isinstance(value, yaml.MappingNode):
            _yaml_text(value, f"{where}: {name}")
        if name in lines:
            raise ConfigError(f"{where}: {name} stands there twice (line {lines[name]}, too): keep one of them")
        if name not in fields:
            raise ConfigError(f"{where}: {unknown_flags(['--' + name], fields)}")
        lines[name] = key.start_mark.line + 1
        flags += _flags_of(name, value, fields[name], where)
    return flags + argv


_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value")}


def _yaml_text(node: Any, where: str) -> str:
    """A scalar as it is written."""
    if isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN:
        return str(node.value)
    what = {"MappingNode": "a nested mapping", "SequenceNode": "a list"}.get(type(node).__name__, f"a {node.tag}")
    raise ConfigError(f"{where}: {what} where one value belongs: flags are one name and one value a line, without groups; a "
                      "flag that takes JSON has it in quotes")


def _flags_of(name: str, node: Any, field: Any, where: str) -> list[str]:
    """The words of one flag of a configuration file; none for null, which means that it is not given."""
    if isinstance(node, yaml.SequenceNode):
        items = [_yaml_text(item, f"{where}: {name}") for item in node.value]
        if any(item.tag.endswith(":null") for item in node.value) or not items:
            raise ConfigError(f"{where}: {name} is an empty list, or has an empty item: give its values, or leave it out")
        if "comma-separated" in str(field.metadata.get("help")):
            return [f"--{name}={','.join(items)}"]
        if "list" not in str(field.type):
            raise ConfigError(f"{where}: {name} takes one value, not a list")
        dashed = [item for item in items if item.startswith("-")]
        if dashed:
            raise ConfigError(f"{where}: {name} holds {dashed[0]!r}, which would be another flag")
        return [f"--{name}", *items]
    text = _yaml_text(node, f"{where}: {name}")
    if node.tag.endswith(":null"):
        return []
    if node.tag.endswith(":bool") and "bool" in str(field.type):
        text = {"on": "true", "off": "false"}.get(text.lower(), text)
    return [f"--{name}={text}"]


def parse_layer_types(text: str) -> list[str]:
    """'ffn_down,attn_q' -> ['ffn_down', 'attn_q'], in the order of LAYER_TYPES; ConfigError for an unknown one."""
    given = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in given if part not in LAYER_TYPES]
    if unknown or not given:
        raise ConfigError(f"--layer_type {text!r}: choose from {', '.join(LAYER_TYPES)}")
    return [kind for kind in LAYER_TYPES if kind in given]


def parse_target_layers(text: str, depth: int) -> range:
    """The blocks that ``--target_layers`` names in a model of ``depth`` blocks, as a range.

    Thirds of 32 are 0-10, 11-21, 22-31, as in the original. ConfigError for anything outside the model.
    """
    cut = -(-depth // 3)
    named = {
        "all": range(depth),
        "early": range(0, cut),
        "middle": range(cut, min(2 * cut, depth)),
        "late": range(min(2 * cut, depth), depth),
        "last": range(depth - 1, depth),
    }
    if text in named:
        found = named[text]
    else:
        first, _, last = text.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()) or text.endswith("-"):
            raise ConfigError(f"--target_layers {text!r}: use {', '.join(named)}, a number or a range such as 0-5")
        found = range(int(first), int(last or first) + 1)
    if not found or found.stop > depth:
        raise ConfigError(f"--target_layers {text!r} names no layers of this model: it has 0-{depth - 1}")
    return found


def check_keep_ratio(keep_ratio: float) -> None:
    if not 0.0 <= keep_ratio <= 1.0:
        raise ConfigError(f"--keep_ratio is the share of coefficients to freeze, from 0 to 1, not {keep_ratio}")


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


def _at_least(arguments: RunArguments, name: str, least: int) -> None:
    if getattr(arguments, name) < least:
        raise ConfigError(f"--{name} must be at least {least}, not {getattr(arguments, name)}")


def _check_numbers(arguments: Any) -> None:
    """No number that a flag takes is negative, NaN or infinite."""
    for name, value in vars(arguments).items():
        if type(value) in (int, float) and name != "local_rank" and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"--{name} {value}: a finite number, not below 0")


def _check_rank(arguments: Any) -> None:
    _at_least(arguments, "max_rank", 0)
    if not 0.0 < arguments.energy <= 1.0:
        raise ConfigError(f"--energy is a share above 0 and at most 1, not {arguments.energy}")


def _check_training(arguments: Any) -> None:
    _at_least(arguments, "global_batch_size", 1)
    for name in ("epochs", "learning_rate"):
        if not getattr(arguments, name) > 0:
            raise ConfigError(f"--{name} must be above 0, not {getattr(arguments, name)}")


def _check_writable(name: str, directory: str) -> None:
    import tempfile

    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(f"--{name} {directory} cannot be written: {error.strerror or error}") from error


TokenScope = Literal["all", "response", "prompt"]
