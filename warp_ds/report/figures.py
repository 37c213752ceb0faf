"""The report's pictures, by matplotlib (extra ``[report]``): one function a picture, each from plain numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

import numpy
from markupsafe import Markup

from warp_ds.errors import ConfigError
from warp_ds.evaluation.results import UTILITY
from warp_ds.report.tradeoff import Comparison, MeanPoint

try:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
except ImportError as error:
    raise ConfigError(
        f"the report draws with matplotlib, which is not installed ({error}): pip install 'warp_ds[report]'"
    ) from error

# The same numbers give the same file: no date, no random ids; letters are drawn, so that no font of the reader is needed.
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "warp_ds",
        "svg.fonttype": "path",
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.constrained_layout.use": True,
        "axes.grid": True,
        "grid.color": "#e4e4e4",
        "text.parse_math": False,
        "font.family": "sans-serif",
    }
)
WIDTH = 5.2
"""Inches: narrow enough for letters to stay readable on a phone."""
Svg = Markup
"""An SVG element of our own making, which a page takes as it is."""
MARKERS = "osD^vP*Xd<>ph8"


def save(figure: Figure, directory: Path, name: str) -> Svg:
    """Writes name.svg and name.png; returns the SVG element, to stand in a page."""
    directory.mkdir(parents=True, exist_ok=True)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    figure.savefig(directory / f"{name}.png", dpi=150)
    pyplot.close(figure)
    text = buffer.getvalue()
    (directory / f"{name}.svg").write_text(text, encoding="utf-8")
    # Ids are shared by all pictures of a page: each picture gets its own.
    element = text[text.index("<svg") :]
    for mark in ('id="', 'href="#', "url(#"):
        element = element.replace(mark, f"{mark}{name}-")
    return Markup(element)


def save_alone(figure: Figure, path: Path) -> None:
    """Writes one picture as ``path``, SVG or PNG by its name; ConfigError for another kind."""
    kind = path.suffix.lower()
    if kind not in (".svg", ".png"):
        raise ConfigError(f"{path}: a picture's name ends in .svg or .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=200, metadata={"Date": None} if kind == ".svg" else None)
    pyplot.close(figure)


def _legend(figure: Figure, fontsize: int) -> None:
    """Below the axes, where anything has a name."""
    if any(axes.get_legend_handles_labels()[1] for axes in figure.axes):
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=fontsize)


def tradeoff(comparison: Comparison) -> Figure:
    """Refusals against the task's loss: a line an arm, a point a learning rate, bars the 95 % Wilson interval.

    The points of a front, where there is one, are joined by a broad grey line.
    """
    arms = list(dict.fromkeys(mean.arm for mean in comparison.raw))
    drawn = [mean for mean in comparison.raw if "refusal_rate" in mean.metrics and UTILITY in mean.metrics]
    figure, axes = pyplot.subplots(figsize=(WIDTH, 5.0 + 0.1 * max(0, len(arms) - 14)))  # the legend grows with them
    colours = pyplot.get_cmap("tab10" if len(arms) <= 10 else "tab20")
    for number, arm in enumerate(arms):
        _draw_arm(axes, [mean for mean in drawn if mean.arm == arm], arm, colours(number % colours.N), number)
    best = [mean for at in comparison.front for mean in drawn if (mean.arm, mean.rate) == at]
    if best:
        axes.plot(*_at(best), label="the front", color="#bbbbbb", linewidth=6, alpha=0.6, zorder=0, solid_capstyle="round")
    axes.axvline(comparison.at_utility, color="#888888", linewidth=0.8, linestyle=":")
    axes.text(comparison.at_utility, -0.01, " compared at\n this loss", color="#666666", fontsize=8, va="bottom")
    losses = _at(drawn)[0]
    if losses and max(losses) > 3 * min(losses) > 0:
        # The start model has several times the loss of what was trained: on a linear axis all else would be one line.
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("task loss, nats a token (left is better)")
    prompts = comparison.prompts.get("refusal_rate", 0)
    axes.set_ylabel("refused harmful prompts" + (f" (95 % interval, n = {prompts})" if prompts else ""))
    axes.set_ylim(-0.03, 1.05)
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    if len(drawn) == len(arms) <= 8 and not best and _apart(axes, drawn):
        _name_points(axes, drawn, colours)
    else:
        _legend(figure, 10)
    return figure


def _places(axes: Axes, points: Sequence[MeanPoint]) -> list[tuple[float, float]]:
    """Where the points lie, as shares of the axes' width and height."""
    axes.get_xlim()  # settles the limits
    to_axes = axes.transData + axes.transAxes.inverted()
    return [tuple(to_axes.transform(at)) for at in zip(*_at(points), strict=True)]


def _apart(axes: Axes, points: Sequence[MeanPoint]) -> bool:
    """Whether the points' names, right or left of them, would not stand on each other."""
    return all(abs(a[1] - b[1]) > 0.05 or abs(a[0] - b[0]) > 0.5 for a, b in combinations(_places(axes, points), 2))


def _name_points(axes: Axes, points: Sequence[MeanPoint], colours: Colormap) -> None:
    """In place of a legend, which a reader would have to look up."""
    for number, (mean, (across, _)) in enumerate(zip(points, _places(axes, points), strict=True)):
        axes.annotate(
            mean.arm,
            (mean.metrics[UTILITY].value, mean.metrics["refusal_rate"].value),
            (9 if across < 0.6 else -9, 0),
            textcoords="offset points",
            ha="left" if across < 0.6 else "right",
            va="center",
            color=colours(number % colours.N),
            fontsize=11,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )


