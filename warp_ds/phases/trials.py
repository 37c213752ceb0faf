"""The trials of a comparison: one model each, of an arm, a learning rate and a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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

    @property
    def run(self) -> str:
        """The directory of the run that makes its model, which is in model/ there."""
        kind = "patch" if self.arm.patch else "merge" if self.arm.merge else "phase3"
        return f"{kind}_{self.name}"


def made_from(trial: Trial) -> Trial | None:
    """The trial whose model this one patches or merges: the same arm without that, trained where it is no trial itself."""
    arm = trial.arm
    last = "patch" if arm.patch else arm.merge
    if last is None:
        return None
    rest = "+".join(part for part in arm.name.split("+") if part.partition("@")[0] != last)
    left = replace(arm, patch=False, merge=arm.merge if arm.patch else None)
    strengths = tuple((part, value) for part, value in arm.strengths if part != last)
    return replace(trial, arm=replace(left, strengths=strengths, name=rest or "full"))


def chain(trial: Trial) -> Iterator[Trial]:
    """The trial, and those whose models its own is made from, one after the other."""
    made: Trial | None = trial
    while made is not None:
        yield made
        made = made_from(made)


def is_needed(trial: Trial, later: Sequence[Trial]) -> bool:
    """Whether a later trial is this one, or is made from its model."""
    return any(made.name == trial.name for other in later for made in chain(other))
