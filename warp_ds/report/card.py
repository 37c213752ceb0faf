"""A model's card (README.md): what the model was made of, and what was measured on it, where the card is ours.

Its metadata say base model, data and results as the hub reads them (huggingface_hub's ModelCard and EvalResult).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCardData, EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from warp_ds.errors import ArtifactError
from warp_ds.evaluation.results import RATES, UTILITY, read_metrics
from warp_ds.names import printable
from warp_ds.report.tables import Block, measured_table, task_scores, to_markdown
from warp_ds.secrets import redact
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import read_json, write_text
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import newest, path_of_run, phase_of

logger = logging.getLogger(__name__)
OURS = re.compile(r"^Trained by \[?warp_ds\b", re.MULTILINE)
"""Stands in every card that phases 0 and 3 write."""
NOT_SHOWN = """What this does not show: what the model says to other prompts than these, to attacks that were not tried, in
other languages (verdicts hold for English; other answers are "not judged" and in no rate), or after more training. Verdicts are
by rules that agree with people in about 95 of 100 answers; a rate on one set of prompts says little about another."""


def plain(text: Any) -> str:
    """What a user or a file says, as one line of markdown that shows it and does nothing else."""
    line = " ".join(printable(redact(str(text))).split())
    return re.sub(r"([\\`*_\[\]<>&~$])", r"\\\1", line)


def code(text: Any) -> str:
    """The same as a code span."""
    line = " ".join(printable(redact(str(text))).split())
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def new_card(title: str, text: str, base_model: str, data: str, adapter: bool = False) -> str:
    """The card of a model, or of an ``adapter`` of one, that was just trained; ``title`` and ``text`` are markdown."""
    metadata = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["warp_ds"],
        base_model=base_model if _on_hub(base_model) else None,
        datasets=[data] if _on_hub(data) else None,
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n# {title}\n\n{text.strip()}\n"


def of_merged(text: str) -> str:
    """An adapter's card as that of the model that it was merged into."""
    return re.sub(r"^library_name: peft$", "library_name: transformers", text, count=1, flags=re.MULTILINE)


def artefact_card(directory: Path, kind: str) -> str:
    """The card of a 'basis' or 'masks' that go to the hub as a data set of their own. Raises ArtifactError."""
    store = BasisStore(directory) if kind == "basis" else MaskStore(directory)
    meta: Any = store.metadata
    blocks = sorted({entry["layer"] for entry in meta.layers.values()})
    types = ", ".join(dict.fromkeys(entry["type"] for entry in meta.layers.values()))
    if kind == "basis":
        what = f"{len(meta.bases)} orthonormal bases ({meta.basis}; {meta.tokens:,} tokens, token scope {meta.token_scope})"
        use = "warp-ds phase2 --basis_dir OWNER/NAME"
    else:
        what = f"{meta.frozen:,} of {meta.entries:,} rotated coefficients frozen"
        what += f" (keep_ratio {meta.keep_ratio:g}, scope {meta.scope})"
        use = "warp-ds phase3 --masks_dir OWNER/NAME --basis_dir OWNER/NAME-OF-ITS-BASIS"
    lines = [
        f"- model: {code(meta.model_name)}, fingerprint {meta.model_fingerprint}: no other model takes them",
        f"- layers: {types} of blocks {blocks[0]} to {blocks[-1]}",
        f"- fingerprints: of these files {store.fingerprint()}, of the safety set {meta.data_fingerprint}",
        *([f"- basis: {meta.basis}, fingerprint {meta.basis_fingerprint}"] if kind == "masks" else []),
    ]
    data = DatasetCardData(tags=["warp_ds", f"warp_ds-{kind}"], pretty_name=f"{kind} of {printable(str(meta.model_name))}")
    title = f"{kind.capitalize()} of {plain(Path(meta.model_name).name)}"
    text = f"{what}, by warp_ds. Tensors (safetensors) and metadata alone; whoever reads them checks both.\n\n" + "\n".join(
        lines
    )
    return f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n\n    {use}\n"


def _on_hub(name: str) -> bool:
    """Whether a name is one that the hub can link to: no local path."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not os.path.exists(name)


def write_section(model_dir: Path, name: str, text: str, results: Sequence[EvalResult] = ()) -> None:
    """Puts ``text`` at the end of the model's card, in place of what was there under ``name``, and ``results`` into its
    metadata. Rank 0 alone calls it.

    A card that is missing or somebody else's is left as it is, and so is one that cannot be written, with a warning.
    """
    path = model_dir / "README.md"
    try:
        card = path.read_text(encoding="utf-8") if path.is_file() else ""
        if OURS.search(card):
            changed = f"{_without(card, re.escape(name)).rstrip()}\n\n{_begin(name)}\n{text.strip()}\n{_end(name)}\n"
            if results:
                changed = _with_results(changed, results, model_dir.resolve().parent.name)
            if changed != card:
                write_text(path, changed)
    except (OSError, UnicodeError, ValueError, YAMLError) as error:
        logger.warning("the card %s is left as it is: %s", path, error)


def _with_results(text: str, results: Sequence[EvalResult], name: str) -> str:
    """The card with ``results`` in its metadata, in place of those of the same measures on the same data."""
    whole = text if text.startswith("---\n") else f"---\ntags:\n- warp_ds\n---\n\n{text}"
    card = ModelCard(whole, ignore_metadata_errors=True)
    data: Any = card.data
    kept = [old for old in data.eval_results or () if not any(old.is_equal_except_value(new) for new in results)]
    data.eval_results, data.model_name = [*kept, *results], data.model_name or name
    return str(card)


def without_sections(text: str) -> str:
    """The card as the training wrote it."""
    text = _without(text, r"[\w-]+")
    if not text.startswith("---\n"):
        return text
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    data.eval_results = data.model_name = None
    return str(card)


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


def eval_results(metrics: Mapping[str, Any], data: Mapping[str, str]) -> list[EvalResult]:
    """What the hub shows of ``metrics``. ``data``: 'harmful', 'harmless' and 'task' -> the prompts' data set."""
    kinds = {"over_refusal_rate": "harmless", "utility_accuracy": "task", UTILITY: "task"}
    measured = read_metrics({name: metrics.get(name) for name in (UTILITY, *RATES)})
    results = []
    for name, metric in measured.items():
        source = data.get(kind := kinds.get(name, "harmful"))
        # A path says nothing to others, and may say too much.
        called = f"{kind} prompts" if source is None else source if _on_hub(source) else Path(source).name
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=source if source is not None and _on_hub(source) else kind,
                dataset_name=printable(redact(called)),
                metric_type=name,
                metric_name=name.replace("_", " "),
                metric_value=round(metric.value, 4),
            )
        )
    return results


def evaluation(where: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of ``rows`` (whose model -> its metrics, as ``phases.evaluate`` has them), and what it does not show.

    ``where`` is markdown.
    """
    measured = list(rows.values())[-1]
    tasks = [f"- {plain(task)}, {plain(name)}: {value:.4g}" for task, name, value in task_scores(measured)]
    warnings = [
        f"- Of these prompts {count} stood in a fitting set ({plain(which)}): on them the numbers measure memory."
        for which, count in measured.get("overlap", {}).items()
    ]
    blocks: list[Block] = [
        "## What was measured",
        f"{where} Held-out prompts, greedy answers; in brackets 95 % Wilson intervals.",
        measured_table(rows, plain),
        *("\n".join(part) for part in (tasks, warnings) if part),
        NOT_SHOWN,
    ]
    return to_markdown(blocks)
