"""Digests of parts that lie in one another, made in one pass, are those of their bytes."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from warp_ds.store import digests
from warp_ds.store.digests import Part


def test_parts_within_a_file_and_the_file_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "BLOCK", 100)  # parts begin and end within blocks, and span several
    drawn = random.Random(0)
    for number in range(100):
        data, path = drawn.randbytes(drawn.randint(1, 500)), str(tmp_path / str(number))
        Path(path).write_bytes(data)
        begins = [drawn.randrange(len(data)) for _ in range(5)]
        parts = [Part(path, begin, drawn.randint(0, len(data) - begin)) for begin in begins]
        parts += [Part(path, 0, len(data))] * (number % 3 > 0)
        made = digests.read(parts)
        assert made.keys() == set(parts)
        assert all(d.sha256 == hashlib.sha256(data[p.begin : p.begin + p.nbytes]).hexdigest() for p, d in made.items())


def test_a_mask_and_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass says the file's digest, the bits of its rows, and those beyond their ends."""
    monkeypatch.setattr(digests, "BLOCK", 7)
    data, path = random.Random(0).randbytes(11 + 5 * 3), str(tmp_path / "mask")
    Path(path).write_bytes(data)
    rows, whole = Part(path, 0, len(data), rows_at=11, row_bytes=3, row_bits=21), Part(path, 0, len(data))
    made = digests.read([whole, rows])
    bits = [int.from_bytes(data[begin : begin + 3], "big") for begin in range(11, len(data), 3)]
    assert made[rows].beyond == sum((row & 0b111).bit_count() for row in bits) > 0
    assert made[rows].bits == sum((row >> 3).bit_count() for row in bits)
    assert made[rows].sha256 == made[whole].sha256 == hashlib.sha256(data).hexdigest()


def test_afresh_knows_nothing_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(digests, "SETTLED_SECONDS", -60.0)
    read: list[Part] = []
    own = digests._digest
    monkeypatch.setattr(digests, "_digest", lambda part, within: (read.append(part), own(part, within))[1])
    (tmp_path / "file").write_bytes(b"bytes")
    part = digests.whole_file(tmp_path / "file")
    for expected in (1, 1):
        with digests.afresh():
            digests.digest_parts([part])
            digests.digest_parts([part])
        assert len(read) == expected and not (tmp_path / "cache").exists()
        read.clear()
    digests.digest_parts([part])
    digests.digest_parts([part])
    assert len(read) == 1 and list((tmp_path / "cache").rglob("*.json")), "outside, what was read is remembered"
