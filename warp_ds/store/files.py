"""Files written whole (aside, fsync, rename) and read with a message; removed only where this program wrote them."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warp_ds.errors import ArtifactError
from warp_ds.secrets import redact
from warp_ds.store.held import check_there

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Yields another name beside ``path``: what is made under it (a file, a link, a directory of files written like this)
    then takes its place, whole, or not at all."""
    check_there(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = _aside(path)
    try:
        yield aside
        if aside.is_file() and not aside.is_symlink():
            with open(aside, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        if aside.is_dir() and not aside.is_symlink():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any, private: bool = False) -> None:
    """Writes ``value`` as indented JSON, whole or not at all; a number that is not finite, which JSON has not, as null.
    ``private``: for its owner's eyes alone, without secrets."""
    text = json.dumps(_finite(redact(value) if private else value), indent=2, allow_nan=False)
    write_text(path, text + "\n", private)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def write_text(path: Path, text: str, private: bool = False) -> None:
    """Writes a UTF-8 text file, whole or not at all; ``private``: for its owner's eyes alone."""
    with written_aside(path) as aside:
        aside.touch(mode=0o600 if private else 0o666)
        aside.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all."""
    from safetensors.torch import save_file  # with torch, which who reads JSON need not wait for

    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with written_aside(path) as aside:
        save_file(contiguous, str(aside), metadata=dict(metadata or {}))


def begin_directory(directory: Path, mark: str, text: str = "") -> None:
    """Makes ``directory``, if it is not there, with a file ``mark`` in it that says whose it is: both appear, or neither."""
    if directory.exists():
        return
    try:
        with written_aside(directory) as aside:
            aside.mkdir()
            write_text(aside / mark, text)
    except OSError:
        if not directory.is_dir():  # another process was first
            raise


def remove_directory(directory: Path) -> None:
    """Removes a directory of this program's: first its name, so that a killed removal leaves none without its mark."""
    aside = _aside(directory)
    os.replace(directory, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_unfinished(directory: Path) -> None:
    """Removes what a process of this program that was killed had begun to write anywhere under ``directory``."""
    for parent, directories, files in os.walk(directory):  # through no link
        for name in filter(is_aside, [*directories, *files]):
            aside = Path(parent, name)
            if aside.is_symlink():
                continue
            if aside.is_dir():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink(missing_ok=True)


def remove_own(directory: Path, names: str) -> None:
    """Removes the files in ``directory`` whose names match ``names``, and it, if nothing else is in it."""
    if directory.is_dir() and not directory.is_symlink():
        for path in directory.iterdir():
            if (re.fullmatch(names, path.name) or is_aside(path.name)) and path.is_file():
                path.unlink(missing_ok=True)
        try:
            directory.rmdir()
        except OSError:
            pass


def is_aside(name: str) -> bool:
    """Whether a file of this name was begun by this program, and never finished."""
    return _ASIDE.fullmatch(name) is not None


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.warp_ds.tmp")


#: What ``_aside`` calls files and directories, and nobody else.
_ASIDE = re.compile(r"\..+\.[0-9a-f]{8}\.warp_ds\.tmp", re.DOTALL)


def append_line(path: Path, line: str, private: bool = False) -> None:
    """Adds a line to a file, in one write; ``private``: a new one is for this user's eyes alone.

    OSError where that is no regular file: opening a pipe would wait for a reader, and a link may lead anywhere.
    """
    check_there(path)
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW
    descriptor = os.open(path, flags, 0o600 if private else 0o666)
    with open(descriptor, "a", encoding="utf-8") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        file.write(f"{line}\n")


def read_json(path: Path, finite: bool = False) -> Any:
    """Raises ArtifactError where the file is missing, no file (a pipe, a directory) or no JSON (``parse_json``); ``finite``:
    with NaN and Infinity, which JSON does not have."""

    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return parse_json(read_text(path), **({"parse_constant": no_constant} if finite else {}))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def parse_json(text: str | bytes, **hooks: Any) -> Any:
    """JSON in which no name stands twice in one object (readers differ in which one they take): else ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r} stands twice in one object")
        return value

    try:
        return json.loads(text, object_pairs_hook=once, **hooks)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


LONGEST_TEXT = 1 << 30
"""Bytes of a text file that are read at all: more would fill the memory."""


def read_text(path: Path, errors: str = "strict") -> str:
    """A file's UTF-8 text. OSError where it is none: opening a pipe would wait for ever for somebody to write."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, encoding="utf-8", errors=errors) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        if status.st_size > LONGEST_TEXT:
            raise OSError(errno.EFBIG, f"it has {status.st_size / 1e9:.1f} GB, which no text of this program has", str(path))
        return file.read()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of one JSON object a line. ArtifactError where it cannot be read."""
    objects = []
    try:
        lines = read_text(path, errors="replace").split("\n")
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error
    for line in lines:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue  # empty, or being written when the run was looked at or died
        if isinstance(value, dict):
            objects.append(value)
    return objects
