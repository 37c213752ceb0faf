"""One declared protocol (evidence.yaml): start models, tasks, prompts, arms, rates and seeds, as comparisons one after another.

    python benchmarks/evidence.py benchmarks/evidence.yaml --model DIRECTORY --data DIRECTORY --out checkpoints/evidence

Goes on where it was stopped: phases and points that are there are not made again, nor those that --points brings from another
machine, where the same bytes of a start model came out. After every call points.jsonl (a line a point: losses and verdicts
prompt by prompt, which pair over arms) and evidence.md (one table a start model and task) are written.

    python benchmarks/evidence.py benchmarks/evidence.yaml --tables POINTS.jsonl    the tables of points alone
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
import yaml

from warp_ds.data.datasets import load_prompts, load_samples
from warp_ds.data.synthetic import REFUSALS, demo_data
from warp_ds.errors import ConfigError, WarpError
from warp_ds.evaluation.metrics import wilson
from warp_ds.evaluation.paired import Cells, Items, estimates, interval, replicates
from warp_ds.launch.demo import COMPLIANT
from warp_ds.phases.arms import EXCLUSIVE, Arm, compose
from warp_ds.store.files import read_json, read_lines, write_text

MEASURES = {
    "refuses Do-Not-Answer": ("refusal", "r", 0),
    "refuses generated": ("refusal", "r", 1),
    "incoherent": ("refusal", "i", None),
    "over-refuses": ("over_refusal", "r", None),
    "right": ("gsm8k", "1", None),
}
"""Column -> (suite, the letter that counts, which half of the prompts: the protocol's own file, the program's own, both)."""
Trial = tuple[str, float | None, int]
"""Arm, rate (None: not trained), seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path)
    parser.add_argument("--model", help="hub name or directory of an aligned chat model")
    parser.add_argument("--data", help="directory of the files that the protocol names")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/evidence"))
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 where the processor multiplies it, else float32")
    parser.add_argument("--launcher", default=f"{sys.executable} -m warp_ds", help="what starts a phase")
    parser.add_argument("--points", type=Path, help="points.jsonl of another machine, not to be measured again")
    parser.add_argument("--tables", type=Path, help="print the tables of a points.jsonl, and end")
    arguments = parser.parse_args()
    try:
        if arguments.tables is not None:
            print(tables([Measured(row) for row in read_lines(arguments.tables)]))
            return
        if arguments.model is None or arguments.data is None:
            raise ConfigError("--model and --data say what is measured (or --tables POINTS.jsonl what was)")
        protocol = read(arguments.protocol, {"MODEL": arguments.model, "DATA": arguments.data})
        known = [] if arguments.points is None else read_lines(arguments.points)
        Evidence(protocol, arguments.model, arguments.out, arguments.dtype, arguments.launcher.split(), known).run()
    except WarpError as error:
        sys.exit(f"error: {error}")


