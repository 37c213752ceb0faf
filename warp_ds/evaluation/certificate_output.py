"""A certificate on the terminal and as certificate.json."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from warp_ds.names import printable
from warp_ds.store.files import write_text
from warp_ds.store.runs import phase_of


def certificate_path(after: Path) -> Path:
    """certificate.json in the run that ``after`` lies in, where ``warp-ds report`` finds it; else in this directory."""
    runs = [directory for directory in (after.resolve(), *after.resolve().parents) if phase_of(directory)]
    return (runs[0] if runs and os.access(runs[0], os.W_OK) else Path()) / "certificate.json"


def write_certificate(certificate: dict[str, Any], path: Path) -> None:
    """Writes the certificate as JSON (no NaN, no Infinity), whole or not at all."""
    write_text(path, json.dumps(certificate, indent=2, allow_nan=False) + "\n")


def print_certificate(certificate: dict[str, Any]) -> None:
    """The certificate as a table on standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Moves of rotated coefficients, in the weights' units")

    def line(text: str) -> str:
        """Names come from files that anybody may have written: no line ends, no terminal codes, no markup."""
        return escape(" ".join(printable(text).split()))

    table.add_column("layer")
    for column in ("frozen", "largest", "rms", "allowed", "free: largest", "rms"):
        table.add_column(column, justify="right")
    for layer in certificate["layers"]:
        figures = ("frozen_max", "frozen_rms", "allowed_max", "free_max", "free_rms")
        table.add_row(
            line(layer["layer"]),
            str(layer["frozen"]),
            *("not finite" if layer[name] is None else f"{layer[name]:.2e}" for name in figures),
        )
    console = Console(width=140)
    console.print(table)
    console.print(
        f"[bold]{certificate['outcome'].upper()}[/]: {line(certificate['claim'])} ({certificate['frozen']} frozen, "
        f"{certificate['free']} free; {line(certificate['before'])} -> {line(certificate['after'])})"
    )
    for kind, style in (("problems", "red"), ("reasons", "yellow")):
        for entry in certificate[kind]:
            console.print(f"[{style}]{line(entry)}")
    for note in certificate["notes"]:
        console.print(f"[yellow]note: {line(note)}", highlight=False)
    console.print("This says nothing of what is not masked. There,")
    for part in certificate["not_claimed"]:
        detail = f" ({part['detail']})" if part["detail"] else ""
        console.print("  " + line(f"{part['what']}: {part['state']}{detail}"), highlight=False)
