"""What a directory held when it was whole: the sizes of all its files, the digests of the small ones.

A file that is missing, cut, added or edited since is found before it is read. Large files are told by their size alone.
"""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import Any

SMALL = 4 << 20
"""Bytes up to which a file has a digest: more would cost time at every checkpoint."""


def contents(directory: Path, but: str, digested: float = SMALL) -> dict[str, list[Any]]:
    """File, by its path within ``directory`` -> [bytes, SHA-256 or None]; ``but`` is the file that will say so. Files of up to
    ``digested`` bytes have a digest.

    Raises OSError where something else than files and directories lies there.
    """
    files = {}
    for path in sorted(directory.rglob("*")):
        name, status = path.relative_to(directory).as_posix(), path.lstat()
        if stat.S_ISDIR(status.st_mode) or name == but or path.name.startswith(".nfs"):  # removed on NFS while open
            continue
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is neither a file nor a directory")
        digest = _sha256(path) if status.st_size <= digested else None
        files[name] = [status.st_size, digest]
    return files


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def difference(directory: Path, but: str, sealed: Any, added: bool = True, digested: float = SMALL) -> str:
    """What is not as ``contents`` had it, in words; '' where all is. ``added``: nor may there be a file more."""
    if not isinstance(sealed, dict):
        return "nothing says what it held when it was whole"
    try:
        now = contents(directory, but, digested)
    except OSError as error:
        return str(error)
    for name in sorted({*now, *sealed}):
        if name not in now:
            return f"{ascii(name)[1:-1]} is missing"
        if name not in sealed and added:
            return f"{ascii(name)[1:-1]} was added (move it away)"
        if name in sealed and now[name] != sealed[name]:
            return f"{ascii(name)[1:-1]} was changed"
    return ""


def odd_file(directory: Path) -> str:
    """The first entry under ``directory`` that no run has, in words: a pipe or device (reading it would wait for ever), a
    link to nowhere, a directory in a file's place; '' for none."""
    for parent, folders, files in os.walk(directory):
        for name in (*folders, *files):
            path = Path(parent, name)
            try:
                mode = path.stat().st_mode
            except OSError as error:
                if not path.is_symlink() and isinstance(error, FileNotFoundError):
                    continue  # another process lives here, and has just renamed what it wrote
                return f"{path} cannot be read ({error.strerror})"
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                return f"{path} is neither a file nor a directory"
            if name == ".lock" and path.is_symlink():
                return f"{path} is a link"
            if path.suffix in _FILES or name in (".lock", ".failure"):
                if not stat.S_ISREG(mode):
                    return f"{path} is a directory in a file's place"
            elif name in _DIRECTORIES and not stat.S_ISDIR(mode):
                return f"{path} is a file in a directory's place"
    return ""


_FILES = (".json", ".jsonl", ".md", ".safetensors", ".pt", ".pth")
_DIRECTORIES = ("basis", "masks", "model", "adapter", "trainer", "scores", "points")
