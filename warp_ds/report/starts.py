"""Each arm at the rate with its best task loss, and how far the start model alone moves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from warp_ds.evaluation.results import UTILITY, Metric
from warp_ds.report.tables import COLUMNS, Block, Table, columns, shown
from warp_ds.report.tradeoff import MeanPoint, Point, by_arm


def best_points(points: Sequence[Point]) -> list[MeanPoint]:
    """Of one start model: the mean over seeds of each arm, at the rate with the least task loss.

    That is the rate of somebody who tunes for the task and does not watch what is lost.
    """
    return [min(curve, key=lambda mean: mean.metrics[UTILITY].value) for curve in by_arm(points).values()]


def by_start(points: Sequence[Point]) -> dict[str, list[Point]]:
    """start model -> its points; one that has no name is ''."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.start or "", []).append(point)
    return groups


def best_blocks(points: Sequence[Point], titles: Mapping[str, str]) -> list[Block]:
    """A table of each start model, and before them, where there are several, one of what differs between them."""
    starts = {start: best_points(of) for start, of in by_start(points).items()}
    tables: list[Block] = []
    for start, best in starts.items():
        names = _names(best)
        rows = [[_title(mean, titles), _rate(mean), *(shown(name, _plain(mean, name)) for name in names)] for mean in best]
        of_start = f", start model {start}" if start else ""
        tables += [
            f"What training did to refusals and to the task (held-out text), each arm at its best rate for the task{of_start}",
            Table(["arm", "rate", *(COLUMNS[name] for name in names)], rows),
        ]
    return [*_spread(starts, titles), *tables] if len(starts) > 1 else tables


def _spread(starts: Mapping[str, Sequence[MeanPoint]], titles: Mapping[str, str]) -> list[Block]:
    of_arm: dict[str, list[MeanPoint]] = {}
    for best in starts.values():
        for mean in best:
            of_arm.setdefault(mean.arm, []).append(mean)
    names = _names([mean for means in of_arm.values() for mean in means])
    rows = []
    for means in of_arm.values():
        ranges = [[metric for mean in means if (metric := mean.metrics.get(name))] for name in names]
        rows.append([_title(means[0], titles), *(_range(name, of) for name, of in zip(names, ranges, strict=True))])
    return [
        f"Over {len(starts)} start models: the mean, and in brackets the least and the most. The start model alone decides",
        Table(["arm", *(COLUMNS[name] for name in names)], rows),
    ]


def _names(means: Sequence[MeanPoint]) -> list[str]:
    wanted = [name for name in COLUMNS if name != "movement"]
    return columns([mean.metrics for mean in means], wanted)


def _range(name: str, metrics: Sequence[Metric]) -> str:
    if not metrics:
        return ""
    values = [metric.value for metric in metrics]
    mean, least, most = (shown(name, Metric(value)) for value in (sum(values) / len(values), min(values), max(values)))
    return f"{mean} ({least} to {most})"


def _plain(mean: MeanPoint, name: str) -> Metric | None:
    metric = mean.metrics.get(name)
    return None if metric is None else replace(metric, interval=None)


def _title(mean: MeanPoint, titles: Mapping[str, str]) -> str:
    return titles.get(mean.arm, mean.arm)


def _rate(mean: MeanPoint) -> str:
    return "" if mean.rate is None else f"{mean.rate:g}"
