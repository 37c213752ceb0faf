"""The task samples that cost most safety, to be looked at before training: for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warp_ds.report.runs import Runs, read_json
from warp_ds.report.sections import Answers, Note, Section
from warp_ds.report.tables import Block, Table

FORMAT = "warp_ds.audit"
WIDTH = 60
"""Characters of a text that a line of the table shows."""
CAPTION = (
    "Cost: by how much a step of plain gradient descent on this sample alone raises the safety loss, in nats a response token "
    "and unit of learning rate, to first order, through the frozen coefficients; below 0: it lowers it. Opposed: the cosine "
    "between the sample's gradient and the safety gradient there, its sign turned. A rank is a reason to look, and no verdict."
)


def audits(runs: Runs, pictures: Path) -> list[Section]:
    """Every audit in the runs, its first samples folded with their texts."""
    blocks = [
        block
        for run in runs.of("audit")
        if (run / "audit.json").is_file()
        for block in audit_blocks(read_json(run / "audit.json"), with_texts=True)
    ]
    return [Section("Task samples that cost safety", blocks)] if blocks else []


def audit_blocks(found: Mapping[str, Any], with_texts: bool) -> list[Any]:
    """Of the content of audit.json; ``with_texts``: whole, folded, for the page."""
    head = (
        f"{found['raising']} of {len(found['ranked'])} samples of {found['utility_data']} raise the loss on "
        f"{found['safety_samples']} safety samples. The {len(found['shown'])} that raise it most:"
    )
    if with_texts:
        rows: list[Any] = [
            Answers(
                f"{number}. Row {row['row']}: cost {row['cost']:.3g}, opposed {row['opposed']:.2f}",
                row["prompt"],
                [("task", "response", row["response"])],
            )
            for number, row in enumerate(found["shown"], 1)
        ]
        return [head, *rows, Note(CAPTION)]
    lines = [
        [str(row["row"]), f"{row['cost']:.3g}", f"{row['opposed']:.2f}", _short(row["prompt"]), _short(row["response"])]
        for row in found["shown"]
    ]
    table: list[Block] = [head, Table(["row", "cost", "opposed", "prompt", "response"], lines), CAPTION]
    return table


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
