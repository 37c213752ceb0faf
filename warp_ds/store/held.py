"""Directories that must stay where they are while a run is under way: nothing is written anew where one was removed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from warp_ds.errors import DirectoryGoneError

_held: dict[Path, tuple[int, int]] = {}


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """A block in which ``check_there`` knows whether ``directory`` is still the one that it is now."""
    path = Path(os.path.abspath(directory))
    outer = _held.get(path)
    # Open, so that its number is not given to the next directory that is made.
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    status = os.fstat(descriptor)
    _held[path] = status.st_dev, status.st_ino
    try:
        yield
    finally:
        os.close(descriptor)
        del _held[path]
        if outer is not None:
            _held[path] = outer


def check_there(path: Path) -> None:
    """DirectoryGoneError where ``path`` lies in a held directory that is gone, or is another one by now."""
    absolute = Path(os.path.abspath(path))
    for directory, identity in tuple(_held.items()):
        if absolute.is_relative_to(directory):
            try:
                status = directory.stat()
            except (FileNotFoundError, NotADirectoryError):
                raise DirectoryGoneError(_gone(directory, "was removed or unmounted")) from None
            if (status.st_dev, status.st_ino) != identity:
                raise DirectoryGoneError(_gone(directory, "was replaced by another directory"))


def _gone(directory: Path, what: str) -> str:
    return (
        f"{directory} has vanished while the run wrote to it (it {what}): what was written there is lost, and the run "
        "ends here. Start it again where the directory stays"
    )
