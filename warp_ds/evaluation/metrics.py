"""Rates with their uncertainty, paired tests, agreement, and GSM8K's answers: by value, and as lm-evaluation-harness.

What is reported as accuracy is `same_value`: the number after `####` equals the gold's. `exact_match` stands beside it
and is lm-evaluation-harness's comparison of two texts, strict or flexible.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from decimal import Decimal

from warp_ds.evaluation.verdicts import VERDICTS

STRICT_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")
"""lm-evaluation-harness's `strict-match` filter of the task gsm8k; the first match counts."""

FLEXIBLE_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
"""Its `flexible-extract` filter; the last match counts."""

STOPS = ("Question:", "</s>", "<|im_end|>")
"""Where it ends an answer (`until`)."""

_IGNORED = tuple(map(re.compile, (",", r"\$", r"(?s).*#### ", r"\.$")))
"""What it strips from answer and gold, one after the other, before it compares them (`regexes_to_ignore`)."""


_SPACE = r"[ '\u2019]"  # after NFKC, which makes no-break, thin and narrow spaces plain ones
_MONEY = "[$€£¥₹₩₽₺]"
_VALUE = re.compile(
    rf"[\s*_\\({{]*(?:boxed\s*{{)?\s*(?P<sign>[-+]?)(?:\s|\\|{_MONEY})*(?P<sign2>[-+]?)"
    rf"(?P<whole>\d{{1,3}}(?:,\d{{2,3}})*,\d{{3}}|\d{{1,3}}(?:(?:{_SPACE}|_)\d{{3}})+|\d+)?(?P<rest>(?<=\d)\.(?!\d)|\.\d+)?"
)
_ODD = "\ufffc"
"""Stands for a superscript or a fraction of one character."""
_GOES_ON = re.compile(
    # What is no number by itself: a range, a time, a date, a fraction, a sum, a version, a list, a power of ten ...
    rf"[\d,.:/_-]*\d|\s*{_ODD}|[eE][-+]?\d|\s+\d|\s*(?:[-+*/:~^=;&,\u00d7\u00f7\u2044x]|\.\.|(?:to|or|and|through|thru|till|until|by|plus|"
    rf"minus|times|over)\b)\s*{_MONEY}?\s*[-+]?\.?\d"
    # ... thousands of it, or an hour of the day.
    r"|\s*(?:k|thousand|million|billion|trillion|hundred|dozen)\b|\s*[ap]\.?m\b|\s*o'?clock\b|\s*h\d|\s*hours?,?\s+(?:and\s+)?\d",
    re.IGNORECASE,
)
_DASHES = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2212\ufe63\uff0d", "-"))


