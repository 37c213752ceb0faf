"""The whole job on a model of two million parameters, made on the spot: phases 0 to 3, six arms, one table.

Started by ``warp-ds demo`` (``make demo``) on two local ranks; every phase is the real one, with the flags below.
"""

from __future__ import annotations

import json
import logging
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from warp_ds.artifacts import fingerprint_rows, read_json, write_json
from warp_ds.config import (
    BasisArguments,
    ConfigError,
    EvaluateArguments,
    ImportanceArguments,
    RunArguments,
    SafetyTuningArguments,
    TrainArguments,
    flag,
)
from warp_ds.data.datasets import load_pairs, load_prompts
from warp_ds.data.synthetic import demo_data, tiny_llama, train_tokenizer
from warp_ds.evaluation.metrics import extract_number
from warp_ds.phases.basis import run_basis
from warp_ds.phases.evaluate import (
    EvaluationSets,
    NoiseRule,
    load_engine,
    measure,
    noise_rule,
    write_measurement,
)
from warp_ds.phases.importance import run_importance
from warp_ds.phases.launcher import launch
from warp_ds.phases.run import log_to_file, versions
from warp_ds.phases.training import run_safety_tuning, run_training
from warp_ds.report.verify import certify
from warp_ds.zero import runtime

logger = logging.getLogger(__name__)

LAYER_TYPE = "attn_q,attn_k,attn_v,ffn_up,ffn_down"
KEEP_RATIO = 0.1


@dataclass
class DemoArguments(RunArguments):
    """The demo's own defaults; it makes its model and its data."""

    model_name: str = "made by the demo"
    dtype: str = "float32"
    device: str = "cpu"
    output_dir: str = "checkpoints/demo"
    batch_size: int = 8
    max_length: int = 128
    harmful_data: str | None = flag(None, "file of harmful prompts to use in place of the demo's own requests")
    utility_data: str | None = flag(None, "file of task items (answers end in #### N) to train on, in place of its own")
    utility_heldout: str | None = flag(None, "file of task items to evaluate on; needed with --utility_data")
    max_new_tokens: int = flag(56, "longest answer in the evaluation, in tokens")

    def check(self) -> None:
        super().check()
        if (self.utility_data is None) != (self.utility_heldout is None):
            raise ConfigError("--utility_data and --utility_heldout go together: items to train on and to evaluate on")


@dataclass(frozen=True)
class Arm:
    name: str
    train_scope: str | None = None
    """None: not trained."""
    masks: str | None = None
    """'rotated', 'original', or None."""

    @property
    def run_name(self) -> str:
        return "phase3_" + self.name.replace(", ", "_").replace(" ", "_").replace("-", "_")


ARMS = (
    Arm("before"),
    Arm("all parameters", "all"),
    Arm("all parameters, rotated mask", "all", "rotated"),
    Arm("target layers, no mask", "warp"),
    Arm("target layers, original-space mask", "warp", "original"),
    Arm("target layers, rotated mask", "warp", "rotated"),
)


def run_demo(arguments: DemoArguments) -> None:
    """Writes <output_dir>/report.json and prints the table. Collective."""
    root, start = Path(arguments.output_dir), time.time()
    seconds: dict[str, float] = {}

    def timed(name: str, run: Any) -> Any:
        began = time.time()
        result = run()
        seconds[name] = round(time.time() - began, 1)
        return result

    with log_to_file(Path(arguments.log_dir), "demo"):
        data = runtime.on_rank_0(lambda: _make(root, arguments), "making the demo's model and data")
        common: dict[str, Any] = {
            "dtype": arguments.dtype, "device": arguments.device, "deepspeed": arguments.deepspeed,
            "output_dir": str(root), "log_dir": arguments.log_dir, "seed": arguments.seed,
            "max_length": arguments.max_length, "batch_size": arguments.batch_size,
        }
        logger.info("phase 0: a model that refuses harmful requests and answers harmless ones")
        safe = timed("phase 0", lambda: run_safety_tuning(SafetyTuningArguments(
            **common, model_name=str(root / "base"), safety_data=str(root / "data" / "phase0.jsonl"), safety_samples=0,
            run_name="phase0", epochs=4, learning_rate=3e-3, global_batch_size=16,
        ), {"warmup_steps": 20, "lr_scheduler_type": "cosine"})) / "model"
        phase12: dict[str, Any] = {**common, "model_name": str(safe), "layer_type": LAYER_TYPE,
                                   "safety_data": str(root / "data" / "refusals_fit.jsonl")}
        logger.info("phase 1: the basis of every target layer's safety inputs")
        basis = timed("phase 1", lambda: run_basis(
            BasisArguments(**phase12, safety_samples=0, run_name="phase1"))) / "basis"
        logger.info("phase 2: which coefficients the refusals rest on, rotated and in the original space")
        masks = {
            "rotated": timed("phase 2", lambda: run_importance(ImportanceArguments(
                **phase12, safety_samples=200, run_name="phase2", basis_dir=str(basis), keep_ratio=KEEP_RATIO))),
            "original": timed("phase 2, original space", lambda: run_importance(ImportanceArguments(
                **phase12, safety_samples=200, run_name="phase2_original", basis="identity", keep_ratio=KEEP_RATIO))),
        }
        sets = EvaluationSets(
            [row["prompt"] for row in data["refusals_heldout"]], [row["prompt"] for row in data["harmless_heldout"]],
            data["utility_heldout"],
        )
        noise = timed("noise rule", partial(_noise, safe, sets, arguments))
        results = []
        for arm in ARMS:
            directory = safe
            if arm.train_scope is not None:
                logger.info("phase 3: %s", arm.name)
                settings = TrainArguments(
                    **common, model_name=str(safe), layer_type=LAYER_TYPE, train_scope=arm.train_scope,
                    masks_dir=str(masks[arm.masks] / "masks") if arm.masks else "none",
                    utility_data=str(root / "data" / "utility_train.jsonl"), utility_samples=0, epochs=5,
                    learning_rate=1e-3, global_batch_size=16, run_name=arm.run_name,
                )
                directory = timed(f"phase 3, {arm.name}", partial(run_training, settings)) / "model"
            metrics = timed(f"evaluation, {arm.name}", partial(_evaluate, directory, sets, arguments, noise))
            drift = runtime.on_rank_0(partial(_drift, safe, directory, masks["rotated"] / "masks", basis), "certifying")
            results.append({"name": arm.name, **metrics, "frozen_drift": drift})
        report = {"arms": results, "keep_ratio": KEEP_RATIO, "layer_type": LAYER_TYPE, "seconds": seconds,
                  "total_seconds": round(time.time() - start, 1), "world_size": runtime.world_size(),
                  "noise_threshold": noise.threshold, "versions": versions()}
        runtime.on_rank_0(lambda: write_json(root / "report.json", report), "writing the report")
        if runtime.rank() == 0:
            print_table(report)


