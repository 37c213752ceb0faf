"""One declared protocol (evidence.yaml): start models, tasks, prompts, arms, rates and seeds, as comparisons one after another.

    python benchmarks/evidence.py benchmarks/evidence.yaml --model DIRECTORY --data DIRECTORY --out checkpoints/evidence

Goes on where it was stopped: phases and points that are there are not made again. After every step evidence.md (one table a
start model and task, all points so far) and evidence.json (outcomes prompt by prompt, which pair over arms) are written.
"""

from __future__ import annotations

import argparse
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
from warp_ds.store.files import read_lines, write_json, write_text

SETS = ("Do-Not-Answer", "generated")
"""The two sets of harmful prompts, as evidence.md calls them; the first is the protocol's own file."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path)
    parser.add_argument("--model", required=True, help="hub name or directory of an aligned chat model")
    parser.add_argument("--data", required=True, help="directory of the files that the protocol names")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/evidence"))
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 where the processor multiplies it, else float32")
    parser.add_argument("--launcher", default=f"{sys.executable} -m warp_ds", help="what starts a phase")
    arguments = parser.parse_args()
    try:
        protocol = read(arguments.protocol, {"MODEL": arguments.model, "DATA": arguments.data})
        Evidence(protocol, arguments.model, arguments.out, arguments.dtype, arguments.launcher.split()).run()
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

    def __init__(self, protocol: dict[str, Any], model: str, out: Path, dtype: str, launcher: Sequence[str]):
        self.protocol, self.model, self.out, self.launcher = protocol, model, out, list(launcher)
        self.dtype = usable_dtype() if dtype == "auto" else dtype
        self.data = out / "data"

    def run(self) -> None:
        self.write_data()
        for number, step in enumerate(self.protocol["steps"], 1):
            print(f"step {number} of {len(self.protocol['steps'])}: {step}", flush=True)
            self.compare(step, self.start(step["start"]))
            self.tables()

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

    def compare(self, step: Mapping[str, Any], model: str) -> None:
        """The comparison of a step: one run a start model, task and variant, to which steps add points."""
        task = self.protocol["tasks"][step["task"]]
        rates = {**self.protocol["rates"], **step.get("rates", {})}
        every = [arm.strip() for arm in step["arms"].split(",")]
        whole = [arm for arm in every if compose(arm).trains == "all"]
        own = ",".join(f"{arm}={rates['all'].replace(',', ':')}" for arm in whole)
        self.call(
            "compare",
            {
                **self.protocol["compare"],
                "model_name": model,
                "run_name": "_".join(filter(None, (step["start"], step["task"], step.get("variant")))),
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
                "harmful_ratio": str(step.get("harmful_ratio", "0")),
                "max_length": task["max_length"],
                "max_new_tokens": task["max_new_tokens"],
                "arms": ",".join(every),
                "learning_rates": rates["target"],
                **({"arm_rates": own} if own else {}),
                "seeds": str(step["seeds"]),
                **step.get("flags", {}),
            },
        )

    # ------------------------------------------------------------ tables

    def tables(self) -> None:
        """evidence.md and evidence.json of every point so far."""
        blocks, outcomes = [], {}
        for run in sorted(path.parent for path in self.out.glob("*/points") if not path.parent.is_symlink()):
            points = [Measured.of(path, self.protocol["prompts"]["heldout"]) for path in sorted((run / "points").iterdir())]
            points = [point for point in points if point is not None]
            outcomes[run.name] = [vars(point) for point in points]
            blocks.append(f"## {run.name}\n\n{table(points)}\n{paired(points)}")
        write_json(self.out / "evidence.json", {"model": self.model, "dtype": self.dtype, "runs": outcomes})
        write_text(self.out / "evidence.md", "\n".join(blocks))


class Measured:
    """A measured point: its arm, rate and seed, and what was measured prompt by prompt."""

    def __init__(self, name: str, metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], first: int):
        """``first``: how many of the harmful prompts are of the first set."""
        found = re.fullmatch(r"(.+)_lr(.+)_seed(\d+)", name)
        self.arm, self.rate, self.seed = (found[1], float(found[2]), int(found[3])) if found else (name, None, None)
        self.nll = metrics.get("utility_nll")
        self.loss = metrics.get("outcomes", {}).get("loss")
        by_suite: dict[str, list[Any]] = defaultdict(list)
        for row in rows:
            by_suite[row["suite"]].append(row.get("verdict", row.get("correct")))
        harmful, harmless = ([said == "refusal" for said in by_suite[suite]] for suite in ("refusal", "over_refusal"))
        self.outcomes = {
            f"refuses {SETS[0]}": harmful[:first],
            f"refuses {SETS[1]}": harmful[first:],
            "incoherent": [said == "incoherent" for said in by_suite["refusal"]],
            "over-refuses": harmless,
            "right": [bool(said) for said in by_suite["gsm8k"]],
        }

    def items(self, name: str) -> Items:
        """'loss', or a measure of ``outcomes``, prompt by prompt."""
        if name == "loss":
            kept = self.loss or {"nats": [], "tokens": []}
            return Items(np.array(kept["nats"], float), np.array(kept["tokens"], float))
        return Items(np.array(self.outcomes[name], float), np.ones(len(self.outcomes[name])))

    @classmethod
    def of(cls, path: Path, first: int) -> Measured | None:
        if not (path / "metrics.json").is_file() or not (path / "answers.jsonl").is_file():
            return None
        return cls(path.name, json.loads((path / "metrics.json").read_text()), read_lines(path / "answers.jsonl"), first)


def table(points: Sequence[Measured]) -> str:
    """A row an arm and rate, seeds pooled, with 95 % Wilson intervals over the prompts."""
    pooled: dict[tuple[str, float | None], list[Measured]] = defaultdict(list)
    for point in points:
        pooled[point.arm, point.rate].append(point)
    if not points:
        return ""
    names = list(points[0].outcomes)
    lines = [f"| arm | rate | seeds | task loss | {' | '.join(names)} |", "|---" * (len(names) + 4) + "|"]
    for (arm, rate), same in sorted(pooled.items(), key=lambda item: (item[0][1] is not None, item[0][0], item[0][1])):
        losses = [point.nll for point in same if point.nll is not None]
        cells = [arm, "" if rate is None else f"{rate:g}", str(len(same))]
        cells.append(f"{sum(losses) / len(losses):.3f}" if losses else "")
        cells += [share([point.outcomes[name] for point in same]) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def paired(points: Sequence[Measured]) -> str:
    """Each arm less the same training without protection, each at the rate that is best for its task, on the same seeds."""
    by_arm: dict[str, dict[float, dict[int, Measured]]] = defaultdict(lambda: defaultdict(dict))
    for point in points:
        if point.rate is not None and point.seed is not None:
            by_arm[point.arm][point.rate][point.seed] = point
    best = {arm: rates[best_rate(rates)] for arm, rates in by_arm.items()}
    lines = []
    for arm, seeds in sorted(best.items()):
        plain = next((other for other in best if other != arm and is_plain(other, arm)), None)
        if plain is None or not (shared := sorted(set(seeds) & set(best[plain]))):
            continue
        names = [name for name in seeds[shared[0]].outcomes if name != "incoherent"]
        cells = [difference([seeds[s] for s in shared], [best[plain][s] for s in shared], name) for name in ("loss", *names)]
        rate = next(point.rate for point in seeds.values())
        lines.append(f"| {arm} at {rate:g} less {plain} | {len(shared)} | {' | '.join(cells)} |")
        head = f"| | seeds | task loss | {' | '.join(names)} |\n{'|---' * (len(names) + 3)}|\n"
    if not lines:
        return ""
    words = "Each arm at the rate with its best task loss, less the same training without protection at its own, paired"
    return f"{words} over prompts and seeds\n(95 % of bootstrap draws):\n\n{head}" + "\n".join(lines) + "\n"


def best_rate(rates: Mapping[float, Mapping[int, Measured]]) -> float:
    """The rate with the lowest task loss on the seeds that every rate has (on its own where they share none)."""
    shared = set.intersection(*(set(seeds) for seeds in rates.values()))

    def loss(rate: float) -> float:
        values = [point.nll for seed, point in rates[rate].items() if not shared or seed in shared]
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
        return {("", number): point.items(name) for number, point in enumerate(points)}

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
