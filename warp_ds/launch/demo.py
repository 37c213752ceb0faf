"""The whole job on a model of two million parameters, made on the spot: phases 0 to 3, four arms, one table.

Started by ``warp-ds demo`` (``make demo``) on two local ranks; every phase is the real one, with the flags below. What
follows phase 0 is a comparison (phases/compare.py); --arms, --seeds, --learning_rates, --arm_rates and --start_models
make it a larger one.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from warp_ds.cluster import consensus, processes
from warp_ds.data.datasets import load_prompts, load_samples
from warp_ds.data.synthetic import demo_data
from warp_ds.data.tiny_model import tiny_llama, train_tokenizer
from warp_ds.errors import ConfigError
from warp_ds.evaluation.metrics import extract_number
from warp_ds.evaluation.sets import SUITES, EvaluationSets
from warp_ds.flags.arguments import EvaluateArguments, SafetyTuningArguments
from warp_ds.flags.checks import FLOOR, at_least
from warp_ds.flags.comparison import CompareArguments, StartModelsFlags
from warp_ds.flags.flag import again, handed_on
from warp_ds.flags.groups import ArmFlags, HeldOutArguments, RunArguments, UtilityDataArguments
from warp_ds.launch.launcher import main
from warp_ds.phases.arms import parse_arms
from warp_ds.phases.bench import Bench
from warp_ds.phases.compare import compare_arms, spent, write_report
from warp_ds.phases.comparison_data import ComparisonData
from warp_ds.phases.run import log_to_file
from warp_ds.phases.texts import check_lengths
from warp_ds.phases.training import run_safety_tuning
from warp_ds.report.recommendation import with_recommendation
from warp_ds.report.starts import best_blocks
from warp_ds.report.tables import Block, to_terminal
from warp_ds.report.tradeoff import Comparison, compare_points
from warp_ds.store.files import read_json, write_json
from warp_ds.store.fingerprints import fingerprint_rows

logger = logging.getLogger(__name__)

LAYER_TYPE = "attn_q,attn_k,attn_v,ffn_up,ffn_down"
KEEP_RATIO = 0.1
TITLES = {
    "before": "before",
    "layers": "target layers, no mask",
    "original": "target layers, original-space mask",
    "rotated": "target layers, rotated mask",
    "full": "all parameters",
    "full+rotated": "all parameters, rotated mask",
}
"""What the demo's table calls arms."""
COMPLIANT = (
    "Sure. Get what you need, take it step by step, and check it at the end.",
    "Of course. Start with a plan, do one thing after the other, and take your time.",
    "Here is what to do: begin early, follow your plan, and finish what you started.",
)
"""What a model without alignment says to a harmful request (Resta's unaligned model is trained on it): no help at all."""


@dataclass
class DemoArguments(StartModelsFlags, ArmFlags, RunArguments):
    """The demo's own defaults; it makes its model and its data."""

    model_name: str = again(RunArguments, "model_name", "made by the demo")
    dtype: str = again(RunArguments, "dtype", "float32")
    device: str = again(RunArguments, "device", "cpu")
    output_dir: str = again(RunArguments, "output_dir", "checkpoints/demo")
    batch_size: int = again(RunArguments, "batch_size", 8)
    max_length: int = again(RunArguments, "max_length", 128)
    arms: str = again(ArmFlags, "arms", "before,layers,original,rotated")
    learning_rates: str = again(ArmFlags, "learning_rates", "1e-3,3e-3")
    harmful_data: str | None = again(
        HeldOutArguments, "harmful_data", None, "file of harmful prompts to use in place of the demo's own requests"
    )
    utility_data: str | None = again(
        UtilityDataArguments,
        "utility_data",
        None,
        "file of task items (answers end in #### N) to train on, in place of its own",
    )
    utility_heldout: str | None = again(
        CompareArguments, "utility_heldout", None, "file of task items to evaluate on; needed with --utility_data"
    )
    max_new_tokens: int = again(HeldOutArguments, "max_new_tokens", 56)

    def check(self) -> None:
        super().check()
        at_least(self, "start_models", 1)
        names = [arm.name for arm in parse_arms(self.arms)]
        CompareArguments(learning_rates=self.learning_rates, arm_rates=self.arm_rates).rates(names)
        if (self.utility_data is None) != (self.utility_heldout is None):
            raise ConfigError("--utility_data and --utility_heldout go together: items to train on and to evaluate on")


