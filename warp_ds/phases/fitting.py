"""What a model was fitted on, read from the runs that made it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from warp_ds.data.datasets import load_prompts, load_samples
from warp_ds.errors import DataError
from warp_ds.report import card
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import path_of_run, phase_of, run_config

logger = logging.getLogger(__name__)


def fitting_sets(runs: Iterable[Path]) -> dict[str, list[str]]:
    """Data set -> the prompts that these runs were fitted on, and the runs whose model, basis and masks they took.

    From each run's config.json; a directory that is no run, or data that are no longer there, are passed over.
    """
    prompts: dict[str, list[str]] = {}
    queue = [run.resolve() for run in runs]
    for run in queue:  # grows
        if phase_of(run) is None:
            continue
        config = run_config(run)
        settings = config.get("settings")
        if not isinstance(settings, dict):
            logger.warning("%s: its config.json has no settings, so its data are not looked through", run)
            continue
        made_from = [settings.get("model_name"), settings.get("basis_dir"), settings.get("masks_dir")]
        if config["phase"] == "phase3" and settings.get("masks_dir") is None:
            made_from.append(card.masks_of(run))
        if config["phase"] == "phase2" and (run / "masks" / "metadata.json").is_file():
            made_from += MaskStore(run / "masks").basis_places()
        for path in (path_of_run(config, str(name)).resolve() for name in made_from if name):
            queue += [home for home in (path, path.parent) if home not in queue]
        kind = "utility" if config["phase"] == "phase3" else "safety"
        replayed = ["replay"] if settings.get("replay_data") else []
        for flag in [kind, *replayed, *_chosen_by(settings)]:
            try:
                name, asked = _prompts(config, settings, flag)
            except (DataError, KeyError) as error:
                logger.info(
                    "the data of %s, which was started in %s, cannot be looked through for prompts of the evaluation: %s",
                    run,
                    config.get("working_directory", "an unknown directory"),
                    error,
                )
                continue
            prompts.setdefault(name, []).extend(asked)
    return prompts


def _chosen_by(settings: Mapping[str, Any]) -> list[str]:
    """The held-out sets that decided which step's model came out: it is fitted on them, too."""
    if not (settings.get("load_best_model_at_end") or settings.get("early_stopping_patience")):
        return []
    return [kind for kind, flag in (("eval", "eval_data"), ("eval_safety", "eval_safety")) if settings.get(flag)]


def _prompts(config: dict[str, Any], settings: Mapping[str, Any], kind: str) -> tuple[str, list[str]]:
    """(name, prompts) of one set of a run. Raises DataError or KeyError."""
    name = settings[kind if kind == "eval_safety" else f"{kind}_data"]
    local = path_of_run(config, name)
    place, streaming = local if local.exists() else name, bool(settings.get("streaming"))
    if kind == "eval_safety":
        prompts = load_prompts(place, samples=settings["eval_safety_samples"], streaming=streaming)
        return name, [sample.prompt for sample in prompts]
    columns: dict[str, Any] = {
        "prompt_column": settings.get("prompt_column"),
        "response_column": settings.get("response_column"),
    }
    if kind == "replay":
        return name, [sample.prompt for sample in load_samples(place, samples=0, streaming=streaming, **columns)]
    samples = load_samples(
        place,
        split=settings[f"{kind}_split"],
        samples=settings[f"{kind}_samples"],
        refusal_file=settings.get("refusal_file"),
        config=settings.get("data_config"),
        streaming=streaming,
        **columns,
    )
    return name, [sample.prompt for sample in samples]
