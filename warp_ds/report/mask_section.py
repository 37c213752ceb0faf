"""The report's section on masks: where they lie, how the scores do, and what a coefficient had to score."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from warp_ds.report import figures
from warp_ds.report.runs import Runs
from warp_ds.report.sections import Bullets, Note, Picture, Section
from warp_ds.report.tables import Table

if TYPE_CHECKING:
    from torch import Tensor

    from warp_ds.store.layers import TargetLayer
    from warp_ds.store.masks import MaskStore

BINS, MASKS = 50, 3
"""Ranges of eigen-directions in a picture, and most masks that are drawn."""


def masks(runs: Runs, pictures: Path) -> list[Section]:
    """Rotated masks of single entries."""
    rotated = []
    for run in runs.of_start("phase2"):
        if (run / "masks" / "metadata.json").is_file():
            from warp_ds.store.masks import MaskStore  # torch takes seconds, and most of a report needs none

            store = MaskStore(run / "masks")
            store.fingerprint()  # counts the bits that are drawn
            if (store.metadata.basis, store.metadata.unit, store.metadata.score) == ("activation", "entry", "importance"):
                rotated.append((runs.name(run), store))
    blocks: list[Picture | Table | Bullets | Note] = []
    for number, (name, store) in enumerate(rotated[:MASKS]):
        blocks += _of_mask(name, store, pictures, str(number or ""))
    if len(rotated) > MASKS:
        blocks.append(Note(f"{len(rotated) - MASKS} more masks are not drawn."))
    return [Section("Where the mask lies", blocks)] if blocks else []


def _of_mask(name: str, store: MaskStore, pictures: Path, number: str) -> list[Picture | Table | Bullets | Note]:
    import torch

    from warp_ds.method.mask import unpack_bits

    by_column = {layer.stem: unpack_bits(store.packed(layer.name), layer.n).float().mean(0) for layer in store.layers}
    drawn: dict[str, list[Tensor]] = {}
    for layer in store.layers:
        drawn.setdefault(_line(layer), []).append(by_column[layer.stem])
    lines_of = {line: torch.stack(columns).mean(0) for line, columns in drawn.items()}
    shares = {
        line: [float(part.mean()) for part in torch.tensor_split(columns, min(BINS, len(columns)))]
        for line, columns in lines_of.items()
    }
    width = max(map(len, shares.values()))
    shares = {stem: row + [row[-1]] * (width - len(row)) for stem, row in shares.items()}
    meta = store.metadata
    lines = figures.frozen_by_layer({stem: columns.tolist() for stem, columns in lines_of.items()})
    return [
        Picture(
            figures.save(figures.mask_map(shares, width), pictures, f"mask{number}"),
            f"{meta.frozen:,} of {meta.entries:,} rotated coefficients are frozen (keep_ratio {meta.keep_ratio:g}, "
            f"scope {meta.scope}). Run {name}.",
        ),
        Picture(
            figures.save(lines, pictures, f"frozen{number}"),
            "How a layer's frozen coefficients lie in its columns (eigen-directions): a steep fall means a few whole "
            "directions, a flat line means all of them alike. Early layers dark.",
        ),
        *_scores(store, pictures, f"scores{number}"),
        _thresholds(store, by_column),
        *([Bullets(meta.notes)] if meta.notes else []),
    ]


def _line(layer: TargetLayer) -> str:
    """What a layer is drawn as: a block's experts of a type as one, their mean."""
    return layer.stem if layer.expert is None else layer.stem.rpartition("_")[0]


def _scores(store: MaskStore, pictures: Path, name: str) -> list[Picture]:
    """How the scores of each layer lie, where the masks' phase kept that."""
    kept = store.scores()
    if kept is None:
        return []
    decade, types = kept["bins_per_decade"], dict[str, dict[str, tuple[list[float], list[float], float | None]]]()
    for layer in store.layers:
        histogram, threshold = kept["layers"][layer.name], store.metadata.layers[layer.name]["threshold"]
        logs = [(histogram["first"] + i + 0.5) / decade for i in range(len(histogram["counts"]))]
        shares = [count / (layer.m * layer.n) for count in histogram["counts"]]
        kind = layer.type if layer.expert is None else layer.type.rpartition("_")[0]
        lowest = None if threshold is None or not logs else math.log10(threshold)  # an expert that saw nothing has no scores
        types.setdefault(kind, {})[layer.stem] = logs, shares, lowest
    caption = (
        f"How the importance scores lie, {decade} bins a decade: a line a layer, early layers dark. Dots: the "
        "lowest frozen score; what lies right of it is frozen."
    )
    return [Picture(figures.save(figures.scores(types), pictures, name), caption)]


def _thresholds(store: MaskStore, by_column: dict[str, Tensor]) -> Table:
    """How much is frozen, and what a coefficient had to score for it, layer by layer; a block's experts of a type in one row:
    least, median and most."""
    lines, kept = dict[str, list[list[float | None]]](), (store.scores() or {}).get("layers")
    for layer in store.layers:
        entry, shares = store.metadata.layers[layer.name], by_column[layer.stem]
        lines.setdefault(_line(layer), []).append(
            [
                entry["frozen"] / (layer.m * layer.n),
                float((shares > 0).float().mean()),
                float((shares > 0.5).float().mean()),
                entry["threshold"],
                kept[layer.name]["zeros"] / (layer.m * layer.n) if kept else None,
            ]
        )
    forms = (".1%", ".1%", ".1%", ".2e", ".1%")
    rows = [
        [
            line if len(of) == 1 else f"{line}, {len(of)} experts: least, median, most",
            *(_spread(values, form) for values, form in zip(zip(*of, strict=True), forms, strict=True)),
        ]
        for line, of in lines.items()
    ]
    return Table(
        ["layer", "frozen", "columns with any frozen", "columns more than half frozen", "lowest frozen score", "score 0"], rows
    )


def _spread(values: Sequence[float | None], form: str) -> str:
    """A layer's value, or the least, median and most of several layers'; of those that have one."""
    there = [value for value in values if value is not None]
    shown = there if len(values) == 1 or not there else [min(there), statistics.median(there), max(there)]
    return ", ".join(format(value, form) for value in shown)