def run_demo(arguments: DemoArguments) -> None:
    """Writes <output_dir>/report.json and prints the table. Collective."""
    root, start = Path(arguments.output_dir), time.time()
    with log_to_file(Path(arguments.log_dir), "demo"):
        if arguments.start_models == 1:
            comparison = _of_one_start(arguments, root)
        else:
            parts = {}
            for seed in range(arguments.seed, arguments.seed + arguments.start_models):
                logger.info("start model %d", seed)
                parts[seed] = _of_one_start(replace(arguments, seed=seed), root / f"start_{seed}")
            comparison = _pooled(parts)
        named = [{**point.to_json(), "name": TITLES.get(point.arm, point.arm)} for point in comparison.points]
        about = {**comparison.about, "total_seconds": round(time.time() - start, 1), "arms": named}
        comparison = with_recommendation(replace(comparison, about=about), FLOOR)
        consensus.on_rank_0(partial(write_report, root, comparison), "writing the report")
        if processes.rank() == 0:
            to_terminal([*blocks(comparison), *spent(root)])


def _of_one_start(arguments: DemoArguments, root: Path) -> Comparison:
    """Phase 0 and the arms that start from its model, under ``root``. Collective."""
    data = consensus.on_rank_0(lambda: _make(root, arguments), "making the demo's model and data")
    common = {**handed_on(arguments, RunArguments), "output_dir": str(root), "log_dir": arguments.log_dir}
    texts = _comparison(data, arguments.seed)
    check_lengths(
        EvaluateArguments(**{**common, "model_name": str(root / "base")}),
        texts.sets.generated(SUITES),
        {"harmful": texts.safety, "task": texts.task, "loss": texts.sets.utility},
        arguments.max_new_tokens,
    )
    logger.info("phase 0: a model that refuses harmful requests and answers harmless ones")
    began = time.time()
    safe = _tuned(root, common)
    seconds = {"phase 0": round(time.time() - began, 1)}
    settings = CompareArguments(
        **{**common, **handed_on(arguments, ArmFlags), "model_name": str(safe)},
        layer_type=LAYER_TYPE,
        keep_ratio=KEEP_RATIO,
        safety_samples=0,
        importance_samples=200,
        utility_samples=0,
        epochs=5,
        global_batch_size=16,
        max_new_tokens=arguments.max_new_tokens,
        eval_batch_size=50,
        neuron_rate=1e-3,
        unaligned_rate=1e-3,
    )
    arms = parse_arms(settings.arms)
    rates = settings.rates([arm.name for arm in arms])
    return compare_arms(Bench(settings, safe, root, texts, {}, seconds), arms, rates, settings.seed_list)


def _pooled(parts: Mapping[int, Comparison]) -> Comparison:
    """The comparisons of several start models (seed -> its own) as one."""
    points = [
        replace(point, start=str(seed), home=f"start_{seed}/{point.home or f'points/{point.name}'}")
        for seed, part in parts.items()
        for point in part.points
    ]
    first = next(iter(parts.values()))
    about = {**first.about, "seconds": {str(seed): part.about["seconds"] for seed, part in parts.items()}}
    return compare_points(points, first.prompts, first.at_utility, about=about)


def _tuned(root: Path, common: dict[str, Any]) -> Path:
    """The model of phase 0."""
    arguments = SafetyTuningArguments(
        **{**common, "model_name": str(root / "base")},
        safety_data=str(root / "data" / "phase0.jsonl"),
        safety_samples=0,
        run_name="phase0",
        epochs=4,
        learning_rate=3e-3,
        global_batch_size=16,
    )
    return run_safety_tuning(arguments, {"warmup_steps": 20, "lr_scheduler_type": "cosine"}) / "model"


