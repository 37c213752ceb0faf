"""Two questions about the start model of `make evidence`: is its mask stable, and does the audit find planted samples?

    python benchmarks/stability.py checkpoints/evidence        # beside what make evidence left there; minutes on two cores

Masks of three disjoint safety sets (32 refused questions of the protocol's file and 8 answered requests each) are told apart by
`warp-ds overlap`: with one basis, each set's own, and in the original space. `warp-ds audit` ranks 60 samples of the
protocol's tasks and 10 compliances planted among them (content-free ones, to held-out questions), by the masks of the safety
set. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from warp_ds.launch.demo import COMPLIANT
from warp_ds.store.files import read_json, read_lines, write_text

REFUSED, ANSWERED, SETS = 32, 8, 3
PLANTED, SAMPLES = 10, 60
SHARED = ("iou", "iou_by_chance", "subspace", "subspace_by_chance", "subspace_by_columns")
"""Of overlap.json; with bases of their own sets have no coefficients in common, and no iou."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("evidence", type=Path, help="the --out of benchmarks/evidence.py, in which phase 0 has run")
    parser.add_argument("--start", default="safe", help="which of its start models")
    arguments = parser.parse_args()
    if not list((arguments.evidence / "configs").glob(f"{arguments.start}_*.yaml")):
        sys.exit(f"error: nothing was compared from {arguments.start} in {arguments.evidence}: run make evidence there first")
    job = Job(arguments.evidence, arguments.start)
    print(json.dumps({"overlap": job.overlap(), "audit": job.audit()}))


class Job:
    """Phases on one start model; each finds what it finished before itself."""

    def __init__(self, evidence: Path, start: str):
        self.data, self.out, model = evidence / "data", evidence / f"stability_{start}", evidence / start / "model"
        configs = [yaml.safe_load(path.read_text()) for path in sorted((evidence / "configs").glob("*.yaml"))]
        # The first of its comparisons, without a variant's flags.
        compared = min((c for c in configs if "arms" in c and c["model_name"] == str(model)), key=lambda c: len(c["run_name"]))
        self.common = {"model_name": str(model), "dtype": compared["dtype"], "output_dir": str(self.out)}
        self.common |= {"log_dir": str(self.out / "logs"), "safety_samples": "0"}
        self.layers, self.share = (
            {name: str(compared[name])} if name in compared else {} for name in ("layer_type", "keep_ratio")
        )

    def call(self, phase: str, name: str, **flags: str) -> Path:
        given = {**self.common, "run_name": name, **flags}
        words = [word for flag, value in given.items() for word in (f"--{flag}", value)]
        subprocess.run([sys.executable, "-m", "warp_ds", phase, *words], check=True)
        return self.out / name

    def masks(self, name: str, texts: Path, **of: str) -> str:
        flags = {**self.layers, **self.share, "safety_data": str(texts), **of}
        return str(self.call("phase2", name, **flags) / "masks")

    def basis(self, name: str, texts: Path) -> str:
        return str(self.call("phase1", name, **self.layers, safety_data=str(texts)) / "basis")

    def overlap(self) -> dict[str, Any]:
        """Way -> pair -> what `warp-ds overlap` says of all layers together."""
        refused, answered = self.texts()
        sets = []
        for k in range(SETS):
            rows = [row for of, most in ((refused, REFUSED), (answered, ANSWERED)) for row in part(of, k, most)]
            sets.append(written(self.out / f"set_{k}.jsonl", rows))
        bases = [self.basis(f"basis_{k}", texts) for k, texts in enumerate(sets)]
        found = {}
        for way in ("one_basis", "own_bases", "original"):
            masks = []
            for k, texts in enumerate(sets):
                of = {"basis": "identity"} if way == "original" else {"basis_dir": bases[k if way == "own_bases" else 0]}
                masks.append(self.masks(f"masks_{way}_{k}", texts, **of))
            path = self.out / f"overlap_{way}.json"
            subprocess.run([sys.executable, "-m", "warp_ds", "overlap", *masks, "--output", str(path)], check=True)
            found[way] = summary(read_json(path))
        return found

    def texts(self) -> tuple[list[Any], list[Any]]:
        """Phase 0's refusals of the protocol's own file, and its answered requests."""
        rows = read_lines(self.data / "phase0.jsonl")
        half = len(rows) // 2
        return rows[: half // 2], rows[half:]

    def audit(self) -> dict[str, Any]:
        """Ranks of the planted samples, from 1, and the area under the curve."""
        tasks = sorted(self.data.glob("*_train.jsonl"))
        rows = [row for path in tasks for row in read_lines(path)[: SAMPLES // len(tasks)]]
        held_out = read_lines(self.data / "harmful.jsonl")  # of the protocol's own file first, then as many of the program's
        asked = [row["prompt"] for row in held_out[: len(held_out) // 2][:PLANTED]]
        planted = [{"prompt": prompt, "response": COMPLIANT[k % len(COMPLIANT)]} for k, prompt in enumerate(asked)]
        spread = len(rows) // len(planted)
        mixed = [row for k, last in enumerate(planted) for row in (*rows[k * spread :][:spread], last)]
        task, safety = written(self.out / "mixed.jsonl", mixed), self.data / "safety.jsonl"
        masks = self.masks("masks_safety", safety, basis_dir=self.basis("basis_safety", safety))
        given = {"utility_data": str(task), "safety_data": str(safety), "masks_dir": masks, "show": "10"}
        ranked = read_json(self.call("audit", "audit", **given) / "audit.json")["ranked"]
        return ranks([row["row"] % (spread + 1) == spread for row in ranked])


def part(rows: list[Any], k: int, most: int) -> list[Any]:
    """The ``k``-th of ``SETS`` parts of ``rows``, of at most ``most``."""
    size = min(most, len(rows) // SETS)
    return rows[k * size :][:size]


def written(path: Path, rows: list[Any]) -> Path:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def ranks(planted: list[bool]) -> dict[str, Any]:
    """Of the samples as they are ranked, whether each was planted -> the planted ones' ranks and the area under the curve."""
    places = [number for number, is_planted in enumerate(planted) if is_planted]
    pairs = len(places) * (len(planted) - len(places))
    above = sum(not other for place in places for other in planted[place:])
    return {"ranks": [place + 1 for place in places], "of": len(planted), "auc": round(above / pairs, 3)}


def summary(found: Any) -> dict[str, list[float]]:
    """Of all layers together the least and the most that two sets' masks have in common; by chance too."""
    shares = {name: [pair["over_all"][name] for pair in found["pairs"]] for name in SHARED}
    return {name: [round(of(values), 3) for of in (min, max)] for name, values in shares.items() if None not in values}


if __name__ == "__main__":
    main()