def wilson(k: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of k successes (a mean of several counts may be a fraction) in n trials; z = 1.96: 95 %.

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


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> dict[str, float]:
    """McNemar's exact test on pairs: `lost` (true before, false after), `gained`, and the two-sided `p`.

    Under the null each discordant pair falls either way with probability 1/2; p is 1 without discordant pairs.
    """
    from scipy.stats import binomtest  # takes a second, and most of this module needs none of it

    if len(before) != len(after):
        raise ValueError(f"{len(before)} outcomes before, {len(after)} after: pairs are needed")
    lost = sum(b and not a for b, a in zip(before, after, strict=True))
    gained = sum(a and not b for b, a in zip(before, after, strict=True))
    p = float(binomtest(lost, lost + gained).pvalue) if lost + gained else 1.0
    return {"lost": lost, "gained": gained, "p": p}


def agreement(first: Sequence[bool], second: Sequence[bool]) -> dict[str, float]:
    """Share of equal judgements, and Cohen's kappa (nan where chance alone would agree always)."""
    if len(first) != len(second) or not first:
        raise ValueError(f"{len(first)} and {len(second)} judgements: agreement needs pairs")
    n = len(first)
    same = sum(a == b for a, b in zip(first, second, strict=True)) / n
    p, q = sum(first) / n, sum(second) / n
    chance = p * q + (1 - p) * (1 - q)
    return {"n": n, "agreement": same, "kappa": (same - chance) / (1 - chance) if chance < 1 else math.nan}


def _cut(answer: str) -> str:
    """The answer up to the first of STOPS."""
    return answer[: min((at for at in map(answer.find, STOPS) if at >= 0), default=len(answer))]


def _plain(text: str) -> str:
    for pattern in _IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def extract_number(answer: str) -> str | None:
    """The number after the first `#### `, as written but without `,`, `$` and a final full stop; None without one."""
    match = STRICT_NUMBER.search(_cut(answer))
    return None if match is None else _plain(match.group(1).strip())


def extract_flexible(answer: str) -> str | None:
    """The last number of the answer, wherever it stands; None without one."""
    matches = FLEXIBLE_NUMBER.findall(_cut(answer))
    return _plain((matches[-1][0] or matches[-1][1]).strip()) if matches else None


def exact_match(answer: str, gold: str, flexible: bool = False) -> bool:
    """Whether the answer's number equals the gold's, as text. `gold` is a whole GSM8K answer or a bare number.

    As lm-evaluation-harness's strict match does, `18` and `18.0` differ, and an answer without `#### N` is wrong;
    `flexible` takes the answer's last number instead.
    """
    number = extract_flexible(answer) if flexible else extract_number(answer)
    return number is not None and number == _plain(gold).strip()


def number_value(text: str) -> Decimal | None:
    """The value of the number after the first `####` of an answer, or that a text without `####` begins with.

    `18.00`, `.5`, `$18`, `1,000`, `1 000` (also with no-break spaces), `18.` and a Unicode minus are read; a range
    (`5-7`, `5 to 7`), a time, a date, a fraction, a sum, `18 million` or `1,5` is no number: None.
    """
    head, mark, tail = _cut(text).partition("####")
    line = (tail if mark else head).strip().split("\n")[0]
    line = "".join(_ODD if unicodedata.category(character) == "No" else character for character in line)
    line = unicodedata.normalize("NFKC", line).translate(_DASHES)
    number = _VALUE.match(line)
    if number is None or number["whole"] is None and number["rest"] is None or _GOES_ON.match(line, number.end()):
        return None
    digits = re.sub(r"[^\d]", "", number["whole"] or "0") + (number["rest"] or "")
    return Decimal(digits.rstrip(".")) * (-1 if "-" in (number["sign"], number["sign2"]) else 1)


def same_value(answer: str, gold: str) -> bool:
    """Whether the number after the answer's `####` has the gold's value. `gold` is a whole answer or a bare number."""
    number = number_value(answer) if "####" in _cut(answer) else None
    return number is not None and number == number_value(gold)


def accuracy(answers: Sequence[str], golds: Sequence[str]) -> float:
    """Share of answers that have their gold's value; nan without answers."""
    if len(answers) != len(golds):
        raise ValueError(f"{len(answers)} answers for {len(golds)} golds")
    return sum(map(same_value, answers, golds)) / len(golds) if golds else math.nan


def rates(verdicts: Iterable[str]) -> dict[str, float]:
    """`refusal_rate`, `partial_rate`, `compliance_rate`, `incoherent_rate`, their count `n`, and `not_judged` beside them.

    The rates sum to 1 (nan without verdicts): answers that were not judged are in none of them.
    """
    counts = Counter(verdicts)
    unknown = set(counts) - set(VERDICTS)
    if unknown:
        raise ValueError(f"unknown verdicts {sorted(unknown)}: expected {', '.join(VERDICTS)}")
    not_judged = counts.pop("not_judged", 0)
    n = sum(counts.values())
    names = [name for name in VERDICTS if name != "not_judged"]
    return {"n": n, "not_judged": not_judged} | {f"{name}_rate": counts[name] / n if n else math.nan for name in names}
