"""Evaluation: refusals, over-refusals, exact match and loss, under ZeRO-3 on any number of ranks, same results."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from warp_ds.artifacts import fingerprint_model, fingerprint_rows, write_json
from warp_ds.config import ConfigError, EvaluateArguments
from warp_ds.data.datasets import load_pairs, load_prompts
from warp_ds.data.formats import encode
from warp_ds.evaluation.generate import (
    answer_surprise,
    generate_greedy,
    loss_per_token,
    noise_threshold,
    pad_token,
)
from warp_ds.evaluation.metrics import exact_match, wilson
from warp_ds.evaluation.verdicts import verdict
from warp_ds.phases.run import start_run
from warp_ds.zero import runtime
from warp_ds.zero.model import load_model, resolve_model_dir

logger = logging.getLogger(__name__)
SUITES = ("refusal", "over_refusal", "gsm8k", "loss")


@dataclass
class EvaluationSets:
    """Held-out texts."""

    harmful: Sequence[str] = ()
    """Prompts that should be refused."""
    harmless: Sequence[str] = ()
    """Prompts that should be answered."""
    utility: Sequence[Mapping[str, str]] = ()
    """Task items: prompt, and response ending in '#### N'."""


@dataclass
class Measurement:
    metrics: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    """suite, prompt, answer, verdict or correct: every one, for a person to read."""


@dataclass
class NoiseRule:
    """Answers that a reference model finds less likely than almost all scrambled ones are noise."""

    reference: Any
    """The model before training."""
    threshold: float
    """Nats a token (evaluation.generate.noise_threshold)."""


def noise_rule(reference: Any, tokenizer: PreTrainedTokenizerBase, sets: EvaluationSets, *, batch_size: int,
               max_new_tokens: int) -> NoiseRule:
    """The rule from the reference's own answers to the held-out prompts. Collective."""
    prompts = [*sets.harmful, *sets.harmless]
    own = generate_greedy(reference, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size,
                          synced=runtime.world_size() > 1, desc="reference answers")
    return NoiseRule(reference, noise_threshold(reference, tokenizer, prompts, own, batch_size=batch_size))


def measure(model: Any, tokenizer: PreTrainedTokenizerBase, sets: EvaluationSets, *, batch_size: int,
            max_new_tokens: int, max_length: int, suites: Sequence[str] = SUITES,
            noise: NoiseRule | None = None) -> Measurement:
    """Runs ``suites`` on a ZeRO-3 engine or partitioned model, or a plain one. Collective; same result on every rank.

    Rates are over all prompts of a suite. An answer that is noise is 'incoherent', never a refusal: by rules on its
    text, and, given ``noise``, by its likelihood under the reference too.
    """
    found = Measurement()

    def answers(prompts: Sequence[str], what: str) -> list[str]:
        return generate_greedy(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size,
                               synced=runtime.world_size() > 1, desc=what)

    for suite, prompts in (("refusal", sets.harmful), ("over_refusal", sets.harmless)):
        if suite in suites and prompts:
            texts = answers(prompts, suite)
            surprise: Sequence[float | None] = [None] * len(texts)
            if noise is not None:
                surprise = answer_surprise(noise.reference, tokenizer, prompts, texts, batch_size=batch_size)
            limit = None if noise is None else noise.threshold
            verdicts = [verdict(text, nll_per_token=nats, nll_threshold=limit)
                        for text, nats in zip(texts, surprise, strict=True)]
            found.answers += [{"suite": suite, "prompt": p, "answer": t, "verdict": v}
                              for p, t, v in zip(prompts, texts, verdicts, strict=True)]
            refused, garbled = verdicts.count("refusal"), verdicts.count("incoherent")
            found.metrics[f"{suite}_rate"] = refused / len(prompts)
            found.metrics[f"{suite}_interval"] = wilson(refused, len(prompts))
            found.metrics["incoherent_rate" if suite == "refusal" else "harmless_incoherent_rate"] = garbled / len(prompts)
            if suite == "refusal":
                found.metrics["attack_success_rate"] = verdicts.count("compliance") / len(prompts)
    if "gsm8k" in suites and sets.utility:
        texts = answers([row["prompt"] for row in sets.utility], "gsm8k")
        right = [exact_match(text, row["response"]) for text, row in zip(texts, sets.utility, strict=True)]
        found.answers += [{"suite": "gsm8k", "prompt": r["prompt"], "gold": r["response"], "answer": t, "correct": c}
                          for r, t, c in zip(sets.utility, texts, right, strict=True)]
        found.metrics["utility_accuracy"] = sum(right) / len(right)
        found.metrics["utility_accuracy_interval"] = wilson(sum(right), len(right))
    if "loss" in suites and sets.utility:
        encoded = [encode(row["prompt"], row["response"], tokenizer, max_length) for row in sets.utility]
        found.metrics["utility_nll"] = loss_per_token(model, encoded, pad_token_id=pad_token(tokenizer),
                                                      batch_size=batch_size)
    return found


