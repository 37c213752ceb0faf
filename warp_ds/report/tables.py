"""What a reader sees of results: tables and paragraphs, as data; and their text in markdown and on a terminal."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich import table as rich_table
from rich.cells import cell_len
from rich.console import Console

from warp_ds.evaluation.kept import PREFIX, behaviour_rates
from warp_ds.evaluation.results import OTHERS, UTILITY, Metric, read_metric, read_metrics
from warp_ds.names import printable
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
    kept = behaviour_rates(dict.fromkeys(name for row in rows for name in row))
    rates = [name for name in COLUMNS if name not in (UTILITY, "movement", "frozen_drift")]
    names = [*columns(rows, rates), *kept, "movement"]
    head = [COLUMNS.get(name) or f"keeps {name.removeprefix(PREFIX).removesuffix('_rate')}" for name in names]

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
    advice = comparison.about.get("recommendation")
    return [f"Recommendation. {advice['text']}"] if advice else []


def _by_seed(reading: Reading) -> str:
    low, high = reading.seeds_range or (math.nan, math.nan)
    missing = reading.seeds - reading.seeds_reached
    return f"{low:.0%} to {high:.0%}" + (f" (of {reading.seeds_reached}; {missing} more do not get there)" if missing else "")


def _rate(rate: float | None) -> str:
    return "the start model" if rate is None else f"{rate:g}"


def measured_table(rows: Mapping[str, Mapping[str, Any]], written: Callable[[str], str] = str) -> Table:
    """``rows``: whose model -> its metrics.json; a further row for each file of attacks, its name as ``written`` has it."""
    table: dict[str, dict[str, Metric]] = {}
    for who, metrics in rows.items():
        table[who] = read_metrics(metrics)
        refusals = [name for name in metrics if name.startswith("attack_") and name.endswith("_refusal_rate")]
        for attack in (name.removesuffix("_refusal_rate") for name in refusals):
            of_attack = {name: read_metric(metrics, f"{attack}_{name}") for name in COLUMNS if name not in OTHERS}
            called = f"{who}, {written(attack.removeprefix('attack_'))}"
            table[called] = {name: metric for name, metric in of_attack.items() if metric is not None}
    names = columns(list(table.values()))
    lines = [[who, *(shown(name, metrics.get(name)) for name in names)] for who, metrics in table.items()]
    return Table(["model", *(COLUMNS[name] for name in names)], lines)


def evaluation_blocks(rows: Mapping[str, Mapping[str, Any]]) -> list[Block]:
    """What an evaluation found, the model that it is of last in ``rows``; a line for each paired test, task and warning."""
    measured = list(rows.values())[-1]
    lines = [f"{name}: {behaviour_line(rows, name)}." for name in behaviour_rates(measured)]
    for suite in (name.removesuffix("_p_against_before") for name in measured if name.endswith("_p_against_before")):
        lost, gained, p = (measured[f"{suite}_{kind}_against_before"] for kind in ("lost", "gained", "p"))
        what = "right answers" if suite == "gsm8k" or suite.startswith(PREFIX) else "refusals"
        lines.append(f"{suite}: {lost} {what} lost and {gained} gained, prompt by prompt (McNemar's exact test, p {p:.2g}).")
    for name, share in measured.items():
        if name.endswith("judge_agreement"):
            of = name.removesuffix("agreement")
            on = of.removesuffix("judge_").strip("_") or "harmful"
            lines.append(f"{on}: the guard model agrees on {share:.0%} of {measured[f'{of}n']} answers.")
    lines += [f"{task}, {name}: {value:.4g}" for task, name, value in task_scores(measured)]
    lines += [
        f"Warning: {count} prompts stood in a fitting set ({which}): on them the numbers measure memory."
        for which, count in measured.get("overlap", {}).items()
    ]
    return [measured_table(rows), *lines, "In brackets: 95 % Wilson intervals over the prompts."]


def behaviour_line(rows: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """The rate ``name`` of each model in words, with its interval."""
    found = {who: read_metric(metrics, name) for who, metrics in rows.items()}
    return ", ".join(
        f"{who} {metric.value:.0%}" + (f" [{metric.interval[0]:.0%}, {metric.interval[1]:.0%}]" if metric.interval else "")
        for who, metric in found.items()
        if metric is not None
    )


def task_scores(metrics: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Task of lm-evaluation-harness, its measure, the value."""
    return [
        (task, name, value)
        for task, scores in metrics.get("lm_eval", {}).items()
        for name, value in scores.items()
        if isinstance(value, float)
    ]


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
    """Printed, as wide as the terminal is, or ``width`` where there is none; markup in it is text.

    What is too wide for one table goes on in a second one, with the first column again: no name and no number is cut.
    """
    size = shutil.get_terminal_size((width, 24))  # both given: else a terminal that rich takes for a dumb one is 80 wide
    console = Console(markup=False, width=size.columns, height=size.lines)
    for block in blocks:
        for part in [block] if isinstance(block, str) else _fitting(block, console.width):
            console.print(printable(part) if isinstance(part, str) else part)


_FRAME = 3
"""Characters that a column takes beside its text; a table takes one more."""


def _fitting(table: Table, room: int) -> list[rich_table.Table]:
    """The table, or several with the first column each, none wider than ``room``."""
    rows = [[*row, *[""] * (len(table.head) - len(row))] for row in table.rows]
    columns_of = [[row[number] for row in rows] for number in range(len(table.head))]
    whole = [max(map(cell_len, [head, *cells])) for head, cells in zip(table.head, columns_of, strict=True)]
    if sum(whole) + _FRAME * len(whole) < room:
        return [_drawn(table.head, rows, range(len(whole)), whole)]
    # Heads and names may wrap between words. A cell wraps where it alone is wider than the room beside the name.
    word = max(cell_len(word) for cell in [table.head[0], *columns_of[0]] for word in [*cell.split(), ""])
    name = min(whole[0], max(word, room // 3), max(1, room * 2 // 3 - _FRAME))
    left = room - 1 - name - _FRAME
    narrow = [max(map(cell_len, [*head.split(), *cells])) for head, cells in zip(table.head, columns_of, strict=True)]
    widths = [name, *(max(1, min(width, left - _FRAME)) for width in narrow[1:])]
    parts: list[list[int]] = [[]]
    for number, width in enumerate(widths[1:], 1):
        if parts[-1] and sum(widths[other] + _FRAME for other in parts[-1]) + width + _FRAME > left:
            parts.append([])
        parts[-1].append(number)
    return [_drawn(table.head, rows, [0, *numbers], widths) for numbers in parts]


def _drawn(
    head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int], widths: Sequence[int]
) -> rich_table.Table:
    drawn = rich_table.Table()
    for number in numbers:
        drawn.add_column(head[number], justify="right" if number else "left", width=widths[number], overflow="fold")
    for row in rows:
        drawn.add_row(*(printable(row[number]) for number in numbers))
    return drawn
