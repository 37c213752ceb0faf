"""Samples in a memory-mapped file, read by one process and seen by all: no rank holds more of them than it looks at."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

import pyarrow
from datasets import Dataset

from warp_ds.data.cache import named_once_made
from warp_ds.data.sample import Sample
from warp_ds.errors import DataError
from warp_ds.store.files import read_json, write_json
from warp_ds.store.fingerprints import RowsFingerprint

FILE, FACTS = "samples.arrow", "facts.json"
_BATCH = 1000
_SCHEMA = pyarrow.schema([("sample", pyarrow.string())])


class StoredSamples(Sequence[Sample]):
    """The samples that `store` wrote. Raises `DataError` where they cannot be read."""

    def __init__(self, directory: Path):
        facts = read_json(directory / FACTS)
        self.directory = directory
        self.fingerprint: str = facts["fingerprint"]
        """As `fingerprint_rows` of the samples."""
        self.digest: str = facts["digest"]
        """Of every character of them, in hex."""
        self.rows = mapped([directory / FILE])
        """One column, `sample`: `Sample.as_row` as JSON."""

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = index + len(self) * (index < 0)
        return Sample.of(json.loads(self.rows[row]["sample"]), row)

    def __iter__(self) -> Iterator[Sample]:
        batches = self.rows.iter(batch_size=_BATCH)
        texts = (text for batch in batches for text in batch["sample"])
        return (Sample.of(json.loads(text), row) for row, text in enumerate(texts))


def store(work: str, samples: Iterable[Sample]) -> StoredSamples:
    """Writes samples as they come, under the digest of all of them. `work` names what is done by one process at a time."""

    def write(directory: Path) -> str:
        facts = write_samples(samples, directory / FILE)
        write_json(directory / FACTS, facts)
        return f"texts-{facts['digest']}"

    return StoredSamples(named_once_made(work, write))


def write_samples(samples: Iterable[Sample], path: Path) -> dict[str, Any]:
    """Writes samples to an arrow file; returns its `fingerprint` and `digest`."""
    digest, fingerprint = hashlib.sha256(), RowsFingerprint()
    left = iter(samples)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, _SCHEMA) as writer:
        while batch := list(islice(left, _BATCH)):
            texts = [json.dumps(sample.as_row()) for sample in batch]
            for sample, text in zip(batch, texts, strict=True):
                fingerprint.add(sample)
                digest.update(text.encode() + b"\n")
            writer.write_batch(pyarrow.record_batch([pyarrow.array(texts, pyarrow.string())], schema=_SCHEMA))
    return {"fingerprint": fingerprint.value, "digest": digest.hexdigest()[:32]}


def digest_of(samples: Iterable[Sample]) -> str:
    """As `StoredSamples.digest`."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps(sample.as_row()).encode() + b"\n")
    return digest.hexdigest()[:32]


def mapped(files: Sequence[Path]) -> Dataset:
    """Arrow files, in order, as one memory-mapped data set. Raises `DataError`."""
    from datasets import concatenate_datasets

    try:
        return concatenate_datasets([Dataset.from_file(str(file)) for file in files])
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise DataError(f"{files[0].parent} is damaged ({error}): remove it, and it is made again") from error
