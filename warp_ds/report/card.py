"""A model's card (README.md): what the model was made of, and what was measured on it, where the card is ours."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from warp_ds.errors import ArtifactError
from warp_ds.store.files import read_json, write_text
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import newest, path_of_run, phase_of

logger = logging.getLogger(__name__)
OURS = re.compile(r"^Trained by \[?warp_ds\b", re.MULTILINE)
"""Stands in every card that phases 0 and 3 write."""
COLUMNS = {
    "refusal_rate": "refuses",
    "partial_rate": "in part",
    "incoherent_rate": "incoherent",
    "attack_success_rate": "complies",
    "not_judged_rate": "not judged",
    "over_refusal_rate": "over-refuses",
    "utility_accuracy": "task accuracy",
    "utility_nll": "task NLL",
    "movement": "moved",
    "frozen_drift": "frozen drift",
}
NOT_SHOWN = """What this does not show: what the model says to other prompts than these, to attacks that were not tried, in
other languages (verdicts hold for English; other answers are "not judged" and in no rate), or after more training. Verdicts are
by rules that agree with people in about 95 of 100 answers; a rate on one set of prompts says little about another."""


def write_section(model_dir: Path, name: str, text: str) -> None:
    """Puts ``text`` at the end of the model's card, in place of what was there under ``name``. Rank 0 alone calls it.

    A card that is missing or somebody else's is left as it is, and so is one that cannot be written, with a warning.
    """
    path = model_dir / "README.md"
    try:
        card = path.read_text(encoding="utf-8") if path.is_file() else ""
        if OURS.search(card):
            changed = f"{_without(card, re.escape(name)).rstrip()}\n\n{_begin(name)}\n{text.strip()}\n{_end(name)}\n"
            if changed != card:
                write_text(path, changed)
    except (OSError, UnicodeError) as error:
        logger.warning("the card %s is left as it is: %s", path, error)


def without_sections(card: str) -> str:
    """The card as the training wrote it."""
    return _without(card, r"[\w-]+")


def _begin(name: str) -> str:
    return f"<!-- warp_ds {name} -->"


def _end(name: str) -> str:
    return f"<!-- end of warp_ds {name} -->"


def _without(card: str, names: str) -> str:
    return re.sub(rf"\n*<!-- warp_ds ({names}) -->.*?<!-- end of warp_ds \1 -->", "", card, flags=re.DOTALL)


# ---------------------------------------------------------------- what it was made of


def masks_of(run: Path) -> Path | None:
    """The masks that a phase 3 run took, where they are still there."""
    config = read_json(run / "config.json")
    given = config["settings"].get("masks_dir")
    if given == "none" or "masks" not in config["inputs"]:
        return None
    # Where none were given, the newest: then those, unless others came since.
    newer = newest(run.parent, "phase2") if given is None else None
    named = path_of_run(config, given) if given else Path()
    for path in (named, named / "masks") if given else () if newer is None else (newer / "masks",):
        try:
            if MaskStore(path).fingerprint() == config["inputs"]["masks"]:
                return path
        except (ArtifactError, OSError):
            continue
    return None


def made(model_dir: Path) -> str:
    """Method, layers, fingerprints and versions of a phase 3 run's model; '' where the model is no run's."""
    run = model_dir.parent
    if phase_of(run) != "phase3":
        return ""
    config = read_json(run / "config.json")
    settings, inputs = config["settings"], config["inputs"]
    lines = ["## How it was made", ""]
    masks = masks_of(run)
    if masks is not None:
        meta = MaskStore(masks).metadata
        blocks = sorted({entry["layer"] for entry in meta.layers.values()})
        types = ", ".join(dict.fromkeys(entry["type"] for entry in meta.layers.values()))
        lines += [
            f"- method: {meta.frozen:,} of {meta.entries:,} coefficients frozen, by {meta.score}, unit {meta.unit}, in the "
            f"{meta.basis} basis; keep_ratio {meta.keep_ratio:g}, scope {meta.scope}; train_scope {settings['train_scope']}",
            f"- layers: {types} of blocks {blocks[0]} to {blocks[-1]}",
        ]
        inputs = {**inputs, "basis": meta.basis_fingerprint, "safety set": meta.data_fingerprint}
    elif "masks" in inputs:
        lines += ["- method: coefficients frozen by the masks of this fingerprint, which are no longer where they were"]
    else:
        lines += [
            f"- method: no mask; train_scope {settings['train_scope']}, layers {settings['layer_type']} of "
            f"{settings['target_layers']}"
        ]
    lines += [
        f"- fingerprints: {', '.join(f'{name} {value}' for name, value in inputs.items() if value)}",
        f"- versions: {', '.join(f'{name} {value}' for name, value in config.get('versions', {}).items())}",
        f"- ranks: {config.get('world_size')}; started {config.get('started_at')}",
    ]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- what was measured


def evaluation(where: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of ``rows`` (whose model -> its metrics, as ``phases.evaluate`` has them), and what it does not show."""
    table: dict[str, dict[str, str]] = {}
    for who, metrics in rows.items():
        table[who] = {name: _cell(metrics, name) for name in COLUMNS if name in metrics}
        for attack in (name.removesuffix("_refusal_rate") for name in metrics if re.fullmatch(r"attack_.+_refusal_rate", name)):
            table[f"{who}, {attack.removeprefix('attack_')}"] = {
                name: _cell(metrics, f"{attack}_{name}") for name in COLUMNS if f"{attack}_{name}" in metrics
            }
    shown = [name for name in COLUMNS if any(name in cells for cells in table.values())]
    if not any(value for metrics in rows.values() for name, value in metrics.items() if name.endswith("not_judged")):
        shown = [name for name in shown if name != "not_judged_rate"]
    lines = [
        "## What was measured",
        "",
        f"{where} Held-out prompts, greedy answers; in brackets 95 % Wilson intervals.",
        "",
        "| model | " + " | ".join(COLUMNS[name] for name in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    lines += [f"| {who} | " + " | ".join(cells.get(name, "") for name in shown) + " |" for who, cells in table.items()]
    measured = list(rows.values())[-1]
    tasks = [
        f"- {task}, {name}: {value:.4g}"
        for task, found in measured.get("lm_eval", {}).items()
        for name, value in found.items()
        if isinstance(value, float)
    ]
    warnings = [
        f"- Of these prompts {count} stood in a fitting set ({which}): on them the numbers measure memory."
        for which, count in measured.get("overlap", {}).items()
    ]
    for part in (tasks, warnings):
        lines += ["", *part] if part else []
    return "\n".join([*lines, "", NOT_SHOWN]) + "\n"


def _cell(metrics: Mapping[str, Any], name: str) -> str:
    value, ends = metrics[name], metrics.get(f"{name.removesuffix('_rate')}_interval")
    if name.endswith(("_rate", "_accuracy")):
        return f"{value:.0%}" + (f" [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]" if ends else "")
    return f"{value:.1e}" if name == "frozen_drift" else f"{value:.3f}"
