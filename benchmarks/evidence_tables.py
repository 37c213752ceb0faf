"""What the points of a protocol show: arms, paired differences to plain training and to controls, variants, words.

    python benchmarks/evidence_tables.py benchmarks/points                          everything, printed
    python benchmarks/evidence_tables.py benchmarks/points --into docs/evidence.md  between a page's markers

A marker names a kind of table, a file of points and a run of its protocol, and the table ends where it says so:
<!-- arms smollm2 safe_sums --> ... <!-- end -->.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from warp_ds.errors import ConfigError, WarpError
from warp_ds.evaluation.metrics import wilson
from warp_ds.evaluation.paired import Cells, Items, estimates, interval, replicates
from warp_ds.phases.arms import EXCLUSIVE, Arm, compose
from warp_ds.report.recommendation import recommend
from warp_ds.report.tradeoff import Point
from warp_ds.store.files import read_lines, write_text

MEASURES = {
    "refuses Do-Not-Answer": ("refusal", "r", 0),
    "complies": ("refusal", "c", 0),
    "refuses generated": ("refusal", "r", 1),
    "complies with generated": ("refusal", "c", 1),
    "incoherent": ("refusal", "i", None),
    "over-refuses": ("over_refusal", "r", None),
    "right": ("gsm8k", "1", None),
}
"""Column -> (suite, the letter that counts, which half of the prompts: the protocol's own file, the program's own, both)."""
OURS = ("rotated", "lora+column")
"""The arms whose differences to every control are shown."""
Trial = tuple[str, float | None, int]
"""Arm, rate (None: not trained), seed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=Path, help="a points.jsonl, or a directory of such files")
    parser.add_argument("--into", type=Path, help="a page whose tables between markers are written anew")
    arguments = parser.parse_args()
    paths = sorted(arguments.points.glob("*.jsonl")) if arguments.points.is_dir() else [arguments.points]
    try:
        files = {path.stem: [Measured(row) for row in read_lines(path)] for path in paths}
        if arguments.into is None:
            print("\n".join(f"# {name}\n\n{tables(points)}" for name, points in files.items()))
        else:
            write_text(arguments.into, filled(arguments.into.read_text(encoding="utf-8"), files))
    except WarpError as error:
        sys.exit(f"error: {error}")


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


Models = dict[tuple[str, int], Measured]
"""(start model, seed) -> the point of one arm and rate."""
Setting = tuple[str, float]
"""An arm at a rate."""


def tables(points: Sequence[Measured]) -> str:
    """Everything that points show; what was measured by another protocol, of another base model say, is never pooled."""
    runs: dict[tuple[str, str], list[Measured]] = defaultdict(list)
    for point in points:
        runs[point.run, point.protocol].append(point)
    kinds = ("arms", "plain", "controls", "advice")
    return "\n".join(
        f"## {run} (protocol {protocol})\n\n" + "\n".join(filter(None, (SHOWN[kind](same, run) for kind in kinds)))
        for (run, protocol), same in sorted(runs.items())
    )


def filled(page: str, files: Mapping[str, Sequence[Measured]]) -> str:
    """The page with every table between its markers made anew. ConfigError for markers of what is not there."""

    def anew(found: re.Match[str]) -> str:
        kind, file, run = found[2].split()
        if kind not in SHOWN or file not in files:
            raise ConfigError(f"<!-- {found[2]} -->: kinds are {', '.join(SHOWN)}, files {', '.join(files)}")
        return f"{found[1]}\n{SHOWN[kind](files[file], run)}{found[3]}"

    return re.sub(r"(<!-- (\w+ \w+ \w+) -->)\n.*?(<!-- end -->)", anew, page, flags=re.DOTALL)


def one_run(points: Sequence[Measured], run: str) -> list[Measured]:
    """The points of a run; ConfigError where they are of several protocols, or there are none."""
    mine = [point for point in points if point.run == run]
    if len({point.protocol for point in mine}) != 1:
        raise ConfigError(f"points of {run}: of {len({point.protocol for point in mine})} protocols, where one is wanted")
    return mine


