"""The sections of a report, each from what the runs hold: its blocks are data, which the page's template shows."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from warp_ds.errors import ArtifactError
from warp_ds.evaluation.results import read_metric
from warp_ds.report import costs, figures
from warp_ds.report.runs import Runs, comparisons, read_json, read_lines, run_config
from warp_ds.report.tables import Block, Table, comparison_blocks
from warp_ds.report.tradeoff import Comparison
from warp_ds.secrets import redact
from warp_ds.store.runs import path_of_run

CURVES, ANSWERS = 16, 20
"""Most training runs in one picture, and most prompts of a suite with their answers in the page."""


@dataclass(frozen=True)
class Note:
    """A paragraph in a paler colour."""

    text: str
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Bullets:
    items: Sequence[str]
    kind: ClassVar[str] = "bullets"


@dataclass(frozen=True)
class Picture:
    svg: figures.Svg
    caption: str
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Verdict:
    """What a certificate says, in one word and in more."""

    verdict: str
    text: str
    kind: ClassVar[str] = "verdict"


@dataclass(frozen=True)
class Command:
    """What made a run."""

    run: str
    words: str
    facts: str
    kind: ClassVar[str] = "command"


@dataclass(frozen=True)
class Answers:
    """The arms' answers to one prompt, folded."""

    title: str
    hidden: str
    """The prompt, where the title does not show it."""
    answers: Sequence[tuple[str, str, str]]
    """Arm, mark, answer."""
    kind: ClassVar[str] = "answers"


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block | Note | Bullets | Picture | Verdict | Command | Answers]


def comparison(runs: Runs, pictures: Path) -> list[Section]:
    sections = []
    for number, (sources, compared) in enumerate(comparisons(runs)):
        svg = figures.save(figures.tradeoff(compared), pictures, f"tradeoff{number or ''}")
        broad = " Broad: the points that no other beats in task loss and refusals both." if compared.front else ""
        pooled = f" Pooled from {', '.join(map(runs.name, sources))}." if len(sources) > 1 else ""
        caption = (
            "Each line is an arm, each point a learning rate (mean over seeds). Bars: 95 % Wilson intervals "
            f"over {compared.prompts.get('refusal_rate', 0)} prompts. Dotted: the task loss at which arms are "
            f"compared.{broad}{pooled}"
        )
        blocks = [Picture(svg, caption), *comparison_blocks(compared), *_warnings(compared.about)]
        sections.append(Section("Safety against the task", blocks))
    return sections


def _warnings(report: Mapping[str, Any]) -> list[Bullets]:
    said = [f"{n} evaluation prompts stood in a fitting set: {where}." for where, n in report.get("overlap", {}).items()]
    if report.get("noise_threshold") is not None:
        said.append(
            f"Answers with a stretch above {report['noise_threshold']:.2f} nats a token under the model before "
            "training count as incoherent."
        )
    if report.get("unaligned"):
        said.append(f"The unaligned model that Resta subtracts refuses {report['unaligned']['refusal_rate']:.0%}.")
    return [Bullets(said)] if said else []


def evaluations(runs: Runs, pictures: Path) -> list[Section]:
    rows: list[list[str]] = []
    warnings: list[Bullets] = []
    for run in runs.of("evaluate"):
        if (run / "metrics.json").is_file():
            metrics = read_json(run / "metrics.json")
            warnings += _warnings(metrics)
            rows += [[runs.name(run), *cells] for name in metrics if (cells := _measure(metrics, name))]
    table = Table(["run", "measure", "value", "95 % interval"], rows)
    return [Section("Evaluations", [table, *warnings])] if rows else []


def _measure(metrics: Mapping[str, Any], name: str) -> list[str]:
    """Name, value, interval of a rate, p-value, loss or movement."""
    wanted = name.endswith(("_rate", "_p_against_before")) or name == "movement"
    if not wanted and not (name.startswith("utility") and isinstance(metrics[name], float)):
        return []
    metric = read_metric(metrics, name)
    if metric is None:
        raise TypeError(f"{name} is None")
    return [name, f"{metric.value:.3f}", "{:.3f} to {:.3f}".format(*metric.interval) if metric.interval else ""]


