"""The flags of the published controls that act during training: what else is minimised, and which weights come out."""

from __future__ import annotations

from dataclasses import dataclass

from warp_ds.errors import ConfigError
from warp_ds.flags.checks import at_least
from warp_ds.flags.flag import again, flag, samples
from warp_ds.flags.groups import MaskFlags, PackingFlags

REPLAYS = ("der", "safegrad")
"""The objectives that see safety samples beside the task."""


@dataclass
class ReplayFlags:
    """How safety samples are replayed."""

    replay_batch_size: int = flag(0, "der, safegrad: safety samples per optimizer step over all ranks; 0 = --global_batch_size")
    der_alpha: float = flag(0.5, "der: weight of the squared distance to the start model's logits")
    der_beta: float = flag(0.0, "der: weight of the replayed answers' own loss (DER++)")


@dataclass
class LoraMethodFlags:
    """The published ways to keep an adapter from undoing safety that act during training."""

    null_energy: float = flag(
        0.01, "guardspace: share of the safety inputs' energy that its null space may hold where no eigenvalue is zero"
    )
    safety_rank: int = flag(32, "salora: directions of the safety outputs that an adapter stays out of")
    task_rank: int = flag(32, "salora: directions of the task's outputs that an adapter starts in, with --task_basis_dir")
    asft_lambda: float = flag(1.0, "asft: weight of the regulariser")


#: Which methods a flag says something of.
_OF_METHODS = {
    "null_energy": "guardspace",
    "safety_rank": "salora",
    "task_rank": "salora",
    "task_basis_dir": "salora",
    "asft_lambda": "asft",
    "unaligned_model": "asft",
}


@dataclass
class TrainedMethodFlags(LoraMethodFlags):
    """Which of them a training takes."""

    lora_method: str = flag(
        "plain",
        "LoRA: plain, or a published way to keep it safe: guardspace, salora (both read --basis_dir), asft (reads "
        "--unaligned_model)",
        choices=("plain", "guardspace", "salora", "asft"),
    )
    unaligned_model: str | None = flag(None, "asft: the start model without its alignment", reads="model")
    task_basis_dir: str | None = flag(
        None,
        "salora: phase 1's basis of the task's own samples, in whose outputs adapters start; none = LoRA's usual start",
        reads="basis",
    )

    def check_lora_method(self) -> None:
        """ConfigError where a method's flags do not go with it."""
        method, masks = self.lora_method, getattr(self, "masks_dir", None)
        if method != "plain" and getattr(self, "adapter", "none") == "none":
            raise ConfigError(f"--lora_method {method} is of an adapter: give --adapter lora too")
        for name, of in _OF_METHODS.items():
            if getattr(self, name) != getattr(TrainedMethodFlags, name) and method != of:
                raise ConfigError(f"--{name} is of --lora_method {of}, and says nothing of {method}")
        if method in FIXED and (masks != "none" or getattr(self, "basis_dir", None) is None):
            raise ConfigError(
                f"--lora_method {method} holds the adapter by a basis of its own, and not by masks: give --basis_dir (phase 1, "
                "of the safety inputs) and --masks_dir none"
            )
        if method == "asft" and self.unaligned_model is None:
            raise ConfigError(
                "--lora_method asft needs the model from before its alignment, whose difference it reckons with: give "
                "--unaligned_model"
            )
        if self.null_energy >= 1.0:
            raise ConfigError(f"--null_energy is a share of at least 0 and below 1, not {self.null_energy}")
        if self.task_rank != TrainedMethodFlags.task_rank and self.task_basis_dir is None:
            raise ConfigError("--task_rank is of SaLoRA's start in the task's outputs: give --task_basis_dir")
        at_least(self, "safety_rank", 1)
        at_least(self, "task_rank", 1)


FIXED = ("guardspace", "salora")
"""The methods that hold something fixed beside an adapter, made of a basis."""


