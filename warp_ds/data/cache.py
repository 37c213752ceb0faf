"""What is made of data once and read by every rank: directories under HF_DATASETS_CACHE, named by content, written whole.

Nothing in it is needed: `rm -r "$HF_DATASETS_CACHE/warp_ds"` costs the next run the making.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets

from warp_ds.errors import ArtifactError, DataError
from warp_ds.store.files import read_json, remove_directory, write_json
from warp_ds.store.lock import NO_FLOCK
from warp_ds.store.sealed import contents, difference

logger = logging.getLogger(__name__)
_SEAL = "whole.json"
"""In each directory: the size and digest of every other file of it."""
_seen: dict[Path, list[tuple[str, int, int, int]]] = {}
"""The directories that this process has read and found whole, and the state of their files then."""


def root() -> Path:
    """Where everything of this module lies."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "warp_ds"


def place_of(name: str) -> Path | None:
    """The directory of this name, every byte of which is as it was made; None where there is none. Another one is removed."""
    place = root() / name
    if not place.is_dir():
        return None
    if problem := _damage(place):
        logger.warning("%s is damaged (%s): it is made again", place, problem)
        try:
            remove_directory(place)
        except FileNotFoundError:
            pass  # another rank was first
        except OSError as error:
            raise DataError(f"{place} is damaged ({problem}), and cannot be removed ({error.strerror}): remove it") from error
        return None
    return place


def _damage(place: Path) -> str:
    """What of a directory is not as it was made, in words; '' where all is. Read once, as long as its files are those."""
    try:
        state = sorted(
            (path.name, path.stat().st_ino, path.stat().st_size, path.stat().st_mtime_ns) for path in place.iterdir()
        )
        if _seen.get(place) == state:
            return ""
        said = read_json(place / _SEAL)
    except (ArtifactError, OSError) as error:
        return str(error)
    problem = difference(place, _SEAL, said.get("files") if isinstance(said, dict) else None, digested=math.inf)
    if not problem:
        _seen[place] = state
    return problem


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
                write_json(making / _SEAL, {"files": contents(making, _SEAL, digested=math.inf)})
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
    if place_of(place.name) is not None:
        return
    try:
        making.rename(place)
    except OSError:
        if place_of(place.name) is None:
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