def answers(runs: Runs, pictures: Path) -> list[Section]:
    """Answers of the arms (one seed, the largest rate) to the same prompts; harmful prompts stay folded."""
    table: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for arm, path in _answer_files(runs).items():
        for row in read_lines(path):
            mark = row.get("verdict") or ("right" if row["correct"] else "wrong")
            if row.get("kept") is not None:
                mark = "kept" if row["kept"] else "lost"
            table.setdefault((row["suite"], row["prompt"]), []).append((arm, mark, row["answer"]))
    blocks, counts = [], dict[str, int]()
    for (suite, prompt), said in table.items():
        counts[suite] = number = counts.get(suite, 0) + 1
        if number <= ANSWERS:
            harmful = suite == "refusal" or suite.startswith("attack")
            title = f"Harmful prompt {number} ({suite}): click to show" if harmful else prompt
            blocks.append(Answers(title, prompt if harmful else "", said))
    note = Note(f"The first {ANSWERS} prompts of each suite; all are in the runs' answers.jsonl.")
    return [Section("Answers side by side", [note, *blocks])] if blocks else []


def _answer_files(runs: Runs) -> dict[str, Path]:
    """Arm, or run of an evaluation -> its answers.jsonl. ArtifactError for one that lies elsewhere."""
    sources: dict[str, Path] = {}
    compared = comparisons(runs)
    for homes, _ in compared:
        above = f"{runs.name(homes[0])}: " if len(compared) > 1 else ""
        points = [(run, point) for run in homes for point in Comparison.from_json(read_json(run / "report.json")).points]
        for run, point in sorted(points, key=lambda p: (-(p[1].rate or 0), p[1].seed)):
            path = Path(os.path.abspath(run / str(point.home or Path("points") / point.name) / "answers.jsonl"))
            if not path.is_relative_to(os.path.abspath(run)):
                raise ArtifactError(
                    f"{run / 'report.json'} names answers that do not lie beside it ({ascii(point.name)[:80]}): run "
                    "the comparison again under its --run_name, which measures nothing twice"
                )
            if path.is_file():
                sources.setdefault(f"{above}{point.arm}", path)
    for run in runs.of("evaluate"):
        if (run / "answers.jsonl").is_file():
            sources.setdefault(runs.name(run), run / "answers.jsonl")
    return sources


def bases(runs: Runs, pictures: Path) -> list[Section]:
    for run in runs.of_start("phase1"):
        if not (run / "basis" / "metadata.json").is_file():
            continue
        from warp_ds.store.bases import BasisStore  # torch takes seconds, and most of a report needs none

        basis = BasisStore(run / "basis")
        if basis.metadata.basis != "activation":
            continue
        by_file = {entry["file"]: name for name, entry in reversed(basis.metadata.layers.items())}
        by_file = {file: by_file[file] for file in _drawn({file: basis.metadata.bases[file] for file in by_file})}
        values = {
            file.removesuffix("_svd.safetensors"): basis.columns(name)[1].tolist() for file, name in sorted(by_file.items())
        }
        svg = figures.save(figures.spectra({k: v for k, v in values.items() if any(v)}), pictures, "spectra")
        caption = (
            f"Eigenvalues of the covariance of each layer's safety inputs ({basis.metadata.tokens} tokens), early "
            f"layers dark; of a block's experts the one that saw most. Run {runs.name(run)}."
        )
        return [Section("What the safety inputs span", [Picture(svg, caption), *_few_tokens(basis.metadata.bases)])]
    return []