def _make(root: Path, arguments: DemoArguments) -> dict[str, Any]:
    """Writes the texts, the tokenizer and the random model under ``root``; returns the texts.

    ConfigError where another demo's runs lie there.
    """
    data = _texts(arguments)
    fingerprint = fingerprint_rows([data[kind] for kind in sorted(data)])
    mark = root / "data" / "fingerprint.json"
    if mark.is_file() and read_json(mark) != fingerprint:
        raise ConfigError(f"{root} holds a demo on other texts, of another seed or version: remove it (rm -r {root}) "
                          "or give another --output_dir")
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
        rows = [{"prompt": p, "response": draw.choice(refusals)} for p in load_prompts(arguments.harmful_data)]
        draw.shuffle(rows)
        held = min(100, len(rows) // 5)
        data["refusals_fit"], data["refusals_heldout"] = rows[:-held], rows[-held:]
    if arguments.utility_data and arguments.utility_heldout:
        items = load_pairs(arguments.utility_data, shuffle=True, seed=arguments.seed).to_list()
        data["sums_fit"] += [{"prompt": row["prompt"], "response": f"The answer is {extract_number(row['response'])}."}
                             for row in items[:1300]]
        data["utility_train"] = items[1300:2300] or items
        data["utility_heldout"] = load_pairs(arguments.utility_heldout, samples=100).to_list()
    return data


def _evaluation(arguments: DemoArguments, directory: Path) -> EvaluateArguments:
    return EvaluateArguments(
        model_name=str(directory), dtype=arguments.dtype, device=arguments.device, deepspeed=arguments.deepspeed,
        batch_size=50, max_length=arguments.max_length, max_new_tokens=arguments.max_new_tokens,
    )


def _noise(directory: Path, sets: EvaluationSets, arguments: DemoArguments) -> NoiseRule:
    """What counts as noise, by the likelihood under the model before training."""
    settings = _evaluation(arguments, directory)
    engine, tokenizer = load_engine(settings)
    return noise_rule(engine, tokenizer, sets, batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens)


def _evaluate(
    directory: Path, sets: EvaluationSets, arguments: DemoArguments, noise: NoiseRule
) -> dict[str, Any]:
    """The measurements of one arm; taken from its metrics.json where that exists."""
    run = directory.parent
    if runtime.on_rank_0(lambda: (run / "metrics.json").is_file(), "looking for results"):
        return runtime.on_rank_0(lambda: json.loads((run / "metrics.json").read_text()), "reading results")
    settings = _evaluation(arguments, directory)
    engine, tokenizer = load_engine(settings)
    found = measure(engine, tokenizer, sets, batch_size=settings.batch_size, max_new_tokens=settings.max_new_tokens,
                    max_length=settings.max_length, noise=noise)
    runtime.on_rank_0(lambda: write_measurement(run, found), "writing the results")
    return found.metrics


def _drift(before: Path, after: Path, masks: Path, basis: Path) -> float:
    """How far the coefficients that ``masks`` freezes moved, relative to their size."""
    return 0.0 if before == after else float(certify(before, after, masks, basis)["frozen_drift"])


def print_table(report: dict[str, Any]) -> None:
    """The arms side by side, as measured."""
    table = Table(title="What was trained, and what it did to refusals and to the task (held-out text)")
    table.add_column("arm")
    for column in ("refuses", "incoherent", "over-refuses", "task NLL", "task accuracy", "frozen drift"):
        table.add_column(column, justify="right")
    for arm in report["arms"]:
        table.add_row(
            arm["name"], f"{arm['refusal_rate']:.0%}", f"{arm['incoherent_rate']:.0%}",
            f"{arm['over_refusal_rate']:.0%}", f"{arm['utility_nll']:.3f}", f"{arm['utility_accuracy']:.0%}",
            f"{arm['frozen_drift']:.1e}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(
        f"keep_ratio {report['keep_ratio']}; frozen drift: how far the coefficients that the rotated mask freezes "
        f"moved, relative to their size; {report['world_size']} ranks, {report['total_seconds']:.0f} s in all."
    )


if __name__ == "__main__":
    launch(DemoArguments, run_demo, stoppable=False)
