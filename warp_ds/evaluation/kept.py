"""Which behaviours a model still has: of each one's held-out examples, how many are answered as its own judge wants."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from warp_ds.errors import ConfigError
from warp_ds.evaluation.verdicts import verdict

PREFIX = "kept_"
"""What the suites of behaviours begin with, before a behaviour's name."""


def behaviour_rate(name: str) -> str:
    """The key of a behaviour's rate."""
    return f"{PREFIX}{name}_rate"


def behaviour_rates(keys: Iterable[str]) -> list[str]:
    """Those of ``keys`` that are a behaviour's rate."""
    return [key for key in keys if key.startswith(PREFIX) and key.endswith("_rate")]


def formats_of(given: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Behaviour -> the regular expression that its whole answers match, of NAME=REGEX. ConfigError for what is none."""
    formats: dict[str, str] = {}
    for text in given:
        name, mark, pattern = text.partition("=")
        if not mark or name not in names or name in formats:
            raise ConfigError(
                f"--kept_format {text!r}: NAME=REGEX, once for each of the files in --kept_data ({', '.join(names) or 'none'})"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"--kept_format {name}: {pattern!r} is no regular expression ({error})") from error
        formats[name] = pattern
    return formats


def judge_kept(rows: Sequence[dict[str, Any]], formats: Mapping[str, str]) -> None:
    """Adds 'kept' to the rows of behaviours, which have 'gold', the example's answer, and 'verdict'.

    By the behaviour's regular expression, which the whole answer matches; without one, an example that is a refusal by a
    verdict of refusal (None where the answer was not judged), any other by being the same text up to case and spaces.
    """
    for row in rows:
        answer, name = row["answer"].strip(), row["suite"].removeprefix(PREFIX)
        if name in formats:
            row["kept"] = re.fullmatch(formats[name], answer, re.DOTALL) is not None
        elif verdict(row["gold"], prompt=row["prompt"]) == "refusal":
            row["kept"] = None if row["verdict"] == "not_judged" else row["verdict"] == "refusal"
        else:
            row["kept"] = " ".join(answer.casefold().split()) == " ".join(row["gold"].casefold().split())
