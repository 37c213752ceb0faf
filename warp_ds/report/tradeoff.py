"""Arms at equal utility: a comparison of safety means something only where the task was learnt equally well.

An arm's curve joins the start model and its points in the order of their learning rates, seeds averaged; between
neighbours everything is linear in the utility. What is read off at a common utility is an interpolation, and names the
points that it lies between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from warp_ds.evaluation.results import UTILITY, Metric, flat, rate, read_metrics


def point_name(arm: str, rate: float | None, seed: int) -> str:
    """The directory of a point under points/, and what its runs are called by."""
    return arm if rate is None else f"{arm}_lr{rate:g}_seed{seed}"


@dataclass(frozen=True)
class Point:
    """One measured model."""

    arm: str
    rate: float | None
    """Its learning rate; None: not trained."""
    seed: int
    measured: Mapping[str, Any]
    """As metrics.json holds it."""
    from_start: bool = True
    """Whether at rate 0 the arm is the start model: false where it changes weights without training."""
    home: str | None = None
    """Where its answers lie, from the report's directory; None: points/<name>."""
    start: str | None = None
    """The start model, where there are several."""

    @property
    def name(self) -> str:
        return point_name(self.arm, self.rate, self.seed)

    @cached_property
    def metrics(self) -> dict[str, Metric]:
        return read_metrics(self.measured)

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Point:
        own = ("arm", "rate", "seed", "from_start", "home", "start")
        rest = {name: value for name, value in row.items() if name not in own}
        places = row.get("home"), row.get("start")
        return cls(str(row["arm"]), _rate(row), row["seed"], rest, bool(row.get("from_start", True)), *places)

    def to_json(self) -> dict[str, Any]:
        own = {"arm": self.arm, "rate": self.rate, "seed": self.seed, "from_start": self.from_start}
        where = {"home": self.home, "start": self.start}
        return {**own, **self.measured, **{name: place for name, place in where.items() if place is not None}}


@dataclass(frozen=True)
class MeanPoint:
    """The points of one arm and learning rate, averaged over seeds."""

    arm: str
    rate: float | None
    seeds: int
    metrics: Mapping[str, Metric]

    @classmethod
    def from_json(cls, row: Mapping[str, Any], prompts: Mapping[str, int]) -> MeanPoint:
        return cls(str(row["arm"]), _rate(row), int(row.get("seeds", 1)), read_metrics(row, prompts))

    def to_json(self) -> dict[str, Any]:
        return {"arm": self.arm, "rate": self.rate, "seeds": self.seeds, **flat(self.metrics)}


@dataclass(frozen=True)
class Reading:
    """One arm, read off at the common utility; without metrics where it does not get there."""

    arm: str
    best_utility: float
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    between: Sequence[float | None] = ()
    """Rates of the one or two points that it is read from; None is the start model."""
    seeds: int = 0
    seeds_reached: int = 0
    """Seeds whose own curve gets there."""
    seeds_range: tuple[float, float] | None = None
    """The least and the most of the seeds' refusals, each interpolated by itself."""

    @classmethod
    def from_json(cls, row: Mapping[str, Any], prompts: Mapping[str, int]) -> Reading:
        ends = row.get("seeds_range")
        return cls(
            str(row["arm"]),
            _finite_or(row["best_utility"], math.inf),
            read_metrics(row, prompts),
            [None if at is None else float(at) for at in row.get("between", ())],
            int(row.get("seeds", 0)),
            int(row.get("seeds_reached", 0)),
            None if ends is None else (float(ends[0]), float(ends[1])),
        )

    def to_json(self) -> dict[str, Any]:
        row: dict[str, Any] = {"arm": self.arm, "best_utility": self.best_utility}
        if not self.metrics:
            return row
        seeds = {"seeds": self.seeds, "seeds_reached": self.seeds_reached}
        ends = None if self.seeds_range is None else list(self.seeds_range)
        return {**row, **flat(self.metrics), "between": list(self.between), **seeds, "seeds_range": ends}


