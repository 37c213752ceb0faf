"""Models that met the same prompts, told apart: paired differences, by a bootstrap over prompts, seeds and start models.

Two rates whose own intervals overlap may still differ surely, because the same prompts are hard for both. So every
replicate draws prompts, seeds and start models once, for all models, and differences are taken within it (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13: percentile intervals).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
MARKS = {"refusal": "r", "partial": "p", "compliance": "c", "incoherent": "i", "not_judged": "-"}
"""Verdict -> its letter in ``outcomes``."""
REPLICATES = 2000


def outcomes(rows: Sequence[Mapping[str, Any]], losses: Sequence[Sequence[float]] = ()) -> dict[str, Any]:
    """What a model did with each prompt, for metrics.json: suite -> a letter a prompt (gsm8k, behaviours: 1 right, 0 wrong).

    ``losses``: nats of each trained token of each task item; 'loss' then holds their sum and number, item by item.
    """
    by_prompt: dict[str, Any] = {}
    for row in rows:
        known = row.get("correct", row.get("kept"))
        mark = MARKS[row["verdict"]] if known is None else str(int(known))
        by_prompt[row["suite"]] = by_prompt.get(row["suite"], "") + mark
    if losses:
        by_prompt["loss"] = {"nats": [round(sum(tokens), 5) for tokens in losses], "tokens": [len(tokens) for tokens in losses]}
    return by_prompt


@dataclass(frozen=True)
class Items:
    """One measure of one model, prompt by prompt; the measure is the first's sum over the second's."""

    top: Floats
    bottom: Floats

    @classmethod
    def of(cls, measured: Mapping[str, Any], measure: str) -> Items | None:
        """'refusal', 'gsm8k' or 'loss' of a model's metrics; None where they hold no outcomes of it."""
        marks = measured.get("outcomes", {}).get(measure)
        if not marks:
            return None
        if measure == "loss":
            return cls(np.array(marks["nats"], float), np.array(marks["tokens"], float))
        letters = np.array(list(marks))
        return cls((letters == ("1" if measure == "gsm8k" else "r")).astype(float), (letters != "-").astype(float))


Cells = Mapping[tuple[str, int], Items]
"""(start model, seed) -> one measure of the model that came of them."""


def common(models: Sequence[Cells]) -> list[Cells]:
    """What all have: the same start models and seeds, with as many prompts."""
    shared = [key for key in models[0] if all(key in cells for cells in models)]
    shared = [key for key in shared if len({len(cells[key].top) for cells in models}) == 1]
    return [{key: cells[key] for key in shared} for cells in models]


def estimates(models: Sequence[Cells]) -> Floats:
    """The measure of each model [models]: pooled over prompts and seeds, averaged over start models."""
    return _mean([_ratio(_stacked(models, start), None, None)[0] for start in _starts(models)])


def replicates(models: Sequence[Cells], count: int = REPLICATES, seed: int = 0) -> Floats:
    """``estimates`` under ``count`` resamples, each one for all models [count, models].

    Start models are drawn with replacement, for each its seeds and its prompts; prompts are the same for all seeds.
    """
    rng, starts = np.random.default_rng(seed), _starts(models)
    stacks = [_stacked(models, start) for start in starts]
    total = np.zeros((count, len(models)))
    for _ in starts:
        chosen = rng.integers(len(starts), size=count)
        for g, (top, bottom) in enumerate(stacks):
            rows = np.flatnonzero(chosen == g)
            seeds, prompts = (rng.multinomial(n, np.full(n, 1 / n), size=len(rows)).astype(float) for n in top.shape[1:])
            total[rows] += _ratio((top, bottom), seeds, prompts)
    return total / len(starts)


def interval(values: Floats, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of replicates; replicates without a value (nothing judged) are left out."""
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _starts(models: Sequence[Cells]) -> list[str]:
    return sorted({start for start, _ in models[0]})


def _stacked(models: Sequence[Cells], start: str) -> tuple[Floats, Floats]:
    """Sums and weights [models, seeds, prompts] of one start model."""
    seeds = sorted(seed for of, seed in models[0] if of == start)
    tops = [[cells[start, seed].top for seed in seeds] for cells in models]
    return np.array(tops), np.array([[cells[start, seed].bottom for seed in seeds] for cells in models])


def _ratio(stack: tuple[Floats, Floats], seeds: Floats | None, prompts: Floats | None) -> Floats:
    """[draws, models] under how often each seed [draws, seeds] and prompt [draws, prompts] was drawn; None: once each."""
    _, of_seeds, of_prompts = stack[0].shape
    seeds = np.ones((1, of_seeds)) if seeds is None else seeds
    prompts = np.ones((1, of_prompts)) if prompts is None else prompts
    top, bottom = (np.einsum("bs,msp,bp->bm", seeds, part, prompts, optimize=True) for part in stack)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(top / bottom)


def _mean(rows: Sequence[Floats]) -> Floats:
    return np.asarray(np.mean(rows, axis=0))
