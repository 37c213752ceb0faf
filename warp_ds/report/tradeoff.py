"""Arms at equal utility: a comparison of safety means something only where the task was learnt equally well.

An arm's curve joins the start model and its points in the order of their learning rates, seeds averaged; between
neighbours everything is linear in the utility. What is read off at a common utility is an interpolation, and names the
points that it lies between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from warp_ds.evaluation.metrics import wilson

Point = Mapping[str, Any]
"""One measured model: arm, rate, seed, and its metrics."""

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


def average(points: Sequence[Point]) -> dict[str, Any]:
    """Metrics averaged over seeds; ``<rate>_range`` is the least and the most of them."""
    found: dict[str, Any] = {"arm": points[0]["arm"], "rate": points[0]["rate"], "seeds": len(points)}
    for name in (UTILITY, *RATES, *OTHERS):
        values = [p[name] for p in points if p.get(name) is not None]
        if values:
            found[name] = math.fsum(values) / len(values)
            found[f"{name}_range"] = [min(values), max(values)]
    return found


def by_arm(points: Sequence[Point]) -> dict[str, list[dict[str, Any]]]:
    """arm -> its averaged points in the order of the rates; the arms in their first order."""
    groups: dict[str, dict[Any, list[Point]]] = {}
    for point in points:
        groups.setdefault(point["arm"], {}).setdefault(point["rate"], []).append(point)
    return {
        arm: [average(group) for _, group in sorted(rates.items(), key=lambda item: item[0] or 0.0)]
        for arm, rates in groups.items()
    }


def crossing(utilities: Sequence[float], target: float) -> tuple[int, float] | None:
    """(i, share): utilities[i] + share (utilities[i + 1] - utilities[i]) first equals ``target``; None if never.

    Lower is better; the first crossing from above counts, so a curve that turns back later does not.
    """
    for i, (u, v) in enumerate(zip(utilities, utilities[1:], strict=False)):
        if u >= target >= v:
            return (i, 0.0) if u == v else (i, (u - target) / (u - v))
    return None


def at_utility(curve: Sequence[Point], target: float) -> dict[str, Any] | None:
    """The metrics of a curve where its utility is ``target``, by linear interpolation; None where it does not get there.

    ``between`` gives the rates of the one or two points that they come from; None is the start model.
    """
    found = crossing([p[UTILITY] for p in curve], target)
    if found is None:
        return None
    i, share = found
    first, second = curve[i], curve[i + 1]
    read: dict[str, Any] = {
        name: first[name] + share * (second[name] - first[name])
        for name in (UTILITY, *RATES, *OTHERS)
        if name in first and name in second
    }
    return read | {"between": [p["rate"] for p, weight in ((first, 1.0 - share), (second, share)) if weight]}


def common_utility(curves: Mapping[str, Sequence[Point]], wanted: float, reference: str) -> float:
    """The utility to compare at: ``wanted``, or the best that ``reference`` reaches, or what every arm reaches."""
    best = {arm: min(p[UTILITY] for p in curve) for arm, curve in curves.items() if arm != "before"}
    if wanted:
        return wanted
    return best.get(reference, max(best.values(), default=math.nan))


def compare(
    points: Sequence[Point], prompts: Mapping[str, int], wanted: float = 0.0, reference: str = "rotated"
) -> dict[str, Any]:
    """Raw rows (arm, rate; means over seeds) and rows at equal utility.

    Intervals are Wilson's, 95 %, of the mean rate over the prompts (metric -> number in ``prompts``): seeds answer the
    same prompts, so they do not count as more of them; ``seeds_range`` is the least and the most of the seeds, each
    interpolated by itself.
    """
    curves = by_arm(points)
    target = common_utility(curves, wanted, reference)
    before = curves.get("before", [])
    equal = []
    for arm, curve in curves.items():
        if arm == "before":
            continue
        # At rate 0 an arm is the start model, unless it changes weights without training.
        starts = [p for p in points if p["arm"] == arm]
        whole = [*(before if starts[0].get("from_start", True) else []), *curve]
        row: dict[str, Any] = {"arm": arm, "best_utility": min(p[UTILITY] for p in curve)}
        values = at_utility(whole, target)
        if values is not None:
            row |= values | {
                f"{name}_interval": interval(values[name], prompts[name])
                for name in RATES
                if name in values and name in prompts
            }
            each = [
                at_utility([*whole[: len(whole) - len(curve)], *by_arm([p for p in starts if p["seed"] == seed])[arm]], target)
                for seed in sorted({p["seed"] for p in starts})
            ]
            reached = [value["refusal_rate"] for value in each if value is not None and "refusal_rate" in value]
            row |= {
                "seeds": len(each),
                "seeds_reached": len(reached),
                "seeds_range": [min(reached), max(reached)] if reached else None,
            }
        equal.append(row)
    raw = [
        row | {f"{name}_interval": interval(row[name], prompts[name]) for name in RATES if name in row and name in prompts}
        for curve in curves.values()
        for row in curve
    ]
    return {"at_utility": target, "equal_utility": equal, "raw": raw}


def interval(rate: float, n: int) -> tuple[float, float]:
    return wilson(min(max(rate, 0.0), 1.0) * n, n)


def markdown(found: Mapping[str, Any]) -> str:
    """Both tables, for a note or a README."""
    columns = {
        "refusal_rate": "refuses",
        "partial_rate": "in part",
        "incoherent_rate": "incoherent",
        "attack_success_rate": "complies",
        "not_judged_rate": "not judged",
        "over_refusal_rate": "over-refuses",
        "utility_accuracy": "task accuracy",
    }

    shown = [*found["raw"], *found["equal_utility"]]
    columns = {name: title for name, title in columns.items() if any(name in row for row in shown)}
    if not any(row.get("not_judged_rate") for row in shown):
        columns.pop("not_judged_rate", None)

    def cells(row: Mapping[str, Any]) -> list[str]:
        return [_percent(row, name) for name in columns] + [_plain(row, "movement")]

    head = [*columns.values(), "moved"]
    lines = [
        f"At equal utility (task NLL {found['at_utility']:.3f} nats a token, linear between the points named last):",
        "",
        "| arm | " + " | ".join(head) + " | refuses, by seed | read between |",
        "|" + "---|" * (len(head) + 3),
    ]
    for row in found["equal_utility"]:
        if "refusal_rate" in row:
            low, high = row["seeds_range"] or (math.nan, math.nan)
            seeds = f"{low:.0%} to {high:.0%}" + (
                ""
                if row["seeds_reached"] == row["seeds"]
                else f" (of {row['seeds_reached']}; {row['seeds'] - row['seeds_reached']} more do not get there)"
            )
            ends = " and ".join("the start model" if rate is None else f"{rate:g}" for rate in row["between"])
            lines.append(f"| {row['arm']} | " + " | ".join(cells(row)) + f" | {seeds} | {ends} |")
        else:
            lines.append(
                f"| {row['arm']} | does not cross it (its best is {row['best_utility']:.3f}) |" + " |" * (len(head) + 1)
            )
    lines += [
        "",
        "Measured points (means over seeds):",
        "",
        "| arm | rate | task NLL | " + " | ".join(head) + " |",
        "|" + "---|" * (len(head) + 3),
    ]
    for row in found["raw"]:
        rate = "" if row["rate"] is None else f"{row['rate']:g}"
        lines.append(f"| {row['arm']} | {rate} | {_plain(row, UTILITY)} | " + " | ".join(cells(row)) + " |")
    if any(None in row.get("between", ()) for row in found["equal_utility"]):
        lines += [
            "",
            "An arm read between the start model and its first point has no measured point on one side: give it "
            "smaller --learning_rates before believing that row.",
        ]
    lines += ["", "In brackets: 95 % Wilson intervals over the prompts."]
    return "\n".join(lines) + "\n"


def _percent(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        return ""
    ends = row.get(f"{name}_interval")
    return f"{row[name]:.0%}" + (f" [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]" if ends else "")


def _plain(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.3f}" if name in row else ""
