"""The texts of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from warp_ds.data.datasets import load_prompts, load_samples
from warp_ds.data.sample import Sample, as_samples
from warp_ds.errors import ConfigError
from warp_ds.evaluation.sets import EvaluationSets, check_golds, shared_prompts
from warp_ds.flags.comparison import CompareArguments
from warp_ds.method.baselines import safety_share
from warp_ds.phases.arms import Arm
from warp_ds.phases.behaviours import held_out, sets_apart

PATCH = (
    {
        "prompt": "How can I bypass system security checks?",
        "response": "Sorry, I can't help you. Please follow security guidelines.",
    },
)
"""The one refusal of Safety at One Shot (ICLR 2026)."""


@dataclass
class ComparisonData:
    """Samples; texts are taken as prompts, and mappings as `Sample.of` takes them."""

    safety: Sequence[Any]
    """What bases, importances and safety neurons are found on, and what SafeInstr mixes in."""
    task: Sequence[Any]
    sets: EvaluationSets
    mix: Sequence[Any] = ()
    """A user's own examples, mixed into every arm's task."""
    unaligned: Sequence[Any] = ()
    """Examples that undo the alignment, for Resta's safety vector."""
    foundation: Sequence[Any] = ()
    """Prompts of general use, for RSN-Tune's foundation neurons."""
    harmful_mix: Sequence[Any] = ()
    """Harmful requests that are complied with, for --harmful_ratio and the arm 'harmful'."""
    behaviours: Sequence[Sequence[Any]] = ()
    """Where --keep_data names several: the samples of each, which masks are found on with a share each."""
    patch: Sequence[Any] = PATCH
    """Refusals that '+patch' trains at the end."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name == "behaviours":
                self.behaviours = [as_samples(samples) for samples in self.behaviours]
            elif field.name != "sets":
                setattr(self, field.name, as_samples(getattr(self, field.name)))


def overlaps(data: ComparisonData) -> dict[tuple[str, str], int]:
    """As ``shared_prompts``, of everything that some arm is fitted on."""
    return shared_prompts(
        {
            name: [sample.prompt for sample in rows]
            for name, rows in (
                ("the safety set", data.safety),
                ("the task set", data.task),
                ("--mix_file", data.mix),
                ("--unaligned_data", data.unaligned),
                ("--harmful_mix", data.harmful_mix),
                ("--patch_data", data.patch),
            )
        },
        data.sets,
    )


def load_data(a: CompareArguments) -> ComparisonData:
    """Raises DataError for a file that is missing, empty or without the columns."""
    streaming = a.streaming
    columns: dict[str, Any] = {"prompt_column": a.prompt_column, "response_column": a.response_column, "streaming": streaming}
    safety = load_samples(a.safety_data, split=a.safety_split, samples=a.safety_samples, refusal_file=a.refusal_file, **columns)
    task = load_samples(a.utility_data, split=a.utility_split, samples=a.utility_samples, config=a.data_config, **columns)
    heldout = load_samples(
        a.utility_heldout or a.utility_data, split=a.heldout_split, samples=a.heldout_samples, config=a.data_config, **columns
    )
    mix = load_samples(a.mix_file, streaming=streaming)[: safety_share(len(task), a.mix_ratio)] if a.mix_file else []
    return ComparisonData(
        safety,
        task,
        EvaluationSets(
            load_prompts(a.harmful_data, samples=a.harmful_samples, prompt_column=a.prompt_column, streaming=streaming),
            load_prompts(a.harmless_data, samples=a.harmless_samples, streaming=streaming) if a.harmless_data else (),
            heldout,
            {},
            *held_out(a),
        ),
        mix,
        load_samples(a.unaligned_data, streaming=streaming) if a.unaligned_data else [],
        load_prompts(a.foundation_data, samples=len(safety), streaming=streaming)
        if a.foundation_data
        else [sample.asked() for sample in task if sample.messages][: len(safety)],
        load_samples(a.harmful_mix) if a.harmful_mix else [],
        _behaviours(a, columns),
        load_samples(a.patch_data) if a.patch_data else PATCH,
    )


def _behaviours(a: CompareArguments, columns: dict[str, Any]) -> list[list[Sample]]:
    options: dict[str, Any] = dict(split=a.safety_split, refusal_file=a.refusal_file, **columns)
    apart = sets_apart(a)
    return [load_samples(name, samples=count, **options) for name, count in apart] if len(apart) > 1 else []


def check_data(arms: Sequence[Arm], a: CompareArguments, data: ComparisonData) -> None:
    asking = next((part for arm in arms for part in (arm.merge, arm.method) if part in ("resta", "safelora", "asft")), None)
    if asking and not (a.unaligned_model or data.unaligned):
        raise ConfigError(
            f"--arms {asking} reckons with what undoing the alignment takes away: give an unaligned model with "
            "--unaligned_model, or examples that undo it with --unaligned_data (none are shipped)"
        )
    for arm in arms:
        if (
            arm.grows == "schedule"
            and not a.schedule
            or arm.grows == "refresh"
            and not arm.strength("refresh", a.refresh_steps)
        ):
            how = "--keep_ratio_schedule STEP:SHARE,…" if arm.grows == "schedule" else "--refresh_steps, or refresh@STEPS"
            raise ConfigError(f"--arms {arm.name}: give {how}")
        if arm.grows == "schedule" and min(a.schedule.values()) < a.keep_ratio:
            raise ConfigError(f"--keep_ratio_schedule {a.keep_ratio_schedule} falls below --keep_ratio {a.keep_ratio:g}")
    wanted = max((safety_share(len(data.task), arm.harmful_share) for arm in arms), default=0)
    if wanted > len(data.harmful_mix):
        raise ConfigError(
            f"a harmful mix takes {wanted} harmful samples, and --harmful_mix has {len(data.harmful_mix)}: give a file of "
            "requests that are complied with (none is shipped), or a smaller ratio"
        )
    check_golds(data.sets.utility, a.utility_heldout or a.utility_data)
