"""Arms side by side: one start model, one data set, the same seeds and learning rates, one launch, one table.

Every phase is the real one. A point (arm, learning rate, seed) that is measured is not done again, so a comparison that
was stopped goes on, and one that is started again under the same --run_name with more arms, rates or seeds adds those.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from warp_ds.cluster import consensus, processes
from warp_ds.cluster.preemption import leave_if_asked
from warp_ds.data.datasets import load_prompts, load_samples
from warp_ds.data.sample import Sample, as_rows, as_samples
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.evaluation.generate import answer_surprise
from warp_ds.evaluation.movement import frozen_drift
from warp_ds.flags.arguments import (
    BasisArguments,
    CompareArguments,
    EvaluateArguments,
    ImportanceArguments,
    SafetyTuningArguments,
    TrainArguments,
)
from warp_ds.method.baselines import safety_share
from warp_ds.phases.arms import ARMS, Arm, parse_arms
from warp_ds.phases.basis import run_basis
from warp_ds.phases.evaluate import (
    SUITES,
    EvaluationSets,
    Measurement,
    NoiseRule,
    Row,
    check_golds,
    load_engine,
    measure,
    movement_metrics,
    noise_limit,
    paired_tests,
    shared_prompts,
    write_card,
    write_measurement,
)
from warp_ds.phases.importance import run_importance
from warp_ds.phases.merge import merge, resta_formula, safe_delta_formula
from warp_ds.phases.neurons import LAYERS, safety_neuron_masks
from warp_ds.phases.run import link_latest, start_run, versions
from warp_ds.phases.texts import check_lengths
from warp_ds.phases.training import check_training, run_safety_tuning, run_training
from warp_ds.report import card, costs, tradeoff
from warp_ds.store.files import read_json, read_lines, write_json, write_text
from warp_ds.store.fingerprints import fingerprint_rows
from warp_ds.store.state import Progress
from warp_ds.zero.deepspeed_internals import end_engine
from warp_ds.zero.model import resolve_model_dir
from warp_ds.zero.shared_reading import model_fingerprint

logger = logging.getLogger(__name__)


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

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name != "sets":
                setattr(self, field.name, as_samples(getattr(self, field.name)))


@dataclass(frozen=True)
class Point:
    """One model of the comparison."""

    arm: Arm
    rate: float
    seed: int

    @property
    def name(self) -> str:
        if self.arm.trains is None:
            return self.arm.name
        return f"{self.arm.name}_lr{self.rate:g}_seed{self.seed}"


def run_compare(arguments: CompareArguments, passed: dict[str, Any] | None = None) -> Path:
    """Returns the run directory with report.json and table.md. Collective."""
    check_training(training_flags(arguments), passed)
    with consensus.on_every_rank_or_none("checking the arms"):
        arms = parse_arms(arguments.arms)
        rates, seeds = arguments.rates([arm.name for arm in arms]), arguments.seed_list
    model_dir = resolve_model_dir(arguments.model_name)
    if arguments.unaligned_model is not None:
        resolve_model_dir(arguments.unaligned_model, "--unaligned_model")
    fingerprint = model_fingerprint(model_dir)
    with consensus.on_every_rank_or_none("reading the data"):
        data = load_data(arguments)
        _check(arms, arguments, data)
        inputs = {
            "model": fingerprint,
            "data": fingerprint_rows(
                [
                    list(data.safety),
                    list(data.task),
                    list(data.mix),
                    list(data.unaligned),
                    list(data.foundation),
                    data.sets.harmful,
                    data.sets.harmless,
                    list(data.sets.utility),
                ]
            ),
        }
    with start_run("compare", arguments, inputs, passed) as run:
        report = compare(Bench(arguments, model_dir, run.directory, data, passed or {}), arms, rates, seeds)
        consensus.on_rank_0(lambda: write_report(run.directory, report), "writing the report")
        run.finish()
        if processes.rank() == 0:
            print_tables((run.directory / "table.md").read_text(encoding="utf-8"))
        return run.directory


def training_flags(a: CompareArguments) -> TrainArguments:
    """The flags of a comparison that its trainings take, to be checked before any work."""
    same = {f.name: getattr(a, f.name) for f in fields(TrainArguments) if hasattr(a, f.name)}
    return TrainArguments(**same, learning_rate=max(a.rate_list))


def compare(bench: Bench, arms: Sequence[Arm], rates: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> dict[str, Any]:
    """Trains and measures every point; what report.json holds. Collective."""
    points = [Point(arm, rate, seed) for seed in seeds for arm in arms if arm.trains for rate in rates[arm.name]]
    if any(arm.trains is None for arm in arms):
        points.insert(0, Point(next(arm for arm in arms if arm.trains is None), 0.0, seeds[0]))
    bench.check_lengths()
    bench.write_data()
    for which, count in bench.overlap.items():
        logger.warning("%d prompts of the evaluation (%s) were there before: what is measured on them is memory", count, which)
    rotated = next((arm for arm in arms if arm.basis == "activation" and arm.unit == "entry" and not arm.start), None)
    started = time.time()
    rows = []
    progress = Progress(bench.root, len(points), "points", seconds=0.0)
    for number, point in enumerate(points, 1):
        progress.at(number - 1)
        leave_if_asked()
        logger.info("point %d of %d: %s", number, len(points), point.name)
        rows.append(bench.point(point, rotated))
        if not bench.arguments.keep_models:
            for made in filter(None, (point, merged_from(point))):
                if not _needed(made, points[number:]):
                    bench.forget(made)
    progress.at(len(points))
    plainly_rotated = [point for point in points if point.arm == replace(ARMS["rotated"], name=point.arm.name)]
    if plainly_rotated:
        consensus.on_rank_0(lambda: bench.link_latest(plainly_rotated[-1]), "linking the rotated arm's runs")
    sets = bench.data.sets
    prompts = {
        "refusal_rate": len(sets.harmful),
        "partial_rate": len(sets.harmful),
        "incoherent_rate": len(sets.harmful),
        "not_judged_rate": len(sets.harmful),
        "attack_success_rate": len(sets.harmful),
        "over_refusal_rate": len(sets.harmless),
        "utility_accuracy": len(sets.utility),
    }
    return {
        "format": "warp_ds.compare",
        "version": 1,
        "points": rows,
        "prompts": prompts,
        "overlap": bench.overlap,
        "keep_ratio": bench.arguments.keep_ratio,
        "layer_type": bench.arguments.layer_type,
        "noise_threshold": bench.noise_threshold(),
        "unaligned": bench.known("unaligned") if any(arm.merge == "resta" for arm in arms) else None,
        "seconds": bench.seconds,
        "total_seconds": round(time.time() - started, 1),
        "world_size": processes.world_size(),
        "versions": versions(),
        **tradeoff.compare(rows, {k: n for k, n in prompts.items() if n}, bench.arguments.at_utility),
    }


def write_report(directory: Path, report: Mapping[str, Any]) -> None:
    """report.json and table.md."""
    write_json(directory / "report.json", report)
    write_text(directory / "table.md", tradeoff.markdown(report) + spent(directory))


def spent(directory: Path) -> str:
    """What the phases of a comparison or sweep took, as a markdown table."""
    phases = sorted(mark.parent for mark in directory.rglob("finished.json") if mark.parent != directory)
    return costs.markdown(phases, lambda run: str(run.relative_to(directory)))


def merged_from(point: Point) -> Point | None:
    """The point whose model this one merges: the same arm without its merge, trained where it is no point itself."""
    arm = point.arm
    if arm.merge is None:
        return None
    rest = "+".join(part for part in arm.name.split("+") if part.partition("@")[0] != arm.merge)
    return replace(point, arm=replace(arm, merge=None, strength=None, name=rest or "full"))


def _needed(point: Point, later: Sequence[Point]) -> bool:
    """Whether a later point is this one, or merges its model."""
    return any(made is not None and made.name == point.name for p in later for made in (p, merged_from(p)))


class Bench:
    """Makes what the points need, once each: start models, bases, masks, trained and merged models, measurements."""

    def __init__(
        self,
        arguments: CompareArguments,
        model_dir: Path,
        root: Path,
        data: ComparisonData,
        passed: dict[str, Any],
        seconds: dict[str, float] | None = None,
    ):
        self.arguments, self.model_dir, self.root, self.data, self.passed = arguments, model_dir, root, data, passed
        self.seconds: dict[str, float] = {} if seconds is None else seconds
        self.noise: NoiseRule | None = None
        self.noise_known = False
        self.before: list[Row] = []
        self._made: dict[str, Path] = {}

    @cached_property
    def overlap(self) -> dict[str, int]:
        """'harmful in the safety set' -> how many prompts of the evaluation stand there."""
        return {f"{kind} in {where}": count for (where, kind), count in overlaps(self.data).items()}

    def timed(self, name: str, run: Callable[[], Any]) -> Any:
        began = time.time()
        result = run()
        self.seconds[name] = round(time.time() - began, 1)
        return result

    def common(self, model: Path, **more: Any) -> dict[str, Any]:
        """Flags of every phase."""
        a = self.arguments
        # Two comparisons have phases of the same names: their logs lie apart, as their runs do.
        here = self.root.relative_to(a.output_dir) if self.root.is_relative_to(a.output_dir) else self.root.name
        return {
            "model_name": str(model),
            "dtype": a.dtype,
            "device": a.device,
            "deepspeed": a.deepspeed,
            "output_dir": str(self.root),
            "log_dir": str(Path(a.log_dir) / here),
            "seed": a.seed,
            "max_length": a.max_length,
            "batch_size": a.batch_size,
            "gradient_checkpointing": a.gradient_checkpointing,
            "timeout": a.timeout,
            "template_date": a.template_date,
            "train_on": a.train_on,
            "long_samples": a.long_samples,
            **more,
        }

    def _same(self, *names: str) -> dict[str, Any]:
        """Flags that a phase has by the same name."""
        return {name: getattr(self.arguments, name) for name in names}

    # ---------------------------------------------------------------- data

    def check_lengths(self) -> None:
        """DataError, before any phase, for texts that are too long for one of them. Collective."""
        data = self.data
        check_lengths(
            self._evaluation(self.model_dir),
            data.sets.generated(SUITES),
            {
                "safety": data.safety,
                "task": data.task,
                "--mix_file": data.mix,
                "--unaligned_data": data.unaligned,
                "loss": data.sets.utility,
            },
            self.arguments.max_new_tokens,
        )

    def write_data(self) -> None:
        """The texts as files, for the phases to read."""

        def write() -> None:
            for name, rows in {"safety": self.data.safety, "unaligned": self.data.unaligned}.items():
                self._write_rows(name, rows)

        consensus.on_rank_0(write, "writing the texts")

    def _write_rows(self, name: str, rows: Sequence[Sample]) -> Path:
        path = self.root / "data" / f"{name}.jsonl"
        if rows:
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in as_rows(rows)))
        return path

    def task(self, share: float) -> Path:
        """The task with what is mixed into it: the user's --mix_file in every arm, safety samples in SafeInstr's."""
        rows = [*self.data.task, *self.data.mix]
        wanted = safety_share(len(self.data.task), share) if share else 0
        if wanted:
            draw = random.Random(self.arguments.seed)
            picked = [
                draw.sample(range(len(self.data.safety)), len(self.data.safety))
                for _ in range(-(-wanted // len(self.data.safety)))
            ]
            rows += [self.data.safety[i] for i in [i for order in picked for i in order][:wanted]]
        name = f"task_safety{share:g}" if wanted else "task"
        return consensus.on_rank_0(lambda: self._write_rows(name, rows), "writing the task")

    # ---------------------------------------------------------------- start models, bases, masks

    def once(self, name: str, make: Callable[[], Path]) -> Path:
        if name not in self._made:
            self._made[name] = self.timed(name, make)
        return self._made[name]

    def start(self, kind: str | None) -> Path:
        """The model that an arm starts from."""
        return self.model_dir if kind is None else self.once(kind, partial(self._neuron_tuned, kind))

    def _neuron_tuned(self, kind: str) -> Path:
        """SN-Tune, RSN-Tune: the start model after its safety neurons alone have trained on the safety set."""
        a, masks = self.arguments, self.root / f"neurons_{kind}" / "masks"
        if not consensus.on_rank_0(lambda: (masks / "metadata.json").is_file(), "looking for the neurons"):
            engine, tokenizer = load_engine(EvaluateArguments(**self.common(self.model_dir)))
            foundation = list(self.data.foundation) if kind == "rsn-tune" else None
            safety_neuron_masks(
                engine,
                tokenizer,
                [sample.asked() for sample in self.data.safety],
                foundation,
                a.neuron_share,
                masks,
                str(self.model_dir),
                model_fingerprint(self.model_dir),
            )
            end_engine(engine)
        return (
            run_training(
                TrainArguments(
                    **self.common(self.model_dir),
                    masks_dir=str(masks),
                    utility_data=str(self.root / "data" / "safety.jsonl"),
                    utility_samples=0,
                    run_name=f"phase3_{kind}",
                    epochs=1,
                    learning_rate=a.neuron_rate,
                    **self._same("global_batch_size", "basis_placement", "save_minutes"),
                ),
                self.passed,
            )
            / "model"
        )

    def basis(self, start: str | None, kind: str, layer_type: str, seed: int) -> Path:
        name = self.basis_name(start, kind, layer_type, seed)
        seed = seed if kind == "random" else self.arguments.seed
        return (
            self.once(
                name,
                lambda: run_basis(
                    BasisArguments(
                        **self.common(self.start(start), seed=seed),
                        layer_type=layer_type,
                        target_layers=self.arguments.target_layers,
                        safety_data=str(self.root / "data" / "safety.jsonl"),
                        safety_samples=0,
                        basis=kind,
                        run_name=name,
                        **self._same("token_scope", "energy", "max_rank", "collect", "svd_placement"),
                    )
                ),
            )
            / "basis"
        )

    def link_latest(self, point: Point) -> None:
        """Lets the links to the newest runs end at this arm's, whatever arm came last. Rank 0 alone calls it."""
        arm = point.arm
        names = {
            "phase1": self.basis_name(arm.start, str(arm.basis), self.arguments.layer_type, point.seed),
            "phase2": self.masks_name(arm, point.seed),
            "phase3": f"phase3_{point.name}",
        }
        for phase, name in names.items():
            if (self.root / name / "finished.json").is_file():
                link_latest(phase, self.root / name)

    @staticmethod
    def basis_name(start: str | None, kind: str, layer_type: str, seed: int) -> str:
        suffix = (f"_seed{seed}" if kind == "random" else "") + ("_all" if layer_type == LAYERS else "")
        return f"phase1_{start or 'start'}_{kind}{suffix}"

    @staticmethod
    def masks_name(arm: Arm, seed: int) -> str:
        suffix = f"_seed{seed}" if "random" in (arm.basis, arm.score) else ""
        return f"phase2_{arm.start or 'start'}_{arm.basis}_{arm.unit}_{arm.score}{suffix}"

    def masks(self, arm: Arm, seed: int) -> Path:
        """The masks of an arm; its basis is the one that they name."""
        a = self.arguments
        name = self.masks_name(arm, seed)
        if "random" not in (arm.basis, arm.score):
            seed = a.seed
        identity = arm.basis == "identity"
        basis = None if identity else str(self.basis(arm.start, str(arm.basis), a.layer_type, seed))
        return (
            self.once(
                name,
                lambda: run_importance(
                    ImportanceArguments(
                        **self.common(self.start(arm.start), seed=seed),
                        layer_type=a.layer_type,
                        target_layers=a.target_layers,
                        safety_data=str(self.root / "data" / "safety.jsonl"),
                        safety_samples=a.importance_samples,
                        run_name=name,
                        basis_dir=basis,
                        basis="identity" if identity else "auto",
                        keep_ratio=a.keep_ratio,
                        mask_scope=a.mask_scope,
                        mask_unit=arm.unit,
                        score=arm.score,
                        importance_batch_size=a.importance_batch_size,
                    )
                ),
            )
            / "masks"
        )

    def unaligned(self) -> Path:
        """The start model with its alignment undone: given, or trained on the examples given."""
        a = self.arguments
        if a.unaligned_model is not None:
            return resolve_model_dir(a.unaligned_model, "--unaligned_model")
        return (
            self.once(
                "phase0_unaligned",
                lambda: run_safety_tuning(
                    SafetyTuningArguments(
                        **self.common(self.model_dir),
                        safety_data=str(self.root / "data" / "unaligned.jsonl"),
                        safety_samples=0,
                        run_name="phase0_unaligned",
                        epochs=a.epochs,
                        learning_rate=a.unaligned_rate or max(a.rate_list),
                        **self._same("global_batch_size", "save_minutes"),
                    ),
                    self.passed,
                ),
            )
            / "model"
        )

    # ---------------------------------------------------------------- points

    def model(self, point: Point) -> Path:
        """The model directory of a point, trained or merged where it is not there yet."""
        arm = point.arm
        if arm.trains is None:
            return self.start(arm.start)
        if arm.merge:
            return self._merged(point)
        a = self.arguments
        scope = "all" if arm.trains == "all" or (arm.basis and a.train_scope == "all") else "warp"
        settings = TrainArguments(
            **self.common(self.start(arm.start), seed=point.seed),
            layer_type=a.layer_type,
            target_layers=a.target_layers,
            train_scope=scope,
            masks_dir=str(self.masks(arm, point.seed)) if arm.basis else "none",
            utility_data=str(self.task(arm.safety_share)),
            utility_samples=0,
            run_name=f"phase3_{point.name}",
            epochs=a.epochs,
            learning_rate=point.rate,
            **self._same("global_batch_size", "basis_placement", "save_minutes"),
        )
        consensus.on_rank_0(partial(self._remember, self.root / f"phase3_{point.name}"), "looking for a removed model")
        return self.timed(f"phase3_{point.name}", lambda: run_training(settings, self.passed)) / "model"

    @staticmethod
    def _remember(run: Path) -> None:
        """Lets a finished run whose model was removed (``forget``) begin anew, for a merge that came later."""
        if (run / "finished.json").is_file() and not (run / "model").is_dir():
            (run / "metrics.jsonl").unlink(missing_ok=True)
            (run / "finished.json").unlink()

    def _merged(self, point: Point) -> Path:
        arm, a = point.arm, self.arguments
        trained = merged_from(point)
        assert trained is not None
        fine_tuned = self.model(trained)
        aligned = self.start(arm.start)
        if arm.merge == "resta":
            formula = resta_formula(self.unaligned(), a.resta_alpha if arm.strength is None else arm.strength)
            self.measured("unaligned", self.unaligned)  # so that the report shows how unaligned that model is
        else:
            formula = safe_delta_formula(
                self.basis(arm.start, "activation", LAYERS, a.seed), a.safedelta_s if arm.strength is None else arm.strength
            )
        output = self.root / f"merge_{point.name}" / "model"
        self.timed(f"merge_{point.name}", lambda: merge(fine_tuned, aligned, output, formula))
        text = f"## Merged after training\n\nThis model is the trained one, `{fine_tuned}`, merged by the arm `{arm.name}`.\n\n"
        consensus.on_rank_0(lambda: card.write_section(output, "merged", text + card.made(fine_tuned)), "writing the card")
        return output

    def point(self, point: Point, rotated: Arm | None) -> dict[str, Any]:
        """The metrics of one point, measured once."""
        # How far a model is from another start model says nothing.
        weights = partial(self._weights, rotated) if point.arm.start is None else None
        found = self.measured(point.name, lambda: self.model(point), weights)
        if point.arm.trains is not None:
            model = self.root / f"{'merge' if point.arm.merge else 'phase3'}_{point.name}" / "model"
            before = self.known("before")
            where = f"By a comparison, `{self.root.name}`, arm `{point.arm.name}`."
            consensus.on_rank_0(
                lambda: write_card(model, "compare", where, found | {"overlap": self.overlap}, before),
                "writing the model's card",
            )
        return {
            "arm": point.arm.name,
            "rate": point.rate if point.arm.trains else None,
            "seed": point.seed,
            "from_start": point.arm.merge is None and point.arm.start is None,
            **found,
        }

    def measured(
        self, name: str, make: Callable[[], Path], more: Callable[[Path], dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """The metrics of the model that ``make`` makes, from points/<name>/metrics.json where they are there. Collective."""
        home, found, model = self.root / "points" / name, self.known(name), None
        if found is None:
            model = make()
            measured = self.measure(model, name)
            consensus.on_rank_0(lambda: write_measurement(home, measured), "writing the results")
            found = measured.metrics
        if more is not None and "movement" not in found:
            found |= more(model or make())
            consensus.on_rank_0(lambda: write_json(home / "metrics.json", found), "writing the results")
        return found

    def known(self, name: str) -> dict[str, Any] | None:
        """The metrics of a point, where it has been measured. Collective."""
        path = self.root / "points" / name / "metrics.json"
        return consensus.on_rank_0(lambda: read_measured(path) if path.is_file() else None, "looking for results")

    def measure(self, model: Path, name: str) -> Measurement:
        """Behaviour of one model, against the start model's. Collective."""
        settings = self._evaluation(model)
        options: dict[str, Any] = {"batch_size": settings.batch_size, "max_new_tokens": settings.max_new_tokens}
        if not self.noise_known:
            self.noise, self.noise_known = self.timed("noise rule", self._noise), True
        engine, tokenizer = load_engine(settings)
        found = self.timed(
            f"evaluation_{name}",
            lambda: measure(
                engine,
                tokenizer,
                self.data.sets,
                max_length=settings.max_length,
                noise=self.noise,
                train_on=settings.train_on,
                long_samples=settings.long_samples,
                **options,
            ),
        )
        end_engine(engine)
        if model == self.model_dir:
            self.before = found.answers
        elif not self.before:
            self.before = self._answers_before()
        if self.before:
            found.metrics |= paired_tests(self.before, found.answers)
        return found

    def _answers_before(self) -> list[Row]:
        """The start model's judged answers, where its point has been measured."""
        path = self.root / "points" / "before" / "answers.jsonl"
        return consensus.on_rank_0(lambda: read_lines(path) if path.is_file() else [], "reading the start model's answers")

    def _evaluation(self, model: Path) -> EvaluateArguments:
        a = self.arguments
        return EvaluateArguments(**self.common(model, batch_size=a.eval_batch_size), max_new_tokens=a.max_new_tokens)

    def noise_threshold(self) -> float | None:
        """Nats a token, also where every point was measured before."""
        path = self.root / "noise.json"
        return consensus.on_rank_0(
            lambda: read_measured(path).get("threshold") if path.is_file() else None, "reading the noise threshold"
        )

    def _noise(self) -> NoiseRule | None:
        settings = self._evaluation(self.model_dir)
        if not consensus.on_rank_0((self.root / "noise.json").is_file, "looking for the noise rule"):
            limit = self._with_start_model(
                partial(
                    noise_limit, sets=self.data.sets, batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens
                )
            )
            consensus.on_rank_0(lambda: write_json(self.root / "noise.json", {"threshold": limit}), "writing the rule")
        threshold = self.noise_threshold()
        return (
            None
            if threshold is None
            else NoiseRule(
                lambda prompts, answers: self._with_start_model(
                    partial(answer_surprise, prompts=prompts, answers=answers, batch_size=settings.batch_size)
                ),
                threshold,
            )
        )

    def _with_start_model(self, use: Callable[[Any, Any], Any]) -> Any:
        """``use`` of the start model, loaded for it and released: no training may find it in memory. Collective."""
        engine, tokenizer = load_engine(self._evaluation(self.model_dir))
        result = use(engine, tokenizer)
        end_engine(engine)
        return result

    def _weights(self, rotated: Arm | None, model: Path) -> dict[str, Any]:
        """Movement, and drift of what the rotated arm freezes, from the weights. Collective."""
        basis = self.basis(None, "activation", self.arguments.layer_type, self.arguments.seed)
        masks = None if rotated is None else self.masks(rotated, self.arguments.seed)
        if model == self.model_dir:
            return {"movement": 0.0, **({} if masks is None else {"frozen_drift": 0.0})}
        drift = {} if masks is None else {"frozen_drift": frozen_drift(self.model_dir, model, masks, basis)}
        return movement_metrics(self.model_dir, model, basis) | drift

    def forget(self, point: Point) -> None:
        """Removes the model of a measured point (--keep_models false); its measurements stay."""

        def remove() -> None:
            for kind in ("phase3", "merge"):
                for path in ("model", "trainer"):
                    # Renamed first: a model is there as a whole or not at all.
                    directory = self.root / f"{kind}_{point.name}" / path
                    aside = directory.with_name(f"{path}.removed")
                    if directory.is_dir():
                        directory.replace(aside)
                    shutil.rmtree(aside, ignore_errors=True)

        if point.arm.trains is not None:
            consensus.on_rank_0(remove, "removing a measured model")


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
            )
        },
        data.sets,
    )


