"""One declared protocol (evidence.yaml): start models, tasks, prompts, arms, rates and seeds, as comparisons one after another.

    python benchmarks/evidence.py benchmarks/evidence.yaml --model DIRECTORY --data DIRECTORY --out checkpoints/evidence

Goes on where it was stopped: phases and points that are there are not made again, nor those that --points brings from another
machine, where the same bytes of a start model came out. After every call points.jsonl (a line a point: losses and verdicts
prompt by prompt, which pair over arms) and evidence.md (its tables: evidence_tables.py) are written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import torch
import yaml
from evidence_tables import Measured, tables

from warp_ds.data.datasets import load_prompts, load_samples
from warp_ds.data.synthetic import REFUSALS, demo_data
from warp_ds.errors import ConfigError, WarpError
from warp_ds.launch.demo import COMPLIANT
from warp_ds.phases.arms import compose
from warp_ds.store.files import read_json, read_lines, write_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocol", type=Path)
    parser.add_argument("--model", required=True, help="hub name or directory of an aligned chat model")
    parser.add_argument("--data", required=True, help="directory of the files that the protocol names")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/evidence"))
    parser.add_argument("--dtype", default="auto", help="auto: bfloat16 where the processor multiplies it, else float32")
    parser.add_argument("--launcher", default=f"{sys.executable} -m warp_ds", help="what starts a phase")
    parser.add_argument("--points", type=Path, help="points.jsonl of another machine, not to be measured again")
    arguments = parser.parse_args()
    try:
        protocol = read(arguments.protocol, {"MODEL": arguments.model, "DATA": arguments.data})
        known = [] if arguments.points is None else read_lines(arguments.points)
        Evidence(protocol, arguments.model, arguments.out, arguments.dtype, arguments.launcher.split(), known).run()
    except WarpError as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"error: {error.cmd[-3]} ended with {error.returncode}, as it says above; the same command goes on from there")


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
        unknown = sorted(set(step) - STEP)
        if unknown:
            raise ConfigError(f"{path}, step {number}: {', '.join(unknown)}? A step has {', '.join(sorted(STEP))}")
        settings = protocol["starts"][step["start"]]
        if "start_seed" in step and (settings is None or "seed" in settings or step["start_seed"] == protocol["seed"]):
            raise ConfigError(
                f"{path}, step {number}: start_seed {step['start_seed']}: give a start that phase 0 makes, without a seed of "
                f"its own, and another seed than the protocol's, which is {protocol['seed']}"
            )
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
            model = self.start(step)
            of = {"run": run_name(step), "start": digest(model), "protocol": self.digest(step)}
            self.write_points(self.measured(step, of))  # what a call that was killed had measured and not written
            for seed in str(step["seeds"]).split(","):
                missing = self.missing(step, int(seed), of, self.measured(step, of))
                if missing:
                    try:
                        self.compare(step, model, int(seed), missing)
                    finally:  # of a comparison that failed, too
                        self.write_points(self.measured(step, of))

    def digest(self, step: Mapping[str, Any]) -> str:
        """Of all that a point of a step hangs on but its arm, rate and seed; where files lie is not among it."""
        of = {name: self.protocol[name] for name in ("seed", "prompts", "compare")}
        of |= {"flags": step.get("flags", {}), "dtype": self.dtype, "model": digest(self.model)}
        of |= {kind: self.protocol[f"{kind}s"][step[kind]] for kind in ("start", "task")}
        text = re.sub(r'"[^"]*/([^"/]+)"', r'"\1"', json.dumps(of, sort_keys=True))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def missing(
        self, step: Mapping[str, Any], seed: int, of: Mapping[str, str], measured: Sequence[Mapping[str, Any]]
    ) -> dict[str, list[str]]:
        """Arm -> the rates that no point of the step's start model has yet, harmful mixes as arms of their own."""
        have = {Measured(row).trial for row in [*self.known, *measured] if of.items() <= row.items()}
        rates, wanted = {**self.protocol["rates"], **step.get("rates", {})}, {}
        for arm in arms_of(step):
            grid = rates["all" if compose(arm).trains == "all" else "target"].split(",")
            left = [rate for rate in grid if (arm, float(rate), seed) not in have]
            if left:
                wanted[arm] = left
        return wanted

    def measured(self, step: Mapping[str, Any], of: Mapping[str, str]) -> list[dict[str, Any]]:
        """The points of a step's comparison, a row each."""
        rows = []
        for path in sorted((self.out / directory(step)).glob("points/*/metrics.json")):
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
        for name in {step["task"]: None for step in self.protocol["steps"]}:
            task = self.protocol["tasks"][name]
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

    def start(self, step: Mapping[str, Any]) -> str:
        """A step's start model: as it is, or after phase 0, in another order of its samples for a start_seed of its own."""
        settings, name = self.protocol["starts"][step["start"]], start_name(step)
        if settings is None:
            return self.model
        here = {"safety_data": str(self.data / "phase0.jsonl"), "safety_samples": 0, "model_name": self.model}
        here["seed"] = step.get("start_seed", self.protocol["seed"])
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
                "run_name": directory(step),
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

    def write_points(self, measured: Sequence[Mapping[str, Any]]) -> None:
        """points.jsonl and evidence.md of every point so far, those of other machines with them."""
        path = self.out / "points.jsonl"
        before = {json.dumps(row, sort_keys=True) for row in (read_lines(path) if path.is_file() else [])}
        rows = before | {json.dumps(row, sort_keys=True) for row in [*self.known, *measured]}
        if rows == before:
            return
        write_text(path, "".join(row + "\n" for row in sorted(rows, key=lambda row: [json.loads(row)[key] for key in SORTED])))
        write_text(self.out / "evidence.md", tables([Measured(row) for row in read_lines(path)]))


SORTED = ("run", "start", "point")
STEP = {"start", "start_seed", "task", "seeds", "arms", "harmful_ratio", "rates", "variant", "flags"}
"""What a step may say."""


def run_name(step: Mapping[str, Any]) -> str:
    """What points are pooled by: start models of other start_seeds are the same run."""
    return "_".join(filter(None, (step["start"], step["task"], step.get("variant"))))


def start_name(step: Mapping[str, Any]) -> str:
    return step["start"] + (f"_start{step['start_seed']}" if "start_seed" in step else "")


def directory(step: Mapping[str, Any]) -> str:
    """Of a step's comparison, one a start model."""
    return run_name({**step, "start": start_name(step)})


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


if __name__ == "__main__":
    main()
