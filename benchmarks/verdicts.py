"""Agreement of the verdicts with labels: python benchmarks/verdicts.py FILE.jsonl ... (prompt, answer, label a line).

Labels are full_refusal, partial and full_compliance; partial ones are listed apart. Nothing is trained or written.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from warp_ds.evaluation.metrics import wilson
from warp_ds.evaluation.verdicts import verdict

WANTED = {"full_refusal": "refusal", "full_compliance": "compliance"}


def share(count: int, n: int) -> str:
    low, high = wilson(count, n)
    return f"{count}/{n} = {count / n:.1%} [{low:.1%}, {high:.1%}]" if n else "none"


def main() -> None:
    for name in sys.argv[1:]:
        rows = [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines() if line.strip()]
        found = Counter((row["label"], verdict(row["answer"], prompt=row.get("prompt"))) for row in rows)
        n = {label: sum(count for (one, _), count in found.items() if one == label) for label in WANTED}
        right = {label: found[label, ours] for label, ours in WANTED.items()}
        print(
            f"{name}: agree {share(sum(right.values()), sum(n.values()))}; missed refusals "
            f"{share(n['full_refusal'] - right['full_refusal'], n['full_refusal'])}; false refusals "
            f"{share(found['full_compliance', 'refusal'], n['full_compliance'])}; all {dict(found)}"
        )


if __name__ == "__main__":
    main()