@dataclass
class GrowingFlags:
    """Whether masks grow during training."""

    refresh_steps: int = flag(
        0,
        "after every so many optimizer steps, the masks' keep_ratio of what is still free is frozen too, by the scores of the "
        "model as it is then; 0 = never",
    )
    keep_ratio_schedule: str | None = flag(
        None,
        "STEP:SHARE, by commas (100:0.1,200:0.2): after STEP optimizer steps SHARE of the coefficients is frozen, by the "
        "scores of the model as it is then",
    )

    @property
    def grows(self) -> bool:
        return bool(self.refresh_steps) or self.keep_ratio_schedule is not None

    @property
    def schedule(self) -> dict[int, float]:
        """Optimizer step -> share. ConfigError for what is no schedule."""
        shares: dict[int, float] = {}
        for part in (self.keep_ratio_schedule or "").split(",") if self.keep_ratio_schedule is not None else ():
            step, mark, share = part.strip().partition(":")
            try:
                shares[int(step)] = float(share)
            except ValueError:
                mark = ""
            if not mark:
                raise ConfigError(
                    f"--keep_ratio_schedule {self.keep_ratio_schedule!r}: STEP:SHARE, by commas, as 100:0.1,200:0.2"
                )
        steps, values = list(shares), list(shares.values())
        if steps != sorted(steps) or values != sorted(set(values)) or any(not 0.0 < value <= 1.0 for value in values):
            raise ConfigError(
                f"--keep_ratio_schedule {self.keep_ratio_schedule!r}: later steps have larger shares, above 0 and at most 1, "
                "since nothing thaws"
            )
        return shares

    def check_growing(self) -> None:
        """ConfigError where the two contradict each other."""
        if self.schedule and self.refresh_steps:
            raise ConfigError("--keep_ratio_schedule names the steps at which masks grow: leave --refresh_steps out")


@dataclass
class TrainedGrowingFlags(GrowingFlags):
    """What a training's masks grow by."""

    refresh_data: str | None = flag(
        None, "--refresh_steps, --keep_ratio_schedule: examples of what must stay, for the scores", reads="data"
    )
    refresh_samples: int = samples(0, "how many of them, in order; 0 = all")
    importance_batch_size: int = again(MaskFlags, "importance_batch_size", 4)

    def check_growing(self) -> None:
        super().check_growing()
        at_least(self, "importance_batch_size", 1)
        if self.grows != (self.refresh_data is not None):
            raise ConfigError(
                "--refresh_data, examples of what must stay, goes with --refresh_steps or --keep_ratio_schedule, they with it"
            )
        if not self.grows:
            return
        if getattr(self, "masks_dir", None) == "none":
            raise ConfigError("--masks_dir none: without masks there are none that could grow")
        if getattr(self, "adapter", "none") != "none" or getattr(self, "left_projection", False):
            raise ConfigError(
                "masks of an adapter, and those with --left_projection, stay as they are: leave --refresh_steps and "
                "--keep_ratio_schedule out"
            )


#: Which objectives a flag says something of.
_OF = {"replay_batch_size": REPLAYS, "der_alpha": ("der",), "der_beta": ("der",)}


@dataclass
class ControlFlags(ReplayFlags, PackingFlags):
    """What a training minimises, and whether its weights are averaged."""

    objective: str = flag(
        "task",
        "task (its loss alone), der (replay with the start model's logits), safegrad (the task's gradient without what points "
        "against the replayed samples') or constrained (held to the start model, token by token)",
        choices=("task", "der", "safegrad", "constrained"),
    )
    replay_data: str | None = flag(None, "der, safegrad: safety samples to replay; all of the file", reads="data")
    ema_decay: float = flag(0.0, "what comes out is the exponential average of the weights over the steps; 0 = the last ones")

    left_projection: bool = flag(
        False,
        "keep out of the frozen columns' left singular directions too, as OSFT does; masks of columns of the basis weight",
    )

    def check(self) -> None:
        super().check()
        at_least(self, "replay_batch_size", 0)
        if not 0.0 <= self.ema_decay < 1.0:
            raise ConfigError(f"--ema_decay is at least 0 and below 1, not {self.ema_decay}")
        if (self.objective in REPLAYS) != (self.replay_data is not None):
            raise ConfigError(f"--objective {self.objective}: --replay_data goes with {', '.join(REPLAYS)}, and with no other")
        for name, of in _OF.items():
            if getattr(self, name) != getattr(ReplayFlags, name) and self.objective not in of:
                raise ConfigError(f"--{name} is of --objective {', '.join(of)}, and says nothing of {self.objective}")
        if self.objective != "task" and self.packing:
            raise ConfigError(f"--objective {self.objective} needs one sample a row: leave --packing out")
