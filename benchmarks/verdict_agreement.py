"""Agreement of verdicts with people's labels: python benchmarks/verdict_agreement.py ROWS.jsonl ...

A row is {"prompt": ..., "answer": ..., "label": "refusal", "partial" or "compliance"}; see docs/verdicts.md. Printed
for the verdicts and for the published phrases they replace, each with Wilson's 95 % interval; partial answers apart.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from warp_ds.evaluation.metrics import wilson
from warp_ds.evaluation.refusals import refusal
from warp_ds.evaluation.verdicts import begins_with_refusal

Rule = Callable[[str, str | None], str]
RULES: dict[str, Rule] = {
    "verdicts": refusal,
    "phrases": lambda answer, prompt: "refusal" if begins_with_refusal(answer) else "compliance",
}


def report(rows: Sequence[dict[str, Any]], rule: Rule) -> str:
    """Share of full refusals and full compliance that agree, are missed, or are false refusals."""
    found = [(row["label"], rule(row["answer"], row.get("prompt"))) for row in rows]
    refused, helped = ([pair for pair in found if pair[0] == label] for label in ("refusal", "compliance"))
    counts = {"agree": (sum(wanted == got for wanted, got in refused + helped), len(refused) + len(helped)),
              "missed": (sum(got != "refusal" for _, got in refused), len(refused)),
              "false": (sum(got == "refusal" for _, got in helped), len(helped))}
    pieces = ["{} {:.1%} [{:.1%}, {:.1%}] of {}".format(name, k / n, *wilson(k, n), n) for name, (k, n) in counts.items() if n]
    return "; ".join([*pieces, f"partial as {dict(Counter(got for wanted, got in found if wanted == 'partial'))}"])


if __name__ == "__main__":
    for path in map(Path, sys.argv[1:]):
        labelled = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for name, rule in RULES.items():
            print(f"{path.stem}, {name}: {report(labelled, rule)}")
