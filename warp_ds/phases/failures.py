"""How a run fails: the first failing rank's traceback is what a user sees last, with what can be done about it."""

from __future__ import annotations

import errno
import logging
import os
import traceback
from pathlib import Path

from warp_ds import errors
from warp_ds.cluster import processes
from warp_ds.flags.groups import RunArguments
from warp_ds.secrets import redact
from warp_ds.store.state import note

logger = logging.getLogger(__name__)
FAILURE = ".failure"
"""Made by the first rank that fails, so that the others know that they are not."""


def is_later(error: BaseException) -> bool:
    """Whether this rank failed after another one had: of the first alone the traceback is shown."""
    return getattr(error, "_warp_ds_later", False) is True


def explain(error: Exception, arguments: RunArguments) -> None:
    """Notes on ``error`` what a user can do about it, where its own text does not say."""
    if getattr(error, "__notes__", None) or is_later(error):
        return
    text = str(error)
    if "timed out" in text.lower():
        error.add_note(
            f"This rank waited --timeout {arguments.timeout} s for another one in a collective. The rank that "
            f"hangs is one whose log in {arguments.log_dir} ends earlier than the others'."
        )
    elif "Connection closed by peer" in text or "Connection reset" in text:
        error.add_note(
            "Another rank ended without a word (killed, out of memory, its node lost): see Slurm's or the kernel's "
            "log of its node. The same command goes on from the last good state."
        )
    elif getattr(error, "errno", None) in _DISK_ERRORS or any(words in text for words in _DISK_WORDS):
        error.add_note(
            f"Is there space, and write access, in {arguments.output_dir} and {arguments.log_dir}? Once there is, "
            "the same command goes on from the last good state."
        )


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
#: How safetensors and torch.save say the same.
_DISK_WORDS = ("No space left", "os error 28", "Disk quota", "PytorchStreamWriter failed", "inline_container.cc")


def record_failure(directory: Path, error: Exception, log_dir: Path) -> None:
    """Puts a traceback last in this rank's log, and the first failing rank's in rank 0's too and into the run's state.

    The errors of the ranks that fail after it are marked (``is_later``).
    """
    if isinstance(error, errors.OtherRankError):
        return
    text = redact(f"rank {processes.rank()} failed:\n{''.join(traceback.format_exception(error))}")
    own, main = (log_file(log_dir, directory.name, rank) for rank in (processes.rank(), 0))
    try:
        os.close(os.open(directory / FAILURE, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        if own != main:
            _append(own, text)
        error._warp_ds_later = True  # type: ignore[attr-defined]
        return
    except OSError:
        pass  # a full or read-only file system: every rank says what it saw
    note(directory, "failed", rank=processes.rank(), error=f"{type(error).__name__}: {str(error)[:500]}")
    for log in {own, main}:
        _append(log, text)


def _append(log: Path, text: str) -> None:
    try:
        with open(log, "a") as file:
            file.write(text)
    except OSError as full:
        logger.warning("%s could not be written: %s", log, full)


def log_file(log_dir: Path, name: str, rank: int) -> Path:
    """logs/<run>.log for rank 0, logs/<run>.rank<r>.log beside it for the others."""
    return log_dir / f"{name}{f'.rank{rank}' if rank else ''}.log"