def read(path: Path, words: Mapping[str, str]) -> dict[str, Any]:
    """The protocol with ${MODEL} and ${DATA} put in. ConfigError for other words, and for steps of what it does not name."""
    try:
        protocol: dict[str, Any] = yaml.safe_load(Template(path.read_text(encoding="utf-8")).substitute(words))
    except (OSError, KeyError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is no protocol: {error}") from error
    for number, step in enumerate(protocol["steps"], 1):
        for kind in ("start", "task"):
            if step[kind] not in protocol[f"{kind}s"]:
                raise ConfigError(f"{path}, step {number}: no {kind} is called {step[kind]!r}")
        for arm in step["arms"].split(","):
            compose(arm.strip())
    return protocol


def usable_dtype() -> str:
    """bfloat16 on a GPU, and on a processor with instructions for it; else float32."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    return "bfloat16" if torch.cuda.is_available() or re.search(r"\b(amx_bf16|avx512_bf16)\b", flags) else "float32"


class Evidence:
    """The steps of a protocol under one directory."""

    def __init__(
        self,
        protocol: dict[str, Any],
        model: str,
        out: Path,
        dtype: str,
        launcher: Sequence[str],
        known: Sequence[dict[str, Any]] = (),
    ):
        """``known``: points of another machine (lines of a points.jsonl)."""
        self.protocol, self.model, self.out, self.launcher, self.known = protocol, model, out, list(launcher), list(known)
        self.dtype = usable_dtype() if dtype == "auto" else dtype
        self.data = out / "data"

    def run(self) -> None:
        self.write_data()
        for number, step in enumerate(self.protocol["steps"], 1):
            print(f"step {number} of {len(self.protocol['steps'])}: {step}", flush=True)
            model = self.start(step["start"])
            of = {"run": run_name(step), "start": digest(model), "protocol": self.digest(step)}
            for seed in str(step["seeds"]).split(","):
                missing = self.missing(step, int(seed), of)
                if missing:
                    self.compare(step, model, int(seed), missing)
                    self.write_points(of)

    def digest(self, step: Mapping[str, Any]) -> str:
        """Of all that a point of a step hangs on but its arm, rate and seed; where files lie is not among it."""
        of = {name: self.protocol[name] for name in ("seed", "prompts", "compare")}
        of |= {"flags": step.get("flags", {}), "dtype": self.dtype, "model": digest(self.model)}
        of |= {kind: self.protocol[f"{kind}s"][step[kind]] for kind in ("start", "task")}
        text = re.sub(r'"[^"]*/([^"/]+)"', r'"\1"', json.dumps(of, sort_keys=True))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def missing(self, step: Mapping[str, Any], seed: int, of: Mapping[str, str]) -> dict[str, list[str]]:
        """Arm -> the rates that no point of the step's start model has yet, harmful mixes as arms of their own."""
        have = {Measured(row).trial for row in [*self.known, *self.measured(of)] if of.items() <= row.items()}
        rates, wanted = {**self.protocol["rates"], **step.get("rates", {})}, {}
        for arm in arms_of(step):
            grid = rates["all" if compose(arm).trains == "all" else "target"].split(",")
            left = [rate for rate in grid if (arm, float(rate), seed) not in have]
            if left:
                wanted[arm] = left
        return wanted

    def measured(self, of: Mapping[str, str]) -> list[dict[str, Any]]:
        """The points of a run, a row each."""
        rows = []
        for path in sorted((self.out / of["run"]).glob("points/*/metrics.json")):
            metrics = read_json(path)
            if "outcomes" in metrics:
                rows.append({**of, "point": path.parent.name, "nll": metrics["utility_nll"], "outcomes": metrics["outcomes"]})
        return rows

    def write_data(self) -> None:
        """Every text of the protocol as files, the same ones each time."""
        wanted, seed = self.protocol["prompts"], self.protocol["seed"]
        draw, made = random.Random(seed), demo_data(seed, n_heldout=100)
        prompts = [sample.prompt for sample in load_prompts(wanted["harmful"])]
        draw.shuffle(prompts)
        fit, held = prompts[: wanted["fit"]], prompts[wanted["fit"] :][: wanted["heldout"]]
        refused = [{"prompt": prompt, "response": draw.choice(REFUSALS).format("").strip()} for prompt in fit]
        refused += [{"prompt": row["prompt"], "response": row["response"]} for row in made["refusals_fit"][: len(fit)]]
        answered = made["harmless_fit"][: len(refused)]
        own = [row["prompt"] for row in made["refusals_heldout"][: wanted["heldout"]]]
        harmful = [row["prompt"] for row in made["refusals_fit"][-wanted["harmful_mix"] :]]
        quarter = wanted["safety"] // 4
        files = {
            "phase0": refused + answered,
            "safety": refused[: wanted["safety"]] + answered[:quarter],
            "harmful": [{"prompt": prompt} for prompt in held + own],
            "harmless": [{"prompt": row["prompt"]} for row in made["harmless_heldout"][: wanted["harmless"]]],
            "harmful_mix": [{"prompt": prompt, "response": draw.choice(COMPLIANT)} for prompt in harmful],
        }
        for name, task in self.protocol["tasks"].items():
            train, test = (
                [sample.as_row() for sample in load_samples(task[part], samples=task[count])]
                if part in task
                else made[f"utility_{which}"][: task[count]]
                for part, which, count in (("train", "train", "samples"), ("test", "heldout", "heldout"))
            )
            files |= {f"{name}_train": train, f"{name}_test": test}
        for name, rows in files.items():
            write_text(self.data / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def call(self, phase: str, settings: dict[str, Any]) -> None:
        """One phase as its own process; what it finished before it finds itself."""
        config = self.out / "configs" / f"{settings['run_name']}.yaml"
        places = {"output_dir": str(self.out), "log_dir": str(self.out / "logs"), "dtype": self.dtype}
        write_text(config, yaml.safe_dump({**places, "seed": self.protocol["seed"], **settings}))
        subprocess.run([*self.launcher, phase, "--config", str(config)], check=True)

    def start(self, name: str) -> str:
        """The start model: as it is, or after phase 0."""
        settings = self.protocol["starts"][name]
        if settings is None:
            return self.model
        here = {"safety_data": str(self.data / "phase0.jsonl"), "safety_samples": 0, "model_name": self.model}
        if not (self.out / name / "finished.json").is_file():
            self.call("phase0", {**here, **settings, "run_name": name, "save_minutes": 0, "max_length": 192})
        return str(self.out / name / "model")

    def compare(self, step: Mapping[str, Any], model: str, seed: int, missing: Mapping[str, Sequence[str]]) -> None:
        """The comparison of a step: one run a start model, task and variant, to which every call adds points."""
        task = self.protocol["tasks"][step["task"]]
        unaligned = {"unaligned_model": self.model} if step["start"] != "as_is" else {}
        self.call(
            "compare",
            {
                **self.protocol["compare"],
                "model_name": model,
                "run_name": run_name(step),
                **unaligned,
                "safety_data": str(self.data / "safety.jsonl"),
                "safety_samples": 0,
                "harmful_data": str(self.data / "harmful.jsonl"),
                "harmful_samples": 0,
                "harmless_data": str(self.data / "harmless.jsonl"),
                "harmless_samples": 0,
                "utility_data": str(self.data / f"{step['task']}_train.jsonl"),
                "utility_samples": 0,
                "utility_heldout": str(self.data / f"{step['task']}_test.jsonl"),
                "heldout_samples": 0,
                "harmful_mix": str(self.data / "harmful_mix.jsonl"),
                "max_length": task["max_length"],
                "max_new_tokens": task["max_new_tokens"],
                "arms": ",".join(["before", *missing]),
                "arm_rates": ",".join(f"{arm}={':'.join(rates)}" for arm, rates in missing.items()),
                "seeds": str(seed),
                **step.get("flags", {}),
            },
        )

    def write_points(self, of: Mapping[str, str]) -> None:
        """points.jsonl and evidence.md of every point so far, those of other machines with them."""
        path = self.out / "points.jsonl"
        rows = {json.dumps(row, sort_keys=True) for row in [*self.known, *(read_lines(path) if path.is_file() else [])]}
        rows |= {json.dumps(row, sort_keys=True) for row in self.measured(of)}
        write_text(path, "".join(row + "\n" for row in sorted(rows, key=lambda row: [json.loads(row)[key] for key in SORTED])))
        write_text(self.out / "evidence.md", tables([Measured(row) for row in read_lines(path)]))


SORTED = ("run", "start", "point")


def run_name(step: Mapping[str, Any]) -> str:
    return "_".join(filter(None, (step["start"], step["task"], step.get("variant"))))


def arms_of(step: Mapping[str, Any]) -> list[str]:
    """The trained arms of a step, each at every harmful ratio."""
    arms = [arm.strip() for arm in step["arms"].split(",")]
    ratios = [float(ratio) for ratio in str(step.get("harmful_ratio", "0")).split(",")]
    return [f"{arm}+harmful@{ratio:g}" if ratio else arm for ratio in ratios for arm in arms if arm != "before"]


def digest(model: str) -> str:
    """Of the weights of a start model: two machines have the same one, or two start models. A hub's name stands for itself."""
    whole = hashlib.sha256()
    files = sorted(Path(model).glob("*.safetensors"))
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                whole.update(block)
    return whole.hexdigest()[:16] if files else model


class Measured:
    """A measured point: its start model, arm, rate and seed, and what was measured prompt by prompt."""

    def __init__(self, row: Mapping[str, Any]):
        found = re.fullmatch(r"(.+)_lr(.+)_seed(\d+)", row["point"])
        self.arm, self.rate, self.seed = (found[1], float(found[2]), int(found[3])) if found else (row["point"], None, 0)
        self.run, self.start, self.protocol = row["run"], row["start"], row["protocol"]
        self.nll, self.marks = row["nll"], row["outcomes"]
        self.trial: Trial = (self.arm, self.rate, self.seed)

    def outcomes(self, name: str) -> list[bool]:
        """Whether it did what a column of MEASURES counts, prompt by prompt."""
        suite, letter, half = MEASURES[name]
        marks = self.marks.get(suite, "")
        middle = len(marks) // 2
        return [mark == letter for mark in (marks if half is None else (marks[:middle], marks[middle:])[half])]

    def items(self, name: str) -> Items:
        """'loss', or a column of MEASURES, prompt by prompt."""
        if name == "loss":
            kept = self.marks.get("loss") or {"nats": [], "tokens": []}
            return Items(np.array(kept["nats"], float), np.array(kept["tokens"], float))
        counted = self.outcomes(name)
        return Items(np.array(counted, float), np.ones(len(counted)))


def tables(points: Sequence[Measured]) -> str:
    """For each run of a protocol: a table a start model, and the differences of arms over all of them. What was measured by
    another protocol, of another base model say, is never pooled with it."""
    runs: dict[tuple[str, str], dict[str, list[Measured]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        runs[point.run, point.protocol][point.start].append(point)
    blocks = []
    for (run, protocol), starts in sorted(runs.items()):
        shown = "\n".join(f"Start model {start}:\n\n{table(same)}" for start, same in sorted(starts.items()))
        differences = paired([point for same in starts.values() for point in same])
        blocks.append(f"## {run} (protocol {protocol})\n\n{shown}\n{differences}")
    return "\n".join(blocks)


def table(points: Sequence[Measured]) -> str:
    """A row an arm and rate, seeds pooled, with 95 % Wilson intervals over the prompts."""
    pooled: dict[tuple[str, float | None], list[Measured]] = defaultdict(list)
    for point in points:
        pooled[point.arm, point.rate].append(point)
    lines = [f"| arm | rate | seeds | task loss | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 4) + "|"]
    for (arm, rate), same in sorted(pooled.items(), key=lambda item: (item[0][1] is not None, item[0][0], item[0][1])):
        losses = [point.nll for point in same if point.nll is not None]
        cells = [arm, "" if rate is None else f"{rate:g}", str(len(same))]
        cells.append(f"{sum(losses) / len(losses):.3f}" if losses else "")
        cells += [share([point.outcomes(name) for point in same]) for name in MEASURES]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


Models = dict[tuple[str, int], Measured]
"""(start model, seed) -> the point of one arm and rate."""


def paired(points: Sequence[Measured]) -> str:
    """Each arm less the same training without protection, each at the rate that is best for its task, on the same seeds."""
    by_arm: dict[str, dict[float, Models]] = defaultdict(lambda: defaultdict(dict))
    for point in points:
        if point.rate is not None:
            by_arm[point.arm][point.rate][point.start, point.seed] = point
    best = {arm: best_rate(rates) for arm, rates in by_arm.items()}
    names = ["loss", *(name for name in MEASURES if name != "incoherent")]
    lines = []
    for arm, rate in sorted(best.items()):
        plain = next((other for other in best if other != arm and is_plain(other, arm)), None)
        ours, theirs = by_arm[arm][rate], {} if plain is None else by_arm[plain][best[plain]]
        shared = sorted(set(ours) & set(theirs))
        if shared:
            cells = [difference([ours[key] for key in shared], [theirs[key] for key in shared], name) for name in names]
            lines.append(f"| {arm} at {rate:g} less {plain} | {len(shared)} | {' | '.join(cells)} |")
    if not lines:
        return ""
    words = "Each arm at the rate with its best task loss, less the same training without protection at its own, paired"
    head = f"| | seeds | task {' | '.join(names)} |\n{'|---' * (len(names) + 2)}|\n"
    return f"{words} over prompts, seeds\nand start models (95 % of bootstrap draws):\n\n{head}" + "\n".join(lines) + "\n"


def best_rate(rates: Mapping[float, Models]) -> float:
    """The rate with the lowest task loss on the seeds that every rate has (on its own where they share none)."""
    shared = set.intersection(*(set(models) for models in rates.values()))

    def loss(rate: float) -> float:
        values = [point.nll for key, point in rates[rate].items() if not shared or key in shared]
        return sum(float("inf") if value is None else value for value in values) / len(values)

    return min(rates, key=loss)


def is_plain(other: str, arm: str) -> bool:
    """Whether ``other`` trains what ``arm`` trains, on data as harmful, and does nothing else."""
    a, b = compose(arm), compose(other)
    same = ("trains", "adapter", "harmful_share")
    rest = [key for key in EXCLUSIVE if key not in same]
    return all(getattr(a, key) == getattr(b, key) for key in same) and all(
        getattr(b, key) == getattr(Arm(""), key) for key in rest
    )


def difference(ours: Sequence[Measured], theirs: Sequence[Measured], name: str) -> str:
    """The first's measure less the second's, with its interval; points of shares in per cent."""

    def cells(points: Sequence[Measured]) -> Cells:
        return {(point.start, point.seed): point.items(name) for point in points}

    both = [cells(ours), cells(theirs)]
    if any(not len(items.top) for cell in both for items in cell.values()):
        return ""
    values = estimates(both)
    low, high = interval(np.subtract(*replicates(both).T))
    scale, form = (1, "+.3f") if name == "loss" else (100, "+.0f")
    return f"{scale * (values[0] - values[1]):{form}} [{scale * low:{form}}, {scale * high:{form}}]"


def share(seeds: Sequence[Sequence[bool]]) -> str:
    """The share of true outcomes, seeds pooled; the interval is over one seed's prompts, which the seeds share."""
    count = len(seeds[0])
    if not count:
        return ""
    value = sum(sum(outcomes) for outcomes in seeds) / len(seeds)
    low, high = wilson(value, count)
    return f"{value / count:.0%} [{100 * low:.0f}, {100 * high:.0f}]"


if __name__ == "__main__":
    main()
