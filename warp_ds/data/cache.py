"""What is made of data once and read by every rank: directories under HF_DATASETS_CACHE, named by content, written whole.

Nothing in it is needed: `rm -r "$HF_DATASETS_CACHE/warp_ds"` costs the next run the making.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from warp_ds.errors import DataError
from warp_ds.store.lock import NO_FLOCK

logger = logging.getLogger(__name__)


def root() -> Path:
    """Where everything of this module lies."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "warp_ds"


def place_of(name: str) -> Path | None:
    """The directory of this name, which is whole; None where there is none."""
    place = root() / name
    return place if place.is_dir() else None


def made(name: str, make: Callable[[Path], None]) -> Path:
    """The directory of this name; where there is none, what `make` puts into an empty one becomes it.

    One process at a time makes it, on any number of hosts that share the directory and its locks; where they share no locks
    each makes its own, and the first to end is kept. Raises `DataError` where nothing can be written.
    """

    def known(directory: Path) -> str:
        make(directory)
        return name

    return place_of(name) or named_once_made(name, known, known=True)


def named_once_made(work: str, make: Callable[[Path], str], known: bool = False) -> Path:
    """As `made`, of what is named by what comes out: `make` returns the name. `work` says what is one at a time.

    `known`: the name is `work`, so that nothing is made where another process has made it meanwhile.
    """
    try:
        root().mkdir(parents=True, exist_ok=True)
        with _alone(root() / f"{work}.lock") as alone:
            if known and (place := place_of(work)):
                return place
            # Of processes that were killed: nobody else works at this now.
            for left in root().glob(f"{work}.making-*") if alone else ():
                shutil.rmtree(left, ignore_errors=True)
            making = root() / f"{work}.making-{uuid.uuid4().hex[:8]}"
            making.mkdir()
            try:
                place = root() / make(making)
                _keep(making, place)
            finally:
                shutil.rmtree(making, ignore_errors=True)
            return place
    except OSError as error:
        raise DataError(
            f"the cache of texts and tokens, {root()}, cannot be written ({error.strerror or error}): set HF_DATASETS_CACHE to "
            "a directory that can, and has room"
        ) from error


def _keep(making: Path, place: Path) -> None:
    """Gives a directory its name, whole on disk; the one that has it already is as good."""
    for path in making.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    try:
        making.rename(place)
    except OSError:
        if not place.is_dir():
            raise


@contextmanager
def _alone(path: Path) -> Iterator[bool]:
    """Waits until no other process holds `path`; yields whether this file system has locks (flock) at all."""
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = True
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            held = False
        yield held
