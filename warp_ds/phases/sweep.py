"""Ablations of the rotated arm: one setting at a time is changed, everything else stays what a comparison has."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from warp_ds.cluster import consensus
from warp_ds.errors import ConfigError
from warp_ds.evaluation.measure import NoiseRule
from warp_ds.flags.checks import check_keep_ratio
from warp_ds.flags.comparison import SweepArguments
from warp_ds.models.layer_names import parse_layer_types
from warp_ds.phases.arms import ARMS, Arm
from warp_ds.phases.bench import Bench
from warp_ds.phases.compare import compare_arms, show, training_flags, write_report
from warp_ds.phases.comparison_data import ComparisonData, load_data
from warp_ds.phases.run import start_run
from warp_ds.phases.trainer_arguments import check_training
from warp_ds.phases.trials import Trial
from warp_ds.report.tradeoff import Comparison, compare_points, front
from warp_ds.store.fingerprints import fingerprint_rows
from warp_ds.zero.model import resolve_model_dir
from warp_ds.zero.shared_reading import model_fingerprint

logger = logging.getLogger(__name__)


def settings(a: SweepArguments) -> Iterator[tuple[str, Arm, dict[str, Any]]]:
    """(label, arm, changed flags) of every run, the middle first; ConfigError for a value that cannot be."""
    middle = replace(ARMS["rotated"], name="middle")
    yield "middle", middle, {}

    def values(name: str, separator: str = ",") -> list[str]:
        return [part.strip() for part in (getattr(a, name) or "").split(separator) if part.strip()]

    def checked(name: str, choices: Sequence[str]) -> list[str]:
        for value in values(name):
            if value not in choices:
                raise ConfigError(f"--{name} {value}: choose from {', '.join(choices)}")
        return values(name)

    try:
        ratios, counts = [float(v) for v in values("keep_ratios")], [int(v) for v in values("sample_counts")]
    except ValueError as error:
        raise ConfigError(f"--keep_ratios and --sample_counts are comma-separated numbers: {error}") from error
    for ratio in ratios:
        check_keep_ratio(ratio)
        if ratio != a.keep_ratio:
            yield f"keep_ratio {ratio:g}", middle, {"keep_ratio": ratio}
    for types in values("layer_type_sets", ";"):
        yield types, middle, {"layer_type": ",".join(parse_layer_types(types))}
    for layers in values("layer_ranges"):
        yield f"layers {layers}", middle, {"target_layers": layers}
    for count in counts:
        yield f"{count or 'all'} samples", middle, {"safety_samples": count}
    for basis in checked("bases", ("activation", "identity", "weight", "random")):
        yield f"basis {basis}", replace(middle, basis=basis), {}
    for unit in checked("units", ("entry", "column", "row")):
        yield f"unit {unit}", replace(middle, unit=unit), {}
    for scope in checked("scopes", ("layer", "global")):
        yield f"scope {scope}", middle, {"mask_scope": scope}


def run_sweep(arguments: SweepArguments, passed: dict[str, Any] | None = None) -> Path:
    """Returns the run directory with report.json, table.md and the front. Collective."""
    check_training(training_flags(arguments), passed)
    with consensus.on_every_rank_or_none("checking the settings"):
        wanted = list(settings(arguments))
    model_dir = resolve_model_dir(arguments.model_name)
    fingerprint = model_fingerprint(model_dir)
    with consensus.on_every_rank_or_none("reading the data"):
        data = {
            count: load_data(replace(arguments, safety_samples=count))
            for count in {change.get("safety_samples", arguments.safety_samples) for _, _, change in wanted}
        }
        middle = data[arguments.safety_samples]
        sets = [middle.sets.harmful, middle.sets.harmless, list(middle.sets.utility)]
        inputs = {
            "model": fingerprint,
            "data": fingerprint_rows(
                [*(list(data[count].safety) for count in sorted(data)), list(middle.task), list(middle.mix), *sets]
            ),
        }
    with start_run("sweep", arguments, inputs, passed) as run:
        parts = _settings_compared(arguments, wanted, model_dir, run.directory, data, passed or {})
        points = [point for part in parts for point in part.points]
        total = round(sum(part.about["total_seconds"] for part in parts), 1)
        about = {**parts[0].about, "total_seconds": total}  # the middle's flags are the sweep's
        whole = compare_points(points, parts[0].prompts, arguments.at_utility, "middle", about)
        comparison = replace(whole, front=front(points))
        consensus.on_rank_0(lambda: write_report(run.directory, comparison), "writing the report")
        run.finish()
        show(run.directory, comparison)
        return run.directory


def _settings_compared(
    arguments: SweepArguments,
    wanted: Sequence[tuple[str, Arm, dict[str, Any]]],
    model_dir: Path,
    root: Path,
    data: Mapping[int, ComparisonData],
    passed: dict[str, Any],
) -> list[Comparison]:
    """One comparison a setting, its arm named by it; noise is judged by the middle's rule in all. Collective."""
    parts: list[Comparison] = []
    noise: tuple[NoiseRule | None] | None = None
    for number, (label, arm, change) in enumerate(wanted, 1):
        logger.info("setting %d of %d: %s", number, len(wanted), label)
        a = replace(arguments, **change)
        slug = "".join(c if c.isalnum() or c in ".-" else "_" for c in label)
        bench = Bench(a, model_dir, root / slug, data[a.safety_samples], passed)
        bench.measuring.noise = noise
        arms = [ARMS["before"], arm] if label == "middle" else [arm]
        part = compare_arms(bench, arms, {arm.name: a.rate_list}, a.seed_list)
        noise = bench.measuring.noise
        points = []
        for point in part.points:
            middle = point.arm == "middle"
            trial = Trial(arm if middle else ARMS["before"], point.rate or 0.0, point.seed)
            home = f"{slug}/points/{trial.name}"  # where the report looks for the answers
            points.append(replace(point, arm=label if middle else point.arm, home=home))
        parts.append(replace(part, points=points))
    return parts