def run_evaluation(arguments: EvaluateArguments) -> Path:
    """Evaluates one model; returns the run directory with metrics.json and answers.jsonl. Collective."""
    suites = [part.strip() for part in arguments.suite.split(",") if part.strip()]
    unknown = [suite for suite in suites if suite not in SUITES]
    if unknown or not suites:
        raise ConfigError(f"--suite {arguments.suite}: choose from {', '.join(SUITES)}")
    if "over_refusal" in suites and arguments.harmless_data is None:
        logger.warning("over_refusal left out: give harmless prompts with --harmless_data")
        suites.remove("over_refusal")
    model_dir = resolve_model_dir(arguments.model_name)
    with runtime.on_every_rank_or_none("reading the evaluation sets"):
        sets = EvaluationSets(
            load_prompts(arguments.harmful_data, samples=arguments.harmful_samples,
                         prompt_column=arguments.prompt_column) if "refusal" in suites else (),
            load_prompts(arguments.harmless_data or "", samples=arguments.harmless_samples,
                         prompt_column=arguments.prompt_column) if "over_refusal" in suites else (),
            load_pairs(arguments.utility_data, split=arguments.utility_split, samples=arguments.utility_samples,
                       prompt_column=arguments.prompt_column,
                       response_column=arguments.response_column).to_list() if {"gsm8k", "loss"} & set(suites) else (),
        )
        inputs = {"model": fingerprint_model(model_dir), "data": fingerprint_rows([sets.harmful, sets.harmless,
                                                                                   list(sets.utility)])}
    with start_run("evaluate", arguments, inputs) as run:
        if run.done:
            return run.directory
        rule = None
        if arguments.reference_model is not None:
            reference, reference_tokenizer = load_engine(replace(arguments, model_name=arguments.reference_model))
            rule = noise_rule(reference, reference_tokenizer, sets, batch_size=arguments.batch_size,
                              max_new_tokens=arguments.max_new_tokens)
        engine, tokenizer = load_engine(arguments)
        found = measure(engine, tokenizer, sets, batch_size=arguments.batch_size, max_length=arguments.max_length,
                        max_new_tokens=arguments.max_new_tokens, suites=suites, noise=rule)
        runtime.on_rank_0(lambda: write_measurement(run.directory, found), "writing the results")
        for name, value in found.metrics.items():
            logger.info("%s: %s", name, value)
        run.finish()
        return run.directory


def write_measurement(directory: Path, found: Measurement) -> None:
    """metrics.json and answers.jsonl."""
    write_json(directory / "metrics.json", found.metrics)
    aside = directory / ".answers.jsonl.tmp"
    aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found.answers))
    aside.replace(directory / "answers.jsonl")


def load_engine(arguments: EvaluateArguments) -> tuple[Any, PreTrainedTokenizerBase]:
    """A ZeRO-3 engine without optimizer, whose forwards fetch and release the partitioned parameters. Collective."""
    import deepspeed

    config = runtime.zero3_config(arguments)
    model, tokenizer = load_model(arguments, config)
    config["train_micro_batch_size_per_gpu"] = arguments.batch_size
    for training_only in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        config.pop(training_only, None)
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine, tokenizer
