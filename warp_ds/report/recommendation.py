"""What a comparison comes to, in words: which arm to take, given how many refusals must stay.

An arm is taken at the rate that gives it the best task loss among those that keep the floor. It is recommended only
where its paired difference to plain training, tuned in the same way, is beyond chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from warp_ds.evaluation.paired import Cells, Items, common, estimates, interval, replicates
from warp_ds.flags.checks import FLOOR
from warp_ds.report.tradeoff import Comparison, Point

PLAIN = ("layers", "full")
"""The arms without any protection."""


@dataclass(frozen=True)
class Setting:
    """One arm at one rate."""

    arm: str
    rate: float | None
    loss: Cells
    refusal: Cells
    task_nll: float
    refusal_rate: float
    held: float
    """Its refusals less the floor's, a share of the prompts; below 0: it does not keep the floor."""

    @property
    def name(self) -> str:
        return self.arm if self.rate is None else f"{self.arm} at a rate of {self.rate:g}"


@dataclass(frozen=True)
class Rival:
    """A setting beside tuned plain training."""

    setting: Setting
    saved: float
    """Nats a token of task loss less than plain training."""
    interval: tuple[float, float]
    """Of ``saved``, paired; 95 % for all rivals together (Bonferroni)."""

    @property
    def better(self) -> bool:
        return self.interval[0] > 0


@dataclass(frozen=True)
class Recommendation:
    floor: float
    text: str
    plain: Setting | None = None
    chosen: Setting | None = None
    rivals: Sequence[Rival] = ()
    fallen: Sequence[str] = ()
    """Arms that keep the floor at no rate, or have no task loss there."""

    def to_json(self) -> dict[str, Any]:
        return {
            "floor": self.floor,
            "text": self.text,
            "plain": _row(self.plain),
            "chosen": _row(self.chosen),
            "rivals": [
                {**(_row(rival.setting) or {}), "saved_nll": rival.saved, "saved_nll_interval": list(rival.interval)}
                for rival in self.rivals
            ],
            "below_the_floor": list(self.fallen),
        }


def _row(setting: Setting | None) -> dict[str, Any] | None:
    if setting is None:
        return None
    names = ("arm", "rate", "task_nll", "refusal_rate")
    return {name: getattr(setting, name) for name in names}


def with_recommendation(comparison: Comparison, floor: float) -> Comparison:
    """The comparison, its recommendation at ``floor`` (a share of the start model's refusals) under about."""
    advice = recommend(comparison.points, floor)
    return comparison if advice is None else replace(comparison, about={**comparison.about, "recommendation": advice.to_json()})


def recommend(points: Sequence[Point], floor: float = FLOOR) -> Recommendation | None:
    """Of points with the start model's and per-prompt outcomes; None where there is nothing to compare."""
    start = _cells([point for point in points if point.rate is None and point.arm == "before"], "refusal")
    arms = [arm for arm in dict.fromkeys(point.arm for point in points) if arm != "before"]
    if not start or not arms:
        return None
    settings = [setting for arm in arms for setting in _settings([p for p in points if p.arm == arm], start, floor)]
    unknown = [arm for arm in arms if arm not in {setting.arm for setting in settings}]
    if unknown:
        text = f"No recommendation: {', '.join(unknown)} was measured without the outcome of every prompt (an older version)."
        return Recommendation(floor, text)
    apart = [setting.name for setting in settings if not math.isfinite(setting.task_nll)]
    settings = [setting for setting in settings if math.isfinite(setting.task_nll)]
    tuned = {arm: _best([s for s in settings if s.arm == arm and s.held >= 0]) for arm in arms}
    kept = [setting for setting in tuned.values() if setting is not None]
    plain = _best([setting for setting in kept if setting.arm in PLAIN])
    others = [setting for setting in kept if setting.arm not in PLAIN]
    level = 1 - 0.05 / max(1, len(others))
    # What shares no seed with plain training cannot be told from it.
    rivals = [] if plain is None else [Rival(s, *_saved(plain, s, level)) for s in others if common([plain.loss, s.loss])[0]]
    better = [rival.setting for rival in rivals if rival.better] if plain is not None else others
    chosen = _best(better) or plain
    fallen = [arm for arm, setting in tuned.items() if setting is None]
    ties = [] if chosen is None else [s for s in better if s is not chosen and _saved(s, chosen, level)[1][0] <= 0]
    words = _Words(floor, estimates([start])[0] * floor, start, level, PLAIN if any(arm in PLAIN for arm in arms) else ())
    text = words.whole(plain, chosen, rivals, ties, fallen)
    text += f" Came apart (its task loss is no number): {', '.join(apart)}." if apart else ""
    return Recommendation(floor, text, plain, chosen, rivals, fallen)


def _cells(points: Sequence[Point], measure: str) -> Cells:
    """One measure of points that differ by seed and start model; those without outcomes are left out."""
    items = {(point.start or "", point.seed): Items.of(point.measured, measure) for point in points}
    return {key: value for key, value in items.items() if value is not None}


