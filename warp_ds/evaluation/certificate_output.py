"""A certificate on the terminal and as certificate.json."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from warp_ds.evaluation.certificate import Certificate
from warp_ds.names import printable
from warp_ds.store.files import write_text
from warp_ds.store.runs import phase_of

if TYPE_CHECKING:
    from rich.table import Table


def certificate_path(after: Path) -> Path:
    """certificate.json in the run that ``after`` lies in, where ``warp-ds report`` finds it; else in this directory."""
    runs = [directory for directory in (after.resolve(), *after.resolve().parents) if phase_of(directory)]
    return (runs[0] if runs and os.access(runs[0], os.W_OK) else Path()) / "certificate.json"


def write_certificate(certificate: Certificate, path: Path) -> None:
    """Writes the certificate as JSON (no NaN, no Infinity), whole or not at all."""
    write_text(path, json.dumps(certificate.values(), indent=2, allow_nan=False) + "\n")


def print_certificate(certificate: Certificate) -> None:
    """The certificate as a table on standard output."""
    from rich.console import Console

    console = Console(width=140)
    console.print(_table(certificate))
    console.print(
        f"[bold]{certificate.outcome.upper()}[/]: {_line(certificate.claim)} ({certificate.frozen} frozen, "
        f"{certificate.free} free; {_line(certificate.before)} -> {_line(certificate.after)})"
    )
    for entries, style in ((certificate.problems, "red"), (certificate.reasons, "yellow")):
        for entry in entries:
            console.print(f"[{style}]{_line(entry)}")
    for note in certificate.notes:
        console.print(f"[yellow]note: {_line(note)}", highlight=False)
    console.print("This says nothing of what is not masked. There,")
    for part in certificate.not_claimed:
        detail = f" ({part.detail})" if part.detail else ""
        console.print("  " + _line(f"{part.what}: {part.state}{detail}"), highlight=False)


def _table(certificate: Certificate) -> Table:
    from rich.table import Table

    table = Table(title="Moves of rotated coefficients, in the weights' units")
    table.add_column("layer")
    for column in ("frozen", "largest", "rms", "allowed", "free: largest", "rms"):
        table.add_column(column, justify="right")
    for layer in certificate.layers:
        figures = (layer.frozen_max, layer.frozen_rms, layer.allowed_max, layer.free_max, layer.free_rms)
        shown = [f"{figure:.2e}" if math.isfinite(figure) else "not finite" for figure in figures]
        table.add_row(_line(layer.layer), str(layer.frozen), *shown)
    return table


def _line(text: str) -> str:
    """Names come from files that anybody may have written: no line ends, no terminal codes, no markup."""
    from rich.markup import escape

    return escape(" ".join(printable(text).split()))
