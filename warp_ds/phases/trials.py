"""The trials of a comparison: one model each, of an arm, a learning rate and a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from warp_ds.phases.arms import Arm
from warp_ds.report.tradeoff import point_name


@dataclass(frozen=True)
class Trial:
    """One model of the comparison."""

    arm: Arm
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return point_name(self.arm.name, None if self.arm.trains is None else self.rate, self.seed)


def merged_from(trial: Trial) -> Trial | None:
    """The trial whose model this one merges: the same arm without its merge, trained where it is no trial itself."""
    arm = trial.arm
    if arm.merge is None:
        return None
    rest = "+".join(part for part in arm.name.split("+") if part.partition("@")[0] != arm.merge)
    return replace(trial, arm=replace(arm, merge=None, strength=None, name=rest or "full"))


def is_needed(trial: Trial, later: Sequence[Trial]) -> bool:
    """Whether a later trial is this one, or merges its model."""
    return any(made is not None and made.name == trial.name for other in later for made in (other, merged_from(other)))