def arms_table(points: Sequence[Measured], run: str) -> str:
    """A table a start model."""
    return "\n".join(f"Start model {same[0].start}:\n\n{table(same)}" for same in by_start(one_run(points, run)))


def by_start(points: Sequence[Measured]) -> list[list[Measured]]:
    """The points of each start model, the one with most first."""
    starts: dict[str, list[Measured]] = defaultdict(list)
    for point in points:
        starts[point.start].append(point)
    return sorted(starts.values(), key=lambda same: (-len(same), same[0].start))


def table(points: Sequence[Measured]) -> str:
    """A row an arm and rate, seeds pooled, with 95 % Wilson intervals over the prompts."""
    pooled: dict[tuple[str, float | None], list[Measured]] = defaultdict(list)
    for point in points:
        pooled[point.arm, point.rate].append(point)
    lines = [f"| arm | rate | seeds | task loss | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 4) + "|"]
    for (arm, rate), same in sorted(pooled.items(), key=lambda item: (item[0][1] is not None, item[0][0], item[0][1])):
        lines.append(f"| {' | '.join([arm, '' if rate is None else f'{rate:g}', str(len(same)), *cells(same)])} |")
    return "\n".join(lines) + "\n"


def cells(same: Sequence[Measured]) -> list[str]:
    """The task loss and every column of points that differ by seed alone."""
    losses = [point.nll for point in same if point.nll is not None]
    mean = f"{sum(losses) / len(losses):.3f}" if losses else ""
    return [mean, *(share([point.outcomes(name) for point in same]) for name in MEASURES)]


def settings(points: Sequence[Measured]) -> dict[Setting, Models]:
    """Every trained arm at every rate, in order."""
    found: dict[Setting, Models] = defaultdict(dict)
    for point in sorted((point for point in points if point.rate is not None), key=lambda point: point.trial):
        found[point.arm, point.rate][point.start, point.seed] = point
    return found


def tuned(points: Sequence[Measured]) -> dict[Setting, Models]:
    """Every trained arm at the rate with its best task loss."""
    all_rates = settings(points)
    rates: dict[str, dict[float, Models]] = defaultdict(dict)
    for (arm, rate), models in all_rates.items():
        rates[arm][rate] = models
    return {(arm, best): all_rates[arm, best] for arm, of in rates.items() if (best := best_rate(of))}


def best_rate(rates: Mapping[float, Models]) -> float:
    """The rate with the lowest task loss on the seeds that every rate has (on its own where they share none)."""
    shared = set.intersection(*(set(models) for models in rates.values()))

    def loss(rate: float) -> float:
        values = [point.nll for key, point in rates[rate].items() if not shared or key in shared]
        return sum(float("inf") if value is None else value for value in values) / len(values)

    return min(rates, key=loss)


def against_plain(points: Sequence[Measured], run: str) -> str:
    """Each arm less the same training without protection, at every rate that both have."""
    found = settings(one_run(points, run))
    pairs = [
        (f"{arm} less {other} at {rate:g}", models, found[other, rate])
        for (arm, rate), models in found.items()
        for other in sorted({name for name, _ in found})
        if other != arm and is_plain(other, arm) and (other, rate) in found
    ]
    return differences("Each arm less the same training without protection, at the same rate", pairs)


def against_controls(points: Sequence[Measured], run: str) -> str:
    """Our arms, tuned, less every other that trains on data as harmful: an adapter less adapters, weights less weights."""
    mine = one_run(points, run)
    ours = {arm: (rate, models) for (arm, rate), models in tuned(mine).items() if arm in OURS}
    pairs = [
        (f"{arm} at {ours[arm][0]:g} less {other} at {rate:g}", ours[arm][1], models)
        for arm in filter(ours.__contains__, OURS)
        for (other, rate), models in settings(mine).items()
        if is_rival(compose(other), compose(arm))
    ]
    return differences("Masks at the rate with their best task loss, less every control at each of its rates", pairs)


def variants(points: Sequence[Measured], run: str) -> str:
    """The arms of the run's variants (RUN_NAME: the same task under other flags) less the run's own tuned `layers`."""
    best = {arm: (rate, models) for (arm, rate), models in tuned(one_run(points, run)).items()}
    if "layers" not in best:
        raise ConfigError(f"points of {run}: its variants are told from layers, which was not measured")
    (at, plain), pairs = best["layers"], []
    for name in sorted({point.run for point in points if point.run.startswith(f"{run}_")}):
        of = name.removeprefix(f"{run}_")
        pairs += [
            (f"{of}: {arm} at {rate:g}", models, plain) for (arm, rate), models in settings(one_run(points, name)).items()
        ]
    return differences(f"Variants less the target layers without a mask at {at:g}", pairs)


def advice(points: Sequence[Measured], run: str) -> str:
    """What `warp-ds compare` would say of the start model with most points, harmful mixes left out."""
    mine = [point for point in by_start(one_run(points, run))[0] if not compose(point.arm).harmful_share]
    rows = [
        Point(p.arm, p.rate, p.seed, {"utility_nll": p.nll, "outcomes": p.marks}, start=p.start)
        for p in sorted(mine, key=lambda p: (p.arm, p.rate or 0, p.seed))
    ]
    said = recommend(rows)
    return "" if said is None else f"{said.text}\n"


SHOWN: dict[str, Callable[[Sequence[Measured], str], str]] = {
    "arms": arms_table,
    "plain": against_plain,
    "controls": against_controls,
    "variants": variants,
    "advice": advice,
}


def is_plain(other: str, arm: str) -> bool:
    """Whether ``other`` trains what ``arm`` trains, on data as harmful, and does nothing else."""
    a, b = compose(arm), compose(other)
    same = ("trains", "adapter", "harmful_share")
    rest = [key for key in EXCLUSIVE if key not in same]
    return all(getattr(a, key) == getattr(b, key) for key in same) and all(
        getattr(b, key) == getattr(Arm(""), key) for key in rest
    )


def is_rival(other: Arm, arm: Arm) -> bool:
    """Whether ``other`` is what somebody would do in place of ``arm``: without the basis and choice that it rests on."""
    ours = other.basis == "activation" and other.score == "importance"
    return not ours and (other.adapter, other.harmful_share) == (arm.adapter, arm.harmful_share)


def differences(words: str, pairs: Sequence[tuple[str, Models, Models]]) -> str:
    """A row a pair that shares start models and seeds."""
    names = ["loss", *(name for name in MEASURES if name != "incoherent")]
    lines = []
    for title, ours, theirs in pairs:
        shared = sorted(set(ours) & set(theirs))
        if shared:
            found = [difference([ours[key] for key in shared], [theirs[key] for key in shared], name) for name in names]
            lines.append(f"| {title} | {len(shared)} | {' | '.join(found)} |")
    if not lines:
        return ""
    words += ", paired over prompts, seeds and start models (95 % of bootstrap draws):"
    return f"{words}\n\n| | trainings | task {' | '.join(names)} |\n{'|---' * (len(names) + 2)}|\n" + "\n".join(lines) + "\n"


def difference(ours: Sequence[Measured], theirs: Sequence[Measured], name: str) -> str:
    """The first's measure less the second's, with its interval; points of shares in per cent."""

    def of(points: Sequence[Measured]) -> Cells:
        return {(point.start, point.seed): point.items(name) for point in points}

    both = [of(ours), of(theirs)]
    if any(not len(items.top) for cell in both for items in cell.values()):
        return ""
    values = estimates(both)
    low, high = interval(np.subtract(*replicates(both).T))
    scale, form = (1, "+.3f") if name == "loss" else (100, "+.0f")
    # Halves of a per cent are common: rounded first, so that another machine's last bit does not tip them over.
    value, low, high = (round(scale * float(x), 6) + 0.0 for x in (values[0] - values[1], low, high))
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


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
