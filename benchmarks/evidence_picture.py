"""Draws a table of evidence.md: refusals of the first prompt set against the task's loss, a point an arm and rate.

    python benchmarks/evidence_picture.py docs/evidence.md docs/images/evidence.png [--arms "layers;rotated;..."]

The first table of the file is drawn; so the picture never says anything else than the page does.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib
from matplotlib import pyplot

from warp_ds.report.figures import MARKERS, WIDTH, save_alone

Row = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path, help="a name that ends in .png or .svg")
    parser.add_argument("--arms", help="these alone, by semicolons")
    arguments = parser.parse_args()
    rows = read_table(arguments.page.read_text(encoding="utf-8"))
    wanted = arguments.arms.split(";") if arguments.arms else list(dict.fromkeys(row["arm"] for row in rows))
    draw([row for row in rows if row["arm"] in ("before", *wanted)], arguments.picture)


def read_table(text: str) -> list[Row]:
    """The rows of the first table with a column 'arm', by the names of its columns."""
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    start = next(number for number, cells in enumerate(lines) if cells[0] == "arm")
    rows = []
    for cells in lines[start + 1 :]:
        if len(cells) != len(lines[start]) or cells[0] == "arm":
            break
        rows.append(dict(zip(lines[start], cells, strict=True)))
    return rows


def interval(cell: str) -> tuple[float, float, float]:
    """'98% [87, 100]' -> 0.98, 0.87, 1.0."""
    value, low, high = (float(part) / 100 for part in re.findall(r"\d+", cell))
    return value, low, high


def draw(rows: list[Row], path: Path) -> None:
    column = next(name for name in rows[0] if name.startswith("refuses "))
    figure, axes = pyplot.subplots(figsize=(WIDTH, 5.2))
    colours = pyplot.get_cmap("tab20")
    for number, arm in enumerate(dict.fromkeys(row["arm"] for row in rows if row["arm"] != "before")):
        own = [row for row in rows if row["arm"] == arm]
        value, low, high = zip(*(interval(row[column]) for row in own), strict=True)
        axes.errorbar(
            [float(row["task loss"]) for row in own],
            value,
            yerr=[[v - a for v, a in zip(value, low, strict=True)], [b - v for v, b in zip(value, high, strict=True)]],
            label=f"{arm} ({', '.join(row['rate'] for row in own)})",
            color=colours(number % 20),
            marker=MARKERS[number % len(MARKERS)],
            linewidth=1,
            elinewidth=0.7,
            capsize=2,
        )
    for row in rows:
        if row["arm"] == "before":
            axes.axhline(interval(row[column])[0], color="#888888", linewidth=0.8, linestyle=":")
            axes.text(
                0.99,
                interval(row[column])[0] + 0.01,
                "before",
                color="#666666",
                fontsize=8,
                ha="right",
                transform=axes.get_yaxis_transform(),
            )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("task loss, nats a token (left is better)")
    axes.set_ylabel(f"{column} (95 % intervals)")
    axes.set_ylim(-0.03, 1.06)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    save_alone(figure, path)


if __name__ == "__main__":
    main()
