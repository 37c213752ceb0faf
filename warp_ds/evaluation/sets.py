"""Held-out texts of an evaluation, and which of them stand in a set that something was fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from warp_ds.data.sample import Sample, as_samples
from warp_ds.errors import DataError
from warp_ds.evaluation.kept import PREFIX
from warp_ds.evaluation.metrics import number_value

SUITES = ("refusal", "over_refusal", "gsm8k", "loss")


@dataclass
class EvaluationSets:
    """Held-out samples; texts are taken as prompts, and mappings as `Sample.of` takes them."""

    harmful: Sequence[Any] = ()
    """Prompts that should be refused."""
    harmless: Sequence[Any] = ()
    """Prompts that should be answered."""
    utility: Sequence[Any] = ()
    """Task items, whose responses end in '#### N'."""
    attacks: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Name -> a user's own prompts that should be refused."""
    kept: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Behaviour -> held-out examples of it, prompts with responses."""
    formats: Mapping[str, str] = field(default_factory=dict)
    """Behaviour -> the regular expression that its whole answers match, where it has one."""

    def __post_init__(self) -> None:
        self.harmful, self.harmless, self.utility = map(as_samples, (self.harmful, self.harmless, self.utility))
        self.attacks = {name: as_samples(prompts) for name, prompts in self.attacks.items()}
        self.kept = {name: as_samples(examples) for name, examples in self.kept.items()}

    def refusal_prompts(self, suites: Sequence[str]) -> dict[str, Sequence[Sample]]:
        """Suite -> the prompts whose answers get a verdict."""
        by_suite = {"refusal": self.harmful, "over_refusal": self.harmless}
        chosen = {suite: prompts for suite, prompts in by_suite.items() if suite in suites and prompts}
        return chosen | {f"attack_{name}": prompts for name, prompts in self.attacks.items()}

    def generated(self, suites: Sequence[str]) -> dict[str, Sequence[Sample]]:
        """Suite -> the prompts that the model answers."""
        prompts = self.refusal_prompts(suites)
        prompts |= {f"{PREFIX}{name}": [example.asked() for example in examples] for name, examples in self.kept.items()}
        return prompts | ({"gsm8k": [item.asked() for item in self.utility]} if "gsm8k" in suites and self.utility else {})


def shared_prompts(fitted: Mapping[str, Sequence[str]], sets: EvaluationSets) -> dict[tuple[str, str], int]:
    """(fitting set, kind of evaluation prompt) -> how many of its prompts stand in that set, up to case and spaces."""

    def plain(prompts: Sequence[str]) -> set[str]:
        return {" ".join(prompt.casefold().split()) for prompt in prompts}

    known = {where: plain(prompts) for where, prompts in fitted.items()}
    tested = {
        "harmful": sets.harmful,
        "harmless": sets.harmless,
        "task": sets.utility,
        **{f"attack_{name}": prompts for name, prompts in sets.attacks.items()},
        **{f"{PREFIX}{name}": examples for name, examples in sets.kept.items()},
    }
    asked = {kind: plain([sample.prompt for sample in samples]) for kind, samples in tested.items()}
    counts = {(where, kind): len(asked[kind] & known[where]) for where in known for kind in asked}
    return {key: count for key, count in counts.items() if count}


def check_golds(items: Sequence[Sample], source: str) -> None:
    """DataError where a task item's answer has no '#### N' to compare with."""
    without = [i for i, row in enumerate(items) if number_value("####" + row.response.partition("####")[2]) is None]
    if without:
        raise DataError(
            f"{source}: {len(without)} of {len(items)} answers do not end in '#### N' (row {without[0]}: "
            f"{items[without[0]].response[-60:]!r}): gsm8k cannot score them; use --suite loss, or another "
            "--response_column"
        )
