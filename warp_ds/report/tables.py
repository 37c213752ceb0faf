"""What a reader sees of results: tables and paragraphs, as data; and their text in markdown and on a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich import table as rich_table
from rich.console import Console

from warp_ds.evaluation.results import UTILITY, Metric
from warp_ds.report.tradeoff import Comparison, MeanPoint, Reading

COLUMNS = {
    "refusal_rate": "refuses",
    "partial_rate": "in part",
    "incoherent_rate": "incoherent",
    "attack_success_rate": "complies",
    "not_judged_rate": "not judged",
    "over_refusal_rate": "over-refuses",
    "utility_accuracy": "task accuracy",
    UTILITY: "task NLL",
    "movement": "moved",
    "frozen_drift": "frozen drift",
}


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Each as long as the head, or shorter: what is missing is empty."""
    kind: ClassVar[str] = "table"


Block = Table | str
"""A str is a paragraph."""


def shown(name: str, metric: Metric | None) -> str:
    """A metric as a cell of a table."""
    if metric is None:
        return ""
    if name.endswith(("_rate", "_accuracy")):
        ends = metric.interval
        return f"{metric.value:.0%}" + (f" [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]" if ends else "")
    return f"{metric.value:.1e}" if name == "frozen_drift" else f"{metric.value:.3f}"


def columns(rows: Sequence[Mapping[str, Metric]], names: Sequence[str] = tuple(COLUMNS)) -> list[str]:
    """Those of ``names`` that some row has; what was not judged only where something was not."""
    some = [name for name in names if any(name in row for row in rows)]
    unjudged = any(row["not_judged_rate"].value for row in rows if "not_judged_rate" in row)
    return [name for name in some if unjudged or name != "not_judged_rate"]


def comparison_blocks(comparison: Comparison) -> list[Block]:
    """The arms at equal utility, and the measured points."""
    rows = [mean.metrics for mean in comparison.raw] + [reading.metrics for reading in comparison.equal_utility]
    names = [*columns(rows, [name for name in COLUMNS if name not in (UTILITY, "movement", "frozen_drift")]), "movement"]
    head = [COLUMNS[name] for name in names]

    def cells(one: Reading | MeanPoint) -> list[str]:
        return [shown(name, one.metrics.get(name)) for name in names]

    equal = [
        [reading.arm, *cells(reading), _by_seed(reading), " and ".join(map(_rate, reading.between))]
        if "refusal_rate" in reading.metrics
        else [reading.arm, f"does not cross it (its best is {reading.best_utility:.3f})"]
        for reading in comparison.equal_utility
    ]
    raw = [
        [mean.arm, "" if mean.rate is None else f"{mean.rate:g}", shown(UTILITY, mean.metrics.get(UTILITY)), *cells(mean)]
        for mean in comparison.raw
    ]
    one_sided = any(None in reading.between for reading in comparison.equal_utility)
    caution = (
        "An arm read between the start model and its first point has no measured point on one side: give it "
        "smaller --learning_rates before believing that row."
    )
    return [
        f"At equal utility (task NLL {comparison.at_utility:.3f} nats a token, linear between the points named last):",
        Table(["arm", *head, "refuses, by seed", "read between"], equal),
        "Measured points (means over seeds):",
        Table(["arm", "rate", "task NLL", *head], raw),
        *([caution] if one_sided else []),
        "In brackets: 95 % Wilson intervals over the prompts.",
        *recommended(comparison),
    ]


def recommended(comparison: Comparison) -> list[Block]:
    """What the comparison comes to, in one paragraph, where it says so."""
    found = comparison.about.get("recommendation")
    return [f"Recommendation. {found['text']}"] if found else []


def _by_seed(reading: Reading) -> str:
    low, high = reading.seeds_range or (math.nan, math.nan)
    missing = reading.seeds - reading.seeds_reached
    return f"{low:.0%} to {high:.0%}" + (f" (of {reading.seeds_reached}; {missing} more do not get there)" if missing else "")


def _rate(rate: float | None) -> str:
    return "the start model" if rate is None else f"{rate:g}"


# ---------------------------------------------------------------- renderers


def to_markdown(blocks: Sequence[Block]) -> str:
    """For a note, a card or a README."""
    return "\n\n".join(_markdown_table(block) if isinstance(block, Table) else block for block in blocks) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        padded = [*cells, *[""] * (len(table.head) - len(cells))]
        return f"| {' | '.join(' '.join(cell.split()).replace('|', chr(92) + '|') for cell in padded)} |"

    return "\n".join([line(table.head), "|" + "---|" * len(table.head), *map(line, table.rows)])


def to_terminal(blocks: Sequence[Block], width: int = 160) -> None:
    """Printed; markup in it is text."""
    console = Console(width=width, markup=False)
    for block in blocks:
        if isinstance(block, str):
            console.print(block)
            continue
        drawn = rich_table.Table(block.head[0])
        for column in block.head[1:]:
            drawn.add_column(column, justify="right")
        for row in block.rows:
            drawn.add_row(*row)
        console.print(drawn)
