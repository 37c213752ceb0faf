"""SHA-256 of every byte: of whole files, of single tensors of a file, of masks with their bits counted in the same pass.

Constant memory, a thread a core (hashlib leaves the interpreter to others). What was hashed is remembered by the file's
identity (inode, size, times to the nanosecond): in this process, and for the user's next one in ~/.cache/warp_ds/digests
(mode 600). A file that changed in the last seconds is never remembered, since its times may not show the next change.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from warp_ds.store.files import read_json, write_text

BLOCK = 8 << 20
"""Bytes that a thread holds."""
THREADS = 8
SETTLED_SECONDS = 5.0
"""A file whose times are younger, or in the future, is not remembered: clocks of file systems tick in milliseconds, and
servers' clocks differ."""


@dataclass(frozen=True)
class FileState:
    """What tells one content of a file from another without reading it; equal on every machine that sees the same file."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @staticmethod
    def of(path: str | os.PathLike) -> FileState:
        status = os.stat(path)
        return FileState(status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @property
    def settled(self) -> bool:
        return max(self.mtime_ns, self.ctime_ns) < (time.time() - SETTLED_SECONDS) * 1e9


@dataclass(frozen=True)
class Part:
    """A range of a file's bytes; ``row_bytes`` > 0: rows of bits, of which ``row_bits`` count, begin at ``rows_at``."""

    path: str
    begin: int
    nbytes: int
    rows_at: int = 0
    row_bytes: int = 0
    row_bits: int = 0


@dataclass(frozen=True)
class Digest:
    """What one pass over a ``Part`` found."""

    sha256: str
    """64 hex digits."""
    bits: int = 0
    """Bits that are set within the rows' ``row_bits``."""
    beyond: int = 0
    """Bits that are set after them."""


class _Memory:
    """What is known of parts of files in these states."""

    def __init__(self, lasts: bool) -> None:
        self.known: dict[tuple[Part, FileState], Digest] = {}
        self.lasts = lasts
        """Whether it outlives its use, so that a file must have settled to be in it."""


_memory = _Memory(lasts=True)
_lock = threading.Lock()


@contextmanager
def afresh() -> Iterator[None]:
    """Inside, nothing counts that was found out before: every byte is read now, once, and forgotten at the end."""
    global _memory
    outer, _memory = _memory, _Memory(lasts=False)
    try:
        yield
    finally:
        _memory = outer


def whole_file(path: str | os.PathLike) -> Part:
    return Part(os.fspath(path), 0, os.stat(path).st_size)


def digest_parts(parts: Sequence[Part]) -> list[Digest]:
    """The digest of each part, in order, from memory where it is known. Raises OSError."""
    states = {path: FileState.of(path) for path in {part.path for part in parts}}
    digests = recall(parts, states)
    fresh = read([part for part in parts if part not in digests])
    if fresh:
        learn(fresh, states)
        store(fresh, states)
    digests.update(fresh)
    return [digests[part] for part in parts]


def recall(parts: Iterable[Part], states: dict[str, FileState]) -> dict[Part, Digest]:
    """What is known of parts of files in these states, here or from an earlier process of this user."""
    parts, known = list(parts), _memory.known
    _recall({part.path: states[part.path] for part in parts if (part, states[part.path]) not in known})
    return {part: known[part, states[part.path]] for part in parts if (part, states[part.path]) in known}


def read(parts: Iterable[Part]) -> dict[Part, Digest]:
    """Reads every byte of each part, the longest first, a thread a core; parts of one that begins its file are digested in
    the same pass as that one. Raises OSError."""
    within: dict[Part, list[Part]] = {}
    first: dict[str, Part] = {}
    for part in sorted(set(parts), key=lambda part: (-part.nbytes, -part.row_bytes)):
        outer = first.get(part.path)
        if outer and not part.row_bytes and part.begin + part.nbytes <= outer.nbytes:
            within[outer].append(part)
        else:
            within[part] = []
            if part.begin == 0:
                first.setdefault(part.path, part)
    if not within:
        return {}
    with ThreadPoolExecutor(min(THREADS, len(within), len(os.sched_getaffinity(0)) or 1)) as pool:
        passes = pool.map(_digest, within, within.values())
        return {part: digest for of_pass in passes for part, digest in of_pass.items()}


def learn(digests: dict[Part, Digest], states: dict[str, FileState]) -> None:
    """Remembers digests of files that were in these states, where they still are, and have settled."""
    for part, digest in digests.items():
        state = states.get(part.path)
        if state is not None and (state.settled or not _memory.lasts) and state == _state_or_none(part.path):
            with _lock:
                _memory.known[part, state] = digest


