"""What a finished run has made, on the Hugging Face hub: its model or adapter, or its basis or masks as a data set.

A run is finished before anything is sent: a push that fails costs a warning, and ``warp-ds push`` tries again.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from warp_ds import registry
from warp_ds.cluster import consensus, processes
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.models.adapter_directory import is_adapter
from warp_ds.report.card import artefact_card
from warp_ds.store import hub
from warp_ds.store.runs import find_artifact, phase_of

logger = logging.getLogger(__name__)
F = TypeVar("F", bound=Callable[..., Path])
SUFFIXES = {"phase0": "-safety-tuned", "phase1": "-basis", "phase2": "-masks", "phase3": ""}
"""What is added to the name that --push_to_hub gives, which all phases of a chain have."""


def published(run: F) -> F:
    """A phase's function, which returns its run directory: with --push_to_hub, the repository is made before, and the run
    pushed after."""

    @functools.wraps(run)
    def with_push(arguments: Any, *more: Any, **named: Any) -> Path:
        name = arguments.push_to_hub
        if name is None:
            return run(arguments, *more, **named)
        arguments.check()
        processes.init_distributed(arguments.resolved_device, arguments.timeout)
        phase = registry.phase_of(arguments)
        assert phase is not None
        name += SUFFIXES[phase.name]
        repo_type, private = "model" if phase.writes == "model" else "dataset", arguments.hub_private_repo
        consensus.on_rank_0(lambda: hub.make_repository(name, repo_type, private), "making a repository on the hub")
        directory = run(arguments, *more, **named)
        with consensus.long_step("pushing to the hub"):  # a large model takes longer than --timeout
            if processes.rank() == 0:
                _push_or_warn(directory, name, private)
        return directory

    return cast(F, with_push)


def _push_or_warn(directory: Path, name: str, private: bool) -> None:
    try:
        logger.info("pushed to the hub: %s", push(directory, name, private))
    except (ConfigError, ArtifactError, OSError) as error:
        logger.warning(
            "%s is finished, but was not pushed to the hub (%s): try again with warp-ds push %s %s",
            *(directory, error, directory, name),
        )


def push(run: Path, name: str, private: bool = True) -> str:
    """Uploads what lies in a finished run (or is given itself: a model's, adapter, basis or masks directory); its address.

    Raises ArtifactError for what is no finished run's, ConfigError where the hub does not take it.
    """
    directory, kind = _made(run)
    repo_type = "model" if kind == "model" else "dataset"
    hub.make_repository(name, repo_type, private)
    ours = kind != "model" and not (directory / "README.md").exists()  # what somebody has written there goes as it is
    card = artefact_card(directory, kind) if ours else None
    return hub.upload(directory, name, repo_type, f"{kind} of {run.resolve().name}, by warp_ds", card)


def _made(run: Path) -> tuple[Path, str]:
    """(directory, 'model', 'basis' or 'masks')."""
    phase = registry.PHASES.get(phase_of(run) or "")
    if phase is not None:
        if not (run / "finished.json").is_file() or not phase.writes:
            raise ArtifactError(f"{run} is no finished run of phase 0, 1, 2 or 3: there is nothing to push")
        made = run / phase.writes
        if phase.writes == "model" and not made.is_dir() and is_adapter(run / "adapter"):
            made = run / "adapter"
        return made, phase.writes
    for kind in ("basis", "masks"):
        if run.name == kind and (run / "metadata.json").is_file():
            return find_artifact(str(run), kind, "."), kind
    if is_adapter(run) or (run / "config.json").is_file() and any(run.glob("*.safetensors")):
        return run, "model"
    raise ArtifactError(
        f"{run} is neither a run of warp_ds nor a model, adapter/, basis/ or masks/ of one: there is nothing to push"
    )


def fetch_shared(arguments: Any) -> None:
    """Brings a basis or masks that flags name on the hub into the hub's cache, rank 0 first. Collective. ArtifactError."""
    for kind in ("basis", "masks"):
        given = getattr(arguments, f"{kind}_dir", None)
        if given and given != "none" and hub.is_hub_name(given):
            where = consensus.on_rank_0(functools.partial(_fetch, given, kind), f"fetching {given}")
            logger.info("--%s_dir %s: %s", kind, given, where)


def _fetch(given: str, kind: str) -> str:
    return str(hub.fetched(given, kind))