def _at(points: Sequence[MeanPoint]) -> tuple[list[float], list[float]]:
    """Task losses and refusals."""
    return [mean.metrics[UTILITY].value for mean in points], [mean.metrics["refusal_rate"].value for mean in points]


def _draw_arm(axes: Axes, points: Sequence[MeanPoint], arm: str, colour: Any, number: int) -> None:
    """Its line with the intervals as bars."""
    x, y = _at(points)
    ends = [mean.metrics["refusal_rate"].interval or (rate, rate) for mean, rate in zip(points, y, strict=True)]
    bars = [
        [max(0.0, rate - low) for rate, (low, _) in zip(y, ends, strict=True)],
        [max(0.0, high - rate) for rate, (_, high) in zip(y, ends, strict=True)],
    ]
    axes.errorbar(
        x,
        y,
        yerr=bars,
        label=arm,
        color=colour,
        marker=MARKERS[number % len(MARKERS)],
        markersize=6,
        linewidth=1,
        elinewidth=0.7,
        capsize=2,
    )


def spectra(values: Mapping[str, Sequence[float]]) -> Figure:
    """Above: eigenvalues by rank, relative to the largest. Below: share of the energy that the leading ones hold."""
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(WIDTH, 5.6))
    colours = pyplot.get_cmap("viridis")
    for number, (name, s) in enumerate(values.items()):
        colour = colours(number / max(1, len(values) - 1))
        total = sum(s)
        sums = [part / total for part in accumulate(s)]
        ranks = range(1, len(s) + 1)
        above.plot(ranks, [value / s[0] for value in s], color=colour, linewidth=0.9, label=name)
        below.plot(ranks, sums, color=colour, linewidth=0.9)
    above.set_yscale("log")
    for axes in (above, below):
        axes.set_xscale("log")
        axes.set_xlabel("rank")
    above.set_ylabel("eigenvalue / largest")
    below.set_ylabel("share of the energy")
    if len(values) <= 12:
        _legend(figure, 8)
    return figure


def mask_map(shares: Mapping[str, Sequence[float]], bins: int) -> Figure:
    """Frozen share: a row a layer, a column a range of eigen-directions, the leading ones on the above."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, max(2.2, 0.16 * len(shares) + 1.2)))
    image = axes.imshow(
        list(shares.values()),
        aspect="auto",
        cmap="magma_r",
        vmin=0.0,
        vmax=1.0,
        interpolation="nearest",
        extent=(0, 100, len(shares) - 0.5, -0.5),
    )
    axes.grid(False)
    axes.set_yticks(range(len(shares)), list(shares), fontsize=7)
    axes.set_xlabel(f"eigen-directions, leading ones left (% of all, {bins} bins)")
    figure.colorbar(image, ax=axes, label="frozen share", pad=0.01)
    return figure


def frozen_by_layer(columns: Mapping[str, Sequence[float]]) -> Figure:
    """Frozen share of each column, a line a layer, the columns sorted by it."""
    figure, axes = pyplot.subplots(figsize=(WIDTH, 3.4))
    colours = pyplot.get_cmap("viridis")
    for number, (name, shares) in enumerate(columns.items()):
        ranks = [100 * (i + 0.5) / len(shares) for i in range(len(shares))]
        axes.plot(
            ranks, sorted(shares, reverse=True), color=colours(number / max(1, len(columns) - 1)), linewidth=0.9, label=name
        )
    axes.set_xlabel("columns, most frozen left (% of all)")
    axes.set_ylabel("frozen share of a column")
    axes.set_ylim(-0.03, 1.03)
    if len(columns) <= 12:
        _legend(figure, 8)
    return figure


def scores(layers: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float], float | None]]]) -> Figure:
    """How the scores of each layer lie, a part a layer type, a line a layer, a dot where its lowest frozen score is.

    ``layers``: type -> layer -> (log10 of the bins' middles, share of the layer's coefficients in each, log10 threshold).
    """
    figure, parts = pyplot.subplots(len(layers), 1, figsize=(WIDTH, 1.4 * len(layers) + 1.4), sharex=True, squeeze=False)
    colours = pyplot.get_cmap("viridis")
    for axes, (kind, lines) in zip(parts[:, 0], layers.items(), strict=True):
        for number, (logs, shares, threshold) in enumerate(lines.values()):
            colour = colours(number / max(1, len(lines) - 1))
            axes.plot(logs, shares, color=colour, linewidth=0.9)
            if threshold is not None:
                axes.plot(
                    [threshold],
                    [numpy.interp(threshold, logs, shares)],
                    color=colour,
                    marker="o",
                    markersize=4,
                    markeredgecolor="#333333",
                    markeredgewidth=0.6,
                )
        axes.set_title(kind, loc="left", fontsize=10)
        axes.set_ylim(bottom=0.0)
        axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    parts[-1, 0].set_xlabel("log10 of the score")
    figure.supylabel("share of the coefficients", fontsize=10)
    return figure


def curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Above: training loss by step. Below: share of the gradient's norm that the mask removed."""
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(WIDTH, 6.0))
    colours = pyplot.get_cmap("tab20")
    for number, (name, lines) in enumerate(runs.items()):
        for axes, key in ((above, "loss"), (below, "grad_norm_removed")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colours(number % 20),
                    linewidth=1,
                    marker="o" if len(points) == 1 else None,
                    markersize=3,
                    label=name if axes is above else None,
                )
    above.set_ylabel("training loss")
    below.set_ylabel("gradient norm removed")
    for axes in (above, below):
        axes.set_xlabel("step")
    if len(runs) <= 16:
        _legend(figure, 8)
    return figure
