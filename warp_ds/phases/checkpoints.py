"""The checkpoints in a run's trainer/: which of them are this program's, whole, and which it may remove."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path

from transformers import TrainerState

from warp_ds.errors import ArtifactError
from warp_ds.store.files import begin_directory, read_json, remove_directory, write_json
from warp_ds.store.sealed import contents, difference, odd_file
from warp_ds.zero import universal
from warp_ds.zero.deepspeed_internals import refuse_pickles, tag_of

logger = logging.getLogger(__name__)
BEGUN, WHOLE = "begun.json", "whole.json"
"""Written by this program before anything else of a checkpoint, and after all of it."""


def step_of(path: Path) -> int | None:
    """Of checkpoint-12 the 12; None where that is no checkpoint's name."""
    match = re.fullmatch(r"checkpoint-(\d{1,12})", path.name, re.ASCII)
    return int(match[1]) if match else None


def begin(checkpoint: Path) -> None:
    """Marks a checkpoint as this program's before it is written: the directory appears with its mark, or not at all. One that
    is written once more is whole no longer."""
    begin_directory(checkpoint, BEGUN)
    write_json(checkpoint / BEGUN, {"step": step_of(checkpoint)})
    (checkpoint / WHOLE).unlink(missing_ok=True)


def finish(checkpoint: Path, world_size: int) -> None:
    """Marks a checkpoint as whole: from any other a run never goes on."""
    write_json(
        checkpoint / WHOLE, {"step": step_of(checkpoint), "world_size": world_size, "files": contents(checkpoint, WHOLE)}
    )


def world_size_of(checkpoint: Path) -> int:
    """How many ranks wrote a whole checkpoint. ArtifactError where its mark is not what ``finish`` writes."""
    path = checkpoint / WHOLE
    mark = read_json(path)
    step, ranks = (mark.get("step"), mark.get("world_size")) if isinstance(mark, dict) else (None, None)
    if type(step) is not int or step != step_of(checkpoint) or type(ranks) is not int or ranks < 1:
        raise ArtifactError(
            f"{path} is not what this program writes (step {step!r}, world_size {ranks!r}): remove "
            f"{checkpoint}, or start anew with --resume never"
        )
    return ranks


def check(checkpoint: Path) -> None:
    """ConfigError or ArtifactError, naming the file, where something of ``checkpoint`` would be run, would be waited for,
    lies outside of it, or is not as this program left it."""
    if odd := odd_file(checkpoint):
        raise ArtifactError(f"{odd}: remove {checkpoint}, or start anew with --resume never")
    refuse_pickles(checkpoint)
    tag_of(checkpoint, "latest_universal" if universal.is_converted(checkpoint) else "latest")
    check_trainer_state(checkpoint)
    if not universal.is_converted(checkpoint):  # that is looked at by what made it
        check_as_left(checkpoint)


def check_as_left(checkpoint: Path) -> None:
    """ArtifactError where a whole checkpoint is not what ``finish`` has seen."""
    ranks, sealed = world_size_of(checkpoint), read_json(checkpoint / WHOLE).get("files")
    changed = difference(checkpoint, WHOLE, sealed)
    if not changed and sum(name.endswith("optim_states.pt") for name in sealed) != ranks:
        changed = f"it has not the optimizer's states of {ranks} ranks"
    if changed:
        raise ArtifactError(
            f"{checkpoint} is not as this program left it: {changed}. Mend that, remove the checkpoint, "
            "or start anew with --resume never"
        )


def check_trainer_state(checkpoint: Path) -> None:
    """ArtifactError where trainer_state.json is not what Trainer writes, of the step that the directory is named for."""
    path = checkpoint / "trainer_state.json"
    state = read_json(path)
    wanted = TrainerState()
    wrong = [] if isinstance(state, dict) else ["the whole"]
    for field in dataclasses.fields(TrainerState) if not wrong else ():
        default, value = getattr(wanted, field.name), state.get(field.name, getattr(wanted, field.name))
        kinds = (int, float) if isinstance(default, int | float) else (type(default),)
        if default is not None and not (isinstance(value, kinds) or value is None and field.name == "logging_steps"):
            wrong.append(field.name)
        elif isinstance(value, float) and not math.isfinite(value):
            wrong.append(field.name)
    if not wrong and state.get("global_step") != int(checkpoint.name.rsplit("-", 1)[1]):
        wrong.append("global_step")
    if not wrong and (set(state) - {field.name for field in dataclasses.fields(TrainerState)}):
        wrong.append("unknown keys")
    if wrong:
        raise ArtifactError(
            f"{path} is not what this program's training writes ({', '.join(wrong)}): remove {checkpoint}, or "
            "start anew with --resume never"
        )


def own(directory: Path, mark: str = BEGUN) -> Iterator[Path]:
    """Checkpoints in ``directory`` that have ``mark``, the newest first. What has none, or is a link, is somebody else's."""
    by_step = {step: path for path in directory.glob("checkpoint-*") if (step := step_of(path)) is not None}
    for _, path in sorted(by_step.items(), reverse=True):
        if not path.is_symlink() and any((path / name).is_file() for name in {mark, WHOLE}):
            yield path


def newest_whole(directory: Path) -> str | None:
    """Path of the newest checkpoint that was written to its end; what this program left half written is removed."""
    for path in own(directory):
        if not (path / WHOLE).is_file():
            remove_directory(path)
    return next((str(path) for path in own(directory, WHOLE)), None)


def keep_newest(directory: Path, count: int, best: int | None = None) -> None:
    """Removes all but the ``count`` newest of this program's checkpoints, and that of the step ``best``."""
    for path in list(own(directory))[count:]:
        if step_of(path) != best:
            remove_directory(path)


def refuse_foreign(directory: Path, steps: int) -> None:
    """ArtifactError where a run of ``steps`` would write a checkpoint where somebody else's lies."""
    mine = set(own(directory))
    for path in directory.glob("checkpoint-*"):
        step = step_of(path)
        if path in mine:
            continue
        if step is not None and step <= steps:
            raise ArtifactError(
                f"{path} was not written by this program, which would write its own checkpoint there: move it elsewhere"
            )
        logger.warning("%s was not written by this program: it is left alone", path)
