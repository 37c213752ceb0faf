"""The models of a comparison measured, once each, against the start model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from warp_ds.cluster import consensus
from warp_ds.errors import ArtifactError
from warp_ds.evaluation.answers import Row
from warp_ds.evaluation.generate import answer_surprise
from warp_ds.evaluation.measure import Measurement, NoiseRule, measure, noise_limit, paired_tests
from warp_ds.evaluation.sets import EvaluationSets
from warp_ds.flags.arguments import EvaluateArguments
from warp_ds.phases.evaluate import load_engine, write_measurement
from warp_ds.store.files import read_json, read_lines, write_json
from warp_ds.zero.deepspeed_internals import end_engine

SIZES = ("batch_size", "max_new_tokens", "max_length", "train_on", "long_samples")


class Measuring:
    """What was measured of each model is kept in points/<name>/; every method is collective."""

    def __init__(
        self,
        root: Path,
        model_dir: Path,
        sets: EvaluationSets,
        settings: Callable[[Path], EvaluateArguments],
        timed: Callable[[str, Callable[[], Any]], Any],
    ):
        """``model_dir``: the start model. ``settings``: of the evaluation of a model."""
        self.root, self.model_dir, self.sets, self.settings, self.timed = root, model_dir, sets, settings, timed
        self.noise: tuple[NoiseRule | None] | None = None
        """The rule, once it is known; a sweep's settings share one."""
        self._before: list[Row] = []

    def measured(
        self, name: str, make: Callable[[], Path], more: Callable[[Path], dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """The metrics of the model that ``make`` makes, from points/<name>/metrics.json where they are there."""
        home, metrics, model = self.root / "points" / name, self.known(name), None
        if metrics is None:
            model = make()
            measurement = self._measure(model, name)
            consensus.on_rank_0(lambda: write_measurement(home, measurement), "writing the results")
            metrics = measurement.metrics
        if more is not None and "movement" not in metrics:
            metrics |= more(model or make())
            consensus.on_rank_0(lambda: write_json(home / "metrics.json", metrics), "writing the results")
        return metrics

    def known(self, name: str) -> dict[str, Any] | None:
        """The metrics of a model, where it has been measured."""
        path = self.root / "points" / name / "metrics.json"
        return consensus.on_rank_0(lambda: _read(path) if path.is_file() else None, "looking for results")

    def noise_threshold(self) -> float | None:
        """Nats a token, also where every model was measured before."""
        path = self.root / "noise.json"
        return consensus.on_rank_0(
            lambda: _read(path).get("threshold") if path.is_file() else None, "reading the noise threshold"
        )

    def _measure(self, model: Path, name: str) -> Measurement:
        settings = self.settings(model)
        if self.noise is None:
            self.noise = (self.timed("noise rule", self._rule),)
        (noise,) = self.noise
        engine, tokenizer = load_engine(settings)
        sizes: dict[str, Any] = {name: getattr(settings, name) for name in SIZES}
        measurement = self.timed(f"evaluation_{name}", lambda: measure(engine, tokenizer, self.sets, noise=noise, **sizes))
        end_engine(engine)
        if model == self.model_dir:
            self._before = measurement.answers
        elif not self._before:
            self._before = self._answers_before()
        if self._before:
            measurement.metrics |= paired_tests(self._before, measurement.answers)
        return measurement

    def _answers_before(self) -> list[Row]:
        """The start model's judged answers, where its point has been measured."""
        path = self.root / "points" / "before" / "answers.jsonl"
        return consensus.on_rank_0(lambda: read_lines(path) if path.is_file() else [], "reading the start model's answers")

    def _rule(self) -> NoiseRule | None:
        settings = self.settings(self.model_dir)
        sizes: dict[str, Any] = {"batch_size": settings.batch_size, "max_new_tokens": settings.max_new_tokens}
        if not consensus.on_rank_0((self.root / "noise.json").is_file, "looking for the noise rule"):
            limit = self._with_start_model(partial(noise_limit, sets=self.sets, **sizes))
            consensus.on_rank_0(lambda: write_json(self.root / "noise.json", {"threshold": limit}), "writing the rule")
        threshold = self.noise_threshold()
        if threshold is None:
            return None

        def surprise(prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
            of_these = partial(answer_surprise, prompts=prompts, answers=answers, batch_size=settings.batch_size)
            return self._with_start_model(of_these)

        return NoiseRule(surprise, threshold)

    def _with_start_model(self, use: Callable[[Any, Any], Any]) -> Any:
        """``use`` of the start model, loaded for it and released: no training may find it in memory."""
        engine, tokenizer = load_engine(self.settings(self.model_dir))
        result = use(engine, tokenizer)
        end_engine(engine)
        return result


def _read(path: Path) -> dict[str, Any]:
    """What was measured before. ArtifactError where the file holds something else."""
    metrics = read_json(path)
    if not isinstance(metrics, dict):
        raise ArtifactError(f"{path} is not what this program measures: remove it, and it is measured again")
    return metrics
