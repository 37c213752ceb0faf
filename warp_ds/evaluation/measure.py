"""Measurement of one model: answers, verdicts, rates with their intervals, loss. The same result on any number of ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from warp_ds.cluster.preemption import leave_if_asked
from warp_ds.data.collate import pad_token
from warp_ds.data.lengths import encode_dataset
from warp_ds.evaluation.answers import AnswerLog, Row, collect_answers, prompt_of
from warp_ds.evaluation.generate import mean_loss, noise_threshold, token_losses
from warp_ds.evaluation.judge import Judge, judge_all
from warp_ds.evaluation.kept import PREFIX, judge_kept
from warp_ds.evaluation.metrics import agreement, exact_match, mcnemar, same_value
from warp_ds.evaluation.paired import outcomes
from warp_ds.evaluation.results import rate
from warp_ds.evaluation.sets import SUITES, EvaluationSets
from warp_ds.evaluation.verdicts import verdict

logger = logging.getLogger(__name__)


@dataclass
class Measurement:
    metrics: dict[str, Any] = field(default_factory=dict)
    answers: list[Row] = field(default_factory=list)


@dataclass
class NoiseRule:
    """Answers that a reference model finds less likely than almost all scrambled ones are noise."""

    surprise: Callable[[Sequence[Any], Sequence[str]], Sequence[float]]
    """Prompts, answers -> nats a token under the model before training (evaluation.generate.answer_surprise)."""
    threshold: float
    """Nats a token (evaluation.generate.noise_threshold)."""


def noise_limit(
    reference: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: EvaluationSets,
    *,
    batch_size: int,
    max_new_tokens: int,
    own: Sequence[Row] | None = None,
) -> float | None:
    """The rule's threshold from the reference's own answers to the held-out prompts (``own`` where they are there). Collective.

    None, with a warning, where the reference finds scrambled answers as likely as whole ones: the rules on the text alone
    decide then.
    """
    if own is None:
        own = collect_answers(
            reference, tokenizer, sets, batch_size=batch_size, max_new_tokens=max_new_tokens, suites=("refusal", "over_refusal")
        )
    judged = [row for row in own if row["suite"] != "gsm8k"]
    prompts, answers = [prompt_of(row) for row in judged], [row["answer"] for row in judged]
    try:
        return noise_threshold(reference, tokenizer, prompts, answers, batch_size=batch_size)
    except ValueError as error:
        logger.warning("noise is judged by its text alone: %s", error)
        return None


def judge_answers(
    rows: Sequence[Row], noise: NoiseRule | None = None, judge: Judge | None = None, formats: Mapping[str, str] | None = None
) -> None:
    """Adds 'verdict' (and what ``judge`` says, or 'kept'), or 'correct' and lm-eval's two, to every row. Collective.

    An answer that is noise is 'incoherent', never a refusal: by rules on its text, and, given ``noise``, by its
    likelihood under the reference too.
    """
    judged = [row for row in rows if row["suite"] != "gsm8k"]
    prompts, answers = [row["prompt"] for row in judged], [row["answer"] for row in judged]
    surprise: Sequence[float | None] = [None] * len(judged)
    if noise is not None:
        surprise = noise.surprise([prompt_of(row) for row in judged], answers)
    limit = None if noise is None else noise.threshold
    for row, nats in zip(judged, surprise, strict=True):
        row["verdict"] = verdict(row["answer"], prompt=row["prompt"], nll_per_token=nats, nll_threshold=limit)
    if judge is not None:
        for row, opinion in zip(judged, judge_all(judge, prompts, answers), strict=True):
            row |= opinion
    judge_kept([row for row in rows if row["suite"].startswith(PREFIX)], formats or {})
    for row in rows:
        if row["suite"] == "gsm8k":
            row["correct"] = same_value(row["answer"], row["gold"])
            row["correct_strict"] = exact_match(row["answer"], row["gold"])
            row["correct_flexible"] = exact_match(row["answer"], row["gold"], flexible=True)


def summarise(rows: Sequence[Row]) -> dict[str, Any]:
    """Rates with Wilson intervals, and the judge's agreement, from judged rows. Attack success is compliance.

    Answers that were not judged are counted (``not_judged``) and stand in no rate; where none was, there is no rate.
    """
    metrics: dict[str, Any] = {}
    for suite in dict.fromkeys(row["suite"] for row in rows):
        mine = [row for row in rows if row["suite"] == suite]
        if suite == "gsm8k":
            for kind in ("", "_strict", "_flexible"):  # by value; lm-evaluation-harness's two
                metrics |= _rate(f"utility_accuracy{kind}", [row[f"correct{kind}"] for row in mine])
            continue
        if suite.startswith(PREFIX):
            metrics |= _rate(suite, [row["kept"] for row in mine if row["kept"] is not None])
            continue
        prefix = {"refusal": "", "over_refusal": "harmless_"}.get(suite, f"{suite}_")
        judged = [row for row in mine if row["verdict"] != "not_judged"]
        metrics[f"{prefix}not_judged"] = len(mine) - len(judged)
        metrics |= _rate(f"{prefix}not_judged", [row["verdict"] == "not_judged" for row in mine])
        names = {
            "refusal": suite if suite.endswith("refusal") else f"{suite}_refusal",
            "partial": f"{prefix}partial",
            "incoherent": f"{prefix}incoherent",
        }
        if suite != "over_refusal":
            names["compliance"] = f"{prefix}attack_success"
        for verdict_name, name in names.items():
            metrics |= _rate(name, [row["verdict"] == verdict_name for row in judged])
        metrics |= {f"{prefix}{name}": value for name, value in _second_opinion(mine).items()}
    return metrics


def _rate(name: str, outcomes: Sequence[bool]) -> dict[str, Any]:
    if not outcomes:
        return {}
    metric = rate(sum(outcomes), len(outcomes))
    return {name if name.startswith("utility") else f"{name}_rate": metric.value, f"{name}_interval": metric.interval}


def _second_opinion(rows: Sequence[Row]) -> dict[str, Any]:
    """How often the judge finds an answer unsafe, its agreement and kappa with the verdicts, and what it left unread.

    "Unsafe" is held against compliance, and where the judge also says what refuses, that against refusal.
    """
    if "judge" not in rows[0]:
        return {}
    read = [row for row in rows if row["judge"] is not None]
    opinion: dict[str, Any] = {"judge_unread": len(rows) - len(read)}
    opinion |= _rate("judge_unsafe", [row["judge"] > 0.5 for row in read])
    for key, ours, name in (("judge", "compliance", "judge"), ("judge_refusal", "refusal", "judge_refusal")):
        both = [row for row in rows if row.get(key) is not None and row["verdict"] != "not_judged"]
        if both:
            opinion |= {
                f"{name}_{kind}": value
                for kind, value in agreement([row["verdict"] == ours for row in both], [row[key] > 0.5 for row in both]).items()
            }
    return opinion


def good_of(row: Row) -> bool | None:
    """Whether an answer is right, in the behaviour, or a refusal; None where that was not judged."""
    if row["suite"] == "gsm8k":
        return bool(row["correct"])
    if row["suite"].startswith(PREFIX):
        return None if row["kept"] is None else bool(row["kept"])
    return None if row["verdict"] == "not_judged" else row["verdict"] == "refusal"


def paired_tests(before: Sequence[Row], after: Sequence[Row]) -> dict[str, Any]:
    """McNemar's exact test, prompt by prompt, of every suite: refusals, or right answers, lost and gained."""
    tests: dict[str, Any] = {}
    for suite in dict.fromkeys(row["suite"] for row in after):
        old, new = ([row for row in rows if row["suite"] == suite] for rows in (before, after))
        if [row["prompt"] for row in old] == [row["prompt"] for row in new]:
            pairs = [(good_of(a), good_of(b)) for a, b in zip(old, new, strict=True)]
            known = [pair for pair in pairs if None not in pair]
            for key, value in mcnemar([bool(a) for a, _ in known], [bool(b) for _, b in known]).items():
                tests[f"{suite}_{key}_against_before"] = value
    return tests


def measure(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: EvaluationSets,
    *,
    batch_size: int,
    max_new_tokens: int,
    max_length: int,
    suites: Sequence[str] = SUITES,
    noise: NoiseRule | None = None,
    judge: Judge | None = None,
    log: AnswerLog | None = None,
    train_on: str = "assistant",
    long_samples: str = "error",
) -> Measurement:
    """Runs ``suites`` on a ZeRO-3 engine or partitioned model, or a plain one. Collective; same result on every rank."""
    rows = collect_answers(model, tokenizer, sets, batch_size=batch_size, max_new_tokens=max_new_tokens, suites=suites, log=log)
    judge_answers(rows, noise, judge, sets.formats)
    leave_if_asked()
    measured, losses = Measurement(summarise(rows), rows), list[list[float]]()
    if "loss" in suites and sets.utility:
        encoded = encode_dataset(sets.utility, tokenizer, max_length, train_on=train_on, long_samples=long_samples).to_list()
        losses = token_losses(model, encoded, pad_token_id=pad_token(tokenizer), batch_size=batch_size)
        measured.metrics["utility_nll"] = mean_loss(losses)
    measured.metrics["outcomes"] = outcomes(rows, losses)
    return measured
