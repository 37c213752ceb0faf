"""Rates with their uncertainty, and exact match as GSM8K is scored."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

STRICT_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")
"""lm-evaluation-harness's `strict-match` filter of the task gsm8k; the first match counts."""

_IGNORED = re.compile(r",|\$|(?s:.*#### )|\.$")
"""What lm-evaluation-harness strips from answer and gold before it compares them (`regexes_to_ignore`)."""


def wilson(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of k successes in n trials; z = 1.96 for 95 %. (0, 1) when n is 0.

    Wilson (1927), "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= k <= n:
        raise ValueError(f"{k} successes in {n} trials is impossible")
    if n == 0:
        return 0.0, 1.0
    p = k / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def extract_number(answer: str) -> str | None:
    """The number after the first `#### `, as written but without `,`, `$` and a final full stop; None without one."""
    match = STRICT_NUMBER.search(answer)
    return None if match is None else _IGNORED.sub("", match.group(1))


def exact_match(answer: str, gold: str) -> bool:
    """Whether the answer's number equals the gold's, as text. `gold` is a whole GSM8K answer or a bare number.

    As lm-evaluation-harness's strict match does, `18` and `18.0` differ, and an answer without `#### N` is wrong.
    """
    number = extract_number(answer)
    return number is not None and number == _IGNORED.sub("", gold).strip()


def accuracy(answers: Sequence[str], golds: Sequence[str]) -> float:
    """Share of answers that match their gold exactly; nan without answers."""
    if len(answers) != len(golds):
        raise ValueError(f"{len(answers)} answers for {len(golds)} golds")
    return sum(map(exact_match, answers, golds)) / len(golds) if golds else math.nan


def rates(verdicts: Iterable[str]) -> dict[str, float]:
    """`refusal_rate`, `compliance_rate`, `incoherent_rate` (they sum to 1; nan without verdicts) and the count `n`."""
    counts = Counter(verdicts)
    n = sum(counts.values())
    names = ("refusal", "compliance", "incoherent")
    unknown = set(counts) - set(names)
    if unknown:
        raise ValueError(f"unknown verdicts {sorted(unknown)}: expected {', '.join(names)}")
    return {"n": n} | {f"{name}_rate": counts[name] / n if n else math.nan for name in names}
