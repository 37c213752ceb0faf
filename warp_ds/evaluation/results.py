"""A measured number, with what is known of its uncertainty; and its keys in metrics.json and report.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from warp_ds.evaluation.kept import behaviour_rates
from warp_ds.evaluation.metrics import wilson

UTILITY = "utility_nll"
RATES = (
    "refusal_rate",
    "partial_rate",
    "incoherent_rate",
    "attack_success_rate",
    "not_judged_rate",
    "over_refusal_rate",
    "utility_accuracy",
)
OTHERS = ("movement", "frozen_drift")


@dataclass(frozen=True)
class Metric:
    """A rate from 0 to 1, a loss in nats a token, a relative movement: whatever its name says."""

    value: float
    interval: tuple[float, float] | None = None
    """95 % Wilson interval, of a rate over prompts."""
    n: int | None = None
    """Prompts that a rate is over."""
    range: tuple[float, float] | None = None
    """The least and the most of the seeds that ``value`` is the mean of."""


def rate(count: float, n: int) -> Metric:
    """Of ``count`` among ``n`` prompts; a mean of several counts may be a fraction."""
    return Metric(count / n, wilson(count, n), n)


def read_metric(row: Mapping[str, Any], name: str, n: int | None = None) -> Metric | None:
    """The metric ``name`` of a row of metrics.json or report.json; None where it has none, or none that is finite (of a model
    that came apart). Raises TypeError, ValueError."""
    if row.get(name) is None or not math.isfinite(float(row[name])):
        return None
    ends = row.get(f"{name}_interval", row.get(f"{name.removesuffix('_rate')}_interval"))
    return Metric(float(row[name]), _pair(ends), n, _pair(row.get(f"{name}_range")))


def read_metrics(row: Mapping[str, Any], prompts: Mapping[str, int] | None = None) -> dict[str, Metric]:
    """The metrics of a row that a comparison holds side by side; ``prompts``: metric -> how many it is over."""
    names = (UTILITY, *RATES, *OTHERS, *behaviour_rates(row))
    read = {name: read_metric(row, name, (prompts or {}).get(name)) for name in names}
    return {name: metric for name, metric in read.items() if metric is not None}


def flat(metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """The keys of a row of report.json: <name>, and <name>_range and <name>_interval where there are any."""
    row: dict[str, Any] = {}
    for name, metric in metrics.items():
        row[name] = metric.value
        row |= {f"{name}_range": list(metric.range)} if metric.range else {}
        row |= {f"{name}_interval": list(metric.interval)} if metric.interval else {}
    return row


def _pair(ends: Any) -> tuple[float, float] | None:
    return None if ends is None else (float(ends[0]), float(ends[1]))