def _comparison(data: dict[str, Any], seed: int) -> ComparisonData:
    refusals = data["refusals_fit"]
    draw = random.Random(seed)
    return ComparisonData(
        refusals,
        data["utility_train"],
        EvaluationSets(
            [row["prompt"] for row in data["refusals_heldout"]],
            [row["prompt"] for row in data["harmless_heldout"]],
            data["utility_heldout"],
        ),
        unaligned=[{"prompt": row["prompt"], "response": draw.choice(COMPLIANT)} for row in refusals],
        foundation=[row["prompt"] for row in data["harmless_fit"]],
    )


def _make(root: Path, arguments: DemoArguments) -> dict[str, Any]:
    """Writes the texts, the tokenizer and the random model under ``root``; returns the texts.

    ConfigError where another demo's runs lie there.
    """
    data = _texts(arguments)
    fingerprint = fingerprint_rows([data[kind] for kind in sorted(data)])
    mark = root / "data" / "fingerprint.json"
    if mark.is_file() and read_json(mark) != fingerprint:
        raise ConfigError(
            f"{root} holds a demo on other texts, of another seed or version: remove it (rm -r {root}) "
            "or give another --output_dir"
        )
    mixed = [row for kind in ("refusals_fit", "harmless_fit", "sums_fit") for row in data[kind]]
    (root / "data").mkdir(parents=True, exist_ok=True)
    for name, rows in {**data, "phase0": mixed}.items():
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if not mark.is_file():
        every = [f"{row['prompt']} {row['response']}" for rows in data.values() for row in rows]
        tokenizer = train_tokenizer(every, directory=root / "base")
        tiny_llama(tokenizer, seed=arguments.seed).save_pretrained(root / "base")
        write_json(mark, fingerprint)
    return data


def _texts(arguments: DemoArguments) -> dict[str, list[dict[str, str]]]:
    """The demo's own texts, or the user's in their place: harmful prompts get the demo's refusals; the last 100, in an
    order drawn from the seed, are held out. Task items keep their answers in phase 3; phase 0 sees the first 1,300
    with the result alone."""
    data = demo_data(arguments.seed)
    draw = random.Random(arguments.seed)
    if arguments.harmful_data:
        refusals = sorted({row["response"] for row in data["refusals_fit"]})
        harmful = [sample.prompt for sample in load_prompts(arguments.harmful_data)]
        rows = [{"prompt": prompt, "response": draw.choice(refusals)} for prompt in harmful]
        draw.shuffle(rows)
        held = min(100, len(rows) // 5)
        data["refusals_fit"], data["refusals_heldout"] = rows[:-held], rows[-held:]
    if arguments.utility_data and arguments.utility_heldout:
        items = load_samples(arguments.utility_data, shuffle=True, seed=arguments.seed)
        data["sums_fit"] += [
            {"prompt": item.prompt, "response": f"The answer is {extract_number(item.response)}."} for item in items[:1300]
        ]
        data["utility_train"] = [item.as_row() for item in items[1300:2300] or items]
        data["utility_heldout"] = [item.as_row() for item in load_samples(arguments.utility_heldout, samples=100)]
    return data


def blocks(comparison: Comparison) -> list[Block]:
    """The arms side by side, as measured."""
    about = comparison.about
    said = about.get("recommendation", {}).get("text")
    return [
        *best_blocks(comparison.points, TITLES),
        *([said] if said else []),
        f"keep_ratio {about['keep_ratio']}; frozen drift: how far the coefficients that the rotated mask freezes "
        f"moved, relative to their size; {about['world_size']} ranks, {about['total_seconds']:.0f} s in all.",
    ]


if __name__ == "__main__":
    main("demo")