def _settings(points: Sequence[Point], start: Cells, floor: float) -> list[Setting]:
    """An arm's rates, each with how far it is from the floor."""
    settings = []
    for rate in dict.fromkeys(point.rate for point in points):
        mine = [point for point in points if point.rate == rate]
        loss, refusal = _cells(mine, "loss"), _cells(mine, "refusal")
        if loss and refusal:
            before = estimates([_of_the_starts(start, refusal)])[0]
            nll, kept = float(estimates([loss])[0]), float(estimates([refusal])[0])
            settings.append(Setting(points[0].arm, rate, loss, refusal, nll, kept, kept - floor * float(before)))
    return settings


def _of_the_starts(start: Cells, like: Cells) -> Cells:
    """The start models' own measure at every seed of ``like``: an untrained model has one."""
    by_start = {of: items for (of, _), items in start.items()}
    return {key: by_start[key[0]] for key in like if key[0] in by_start}


def _best(settings: Sequence[Setting]) -> Setting | None:
    return min(settings, key=lambda setting: setting.task_nll, default=None)


def _saved(plain: Setting, other: Setting, level: float) -> tuple[float, tuple[float, float]]:
    """How much lower the other's task loss is, with its paired interval; nothing shared: (nan, (-inf, inf))."""
    shared = common([plain.loss, other.loss])
    if not shared[0]:
        return float("nan"), (-np.inf, np.inf)
    (a, b), drawn = estimates(shared), replicates(shared)
    return float(a - b), interval(drawn[:, 0] - drawn[:, 1], level)


@dataclass(frozen=True)
class _Words:
    """The paragraph."""

    floor: float
    needed: float
    """Refusals that the floor stands for, a share of the prompts."""
    start: Cells
    level: float
    plain_arms: Sequence[str]

    def whole(
        self,
        plain: Setting | None,
        chosen: Setting | None,
        rivals: Sequence[Rival],
        ties: Sequence[Setting],
        fallen: Sequence[str],
    ) -> str:
        head = f"At a floor of {self.floor:.0%} of the start model's refusals ({self.needed:.0%} of the prompts): "
        if chosen is None:
            return head + "no arm keeps it at any of its rates. Try smaller rates."
        if plain is None:
            said = self._without_plain(chosen, ties)
        elif chosen is plain:
            said = f"no arm differs from tuned plain training ({plain.name}, task loss {plain.task_nll:.3f})."
            said += self._not_beyond(rivals)
        else:
            said = self._chosen(plain, chosen, rivals, ties)
        below = f" Below the floor at every rate: {', '.join(fallen)}." if fallen else ""
        return head + said + self._margin(chosen) + below + self._resting_on(chosen)

    def _without_plain(self, chosen: Setting, ties: Sequence[Setting]) -> str:
        why = (
            "plain training keeps it at none of its rates" if self.plain_arms else "no plain training stands beside these arms"
        )
        return f"{why}; take {chosen.name} (task loss {chosen.task_nll:.3f})." + self._tied(ties)

    def _chosen(self, plain: Setting, chosen: Setting, rivals: Sequence[Rival], ties: Sequence[Setting]) -> str:
        rival = next(rival for rival in rivals if rival.setting is chosen)
        low, high = rival.interval
        return (
            f"take {chosen.name}. Its task loss is {chosen.task_nll:.3f}, {rival.saved:.3f} [{low:.3f}, {high:.3f}] nats a "
            f"token below that of tuned plain training ({plain.name}: {plain.task_nll:.3f})."
        ) + self._tied(ties)

    @staticmethod
    def _tied(ties: Sequence[Setting]) -> str:
        return f" Not told apart from it: {', '.join(setting.name for setting in ties)}." if ties else ""

    @staticmethod
    def _not_beyond(rivals: Sequence[Rival]) -> str:
        if not rivals:
            return ""
        nearest = max(rivals, key=lambda rival: rival.saved)
        low, high = nearest.interval
        return f" The nearest, {nearest.setting.name}, has {nearest.saved:+.3f} [{low:+.3f}, {high:+.3f}] nats a token less."

    def _margin(self, chosen: Setting) -> str:
        """How sure it is that the chosen one keeps the floor, paired with the start model."""
        both = common([chosen.refusal, _of_the_starts(self.start, chosen.refusal)])
        drawn = replicates(both)
        low, high = interval(drawn[:, 0] - self.floor * drawn[:, 1])
        doubt = "" if low >= 0 else "; the interval reaches below the floor, so measure more prompts before you rely on it"
        return (
            f" It refuses {chosen.refusal_rate:.0%}, {100 * chosen.held:+.0f} points [{100 * low:+.0f}, {100 * high:+.0f}] "
            f"from the floor{doubt}."
        )

    def _resting_on(self, chosen: Setting) -> str:
        keys = list(chosen.loss)
        starts, seeds = len({start for start, _ in keys}), len({seed for _, seed in keys})
        some = next(iter(chosen.loss))
        counts = f"{len(chosen.loss[some].top)} task items, {len(chosen.refusal[some].top)} harmful prompts"
        unseen = [name for name, count in (("seed", seeds), ("start model", starts)) if count == 1]
        caution = f" One {' and one '.join(unseen)}: what another would give is not in the intervals." if unseen else ""
        many = f", {starts} start models" if starts > 1 else ""
        return (
            f" Differences are paired over {counts}, {seeds} seed{'s' * (seeds > 1)}{many} (bootstrap; 95 % for all arms "
            f"together); only rates that were tried count.{caution}"
        )
