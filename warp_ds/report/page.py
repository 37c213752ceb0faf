"""``warp-ds report RUN…``: one HTML file that opens from disk without a network, its pictures also as SVG and PNG.

A RUN is any run directory: of a comparison, a sweep or a demo (report.json), of phases 1, 2 and 3, of an evaluation. What the
runs hold is shown, what they lack is left out; runs inside a given one are found by themselves.
"""

from __future__ import annotations

import html
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from warp_ds import __version__
from warp_ds.errors import ArtifactError
from warp_ds.evaluation.certificate import still_describes
from warp_ds.method.mask import unpack_bits
from warp_ds.names import printable
from warp_ds.report import costs, figures, tradeoff
from warp_ds.secrets import redact
from warp_ds.store import files, runs
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import write_text
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import path_of_run

logger = logging.getLogger(__name__)
BINS = 50
CURVES, MASKS, ANSWERS = 16, 3, 20
"""Most training runs in one picture, most masks, and most prompts with their answers in the page."""


def read_json(path: Path) -> Any:
    """As ``files.read_json``; strings that a page and a picture can hold."""
    return printable(files.read_json(path))


def read_lines(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = printable(files.read_lines(path))
    return found


def run_config(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = printable(runs.run_config(run))
    return found


STYLE = Path(__file__).with_name("page.css")


@dataclass
class Runs:
    """What was found in the given directories."""

    all: list[Path] = field(default_factory=list)

    def of(self, phase: str) -> list[Path]:
        return [run for run in self.all if run_config(run).get("phase") == phase]

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
    found = Runs()
    for name in map(Path, given):
        if not name.is_dir():
            raise ArtifactError(f"{name}: no such run directory")
        marks = sorted([*name.rglob("config.json"), *name.rglob("report.json")])
        inside = dict.fromkeys(
            mark.parent for mark in marks if mark.name == "report.json" or "phase" in run_config(mark.parent)
        )
        if not inside:
            raise ArtifactError(
                f"{name} holds no run (no config.json of a phase, no report.json): give a directory under --output_dir"
            )
        found.all += [run for run in inside if run.resolve() not in {r.resolve() for r in found.all}]
    return found


def write_report(given: Sequence[str | Path], output: Path) -> Path:
    """Writes ``output`` (an HTML file) and the pictures beside it, in <name>_figures/; returns ``output``.

    Raises ArtifactError where a run is missing, or there is nothing to show.
    """
    runs, pictures = find_runs(given), output.with_name(f"{output.stem}_figures")
    parts = [part for section in SECTIONS for part in [_whatever_it_reads(section, runs, pictures)] if part]
    if not parts:
        raise ArtifactError(
            "these runs hold nothing to show yet: a report wants a comparison's report.json, a basis, masks, "
            "metrics.jsonl or an evaluation"
        )
    page = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            # Nothing is fetched, whatever text of a model stands in the page.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none';style-src 'unsafe-inline';img-src data:;"
            "base-uri 'none';form-action 'none'\">",
            '<link rel="icon" href="data:,">',
            "<title>warp_ds report</title>",
            f"<style>{STYLE.read_text()}</style></head><body><main>",
            "<h1>Fine-tuning and what it did to safety</h1>",
            f'<p class="dim">warp_ds {__version__}; from {", ".join(_text(Path(name).name) for name in given)}</p>',
            *parts,
            "</main></body></html>",
            "",
        ]
    )
    write_text(output, page)
    return output


def _whatever_it_reads(section: Callable[[Runs, Path], str], runs: Runs, pictures: Path) -> str:
    """The section; or, where a file of the runs holds other types than this program writes, that it is not shown."""
    try:
        return section(runs, pictures)
    except ArtifactError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        what = (
            f"{section.__name__.strip('_')}: a file of these runs is not as this program writes it "
            f"({type(error).__name__}: {error})"
        )
        logger.warning("a part of the report is left out: %s", what)
        return _section("Left out", f"<p>{_text(what)}</p>")


# ---------------------------------------------------------------- sections


