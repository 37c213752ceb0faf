"""``warp-ds report RUN…``: one HTML file that opens from disk without a network, its pictures also as SVG and PNG.

A RUN is any run directory: of a comparison, a sweep or a demo (report.json), of phases 1, 2 and 3, of an evaluation. What the
runs hold is shown, what they lack is left out; runs inside a given one are found by themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from warp_ds import __version__
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.flags.checks import output_file
from warp_ds.names import printable
from warp_ds.report import audit_section, figures, mask_section, overlap_section, sections
from warp_ds.report.runs import Runs, comparisons, find_runs
from warp_ds.report.sections import MakesSections, Section
from warp_ds.secrets import redact
from warp_ds.store.files import write_text

logger = logging.getLogger(__name__)
STYLE = Path(__file__).with_name("page.css")
SECTIONS: tuple[MakesSections, ...] = (
    sections.comparison,
    sections.evaluations,
    sections.answers,
    sections.bases,
    mask_section.masks,
    overlap_section.overlaps,
    audit_section.audits,
    sections.curves,
    sections.spent,
    sections.certificates,
    sections.reproduce,
)


def write_report(given: Sequence[str | Path], output: Path) -> Path:
    """Writes ``output`` (an HTML file) and the pictures beside it, in <name>_figures/; returns ``output``.

    Raises ArtifactError where a run is missing, or there is nothing to show.
    """
    runs, pictures = find_runs(given), output.with_name(f"{output.stem}_figures")
    shown = [section for make in SECTIONS for section in _whatever_it_reads(make, runs, pictures)]
    if not shown:
        raise ArtifactError(
            "these runs hold nothing to show yet: a report wants a comparison's report.json, a basis, masks, "
            "metrics.jsonl or an evaluation"
        )
    write_text(output, to_html(shown, [Path(name).name for name in given]))
    return output


def to_html(shown: Sequence[Section], given: Sequence[str]) -> str:
    """Every value is escaped, and stripped of secrets and of what no reader sees; our own pictures and style are not."""
    environment = Environment(
        loader=PackageLoader("warp_ds.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else printable(redact(str(value))),
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html.j2").render(
        sections=shown, given=given, version=__version__, style=Markup(STYLE.read_text())
    )


def write_picture(given: Sequence[str | Path], output: Path) -> Path:
    """Writes the picture of the first comparison in ``given`` alone, as SVG or PNG by the name of ``output``.

    Raises ArtifactError where there is none.
    """
    compared = comparisons(find_runs(given))
    if not compared:
        raise ArtifactError(f"{', '.join(map(str, given))}: no comparison to draw (no report.json of one)")
    figures.save_alone(figures.tradeoff(compared[0][1]), output)
    return output


def _whatever_it_reads(make: MakesSections, runs: Runs, pictures: Path) -> list[Section]:
    """The sections; or, where a file of the runs holds other types than this program writes, that they are not shown."""
    try:
        return make(runs, pictures)
    except ArtifactError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError) as error:
        what = f"{make.__name__}: a file of these runs is not as this program writes it ({type(error).__name__}: {error})"
        logger.warning("a part of the report is left out: %s", what)
        return [Section("Left out", [what])]


def run_report(arguments: Any) -> int:
    """The console command."""
    import sys

    output = output_file("--output", arguments.output)
    picture = output_file("--picture", arguments.picture) if arguments.picture else None
    try:
        if picture:
            print(write_picture(arguments.runs, picture))
        print(write_report(arguments.runs, output))
    except (ArtifactError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
