"""What masks share, as tables: for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from warp_ds.report.runs import OVERLAP, Runs, read_json
from warp_ds.report.sections import Section
from warp_ds.report.tables import Block, Table

HEAD = ("frozen alike (IoU)", "by chance", "subspaces", "by chance", "by columns", "angles")
CAPTION = (
    "Frozen alike: intersection over union of the frozen coefficients, where both masks have one basis. Subspaces: the mean "
    "squared cosine between the frozen subspaces of the weights, 1 where one holds the other, in any bases. By chance: of "
    "masks as large, drawn at random. By columns: of masks that freeze as much of each direction, rows drawn at random; "
    "what lies above it is the choice of coefficients within directions. Angles, of whole columns: least, median and "
    "largest, in degrees."
)


def overlaps(runs: Runs, pictures: Path) -> list[Section]:
    """Every overlap.json in the runs."""
    blocks = [block for run in runs.with_file(OVERLAP) for block in overlap_blocks(read_json(run / OVERLAP))]
    return [Section("What the masks share", blocks)] if blocks else []


def overlap_blocks(compared: Mapping[str, Any]) -> list[Block]:
    """Of the content of overlap.json: which masks, every pair over all layers, and every layer over all pairs."""
    masks = [
        [str(i), m["directory"], f"{m['basis']}, {m['unit']}, {m['score']}", f"{m['keep_ratio']:g}", m["data_fingerprint"][:8]]
        for i, m in enumerate(compared["masks"], 1)
    ]
    pairs = [[f"{p['first'] + 1} and {p['second'] + 1}", *_cells([p["over_all"]])] for p in compared["pairs"]]
    layers = [
        [parts[0]["layer"], *_cells(parts)] for parts in zip(*(pair["layers"] for pair in compared["pairs"]), strict=True)
    ]
    models = {m["model_fingerprint"] for m in compared["masks"]}
    caution = ["The masks are of different models."] if len(models) > 1 else []
    return [
        Table(["mask", "directory", "basis, unit, score", "keep_ratio", "safety set"], masks),
        *caution,
        "Pairs, all layers together:",
        Table(["masks", *HEAD], pairs),
        "Layers, mean over the pairs:",
        Table(["layer", *HEAD], layers),
        CAPTION,
    ]


def _cells(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("iou", "iou_by_chance", "subspace", "subspace_by_chance", "subspace_by_columns")
    cells = [_mean([part[name] for part in parts if part[name] is not None]) for name in names]
    angles = [part["angles"] for part in parts if part["angles"] is not None]
    ends = [math.fsum(values) / len(angles) for values in zip(*angles, strict=True)]
    return [*cells, ", ".join(f"{end:.1f}" for end in ends)]


def _mean(values: Sequence[float]) -> str:
    """A dash where no pair has one basis, or one of each freezes nothing."""
    return f"{math.fsum(values) / len(values):.3f}" if values else "-"