def comparisons(runs: Runs) -> list[tuple[list[Path], dict[str, Any]]]:
    """(runs, report) of every comparison. Runs of the same settings, model and data, such as one job a seed, are one: their
    points are pooled and compared anew. Another program's report.json is passed over; ArtifactError for a broken one."""
    groups: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
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
        groups.setdefault(same, []).append((run, report))
    return [([run for run, _ in group], _pool([report for _, report in group])) for group in groups.values()]


def _pool(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if len(reports) == 1:
        return reports[0]
    points = {(p["arm"], p["rate"], p["seed"]): p for report in reversed(reports) for p in reversed(report["points"])}
    ordered = list(reversed(points.values()))
    prompts = {name: count for name, count in reports[0]["prompts"].items() if count}
    return {**reports[0], "points": ordered, **tradeoff.compare(ordered, prompts)}


def _comparison(runs: Runs, pictures: Path) -> str:
    parts = []
    for number, (sources, report) in enumerate(comparisons(runs)):
        prompts = int(report.get("prompts", {}).get("refusal_rate", 0))
        picture = figures.save(
            figures.tradeoff(report["raw"], prompts, report["at_utility"], report.get("front", ())),
            pictures,
            f"tradeoff{number or ''}",
        )
        front = " Broad: the points that no other beats in task loss and refusals both." if report.get("front") else ""
        pooled = f" Pooled from {', '.join(map(runs.name, sources))}." if len(sources) > 1 else ""
        parts.append(
            _section(
                "Safety against the task",
                _figure(
                    picture,
                    "Each line is an arm, each point a learning rate (mean over seeds). Bars: 95 % Wilson intervals "
                    f"over {prompts} prompts. Dotted: the task loss at which arms are compared.{front}{pooled}",
                ),
                _markdown_tables(tradeoff.markdown(report)),
                _warnings(report),
            )
        )
    return "".join(parts)


def _warnings(report: dict[str, Any]) -> str:
    found = [
        f"<li>{_text(count)} evaluation prompts stood in a fitting set: {_text(where)}.</li>"
        for where, count in report.get("overlap", {}).items()
    ]
    if report.get("noise_threshold") is not None:
        found.append(
            f"<li>Answers with a stretch above {report['noise_threshold']:.2f} nats a token under the model before "
            "training count as incoherent.</li>"
        )
    if report.get("unaligned"):
        found.append(f"<li>The unaligned model that Resta subtracts refuses {report['unaligned']['refusal_rate']:.0%}.</li>")
    return f"<ul>{''.join(found)}</ul>" if found else ""


def _evaluations(runs: Runs, pictures: Path) -> str:
    rows, warnings = [], ""
    for run in runs.of("evaluate"):
        if (run / "metrics.json").is_file():
            metrics = read_json(run / "metrics.json")
            warnings += _warnings(metrics)
            for name, value in metrics.items():
                if (
                    name.endswith(("_rate", "_p_against_before"))
                    or name == "movement"
                    or (name.startswith("utility") and isinstance(value, float))
                ):
                    ends = metrics.get(f"{name.removesuffix('_rate')}_interval")
                    rows.append(
                        [runs.name(run), name, f"{value:.3f}", "" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"]
                    )
    return _section("Evaluations", _table(["run", "measure", "value", "95 % interval"], rows), warnings) if rows else ""


def _of_start(runs: Runs, phase: str) -> list[Path]:
    """The runs of a phase, the comparison's start model's first, then those of start models that an arm changes."""
    return sorted(runs.of(phase), key=lambda run: ("_start_" not in run.name, runs.name(run)))


def _bases(runs: Runs, pictures: Path) -> str:
    for run in _of_start(runs, "phase1"):
        if (run / "basis" / "metadata.json").is_file():
            basis = BasisStore(run / "basis")
            if basis.metadata.basis == "activation":
                files = {entry["file"]: name for name, entry in reversed(basis.metadata.layers.items())}
                values = {
                    file.removesuffix("_svd.safetensors"): basis.columns(name)[1].tolist()
                    for file, name in sorted(files.items())
                }
                return _section(
                    "What the safety inputs span",
                    _figure(
                        figures.save(figures.spectra({k: v for k, v in values.items() if v}), pictures, "spectra"),
                        f"Eigenvalues of the covariance of each layer's safety inputs ({basis.metadata.tokens} tokens), early "
                        f"layers dark. Run {runs.name(run)}.",
                    ),
                )
    return ""


def _masks(runs: Runs, pictures: Path) -> str:
    """Rotated masks of single entries."""
    found = []
    for run in _of_start(runs, "phase2"):
        if (run / "masks" / "metadata.json").is_file():
            masks = MaskStore(run / "masks")
            masks.fingerprint()  # counts the bits that are drawn
            if (masks.metadata.basis, masks.metadata.unit, masks.metadata.score) == ("activation", "entry", "importance"):
                found.append((run, masks))
    parts = []
    for number, (run, masks) in enumerate(found[:MASKS]):
        by_column = {layer.stem: unpack_bits(masks.packed(layer.name), layer.n).float().mean(0) for layer in masks.layers}
        shares = {
            stem: [float(part.mean()) for part in torch.tensor_split(columns, min(BINS, len(columns)))]
            for stem, columns in by_column.items()
        }
        width = max(map(len, shares.values()))
        shares = {stem: row + [row[-1]] * (width - len(row)) for stem, row in shares.items()}
        meta = masks.metadata
        parts += [
            _figure(
                figures.save(figures.mask_map(shares, width), pictures, f"mask{number or ''}"),
                f"{meta.frozen:,} of {meta.entries:,} rotated coefficients are frozen (keep_ratio {meta.keep_ratio:g}, "
                f"scope {meta.scope}). Run {runs.name(run)}.",
            ),
            _figure(
                figures.save(
                    figures.frozen_by_layer({stem: columns.tolist() for stem, columns in by_column.items()}),
                    pictures,
                    f"frozen{number or ''}",
                ),
                "How a layer's frozen coefficients lie in its columns (eigen-directions): a steep fall means a few whole "
                "directions, a flat line means all of them alike. Early layers dark.",
            ),
            _scores(masks, pictures, f"scores{number or ''}"),
            _thresholds(masks, by_column),
        ]
        parts += [f"<ul>{''.join(f'<li>{_text(note)}</li>' for note in meta.notes)}</ul>"] if meta.notes else []
    more = f'<p class="dim">{len(found) - MASKS} more masks are not drawn.</p>' if len(found) > MASKS else ""
    return _section("Where the mask lies", *parts, more) if parts else ""


def _scores(masks: MaskStore, pictures: Path, name: str) -> str:
    """How the scores of each layer lie, where the masks' phase kept that."""
    kept = masks.scores()
    if kept is None:
        return ""
    decade, types = kept["bins_per_decade"], dict[str, dict[str, tuple[list[float], list[float], float | None]]]()
    for layer in masks.layers:
        found, threshold = kept["layers"][layer.name], masks.metadata.layers[layer.name]["threshold"]
        logs = [(found["first"] + i + 0.5) / decade for i in range(len(found["counts"]))]
        shares = [count / (layer.m * layer.n) for count in found["counts"]]
        types.setdefault(layer.type, {})[layer.stem] = logs, shares, None if threshold is None else math.log10(threshold)
    return _figure(
        figures.save(figures.scores(types), pictures, name),
        f"How the importance scores lie, {decade} bins a decade: a line a layer, early layers dark. Dots: the "
        "lowest frozen score; what lies right of it is frozen.",
    )


def _thresholds(masks: MaskStore, by_column: dict[str, torch.Tensor]) -> str:
    """How much is frozen, and what a coefficient had to score for it, layer by layer."""
    rows, kept = [], (masks.scores() or {}).get("layers")
    for layer in masks.layers:
        entry, shares = masks.metadata.layers[layer.name], by_column[layer.stem]
        rows.append(
            [
                layer.stem,
                f"{entry['frozen'] / (layer.m * layer.n):.1%}",
                f"{float((shares > 0).float().mean()):.1%}",
                f"{float((shares > 0.5).float().mean()):.1%}",
                "" if entry["threshold"] is None else f"{entry['threshold']:.2e}",
                f"{kept[layer.name]['zeros'] / (layer.m * layer.n):.1%}" if kept else "",
            ]
        )
    return _table(
        ["layer", "frozen", "columns with any frozen", "columns more than half frozen", "lowest frozen score", "score 0"], rows
    )


def _curves(runs: Runs, pictures: Path) -> str:
    found = {}
    for run in runs.of("phase3"):
        if (run / "metrics.jsonl").is_file():
            *above, name = runs.name(run).split("/")
            found["/".join([*above, name.removeprefix("phase3_")])] = read_lines(run / "metrics.jsonl")
    if not found:
        return ""
    shown = dict(list(found.items())[:CURVES])
    more = f" {len(found) - len(shown)} more runs are not drawn." if len(found) > len(shown) else ""
    return _section(
        "Training",
        _figure(
            figures.save(figures.curves(shown), pictures, "training"),
            "Loss, and the share of the gradient's norm that the mask took away." + more,
        ),
    )


def _costs(runs: Runs, pictures: Path) -> str:
    head, rows = costs.table(runs.all, runs.name)
    return _section("What it took", _table(head, rows), f'<p class="dim">{_text(costs.CAPTION)}</p>') if rows else ""


def _certificates(runs: Runs, pictures: Path) -> str:
    parts = []
    for run in runs.with_file("certificate.json"):
        found = read_json(run / "certificate.json")
        if not isinstance(found, dict) or not isinstance(found.get("problems"), list):
            raise ArtifactError(
                f"{run / 'certificate.json'} is no certificate of this program: remove it, or run warp-ds verify again"
            )
        said = str(found.get("outcome"))
        if not _of_the_model_there_now(found, run):
            said = (
                f"another model's (it says {said} of weights that do not lie in {found.get('after')} now; run warp-ds "
                "verify again)"
            )
        drift = "not finite" if found["frozen_drift"] is None else format(float(found["frozen_drift"]), ".1e")
        problems = "".join(f"<li>{_text(p)}</li>" for p in [*found["problems"], *(found.get("reasons") or ())])
        parts.append(
            f"<p><strong>{_text(said.upper() if said == 'broken' else said.capitalize())}</strong>: "
            f"{_text(format(found['frozen'], ','))} frozen coefficients, "
            f"relative drift {_text(drift)} ({_text(runs.name(run))}).</p>"
            f"<ul>{problems}</ul>"
        )
    return _section("Freeze certificate", *parts) if parts else ""


def _of_the_model_there_now(certificate: dict[str, Any], run: Path) -> bool:
    """Whether the certificate in ``run`` is of the weights that lie there now, by their fingerprint."""
    after = Path(str(certificate.get("after")))
    for directory in dict.fromkeys((run / "model", path_of_run(run_config(run), str(after)))):
        if directory.is_dir():
            return still_describes(certificate, directory)
    return False


def _answers(runs: Runs, pictures: Path) -> str:
    """Answers of the arms (one seed, the largest rate) to the same prompts; harmful prompts stay folded."""
    sources: dict[str, Path] = {}
    compared = comparisons(runs)
    for homes, _ in compared:
        above = f"{runs.name(homes[0])}: " if len(compared) > 1 else ""
        points = [(run, point) for run in homes for point in read_json(run / "report.json")["points"]]
        for run, point in sorted(points, key=lambda p: (-(p[1]["rate"] or 0), p[1]["seed"])):
            name = point["arm"] if point["rate"] is None else f"{point['arm']}_lr{point['rate']:g}_seed{point['seed']}"
            path = Path(os.path.abspath(run / str(point.get("home", Path("points") / str(name))) / "answers.jsonl"))
            if not path.is_relative_to(os.path.abspath(run)):
                raise ArtifactError(
                    f"{run / 'report.json'} names answers that do not lie beside it ({ascii(name)[:80]}): run "
                    "the comparison again under its --run_name, which measures nothing twice"
                )
            if path.is_file():
                sources.setdefault(f"{above}{point['arm']}", path)
    for run in runs.of("evaluate"):
        if (run / "answers.jsonl").is_file():
            sources.setdefault(runs.name(run), run / "answers.jsonl")
    table: dict[tuple[str, str], dict[str, tuple[str, str]]] = {}
    for arm, path in sources.items():
        for row in read_lines(path):
            mark = row.get("verdict") or ("right" if row["correct"] else "wrong")
            table.setdefault((row["suite"], row["prompt"]), {})[arm] = (row["answer"], mark)
    if not table:
        return ""
    parts, counts = [], dict[str, int]()
    for (suite, prompt), answers in table.items():
        counts[suite] = counts.get(suite, 0) + 1
        if counts[suite] > ANSWERS:
            continue
        items = "".join(
            f'<dt>{_text(arm)}</dt><dd><span class="tag">{_text(mark)}</span>{_text(answer) or "(empty)"}</dd>'
            for arm, (answer, mark) in answers.items()
        )
        harmful = suite == "refusal" or suite.startswith("attack")
        title = f"Harmful prompt {counts[suite]} ({_text(suite)}): click to show" if harmful else _text(prompt)
        hidden = f"<p>{_text(prompt)}</p>" if harmful else ""
        parts.append(f"<details><summary>{title}</summary>{hidden}<dl>{items}</dl></details>")
    return _section(
        "Answers side by side",
        f'<p class="dim">The first {ANSWERS} prompts of each suite; all are in the runs\' answers.jsonl.</p>',
        *parts,
    )


def _reproduce(runs: Runs, pictures: Path) -> str:
    parts = []
    for run in runs.all:
        config = run_config(run)
        if "command" in config and not any(parent in runs.all for parent in run.parents):
            versions, inputs = (
                ", ".join(f"{k} {v}" for k, v in dict(config.get(name, {})).items()) for name in ("versions", "inputs")
            )
            words = redact(config["command"])
            command = " ".join(map(str, words)) if isinstance(words, list) else str(words)
            parts.append(
                f"<h3>{_text(runs.name(run))}</h3><pre>{_text(command)}</pre>"
                f'<p class="dim">{_text(config.get("world_size"))} ranks; fingerprints: {_text(inputs)}; '
                f"{_text(versions)}; started {_text(config.get('started_at', ''))}</p>"
            )
    return _section("How to make it again", *parts) if parts else ""


SECTIONS: tuple[Callable[[Runs, Path], str], ...] = (
    _comparison,
    _evaluations,
    _answers,
    _bases,
    _masks,
    _curves,
    _costs,
    _certificates,
    _reproduce,
)


# ---------------------------------------------------------------- HTML


def _text(value: Any) -> str:
    """Any value as text of the page: every one goes through here."""
    return html.escape(printable(redact(str(value))))


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{''.join(parts)}</section>"


def _figure(svg: str, caption: str) -> str:
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{_text(caption)}"', 1)
    return f'<figure>{svg}<figcaption class="dim">{_text(caption)}</figcaption></figure>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{_text(cell)}</th>" for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _markdown_tables(text: str) -> str:
    return "".join(
        _table(block[0], block[1:]) if isinstance(block, list) else f"<p>{_text(block)}</p>" for block in _blocks(text)
    )


def _blocks(text: str) -> Iterator[str | list[list[str]]]:
    """Paragraphs, and tables as lists of rows, of the markdown that ``report.tradeoff`` writes."""
    table: list[list[str]] = []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            if not line.startswith("|---"):
                table.append([cell.strip() for cell in line.strip().strip("|").split("|")])
            continue
        if table:
            yield table
            table = []
        if line:
            yield line


def run_report(arguments: Any) -> int:
    """The console command."""
    import sys

    try:
        print(write_report(arguments.runs, Path(arguments.output)))
    except (ArtifactError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