def combine(text: str, digests: Iterable[tuple[str, str]]) -> str:
    """One SHA-256, 64 hex digits, over ``text`` and named digests, in the order of their names."""
    total = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name, digest in sorted(digests):
        total.update(f"\n{json.dumps(name)}:{digest}".encode())
    return total.hexdigest()


def _digest(part: Part, within: Sequence[Part] = ()) -> dict[Part, Digest]:
    """Of ``part``, and of those ``within`` it, in one pass."""
    total, bits, beyond = hashlib.sha256(), 0, 0
    inner = {each: hashlib.sha256() for each in within}

    def update(data: memoryview | bytes, at: int) -> None:
        total.update(data)
        for each, digest in inner.items():
            first, last = max(each.begin - at, 0), min(each.begin + each.nbytes - at, len(data))
            if first < last:
                digest.update(data[first:last])

    with open(part.path, "rb", buffering=0) as file:
        file.seek(part.begin)
        left = part.nbytes
        if part.row_bytes:
            head = file.read(part.rows_at - part.begin)
            update(head, part.begin)
            left -= len(head)
        # Whole rows at a time, so that the last byte of each is where it is looked for.
        size = max(1, BLOCK // part.row_bytes) * part.row_bytes if part.row_bytes else BLOCK
        buffer = memoryview(bytearray(min(size, max(left, 1))))
        while left:
            filled = _fill(file, buffer[: min(left, len(buffer))])
            if not filled:
                raise OSError(f"{part.path} ended early: it changed while it was read")
            update(buffer[:filled], part.begin + part.nbytes - left)
            left -= filled
            if part.row_bytes:
                set_bits, after = _count(np.frombuffer(buffer[:filled], np.uint8), part)
                bits, beyond = bits + set_bits, beyond + after
    return {part: Digest(total.hexdigest(), bits, beyond), **{each: Digest(d.hexdigest()) for each, d in inner.items()}}


def _fill(file: object, buffer: memoryview) -> int:
    """Reads until ``buffer`` is full or the file ends; the bytes read."""
    filled = 0
    while filled < len(buffer):
        got = file.readinto(buffer[filled:])  # type: ignore[attr-defined]
        if not got:
            break
        filled += got
    return filled


def _count(block: np.ndarray, part: Part) -> tuple[int, int]:
    """Bits set in whole rows: within ``row_bits``, and after them."""
    counted = int(np.bitwise_count(block).sum(dtype=np.int64))
    padding = 8 * part.row_bytes - part.row_bits
    beyond = 0
    if padding:
        last = block.reshape(-1, part.row_bytes)[:, -1] & np.uint8((1 << padding) - 1)
        beyond = int(np.bitwise_count(last).sum(dtype=np.int64))
    return counted - beyond, beyond


# ---------------------------------------------------------------- the user's cache


def _directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "warp_ds" / "digests"


def _entry(path: str) -> Path:
    return _directory() / f"{hashlib.sha256(os.path.realpath(path).encode('utf-8', 'surrogateescape')).hexdigest()}.json"


def _state_or_none(path: str) -> FileState | None:
    try:
        return FileState.of(path)
    except OSError:
        return None


def _recall(states: dict[str, FileState]) -> None:
    """Takes over what an earlier process of this user found out about files that have not changed since."""
    if not _memory.lasts:
        return
    for path, state in states.items():
        try:
            entry = _entry(path)
            status = os.lstat(entry)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or stat.S_IMODE(status.st_mode) != 0o600:
                continue
            if not state.settled:
                continue
            saved = read_json(entry)
            if saved["state"] != vars(state) | {"path": os.path.realpath(path)}:
                continue
            with _lock:
                for values, digest in saved["parts"]:
                    _memory.known[Part(path, *map(int, values)), state] = Digest(str(digest[0]), int(digest[1]), int(digest[2]))
        except (OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError, RecursionError):
            continue  # no cache, or one that is not ours: the file is read


def store(fresh: dict[Part, Digest], states: dict[str, FileState]) -> None:
    """Leaves what was found of settled files to the user's next process; a cache that cannot be written is no loss."""
    if not _memory.lasts:
        return
    for path in {part.path for part in fresh}:
        state = states[path]
        known_parts = [
            (part, digest) for (part, of), digest in list(_memory.known.items()) if part.path == path and of == state
        ]
        if not known_parts:
            continue
        text = json.dumps(
            {
                "state": vars(state) | {"path": os.path.realpath(path)},
                "parts": [
                    [[p.begin, p.nbytes, p.rows_at, p.row_bytes, p.row_bits], [d.sha256, d.bits, d.beyond]]
                    for p, d in known_parts
                ],
            }
        )
        try:
            entry = _entry(path)
            entry.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_text(entry, text, private=True)
        except (OSError, RuntimeError):
            return
