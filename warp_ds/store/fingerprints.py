"""Fingerprints of a model and of data: every byte that a result rests on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warp_ds.errors import ArtifactError, CheckpointError, PickledCheckpoint
from warp_ds.store.checkpoint_index import TensorLocation, read_header, resolve_checkpoint
from warp_ds.store.digests import Digest, Part, combine, digest_parts, whole_file
from warp_ds.store.files import read_json

SHOWN = 16
"""Of a fingerprint's 64 hex digits, those that messages show."""


# ---------------------------------------------------------------- fingerprints


VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
"""Keys of a model's config.json that do not change what the model computes from its weights."""


@dataclass(frozen=True)
class Contents:
    """What a fingerprint covers: a text, and ranges of files by name."""

    text: str
    parts: dict[str, Part]

    def digests(self) -> list[Digest]:
        """Of ``parts``, in order. Raises ArtifactError."""
        try:
            return digest_parts(list(self.parts.values()))
        except OSError as error:
            raise ArtifactError(f"{error}: it was removed or changed while it was read; try again") from error

    def fingerprint(self, digests: Sequence[Digest] | None = None) -> str:
        """64 hex digits from ``text`` and ``digests``, those of ``parts``. Raises ArtifactError."""
        named = zip(self.parts, self.digests() if digests is None else digests, strict=True)
        return combine(self.text, ((name, digest.sha256) for name, digest in named))


def fingerprint_model(directory: Path) -> str:
    """Fingerprint of a model: every byte of its tensors by name, dtype and shape, and its config.json.

    The same whatever the directory is called, however the tensors are spread over files, and whatever VOLATILE keys say.
    Pickled weights (*.bin) count as whole files. Raises ArtifactError.
    """
    return model_contents(directory).fingerprint()


def model_contents(directory: Path) -> Contents:
    """What ``fingerprint_model`` covers; no weight is read. Raises ArtifactError."""
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise ArtifactError(f"{directory / 'config.json'} is no JSON object")
    try:
        parts = {
            f"{name} {tensor.dtype} {list(tensor.shape)}": Part(tensor.path, tensor.offset, tensor.nbytes)
            for name, tensor in resolve_checkpoint(directory).items()
        }
    except PickledCheckpoint:
        parts = {path.name: whole_part(path) for path in sorted(directory.glob("*.bin"))}
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    return Contents(json.dumps(kept, sort_keys=True), parts)


def header_of(path: Path) -> dict[str, TensorLocation]:
    """The tensors of a safetensors file by name; no tensor is read. ArtifactError where it is missing or broken."""
    try:
        if not os.path.isfile(path):
            raise CheckpointError(f"{path} is missing, or no regular file")
        return read_header(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}); run the phase that wrote it again, or download the model again"
        ) from error


def whole_part(path: Path) -> Part:
    if not os.path.isfile(path):
        raise ArtifactError(f"{path} cannot be read: it is missing, or no regular file; run the phase that wrote it again")
    return whole_file(path)


class RowsFingerprint:
    """`fingerprint_rows`, a row at a time."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, row: Any) -> None:
        text = json.dumps(row, sort_keys=True, ensure_ascii=False, default=lambda sample: sample.known_by)
        self._digest.update(text.encode() + b"\n")

    @property
    def value(self) -> str:
        return self._digest.hexdigest()[:16]


def fingerprint_rows(rows: Iterable[Any]) -> str:
    """Fingerprint of a data set's rows: JSON, or samples by their `known_by`; what knows its own is asked for it."""
    known = getattr(rows, "fingerprint", None)
    if isinstance(known, str):
        return known
    digest = RowsFingerprint()
    for row in rows:
        digest.add(row)
    return digest.value


def fingerprint_sets(sets: Sequence[Any]) -> str:
    """`fingerprint_rows` of several data sets in order; of one alone its own."""
    known = [fingerprint_rows(rows) for rows in sets]
    return known[0] if len(known) == 1 else fingerprint_rows(known)