def load_data(a: CompareArguments) -> ComparisonData:
    """Raises DataError for a file that is missing, empty or without the columns."""
    columns: dict[str, Any] = {"prompt_column": a.prompt_column, "response_column": a.response_column, "config": a.data_config}
    safety = load_samples(a.safety_data, split=a.safety_split, samples=a.safety_samples, refusal_file=a.refusal_file, **columns)
    task = load_samples(a.utility_data, split=a.utility_split, samples=a.utility_samples, **columns)
    heldout = load_samples(a.utility_heldout or a.utility_data, split=a.heldout_split, samples=a.heldout_samples, **columns)
    mix = load_samples(a.mix_file, config=a.data_config)[: safety_share(len(task), a.mix_ratio)] if a.mix_file else []
    return ComparisonData(
        safety,
        task,
        EvaluationSets(
            load_prompts(a.harmful_data, samples=a.harmful_samples, prompt_column=a.prompt_column, config=a.data_config),
            load_prompts(a.harmless_data, samples=a.harmless_samples, config=a.data_config) if a.harmless_data else (),
            heldout,
        ),
        mix,
        load_samples(a.unaligned_data, config=a.data_config) if a.unaligned_data else [],
        load_prompts(a.foundation_data, samples=len(safety), config=a.data_config)
        if a.foundation_data
        else [sample.asked() for sample in task if sample.messages][: len(safety)],
    )


def _check(arms: Sequence[Arm], a: CompareArguments, data: ComparisonData) -> None:
    if any(arm.merge == "resta" for arm in arms) and not (a.unaligned_model or data.unaligned):
        raise ConfigError(
            "--arms resta adds what undoing the alignment takes away: give an unaligned model with "
            "--unaligned_model, or examples that undo it with --unaligned_data (none are shipped)"
        )
    check_golds(data.sets.utility, a.utility_heldout or a.utility_data)


def print_tables(text: str) -> None:
    """A markdown text's tables on the terminal."""
    console = Console(width=160, markup=False)
    table: Table | None = None
    for line in [*text.splitlines(), ""]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            if table is not None:
                console.print(table)
            table = None
            if line:
                console.print(line)
        elif table is None:
            table = Table(*cells)
        elif not line.startswith("|---"):
            table.add_row(*cells)


def read_measured(path: Path) -> dict[str, Any]:
    """What was measured before. ArtifactError where the file holds something else."""
    found = read_json(path)
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} is not what this program measures: remove it, and it is measured again")
    return found
