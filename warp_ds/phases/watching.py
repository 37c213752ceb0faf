"""What a training is evaluated on in between: loss on held-out samples, and how many harmful prompts it refuses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from warp_ds.data.collate import pad_token
from warp_ds.data.datasets import load_prompts, load_samples
from warp_ds.data.sample import Sample
from warp_ds.errors import ConfigError
from warp_ds.evaluation.generate import generate_greedy, loss_per_token
from warp_ds.evaluation.results import rate
from warp_ds.evaluation.verdicts import verdict
from warp_ds.flags.groups import TrainingFlags
from warp_ds.phases.texts import check_lengths, tokenise
from warp_ds.store.fingerprints import fingerprint_rows

METRICS = {"loss": "--eval_data", "refusal_rate": "--eval_safety"}
"""What can choose the best model, and the flag that it needs."""


@dataclass
class Watched:
    """Held-out texts of one training."""

    samples: Sequence[Any] = ()
    """Before ``tokenised`` texts, then input_ids and labels."""
    prompts: Sequence[Sample] = ()
    batch_size: int = 1
    max_new_tokens: int = 128

    @classmethod
    def read(cls, arguments: Any, passed: Mapping[str, Any]) -> Watched:
        """What --eval_data and --eval_safety name. Raises DataError."""
        watched = cls(
            batch_size=passed.get("per_device_eval_batch_size", arguments.batch_size), max_new_tokens=arguments.max_new_tokens
        )
        if arguments.eval_data is not None:
            watched.samples = load_samples(
                arguments.eval_data,
                split=arguments.eval_split,
                samples=arguments.eval_samples,
                prompt_column=arguments.prompt_column,
                response_column=arguments.response_column,
                config=arguments.data_config,
                streaming=arguments.streaming,
            )
        if arguments.eval_safety is not None:
            watched.prompts = load_prompts(
                arguments.eval_safety, samples=arguments.eval_safety_samples, streaming=arguments.streaming
            )
        return watched

    def fingerprints(self, arguments: TrainingFlags, passed: Mapping[str, Any]) -> dict[str, str]:
        """Of what decides which weights come out; nothing where evaluation only watches."""
        if not (arguments.early_stopping_patience or passed.get("load_best_model_at_end")):
            return {}
        return {"held-out data": fingerprint_rows([list(self.samples), list(self.prompts)])}

    def tokenised(self, arguments: Any) -> Watched:
        """Ready to be measured on. Raises DataError for what is too long. Collective."""
        if self.prompts:
            check_lengths(arguments, {"--eval_safety": self.prompts}, {}, self.max_new_tokens)
        if self.samples:
            self.samples = tokenise(self.samples, arguments)
        return self

    def measure(self, model: Any, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
        """loss: nats a response token, one mean over all of them; refusal_rate with its 95 % Wilson interval, and of how many
        judged answers. The same on any number of ranks. Collective."""
        measured: dict[str, float] = {}
        if self.samples:
            options: dict[str, Any] = {"pad_token_id": pad_token(tokenizer), "batch_size": self.batch_size}
            measured["loss"] = loss_per_token(model, self.samples, **options)
        if self.prompts:
            options = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size, "desc": "refusals"}
            answers = generate_greedy(model, tokenizer, self.prompts, synced=True, **options)
            verdicts = [verdict(answer, prompt=p.prompt) for p, answer in zip(self.prompts, answers, strict=True)]
            judged = [said == "refusal" for said in verdicts if said != "not_judged"]
            refused = rate(sum(judged), len(judged)) if judged else None
            low, high = (0.0, 1.0) if refused is None or refused.interval is None else refused.interval
            measured |= {
                "refusal_rate": math.nan if refused is None else refused.value,
                "refusal_rate_low": low,
                "refusal_rate_high": high,
                "refusal_judged": len(judged),
            }
        return measured


def settle(arguments: TrainingFlags, passed: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer's flags with what follows from ours: an evaluation after every epoch where nothing says how often, and the
    metric that chooses. ConfigError for what cannot be."""
    settled = dict(passed)
    strategy = getattr(settled.get("eval_strategy"), "value", settled.get("eval_strategy"))
    chooses = settled.get("load_best_model_at_end") or arguments.early_stopping_patience
    if not arguments.watches:
        if asked := [name for name in ("eval_strategy", "eval_on_start", "load_best_model_at_end") if settled.get(name)]:
            if asked != ["eval_strategy"] or strategy != "no":
                raise ConfigError(f"--{asked[0]} needs something to evaluate on: give --eval_data or --eval_safety")
        if arguments.early_stopping_patience:
            raise ConfigError("--early_stopping_patience needs something to evaluate on: give --eval_data or --eval_safety")
        return settled
    if strategy == "no":
        given = "--eval_data" if arguments.eval_data is not None else "--eval_safety"
        raise ConfigError(f"{given} says nothing under --eval_strategy no: leave one of them out")
    settled.setdefault("eval_strategy", "epoch")
    if settled.get("load_best_model_at_end"):
        settled.setdefault("save_strategy", "best")
        _check_saved(settled)
    metric = str(settled.get("metric_for_best_model") or "loss").removeprefix("eval_")
    if chooses:
        if metric not in METRICS:
            raise ConfigError(f"--metric_for_best_model {metric}: choose from {', '.join(METRICS)}")
        if getattr(arguments, METRICS[metric].removeprefix("--")) is None:
            raise ConfigError(f"--metric_for_best_model {metric} (loss where none is given) needs {METRICS[metric]}")
        settled["metric_for_best_model"] = metric
    return settled


def _check_saved(settled: Mapping[str, Any]) -> None:
    """ConfigError where the best model may be that of a step at which nothing is saved."""
    saved, evaluated = (
        tuple(getattr(settled.get(name), "value", settled.get(name)) for name in (f"{kind}_strategy", f"{kind}_steps"))
        for kind in ("save", "eval")
    )
    unsaid = saved == ("steps", None)  # whose defaults differ
    if saved[0] != "best" and (saved != evaluated or unsaid):
        raise ConfigError(
            "--load_best_model_at_end needs a checkpoint of every step that is evaluated and may be the best: leave out "
            "--save_strategy and --save_steps (each new best one is saved), or give those of --eval_strategy and --eval_steps"
        )
