"""The runs that a report is of, and the comparisons in them; what their files say, as text that a page can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from warp_ds.errors import ArtifactError
from warp_ds.names import printable
from warp_ds.report.recommendation import with_recommendation
from warp_ds.report.tradeoff import Comparison, compare_points
from warp_ds.store import files, runs

OVERLAP = "overlap.json"
"""What warp-ds overlap writes."""


def read_json(path: Path) -> Any:
    """As ``files.read_json``; strings that a page and a picture can hold."""
    return printable(files.read_json(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = printable(files.read_lines(path))
    return lines


def run_config(run: Path) -> dict[str, Any]:
    config: dict[str, Any] = printable(runs.run_config(run))
    return config


@dataclass
class Runs:
    """What lies in the given directories."""

    all: list[Path] = field(default_factory=list)

    def of(self, phase: str) -> list[Path]:
        return [run for run in self.all if run_config(run).get("phase") == phase]

    def of_start(self, phase: str) -> list[Path]:
        """The runs of a phase, the comparison's start model's first, then those of start models that an arm changes."""
        return sorted(self.of(phase), key=lambda run: ("_start_" not in run.name, self.name(run)))

    def with_file(self, name: str) -> list[Path]:
        return [run for run in self.all if (run / name).is_file()]

    def name(self, run: Path) -> str:
        """The directory's name, with as many of its parents as tell it from the other runs: a sweep's settings, or two
        comparisons, hold runs of the same names."""
        parts = {other: other.absolute().parts for other in self.all}
        return next(
            "/".join(parts[run][-depth:])
            for depth in range(1, len(parts[run]) + 1)
            if sum(other[-depth:] == parts[run][-depth:] for other in parts.values()) == 1
        )


def find_runs(given: Sequence[str | Path]) -> Runs:
    """The given directories and the runs inside them; ArtifactError where one holds none."""
    known = Runs()
    for name in map(Path, given):
        if not name.is_dir():
            raise ArtifactError(f"{name}: no such run directory")
        marks = sorted(mark for kind in ("config.json", "report.json", OVERLAP) for mark in name.rglob(kind))
        inside = dict.fromkeys(
            mark.parent for mark in marks if mark.name != "config.json" or "phase" in run_config(mark.parent)
        )
        if not inside:
            raise ArtifactError(
                f"{name} holds no run (no config.json of a phase, no report.json, no {OVERLAP}): "
                "give a directory under --output_dir"
            )
        known.all += [run for run in inside if run.resolve() not in {r.resolve() for r in known.all}]
    return known


def comparisons(runs: Runs) -> list[tuple[list[Path], Comparison]]:
    """(runs, comparison) of every comparison. Runs of the same settings, model and data, such as one job a seed, are one:
    their points are pooled and compared anew. Another program's report.json is passed over; ArtifactError for a broken one."""
    groups: dict[str, list[tuple[Path, Comparison]]] = {}
    for run in runs.with_file("report.json"):
        report = read_json(run / "report.json")
        if not isinstance(report, dict) or report.get("format") != "warp_ds.compare":
            continue
        missing = sorted({"points", "raw", "equal_utility", "at_utility", "prompts"} - set(report))
        if missing:
            raise ArtifactError(
                f"{run / 'report.json'} has no {', '.join(missing)}: run the comparison again under its "
                "--run_name, which measures nothing twice"
            )
        config = run_config(run)
        same = config["identity"] if config.get("phase") == "compare" and "identity" in config else str(run.absolute())
        groups.setdefault(same, []).append((run, Comparison.from_json(report)))
    return [([run for run, _ in group], _pool([comparison for _, comparison in group])) for group in groups.values()]


def _pool(parts: Sequence[Comparison]) -> Comparison:
    if len(parts) == 1:
        return parts[0]
    points = {(p.arm, p.rate, p.seed, p.start): p for part in reversed(parts) for p in reversed(part.points)}
    pooled = compare_points(list(reversed(points.values())), parts[0].prompts, about=parts[0].about)
    said = parts[0].about.get("recommendation")
    pooled = with_recommendation(pooled, said["floor"]) if said else pooled
    return replace(pooled, front=parts[0].front)
