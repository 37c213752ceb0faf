"""The flags of a comparison and of a sweep: those of the phases that they run, and their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

from warp_ds.errors import ConfigError
from warp_ds.flags.checks import at_least, check_floor, check_keep_ratio, check_rank
from warp_ds.flags.controls import ControlFlags, GrowingFlags, LoraMethodFlags, ReplayFlags
from warp_ds.flags.flag import DEBUG_SAMPLES, again, flag, samples
from warp_ds.flags.groups import (
    ArmFlags,
    BasisFlags,
    HeldOutArguments,
    LayerArguments,
    LoraFlags,
    MaskedTrainingFlags,
    MaskFlags,
    PackingFlags,
    ProductFlags,
    SafetyDataArguments,
    ScheduleFlags,
    UtilityDataArguments,
)
from warp_ds.models.layer_names import parse_layer_types


@dataclass
class CompareArguments(
    GrowingFlags,
    ReplayFlags,
    LoraMethodFlags,
    ArmFlags,
    BasisFlags,
    MaskFlags,
    MaskedTrainingFlags,
    ProductFlags,
    ScheduleFlags,
    HeldOutArguments,
    UtilityDataArguments,
    SafetyDataArguments,
    LayerArguments,
    PackingFlags,
    LoraFlags,
):
    """Arms side by side: each arm trained from one start model, measured on the same prompts, with paired intervals and a
    recommendation. --seed is that of the shared bases and masks. Example: warp-ds compare --model_name MODEL --safety_data
    refusals.jsonl --utility_data task.jsonl --harmful_data prompts.jsonl --arms before,layers,rotated"""

    safety_samples: int = again(
        SafetyDataArguments, "safety_samples", 100, "safety samples for bases (all of them) and SafeInstr; 0 = all"
    )
    importance_samples: int = samples(0, "of them, for importances; 0 = all")
    utility_heldout: str | None = flag(
        None, "task items to evaluate on; --utility_data with --heldout_split if not given", reads="data"
    )
    heldout_split: str = flag("test", "split of a hub data set")
    heldout_samples: int = samples(100, "how many of them; 0 = all")
    mix_file: str | None = flag(None, "your own examples, mixed into every arm's task", reads="data")
    mix_ratio: float = flag(0.1, "how many of them, as a share of the task's samples")
    unaligned_model: str | None = flag(None, "resta, safelora, asft: the start model without its alignment", reads="model")
    unaligned_data: str | None = flag(
        None, "resta, safelora, asft: examples that undo it, to train such a model on", reads="data"
    )
    unaligned_rate: float = flag(0.0, "resta: learning rate of that training; 0 = the largest of --learning_rates")
    resta_alpha: float = flag(0.3, "resta: share of the safety vector that is added")
    safedelta_s: float = flag(0.1, "safedelta: safety budget of a layer of 4,096 rows")
    safelora_threshold: float = flag(
        0.35, "safelora: cosine of a layer's change and its projection up to which it is projected"
    )
    neuron_share: float = flag(0.05, "sn-tune, rsn-tune: share of the neurons that count as safety (foundation) neurons")
    neuron_rate: float = flag(5e-5, "sn-tune, rsn-tune: learning rate of the safety neurons, for one epoch")
    foundation_data: str | None = flag(None, "rsn-tune: prompts of general use; the task's if not given", reads="data")
    ema_decay: float = again(ControlFlags, "ema_decay", 0.9, "ema: how much of the average each step keeps")
    harmful_ratio: str = flag(
        "0", "comma-separated harmful mixes that every arm trains with, as shares of the task's samples", identity=False
    )
    harmful_mix: str | None = flag(
        None,
        "harmful requests that are complied with, for --harmful_ratio and the arm harmful (none are shipped)",
        reads="data",
    )
    patch_data: str | None = flag(None, "patch: refusals to train at the end; the paper's one if not given", reads="data")
    patch_rate: float = flag(2e-5, "patch: learning rate")
    patch_epochs: float = flag(10.0, "patch: passes over those refusals")
    eval_batch_size: int = flag(8, "prompts per rank and batch in the evaluation", identity=False)
    keep_models: bool = flag(True, "keep every trained model; false: only its measurements", identity=False)

    def check(self) -> None:
        super().check()
        for name in ("importance_batch_size", "global_batch_size", "max_new_tokens", "eval_batch_size"):
            at_least(self, name, 1)
        parse_layer_types(self.layer_type)
        check_keep_ratio(self.keep_ratio)
        self.schedule  # noqa: B018 - raises for what is none
        check_floor(self.floor)
        check_rank(self)
        self.check_lora()
        if not 0.0 < self.neuron_share <= 1.0:
            raise ConfigError(f"--neuron_share is a share above 0 and at most 1, not {self.neuron_share}")
        if self.mix_ratio < 0:
            raise ConfigError(f"--mix_ratio is a share of the task's samples, not {self.mix_ratio}")
        for name in ("epochs", "patch_epochs"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name} must be above 0, not {getattr(self, name)}")
        if any(self.ratio_list) and self.harmful_mix is None:
            raise ConfigError("--harmful_ratio mixes harmful samples into the task: give a file of them with --harmful_mix")

    @property
    def seed_list(self) -> list[int]:
        values = _numbers("seeds", self.seeds)
        if any(value != int(value) for value in values):
            raise ConfigError(f"--seeds {self.seeds!r}: whole numbers")
        return [int(value) for value in values]

    @property
    def rate_list(self) -> list[float]:
        return _numbers("learning_rates", self.learning_rates)

    @property
    def ratio_list(self) -> list[float]:
        """The harmful mixes."""
        return _numbers("harmful_ratio", self.harmful_ratio)

    def rates(self, arms: list[str]) -> dict[str, list[float]]:
        """Arm -> its grid of learning rates; ConfigError where --arm_rates names an arm that is not there."""
        rates_of = {arm: self.rate_list for arm in arms}
        for part in (self.arm_rates or "").split(","):
            name, _, values = part.strip().partition("=")
            if part.strip() and (name not in rates_of or not values):
                raise ConfigError(f"--arm_rates {part!r}: give ARM=RATE:RATE for arms of --arms ({', '.join(arms)})")
            if values:
                rates_of[name] = _numbers("arm_rates", values.replace(":", ","))
        return rates_of


@dataclass
class StartModelsFlags:
    """Of the demo, which makes its start models."""

    start_models: int = flag(
        1, "start models, made from the seeds --seed, --seed + 1, …: how far they alone move the table", identity=False
    )


@dataclass
class SweepArguments(CompareArguments):
    """The flags of a comparison are the middle of the sweep; each list is one axis through it."""

    keep_ratios: str = flag("0.01,0.05,0.1,0.2,0.4", "shares of frozen coefficients")
    layer_type_sets: str | None = flag(None, "semicolon-separated sets, such as 'ffn_down;attn_q,attn_k,attn_v'")
    layer_ranges: str | None = flag(None, "comma-separated --target_layers, such as 'early,middle,late'")
    sample_counts: str | None = flag(None, "comma-separated numbers of safety samples (0 = all)", debug=str(DEBUG_SAMPLES))
    bases: str | None = flag(None, "comma-separated: activation, identity, weight, random")
    units: str | None = flag(None, "comma-separated: entry, column, row")
    scopes: str | None = flag(None, "comma-separated: layer, global")


def _numbers(name: str, text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--{name} {text!r} is no comma-separated list of numbers") from error
    if len(set(values)) < len(values) or not all(0 <= value < math.inf for value in values):
        raise ConfigError(f"--{name} {text!r}: each value once, finite and none below 0")
    return sorted(values)