def _drawn(entries: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The bases' files, of the down projections of a block's experts that of the one that saw most tokens; of their gates and
    ups, where each expert has its own, too."""
    most: dict[str, str] = {}
    for file in sorted(entries):
        line = re.sub(r"(_experts_\w+_)\d+_svd", r"\1", file)
        most[line] = max(most.get(line, file), file, key=lambda of: entries[of].get("tokens", 0))
    return list(most.values())


def _few_tokens(entries: Mapping[str, Mapping[str, Any]]) -> list[Note]:
    """Of experts that were given fewer tokens than they have inputs."""
    of_experts = {file: entry for file, entry in entries.items() if "_experts_" in file and entry.get("from") == "routed"}
    few = [f"{file.removesuffix('_svd.safetensors')} ({e['tokens']})" for file, e in of_experts.items() if e["tokens"] < e["n"]]
    if not few:
        return []
    named = ", ".join(few[:4]) + ", ..." * (len(few) > 4)
    return [
        Note(
            f"{len(few)} of {len(of_experts)} bases of experts are of fewer safety tokens than they have inputs "
            f"({named}): they hold what was seen, and nothing of its complement is frozen."
        )
    ]


def curves(runs: Runs, pictures: Path) -> list[Section]:
    logs = {}
    for run in runs.of("phase3"):
        if (run / "metrics.jsonl").is_file():
            *above, name = runs.name(run).split("/")
            logs["/".join([*above, name.removeprefix("phase3_")])] = read_lines(run / "metrics.jsonl")
    if not logs:
        return []
    drawn = dict(list(logs.items())[:CURVES])
    more = f" {len(logs) - len(drawn)} more runs are not drawn." if len(logs) > len(drawn) else ""
    svg = figures.save(figures.curves(drawn), pictures, "training")
    caption = "Loss, and the share of the gradient's norm that the mask took away." + more
    return [Section("Training", [Picture(svg, caption)])]


def spent(runs: Runs, pictures: Path) -> list[Section]:
    table = costs.table(runs.all, runs.name)
    return [Section("What it took", [table, Note(costs.CAPTION)])] if table.rows else []


def certificates(runs: Runs, pictures: Path) -> list[Section]:
    blocks: list[Verdict | Bullets] = []
    for run in runs.with_file("certificate.json"):
        certificate = read_json(run / "certificate.json")
        if not isinstance(certificate, dict) or not isinstance(certificate.get("problems"), list):
            raise ArtifactError(
                f"{run / 'certificate.json'} is no certificate of this program: remove it, or run warp-ds verify again"
            )
        said = str(certificate.get("outcome"))
        if not _of_the_model_there_now(certificate, run):
            said = (
                f"another model's (it says {said} of weights that do not lie in {certificate.get('after')} now; run warp-ds "
                "verify again)"
            )
        drift = "not finite" if certificate["frozen_drift"] is None else format(float(certificate["frozen_drift"]), ".1e")
        blocks.append(
            Verdict(
                said.upper() if said == "broken" else said.capitalize(),
                f"{format(certificate['frozen'], ',')} frozen coefficients, relative drift {drift} ({runs.name(run)}).",
            )
        )
        problems = [*certificate["problems"], *(certificate.get("reasons") or ())]
        blocks += [Bullets(problems)] if problems else []
    return [Section("Freeze certificate", blocks)] if blocks else []


def _of_the_model_there_now(certificate: dict[str, Any], run: Path) -> bool:
    """Whether the certificate in ``run`` is of the weights that lie there now, by their fingerprint."""
    from warp_ds.evaluation.certificate import still_describes

    after = Path(str(certificate.get("after")))
    for directory in dict.fromkeys((run / "model", path_of_run(run_config(run), str(after)))):
        if directory.is_dir():
            return still_describes(certificate, directory)
    return False


def reproduce(runs: Runs, pictures: Path) -> list[Section]:
    blocks = []
    for run in runs.all:
        config = run_config(run)
        if "command" in config and not any(parent in runs.all for parent in run.parents):
            versions, inputs = (
                ", ".join(f"{k} {v}" for k, v in dict(config.get(name, {})).items()) for name in ("versions", "inputs")
            )
            words = redact(config["command"])
            blocks.append(
                Command(
                    runs.name(run),
                    " ".join(map(str, words)) if isinstance(words, list) else str(words),
                    f"{config.get('world_size')} ranks; fingerprints: {inputs}; {versions}; "
                    f"started {config.get('started_at', '')}",
                )
            )
    return [Section("How to make it again", blocks)] if blocks else []


MakesSections = Callable[[Runs, Path], list[Section]]