@dataclass(frozen=True)
class Comparison:
    """What report.json holds."""

    points: Sequence[Point]
    prompts: Mapping[str, int]
    """Metric -> the prompts that it is a rate over."""
    at_utility: float
    """The task loss at which arms are compared, nats a token; nan where no model has one."""
    equal_utility: Sequence[Reading]
    raw: Sequence[MeanPoint]
    front: Sequence[tuple[str, float | None]] = ()
    """(arm, rate) of the points that no other beats, in a sweep."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """What else the file says: overlap, noise_threshold, unaligned, keep_ratio, seconds, versions ..."""

    @classmethod
    def from_json(cls, report: Mapping[str, Any]) -> Comparison:
        """Raises KeyError, TypeError or ValueError where a value is not as this program writes it."""
        prompts = {str(name): int(count) for name, count in report["prompts"].items() if count}
        return cls(
            [Point.from_json(row) for row in report["points"]],
            prompts,
            _finite_or(report["at_utility"], math.nan),
            [Reading.from_json(row, prompts) for row in report["equal_utility"]],
            [MeanPoint.from_json(row, prompts) for row in report["raw"]],
            [(str(arm), at) for arm, at in report.get("front", ())],
            {name: value for name, value in report.items() if name not in _OWN},
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "format": "warp_ds.compare",
            "version": 1,
            "points": [point.to_json() for point in self.points],
            "prompts": dict(self.prompts),
            **self.about,
            **({"front": [list(at) for at in self.front]} if self.front else {}),
            "at_utility": self.at_utility,
            "equal_utility": [reading.to_json() for reading in self.equal_utility],
            "raw": [mean.to_json() for mean in self.raw],
        }


_OWN = {"format", "version", "points", "prompts", "front", "at_utility", "equal_utility", "raw"}


def _finite_or(value: Any, otherwise: float) -> float:
    """A number that JSON has as null where it is not finite."""
    return otherwise if value is None else float(value)


def _rate(row: Mapping[str, Any]) -> float | None:
    return None if row["rate"] is None else float(row["rate"])


# ---------------------------------------------------------------- curves


def average(points: Sequence[Point]) -> MeanPoint:
    """Of one arm and rate, over seeds."""
    metrics = {}
    for name in dict.fromkeys(name for point in points for name in point.metrics):
        values = [point.metrics[name].value for point in points if name in point.metrics]
        metrics[name] = Metric(math.fsum(values) / len(values), range=(min(values), max(values)))
    return MeanPoint(points[0].arm, points[0].rate, len(points), metrics)


def by_arm(points: Sequence[Point]) -> dict[str, list[MeanPoint]]:
    """arm -> its averaged points in the order of the rates; the arms in their first order."""
    groups: dict[str, dict[float | None, list[Point]]] = {}
    for point in points:
        groups.setdefault(point.arm, {}).setdefault(point.rate, []).append(point)
    return {
        arm: [average(group) for _, group in sorted(rates.items(), key=lambda item: item[0] or 0.0)]
        for arm, rates in groups.items()
    }


def crossing(utilities: Sequence[float], target: float) -> tuple[int, float] | None:
    """(i, share): utilities[i] + share (utilities[i + 1] - utilities[i]) first equals ``target``; None if never.

    Lower is better; the first crossing from above counts, so a curve that turns back later does not.
    """
    for i, (u, v) in enumerate(zip(utilities, utilities[1:], strict=False)):
        if math.isfinite(u) and u >= target >= v:
            return (i, 0.0) if u == v else (i, (u - target) / (u - v))
    return None


def at_utility(curve: Sequence[Point | MeanPoint], target: float) -> tuple[dict[str, float], list[float | None]] | None:
    """The metrics of a curve where its utility is ``target``, by linear interpolation; None where it does not get there.

    With them the rates of the one or two points that they come from; None is the start model.
    """
    crossed = crossing([_utility(point) for point in curve], target)
    if crossed is None:
        return None
    i, share = crossed
    first, second = curve[i], curve[i + 1]
    both = [name for name in first.metrics if name in second.metrics]
    ends = [(first.metrics[name].value, second.metrics[name].value) for name in both]
    values = {name: a + share * (b - a) for name, (a, b) in zip(both, ends, strict=True)}
    return values, [point.rate for point, weight in ((first, 1.0 - share), (second, share)) if weight]


def _utility(point: Point | MeanPoint) -> float:
    """Infinite where the model came apart."""
    return point.metrics[UTILITY].value if UTILITY in point.metrics else math.inf


def common_utility(curves: Mapping[str, Sequence[MeanPoint]], wanted: float, reference: str) -> float:
    """The utility to compare at: ``wanted``, or the best that ``reference`` reaches, or what every arm reaches."""
    best = {arm: min(map(_utility, curve)) for arm, curve in curves.items() if arm != "before"}
    best = {arm: utility for arm, utility in best.items() if math.isfinite(utility)}
    if wanted:
        return wanted
    return best.get(reference, max(best.values(), default=math.nan))


# ---------------------------------------------------------------- the comparison


def compare_points(
    points: Sequence[Point],
    prompts: Mapping[str, int],
    wanted: float = 0.0,
    reference: str = "rotated",
    about: Mapping[str, Any] | None = None,
) -> Comparison:
    """Means over seeds, and the arms at equal utility.

    Intervals are Wilson's, 95 %, of the mean rate over the prompts (metric -> number in ``prompts``): seeds answer the
    same prompts, so they do not count as more of them.
    """
    prompts = {name: count for name, count in prompts.items() if count}
    curves = by_arm(points)
    target = common_utility(curves, wanted, reference)
    equal = [
        _read_off(arm, [point for point in points if point.arm == arm], curves.get("before", []), target, prompts)
        for arm in curves
        if arm != "before"
    ]
    raw = [
        MeanPoint(mean.arm, mean.rate, mean.seeds, {k: _over_prompts(k, m, prompts) for k, m in mean.metrics.items()})
        for curve in curves.values()
        for mean in curve
    ]
    return Comparison(points, prompts, target, equal, raw, about=about or {})


def _read_off(
    arm: str, points: Sequence[Point], before: Sequence[MeanPoint], target: float, prompts: Mapping[str, int]
) -> Reading:
    start = before if points[0].from_start else []
    curve = by_arm(points)[arm]
    best = min(map(_utility, curve))
    read = at_utility([*start, *curve], target)
    if read is None:
        return Reading(arm, best)
    seeds = sorted({point.seed for point in points})
    each = [at_utility([*start, *by_arm([p for p in points if p.seed == seed])[arm]], target) for seed in seeds]
    reached = [one[0]["refusal_rate"] for one in each if one is not None and "refusal_rate" in one[0]]
    values, between = read
    metrics = {name: _over_prompts(name, Metric(value), prompts) for name, value in values.items()}
    return Reading(arm, best, metrics, between, len(seeds), len(reached), (min(reached), max(reached)) if reached else None)


def _over_prompts(name: str, metric: Metric, prompts: Mapping[str, int]) -> Metric:
    """With the interval over its prompts, where it is a rate."""
    if name not in prompts:
        return metric
    n = prompts[name]
    return Metric(metric.value, rate(min(max(metric.value, 0.0), 1.0) * n, n).interval, n, metric.range)


def front(points: Sequence[Point]) -> list[tuple[str, float | None]]:
    """(arm, rate) of the averaged points that no other beats in task loss and refusals both, best task first."""

    def refusals(mean: MeanPoint) -> float:
        return mean.metrics["refusal_rate"].value if "refusal_rate" in mean.metrics else 0.0

    means = [mean for curve in by_arm(points).values() for mean in curve]
    best: list[tuple[str, float | None]] = []
    most = -1.0
    for mean in sorted(means, key=lambda mean: (_utility(mean), -refusals(mean))):
        if refusals(mean) > most:
            best.append((mean.arm, mean.rate))
            most = refusals(mean)
    return best
