"""Arms side by side: one start model, one data set, the same seeds and learning rates, one launch, one table.

Every phase is the real one. A point (arm, learning rate, seed) that is measured is not done again, so a comparison that
was stopped goes on, and one that is started again under the same --run_name with more arms, rates or seeds adds those.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from warp_ds.cluster import consensus, processes
from warp_ds.cluster.preemption import leave_if_asked
from warp_ds.errors import ConfigError
from warp_ds.evaluation.kept import behaviour_rate
from warp_ds.evaluation.results import RATES
from warp_ds.evaluation.sets import EvaluationSets
from warp_ds.flags.arguments import TrainArguments
from warp_ds.flags.comparison import CompareArguments
from warp_ds.models.lora import refuse_parts
from warp_ds.models.targets import targets_of
from warp_ds.phases.adapters import check_adaptable
from warp_ds.phases.arms import ARMS, Arm, parse_arms, refuse_placement, with_harm
from warp_ds.phases.bench import PUBLISHED, Bench
from warp_ds.phases.comparison_data import check_data, load_data
from warp_ds.phases.neurons import LAYERS
from warp_ds.phases.run import start_run
from warp_ds.phases.trainer_arguments import check_training
from warp_ds.phases.trials import Trial, chain, is_needed
from warp_ds.phases.versions import installed_versions
from warp_ds.report import costs
from warp_ds.report.recommendation import with_recommendation
from warp_ds.report.tables import Block, comparison_blocks, to_markdown, to_terminal
from warp_ds.report.tradeoff import Comparison, Point, compare_points
from warp_ds.store.files import write_json, write_text
from warp_ds.store.fingerprints import fingerprint_rows
from warp_ds.store.state import Progress
from warp_ds.zero.model import resolve_model_dir
from warp_ds.zero.shared_reading import model_fingerprint

logger = logging.getLogger(__name__)


def run_compare(arguments: CompareArguments, passed: dict[str, Any] | None = None) -> Path:
    """Returns the run directory with report.json and table.md. Collective."""
    check_training(training_flags(arguments), passed)
    with consensus.on_every_rank_or_none("checking the arms"):
        named = parse_arms(arguments.arms)
        grids, seeds = arguments.rates([arm.name for arm in named]), arguments.seed_list
        arms = with_harm(named, arguments.ratio_list)
        if processes.world_size() > 1:
            refuse_placement(arms, arguments.basis_placement)
        rates = {mixed.name: grids[arm.name] for arm in named for mixed in with_harm([arm], arguments.ratio_list)}
    model_dir = resolve_model_dir(arguments.model_name)
    if arguments.unaligned_model is not None:
        resolve_model_dir(arguments.unaligned_model, "--unaligned_model")
    fingerprint = model_fingerprint(model_dir)
    with consensus.on_every_rank_or_none("looking for the arms' layers"):
        check_layers(arms, arguments, model_dir)
    with consensus.on_every_rank_or_none("reading the data"):
        data = load_data(arguments)
        check_data(arms, arguments, data)
        inputs = {
            "model": fingerprint,
            "data": fingerprint_rows(
                [
                    list(data.safety),
                    list(data.task),
                    list(data.mix),
                    list(data.unaligned),
                    list(data.foundation),
                    list(data.harmful_mix),
                    list(data.patch),
                    data.sets.harmful,
                    data.sets.harmless,
                    list(data.sets.utility),
                    *([sorted(data.sets.kept.items()), sorted(data.sets.formats.items())] if data.sets.kept else []),
                ]
            ),
        }
    with start_run("compare", arguments, inputs, passed) as run:
        comparison = compare_arms(Bench(arguments, model_dir, run.directory, data, passed or {}), arms, rates, seeds)
        comparison = with_recommendation(comparison, arguments.floor)
        consensus.on_rank_0(lambda: write_report(run.directory, comparison), "writing the report")
        run.finish()
        show(run.directory, comparison)
        return run.directory


def check_layers(arms: Sequence[Arm], arguments: CompareArguments, model_dir: Path) -> None:
    """ConfigError, before any arm trains, where one of them is of matrices that every token passes and is given experts."""
    for arm in arms:
        if arm.adapter:
            kinds = PUBLISHED if arm.method == "salora" else arguments.layer_type
            layers = targets_of(model_dir, arguments.target_layers, kinds)
            check_adaptable(layers, AutoConfig.from_pretrained(model_dir, trust_remote_code=False))
            if arm.basis or arm.method or arm.merge == "wsr":
                refuse_parts(layers, f"--arms {arm.name}")
        if arm.merge == "safedelta" or arm.start:
            experts = [layer for layer in targets_of(model_dir, "all", LAYERS) if layer.expert is not None]
            if experts:
                raise ConfigError(
                    f"{experts[0].name} is one of a mixture's experts, and {arm.name} is of matrices that every token passes: "
                    f"leave {arm.name} out of --arms"
                )


def training_flags(a: CompareArguments) -> TrainArguments:
    """The flags of a comparison that its trainings take, to be checked before any work."""
    same = {f.name: getattr(a, f.name) for f in fields(TrainArguments) if hasattr(a, f.name)}
    return TrainArguments(**same, learning_rate=max(a.rate_list))


def compare_arms(bench: Bench, arms: Sequence[Arm], rates: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> Comparison:
    """Trains and measures every trial. Collective."""
    trials = [Trial(arm, rate, seed) for seed in seeds for arm in arms if arm.trains for rate in rates[arm.name]]
    if any(arm.trains is None for arm in arms):
        trials.insert(0, Trial(next(arm for arm in arms if arm.trains is None), 0.0, seeds[0]))
    bench.check_lengths()
    bench.write_data()
    for which, count in bench.overlap.items():
        logger.warning("%d prompts of the evaluation (%s) were there before: what is measured on them is memory", count, which)
    started = time.time()
    points = _measure(bench, trials, arms)
    plainly_rotated = [trial for trial in trials if trial.arm == replace(ARMS["rotated"], name=trial.arm.name)]
    if plainly_rotated:
        consensus.on_rank_0(lambda: bench.link_latest(plainly_rotated[-1]), "linking the rotated arm's runs")
    about = {
        "overlap": bench.overlap,
        "keep_ratio": bench.arguments.keep_ratio,
        "layer_type": bench.arguments.layer_type,
        "noise_threshold": bench.measuring.noise_threshold(),
        "unaligned": bench.measuring.known("unaligned") if any(arm.merge in ("resta", "safelora") for arm in arms) else None,
        "seconds": bench.seconds,
        "total_seconds": round(time.time() - started, 1),
        "world_size": processes.world_size(),
        "versions": installed_versions(),
    }
    return compare_points(points, _prompts(bench.data.sets), bench.arguments.at_utility, about=about)


def _measure(bench: Bench, trials: Sequence[Trial], arms: Sequence[Arm]) -> list[Point]:
    """The point of every trial; models that no later trial needs are removed where --keep_models is false. Collective."""
    one_sided = [arm for arm in arms if arm.output == "identity" and not arm.start]
    rotated = next((arm for arm in one_sided if arm.basis == "activation" and arm.unit == "entry"), None)
    points = []
    progress = Progress(bench.root, len(trials), "points", seconds=0.0)
    for number, trial in enumerate(trials, 1):
        progress.at(number - 1)
        leave_if_asked()
        logger.info("point %d of %d: %s", number, len(trials), trial.name)
        points.append(bench.point(trial, rotated))
        if not bench.arguments.keep_models:
            for made in chain(trial):
                if not is_needed(made, trials[number:]):
                    bench.forget(made)
    progress.at(len(trials))
    return points


def _prompts(sets: EvaluationSets) -> dict[str, int]:
    """Metric -> the prompts that it is a rate over."""
    of_harmful = [name for name in RATES if name not in ("over_refusal_rate", "utility_accuracy")]
    counts = dict.fromkeys(of_harmful, len(sets.harmful))
    kept = {behaviour_rate(name): len(examples) for name, examples in sets.kept.items()}
    return {**counts, "over_refusal_rate": len(sets.harmless), "utility_accuracy": len(sets.utility), **kept}


def write_report(directory: Path, comparison: Comparison) -> None:
    """report.json and table.md. Rank 0 alone calls it."""
    write_json(directory / "report.json", comparison.to_json())
    write_text(directory / "table.md", to_markdown([*comparison_blocks(comparison), *spent(directory)]))


def show(directory: Path, comparison: Comparison) -> None:
    """The same tables on rank 0's terminal."""
    if processes.rank() == 0:
        to_terminal([*comparison_blocks(comparison), *spent(directory)])


def spent(directory: Path) -> list[Block]:
    """What the phases of a comparison or sweep took."""
    phases = sorted(mark.parent for mark in directory.rglob("finished.json") if mark.parent != directory)
    return costs.blocks(phases, lambda run: str(run.relative_to(directory)))
