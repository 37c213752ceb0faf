"""The files that phases hand to one another, and the run directories they lie in (section 5 of the design).

Every file appears under its final name only when whole: written aside, fsynced, renamed. Nothing is unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import stat
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from warp_ds.method.eigenbasis import BAR, orthogonality_error, probed_orthogonality
from warp_ds.method.mask import frozen_count
from warp_ds.method.rotation import Rotation
from warp_ds.secrets import redact
from warp_ds.store.checkpoint_index import (
    CheckpointError,
    PickledCheckpoint,
    TensorLocation,
    read_header,
    resolve_checkpoint,
)
from warp_ds.store.digests import Digest, Part, combine, digest_parts, is_regular, whole_file
from warp_ds.store.held import check_there
from warp_ds.store.schema import SchemaError, check_fields

logger = logging.getLogger(__name__)
BASIS_FORMAT, MASKS_FORMAT, VERSION = "warp_ds.basis", "warp_ds.masks", 2
SHOWN = 16
"""Of a fingerprint's 64 hex digits, those that messages show."""


class ArtifactError(ValueError):
    """A basis, masks or run directory that is missing, broken or made for something else."""


@dataclass(frozen=True)
class TargetLayer:
    """A linear layer y = W x that is rotated."""

    name: str
    """Module name in the model, such as model.layers.0.mlp.down_proj."""
    layer: int
    """Number of its block."""
    type: str
    """One of config.LAYER_TYPES."""
    m: int
    """Outputs: rows of W."""
    n: int
    """Inputs: columns of W."""

    @property
    def stem(self) -> str:
        """layer_00_ffn_down"""
        return f"layer_{self.layer:02d}_{self.type}"

    @property
    def mask_file(self) -> str:
        """layer_00_ffn_down_mask.safetensors"""
        return f"{self.stem}_mask.safetensors"


# ---------------------------------------------------------------- files


def write_json(path: Path, value: Any, private: bool = False) -> None:
    """Writes ``value`` as indented JSON, whole or not at all; ``private``: for its owner's eyes alone, without secrets."""
    text = json.dumps(redact(value) if private else value, indent=2) + "\n"

    def write(aside: Path) -> None:
        aside.touch(mode=0o600 if private else 0o666)
        aside.write_text(text)

    _write_aside(path, write)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 text file, whole or not at all."""
    _write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file, whole or not at all."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    _write_aside(path, lambda aside: save_file(contiguous, str(aside), metadata=dict(metadata or {})))


def remove_unfinished(directory: Path) -> None:
    """Removes what a process of this program that was killed had begun to write anywhere under ``directory``."""
    for parent, _, files in os.walk(directory):  # through no link
        for name in filter(is_aside, files):
            aside = Path(parent, name)
            if not aside.is_symlink():
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


#: What ``_write_aside`` calls the files it writes, and nobody else.
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


def _write_aside(path: Path, write: Any) -> None:
    check_there(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.warp_ds.tmp")
    try:
        write(aside)
        with open(aside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Raises ArtifactError where the file is missing, no file (a pipe, a directory) or no JSON."""
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


def read_strict_json(path: Path) -> Any:
    """``read_json`` without what JSON does not have (NaN, Infinity) and without a name that stands twice in one object."""
    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError(f"a name stands twice among {sorted(found)[:5]}")
        return found

    try:
        return json.loads(read_text(path), parse_constant=no_constant, object_pairs_hook=no_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from error


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
    found = []
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
            found.append(value)
    return found


# ---------------------------------------------------------------- fingerprints


VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
"""Keys of a model's config.json that do not change what the model computes from its weights."""


@dataclass(frozen=True)
class Contents:
    """What a fingerprint covers: a text, and ranges of files by name."""

    text: str
    parts: dict[str, Part]

    def digests(self, remember: bool = True) -> list[Digest]:
        """Of ``parts``, in order. ``remember`` False reads every byte now. Raises ArtifactError."""
        try:
            return digest_parts(list(self.parts.values()), remember)
        except OSError as error:
            raise ArtifactError(f"{error}: it was removed or changed while it was read; try again") from error

    def fingerprint(self, digests: Iterable[Digest]) -> str:
        """64 hex digits from ``text`` and the digests of ``parts``."""
        return combine(self.text, ((name, digest.sha256) for name, digest in zip(self.parts, digests, strict=True)))


def fingerprint_model(directory: Path, remember: bool = True) -> str:
    """Fingerprint of a model: every byte of its tensors by name, dtype and shape, and its config.json.

    The same whatever the directory is called, however the tensors are spread over files, and whatever VOLATILE keys say.
    Pickled weights (*.bin) count as whole files. Raises ArtifactError.
    """
    contents = model_contents(directory)
    return contents.fingerprint(contents.digests(remember))


def model_contents(directory: Path) -> Contents:
    """What ``fingerprint_model`` covers; no weight is read. Raises ArtifactError."""
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise ArtifactError(f"{directory / 'config.json'} is no JSON object")
    try:
        parts = {f"{name} {tensor.dtype} {list(tensor.shape)}": Part(tensor.path, tensor.offset, tensor.nbytes)
                 for name, tensor in resolve_checkpoint(directory).items()}
    except PickledCheckpoint:
        parts = {path.name: _whole(path) for path in sorted(directory.glob("*.bin"))}
    except CheckpointError as error:
        raise ArtifactError(str(error)) from error
    kept = {key: value for key, value in config.items() if key not in VOLATILE}
    return Contents(json.dumps(kept, sort_keys=True), parts)


def header_of(path: Path) -> dict[str, TensorLocation]:
    """The tensors of a safetensors file by name; no tensor is read. ArtifactError where it is missing or broken."""
    try:
        if not is_regular(path):
            raise CheckpointError(f"{path} is missing, or no regular file")
        return read_header(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); run the phase that wrote it again, or download the model "
                            "again") from error


def _whole(path: Path) -> Part:
    if not is_regular(path):
        raise ArtifactError(f"{path} cannot be read: it is missing, or no regular file; run the phase that wrote it again")
    return whole_file(path)


def fingerprint_rows(rows: Iterable[Any]) -> str:
    """Fingerprint of a data set's rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- bases and masks


class LayerEntry(TypedDict):
    """A layer in basis/metadata.json."""

    layer: int
    type: str
    shape: list[int]
    """[m, n]"""
    file: str
    """Layers that see the same input name the same file."""


class MaskedLayerEntry(LayerEntry):
    """A layer in masks/metadata.json."""

    frozen: int
    """Bits that are set in its mask."""
    wanted: int | None
    """Coefficients that keep_ratio asks for in this layer; None where the scope is global."""
    threshold: float | None
    """The lowest frozen score; None where nothing is frozen."""


#: A file in basis/metadata.json; n and rank are always there.
BasisEntry = TypedDict("BasisEntry", {
    "n": int, "rank": int, "tokens": int, "energy": float, "orthogonality_error": float, "residual": float, "from": str,
    "seconds": float | None, "bytes": int}, total=False)


@dataclass
class BasisMetadata:
    """basis/metadata.json"""

    basis: str
    model_fingerprint: str
    data_fingerprint: str
    token_scope: str
    model_name: str
    tokens: int
    layers: dict[str, LayerEntry] = field(default_factory=dict)
    """by module name"""
    bases: dict[str, BasisEntry] = field(default_factory=dict)
    """by file"""
    format: str = BASIS_FORMAT
    version: int = VERSION


@dataclass
class MasksMetadata:
    """masks/metadata.json"""

    keep_ratio: float
    scope: str
    unit: str
    score: str
    basis: str
    basis_dir: str | None
    """Absolute, as it was when the masks were made; ``MaskStore.find_basis`` also finds it after a move."""
    basis_fingerprint: str | None
    model_fingerprint: str
    data_fingerprint: str
    model_name: str
    layers: dict[str, MaskedLayerEntry] = field(default_factory=dict)
    """by module name"""
    frozen: int = 0
    entries: int = 0
    notes: list[str] = field(default_factory=list)
    format: str = MASKS_FORMAT
    version: int = VERSION


class BasisStore:
    """Reads a basis directory. Every reader of the same directory gets the same rotation.

    Whatever its metadata say is checked when it is opened, each file when it is first read: ArtifactError where one
    contradicts the other, or U is not orthonormal within ``method.eigenbasis.BAR``.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.metadata: BasisMetadata = _read_metadata(self.directory, BasisMetadata, BASIS_FORMAT, "basis", "phase 1")
        self._checked: set[str] = set()
        """Layers whose file's header was looked at, and files whose U and S were."""
        try:
            self._check_metadata()
        except SchemaError as error:
            raise ArtifactError(f"{self.directory / 'metadata.json'}: {error}; run phase 1 again") from error

    def _check_metadata(self) -> None:
        meta = self.metadata
        _check_entries(meta.layers)
        if {entry["file"] for entry in meta.layers.values()} != meta.bases.keys():
            raise SchemaError("the files that 'layers' names are not those of 'bases'")
        for name, entry in meta.layers.items():
            of_file = meta.bases[entry["file"]]
            if not 0 <= of_file.get("rank", -1) <= of_file.get("n", -1) == entry["shape"][1]:
                raise SchemaError(f"{name} has {entry['shape'][1]} inputs, but {entry['file']} says n {of_file.get('n')}, "
                                  f"rank {of_file.get('rank')}")
            if not re.fullmatch(rf"layer_{entry['layer']:02d}_[a-z0-9_]+_svd\.safetensors", entry["file"]):
                raise SchemaError(f"{name}, a layer of block {entry['layer']}, names the file {entry['file']}")
        if meta.tokens < 0:
            raise SchemaError(f"tokens is {meta.tokens}")

    def columns(self, name: str) -> tuple[Tensor, Tensor]:
        """U [n, r] and S [r] (descending), fp32, of the layer called ``name``."""
        file = self._check_file(name)
        with _open(self.directory / file) as opened:
            u, s = opened.get_tensor("U"), opened.get_tensor("S")
        if file not in self._checked:
            _check_basis(u, s, self.directory / file)
            self._checked.add(file)
        return u, s

    def _check_file(self, name: str) -> str:
        """The name of the layer's file, whose header is what the metadata say. Raises ArtifactError."""
        entry = self.metadata.layers[name]
        if name in self._checked:
            return entry["file"]
        path, of_file = self.directory / entry["file"], self.metadata.bases[entry["file"]]
        n, r = of_file["n"], of_file["rank"]
        found = _shapes(path)
        if found != {"U": (torch.float32, (n, r)), "S": (torch.float32, (r,))}:
            raise ArtifactError(f"{path} holds {_shown(found)}, where a basis of {n} inputs and rank {r} has U [{n}, {r}] and "
                                f"S [{r}] in float32; run phase 1 again")
        if of_file.get("bytes", path.stat().st_size) != path.stat().st_size:
            raise ArtifactError(f"{path} has {path.stat().st_size} bytes, but its metadata say {of_file['bytes']}; run phase "
                                "1 again")
        _check_layer_in_header(path, BASIS_FORMAT, name, "phase 1")
        self._checked.add(name)
        return entry["file"]

    def held(self, name: str) -> tuple[str, int]:
        """The file of the basis of the layer called ``name``, and the bytes that its fp32 ``rotation`` takes."""
        file = self._check_file(name)
        return file, Rotation.held_bytes(self.metadata.bases[file]["n"], self.metadata.bases[file]["rank"])

    def rotation(
        self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Rotation:
        """The complete basis of the layer called ``name``, made and held on ``device``."""
        columns, _ = self.columns(name)
        return Rotation(columns.to(device), columns.shape[0], dtype)

    def contents(self) -> Contents:
        """What ``fingerprint`` covers: every byte of the files, and the metadata but for seconds."""
        values = metadata_dict(self.metadata)
        for entry in values["bases"].values():
            entry.pop("seconds", None)
        return Contents(json.dumps(values, sort_keys=True),
                        {file: _whole(self.directory / file) for file in self.metadata.bases})

    def fingerprint(self, remember: bool = True) -> str:
        """64 hex digits over ``contents``; ``remember`` False reads every byte now."""
        contents = self.contents()
        return contents.fingerprint(contents.digests(remember))

    @property
    def layers(self) -> list[TargetLayer]:
        return _layers(self.metadata.layers)

    def check(self, layers: Iterable[TargetLayer], model_fingerprint: str | None, model_name: str) -> None:
        """ArtifactError naming both sides where the basis belongs to another model, layers or shapes, or a file's header
        contradicts the metadata."""
        _check_model(self.directory, self.metadata, model_fingerprint, model_name, "basis", "phase 1")
        layers = list(layers)
        _check_layers(self.directory, self.metadata.layers, layers, model_name, "basis", "phase 1")
        for layer in layers:
            self._check_file(layer.name)


class MaskStore:
    """Reads a masks directory, any rows of any layer at a time.

    Its metadata are checked when it is opened. The bits of the files are counted by ``fingerprint``, and so by ``check``:
    ArtifactError where they are not what the metadata say, so call one of them before ``packed``.
    """

    SCORES = "scores.json"

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.metadata: MasksMetadata = _read_metadata(self.directory, MasksMetadata, MASKS_FORMAT, "masks", "phase 2")
        try:
            _check_entries(self.metadata.layers)
            _check_promise(self.metadata)
        except SchemaError as error:
            raise ArtifactError(f"{self.directory / 'metadata.json'}: {error}; run phase 2 again") from error

    def packed(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Packed bits uint8 [last - first, ceil(n / 8)] of rows first to last - 1 of the layer called ``name``."""
        entry = self.metadata.layers[name]
        with _open(self.directory / entry["file"]) as file:
            return file.get_slice("frozen")[first : entry["shape"][0] if last is None else last]

    def scores(self) -> dict[str, Any] | None:
        """How the scores lie: bins_per_decade b; layer name -> {zeros, first, counts}, the counts of the bins that begin at
        10^(first / b), 10^((first + 1) / b) ... None where the masks have none: older ones, shrunk ones."""
        path = self.directory / self.SCORES
        if not path.is_file():
            return None
        found = read_strict_json(path)
        try:
            check_fields(found, Scores)
            if found["layers"].keys() != self.metadata.layers.keys() or found["bins_per_decade"] < 1:
                raise SchemaError("it is of other layers than the masks")
        except SchemaError as error:
            raise ArtifactError(f"{path}: {error}; run phase 2 again, or remove it") from error
        return found

    def contents(self) -> Contents:
        """What ``fingerprint`` covers: every byte of the masks, of the metadata and of the scores that lie beside them."""
        parts = {}
        for name, entry in self.metadata.layers.items():
            path, (m, n) = self.directory / entry["file"], entry["shape"]
            found = _shapes(path)
            if found != {"frozen": (torch.uint8, (m, (n + 7) // 8))}:
                raise ArtifactError(f"{path} holds {_shown(found)}, where a mask of {m} x {n} has frozen [{m}, {(n + 7) // 8}] "
                                    "in uint8; run phase 2 again")
            _check_layer_in_header(path, MASKS_FORMAT, name, "phase 2")
            parts[entry["file"]] = Part(str(path), 0, path.stat().st_size, header_of(path)["frozen"].offset, (n + 7) // 8, n)
        if (self.directory / self.SCORES).exists():
            parts[self.SCORES] = _whole(self.directory / self.SCORES)
        return Contents(json.dumps(metadata_dict(self.metadata), sort_keys=True), parts)

    def fingerprint(self, remember: bool = True) -> str:
        """64 hex digits over ``contents``; ``remember`` False reads every byte now.

        ArtifactError where the masks hold other bits than the metadata promise.
        """
        contents = self.contents()
        digests = contents.digests(remember)
        for entry, digest in zip(self.metadata.layers.values(), digests, strict=False):
            path = self.directory / entry["file"]
            if digest.bits != entry["frozen"]:
                raise ArtifactError(f"{path} freezes {digest.bits} coefficients, but its metadata promise {entry['frozen']}: "
                                    "the file was changed after it was made; run phase 2 again")
            if digest.beyond:
                raise ArtifactError(f"{path} sets {digest.beyond} bits beyond the {entry['shape'][1]} inputs of its layer: "
                                    "the file was changed after it was made; run phase 2 again")
        return contents.fingerprint(digests)

    def find_basis(self, given: str | Path | None = None) -> BasisStore | None:
        """The basis that the masks were made with: ``given``, the recorded one, or the run of its name beside the masks' run.

        None for the identity. Raises ArtifactError, naming the places, where it is in none of them.
        """
        if self.metadata.basis == "identity":
            return None
        if given is not None:
            return BasisStore(find_artifact(str(given), "basis", "."))
        places = self.basis_places()
        for place in places:
            if (place / "metadata.json").is_file():
                return BasisStore(place)
        raise ArtifactError(f"the masks in {self.directory} were made with a basis that is not in "
                            f"{' nor in '.join(map(str, places)) or 'any known place'}: give its directory with --basis_dir")

    def basis_places(self) -> list[Path]:
        """Where the basis lay when the masks were made, and where it lies if its run was moved together with theirs."""
        if self.metadata.basis_dir is None:
            return []
        recorded = Path(self.metadata.basis_dir)
        beside = self.directory.resolve().parent.parent / recorded.parent.name / "basis"
        return [recorded] if recorded == beside else [recorded, beside]

    def check(self, basis: BasisStore | None, model_fingerprint: str | None, model_name: str, remember: bool = True) -> None:
        """ArtifactError naming both sides where the masks belong to another model or basis, or are not what they promise."""
        _check_model(self.directory, self.metadata, model_fingerprint, model_name, "masks", "phase 2")
        self.fingerprint(remember)
        if basis is None:
            if self.metadata.basis != "identity":
                raise ArtifactError(f"the masks in {self.directory} were made with the basis in "
                                    f"{self.metadata.basis_dir}, which was not given; use --basis_dir")
            return
        found = basis.fingerprint(remember)
        if self.metadata.basis_fingerprint != found:
            raise ArtifactError(
                f"the masks in {self.directory} were made with the basis {str(self.metadata.basis_fingerprint)[:SHOWN]} (in "
                f"{self.metadata.basis_dir}), but {basis.directory} holds {found[:SHOWN]}: give the basis they "
                "belong to with --basis_dir, or run phase 2 again"
            )
        basis.check(self.layers, None, model_name)

    @property
    def layers(self) -> list[TargetLayer]:
        return _layers(self.metadata.layers)


def _layers(entries: Mapping[str, Mapping[str, Any]]) -> list[TargetLayer]:
    return [TargetLayer(name, e["layer"], e["type"], *e["shape"]) for name, e in entries.items()]


def layer_entry(layer: TargetLayer, file: str, **more: Any) -> Any:
    """A layer's entry in either metadata file."""
    return {"layer": layer.layer, "type": layer.type, "shape": [layer.m, layer.n], "file": file, **more}


def metadata_dict(metadata: BasisMetadata | MasksMetadata) -> dict[str, Any]:
    """What is written to metadata.json, format and version first."""
    values = asdict(metadata)
    return {"format": values.pop("format"), "version": values.pop("version"), **values}


def write_mask(directory: Path, layer: TargetLayer, packed: Tensor) -> None:
    """Writes the packed bits of one layer's mask, and whose they are."""
    write_tensors(directory / layer.mask_file, {"frozen": packed}, {MASKS_FORMAT: json.dumps({"layers": [layer.name]})})


class LayerScores(TypedDict):
    zeros: int
    first: int
    counts: list[int]


class Scores(TypedDict):
    """scores.json"""

    bins_per_decade: int
    layers: dict[str, LayerScores]


def _check_entries(entries: Mapping[str, LayerEntry] | Mapping[str, MaskedLayerEntry]) -> None:
    """What holds of the layers in either file. Raises SchemaError."""
    if not entries:
        raise SchemaError("it has no layers")
    seen: set[tuple[int, str]] = set()
    for name, entry in entries.items():
        place = (entry["layer"], entry["type"])
        if str(entry["layer"]) not in name.split(".") or not re.fullmatch("[a-z][a-z0-9_]*", entry["type"]) or place in seen:
            raise SchemaError(f"{name} cannot be the {entry['type']} of block {entry['layer']}")
        seen.add(place)
        if len(entry["shape"]) != 2 or min(entry["shape"]) < 1:
            raise SchemaError(f"{name} has shape {entry['shape']}")


def _check_promise(meta: MasksMetadata) -> None:
    """Files, counts and keep_ratio of the masks' metadata agree with one another. Raises SchemaError."""
    if not 0.0 <= meta.keep_ratio <= 1.0 or meta.scope not in ("layer", "global") or meta.unit not in (
            "entry", "row", "column", "neuron"):
        raise SchemaError(f"keep_ratio {meta.keep_ratio}, scope {meta.scope!r}, unit {meta.unit!r} is no mask of ours")
    if (meta.basis == "identity") != (meta.basis_fingerprint is None):
        raise SchemaError(f"basis {meta.basis!r} does not go with basis_fingerprint {meta.basis_fingerprint}")
    for layer in _layers(meta.layers):
        entry = meta.layers[layer.name]
        if entry["file"] != layer.mask_file:
            raise SchemaError(f"{layer.name} names the file {entry['file']}, not {layer.mask_file}")
        if not 0 <= entry["frozen"] <= layer.m * layer.n:
            raise SchemaError(f"{layer.name} has {entry['frozen']} of {layer.m * layer.n} coefficients frozen")
    sums = sum(e["frozen"] for e in meta.layers.values()), sum(layer.m * layer.n for layer in _layers(meta.layers))
    if sums != (meta.frozen, meta.entries):
        raise SchemaError(f"frozen and entries are {meta.frozen} and {meta.entries}, but the layers' add up to {sums}")
    whole = meta.scope == "global" or meta.unit == "neuron"
    groups = [list(meta.layers)] if whole else [[name] for name in meta.layers]
    for group in groups:
        _check_group(meta, group, whole)


def _check_group(meta: MasksMetadata, group: list[str], whole: bool) -> None:
    """The layers that one threshold was chosen for freeze round(keep_ratio x units), or fewer where a note says so."""
    per_unit = {}
    for name in group:
        m, n = meta.layers[name]["shape"]
        per_unit[name] = {"row": n, "column": m}.get(meta.unit, 1)
        if meta.layers[name]["frozen"] % per_unit[name]:
            raise SchemaError(f"{name} has {meta.layers[name]['frozen']} coefficients frozen, which are no whole {meta.unit}s")
    units = sum(meta.layers[name]["shape"][0] * meta.layers[name]["shape"][1] // per_unit[name] for name in group)
    wanted = frozen_count(meta.keep_ratio, units)
    got = sum(meta.layers[name]["frozen"] // per_unit[name] for name in group)
    where = f"all {len(group)} layers" if whole else group[0]
    if not whole and meta.layers[group[0]]["wanted"] != wanted * per_unit[group[0]]:
        raise SchemaError(f"{where} wants {meta.layers[group[0]]['wanted']} coefficients, but keep_ratio {meta.keep_ratio} "
                          f"makes {wanted * per_unit[group[0]]}")
    # An entry of score 0 is never frozen (section 2.5 of the method), and phase 2 notes where that makes fewer.
    said = any(f"only {got} of {wanted} wanted {meta.unit} units are frozen" in note for note in meta.notes)
    if got > wanted or (got < wanted and not said):
        raise SchemaError(f"{where}: {got} {meta.unit} units are frozen, but keep_ratio {meta.keep_ratio} promises {wanted}")


def _shapes(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in header_of(path).items()}


def _shown(found: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    return ", ".join(f"{ascii(name)[1:-1][:40]} {list(shape)} in {str(dtype).removeprefix('torch.')}"
                     for name, (dtype, shape) in list(found.items())[:5]) or "no tensor"


def _check_layer_in_header(path: Path, key: str, name: str, phase: str) -> None:
    """The file was written for the layer ``name``, where its header says for which: ArtifactError."""
    with _open(path) as file:
        metadata = file.metadata() or {}
    try:
        made_for = json.loads(metadata.get(key, "{}")).get("layers", [name])
        right = name in made_for
    except (ValueError, AttributeError, TypeError, RecursionError):
        made_for, right = "nothing readable", False
    if not right:
        raise ArtifactError(f"{path} was made for {ascii(made_for)[:200]}, but the metadata give it to {name}: files or names "
                            f"were swapped; run {phase} again")


def _check_basis(u: Tensor, s: Tensor, path: Path) -> None:
    """U is orthonormal and S a descending spectrum, or ArtifactError."""
    if not (torch.isfinite(u).all() and torch.isfinite(s).all()):
        raise ArtifactError(f"{path} holds NaN or infinities; run phase 1 again")
    if (s < 0).any() or (s[1:] > s[:-1]).any():
        raise ArtifactError(f"{path}: S is negative or does not descend; run phase 1 again")
    # As phase 1 measures it: by probes, and entry by entry where those are above the bar.
    if probed_orthogonality(u) > BAR and (error := orthogonality_error(u.double())) > BAR:
        raise ArtifactError(f"{path}: U is not orthonormal (an entry of its UᵀU - I is {error:.1e}, more than {BAR:g}); run "
                            "phase 1 again")


def _read_metadata(directory: Path, declared: Any, expected: str, kind: str, phase: str) -> Any:
    path = directory / "metadata.json"
    if not path.exists():
        raise ArtifactError(f"no {kind} in {directory} (no metadata.json there): run {phase} first, or give its "
                            f"directory with --{'basis' if kind == 'basis' else 'masks'}_dir")
    values = read_strict_json(path)
    marks = (values.get("format"), values.get("version")) if isinstance(values, dict) else (type(values).__name__, None)
    if marks == (expected, 1) and marks[1] is not True:
        raise ArtifactError(f"{path} was made by an earlier version of warp_ds, whose fingerprints do not cover every byte: "
                            f"run {phase} again")
    if marks != (expected, VERSION) or isinstance(marks[1], bool):
        raise ArtifactError(f"{path} is {ascii(marks)[:100]}, not {(expected, VERSION)}: it was written by another program or "
                            "version")
    try:
        check_fields(values, declared)
        for entry in (*values["layers"].values(), *({"file": file} for file in values.get("bases", ()))):
            # A name and nothing more: no directory, no way out of this one.
            if Path(entry["file"]).name != entry["file"] or entry["file"] in ("", ".", ".."):
                raise SchemaError(f"{ascii(entry['file'])} is no file of this directory")
    except SchemaError as error:
        raise ArtifactError(f"{path}: {error}; it is damaged or was edited: run {phase} again") from error
    return declared(**values)


def _open(path: Path) -> Any:
    try:
        if not is_regular(path):
            raise OSError("it is missing, or no regular file")
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); run the phase that wrote it again") from error


def _check_model(directory: Path, metadata: BasisMetadata | MasksMetadata, fingerprint: str | None, name: str,
                 kind: str, phase: str) -> None:
    if fingerprint is not None and metadata.model_fingerprint != fingerprint:
        raise ArtifactError(
            f"the {kind} in {directory} belong to the model {metadata.model_name} ({metadata.model_fingerprint[:SHOWN]}), "
            f"not to {name} ({fingerprint[:SHOWN]}): give that model, or run {phase} on this one"
        )


def _check_layers(directory: Path, entries: Mapping[str, Mapping[str, Any]], layers: Iterable[TargetLayer],
                  model_name: str, kind: str, phase: str) -> None:
    for layer in layers:
        entry = entries.get(layer.name)
        if entry is None:
            raise ArtifactError(f"the {kind} in {directory} has no layer {layer.name}: it was made for "
                                f"{_summary(entries)}; run {phase} with the layers wanted now")
        if list(entry["shape"]) != [layer.m, layer.n]:
            raise ArtifactError(f"the {kind} in {directory} has {layer.name} as {entry['shape']}, but {model_name} has "
                                f"{[layer.m, layer.n]}: it belongs to another model")


def _summary(entries: Mapping[str, Mapping[str, Any]]) -> str:
    types = sorted({e["type"] for e in entries.values()})
    blocks = sorted({e["layer"] for e in entries.values()})
    return f"{', '.join(types)} of blocks {blocks[0]}-{blocks[-1]}" if entries else "no layers"


# ---------------------------------------------------------------- run directories


def newest(output_dir: str | Path, phase: str) -> Path | None:
    """The newest finished run of ``phase`` ('phase1') under ``output_dir``: itself, not the link that follows runs."""
    found = (p.parent for p in Path(output_dir).glob("*/finished.json") if not p.parent.is_symlink())
    finished = [run for run in found if phase_of(run) == phase]
    return next(iter(newest_first(finished, "finished.json", "finished_at")), None)


CLOCKS = timedelta(minutes=5)
"""By which the clocks of hosts may differ."""


def written_at(path: Path) -> float:
    """When a file was written, in seconds, by the file system; 0 where that has not come yet."""
    try:
        written = path.stat().st_mtime
    except OSError:
        return 0.0
    return written if written < time.time() + CLOCKS.total_seconds() else 0.0


def newest_first(runs: Iterable[Path], file: str, key: str) -> list[Path]:
    """By the time that each run's ``file`` has under ``key``, and by name where two are the same.

    Not by the files' own times, which copying and touching change. A run that recorded none, or one that has not come yet,
    says nothing about when it was: it comes last.
    """
    latest = datetime.now().astimezone() + CLOCKS

    def when(run: Path) -> tuple[bool, float, str]:
        try:
            recorded = datetime.fromisoformat(read_json(run / file)[key]).astimezone()
            known = recorded <= latest
        except (ArtifactError, ValueError, TypeError, KeyError, IndexError, OverflowError, OSError):
            known = False
        return known, recorded.timestamp() if known else 0.0, run.name

    return sorted(runs, key=when, reverse=True)


def phase_of(run: Path) -> str | None:
    """'phase3', say; None where ``run`` is no run's directory."""
    return run_config(run).get("phase")


def is_run(directory: Path) -> bool:
    """Whether ``directory`` is a run's: a model's directory, say, has a config.json too."""
    config = run_config(directory)
    return isinstance(config.get("phase"), str) and isinstance(config.get("identity"), str)


def run_config(run: Path) -> dict[str, Any]:
    """A run's config.json; empty where ``run`` is no run's directory, or is another user's, which is said."""
    try:
        found = read_json(run / "config.json")
    except ArtifactError as error:
        if isinstance(error.__cause__, PermissionError):
            logger.warning("%s is another user's, and its config.json is for its owner alone (chmod g+r): it is passed over; "
                           "its basis or masks can be named with --basis_dir or --masks_dir", run)
        return {}
    return found if isinstance(found, dict) else {}


def find_artifact(given: str | None, kind: str, output_dir: str | Path) -> Path:
    """Where the 'basis' or 'masks' lie: ``given``, or the newest finished run's.

    Takes the artefact's directory, its run directory, and the original project's spelling
    (phase1_…/checkpoints/basis). Raises ArtifactError with the cure where there is none.
    """
    phase = {"basis": "phase1", "masks": "phase2"}[kind]
    if given is None:
        run = newest(output_dir, phase)
        if run is None:
            raise ArtifactError(f"no finished {phase} under {output_dir}: run launch/{phase}.py first, or give "
                                f"--{kind}_dir")
        return run / kind
    path = Path(given)
    original = Path(re.sub(rf"/checkpoints/({kind})/?$", r"/\1", str(path)))
    for candidate in (path, original, path / kind):
        if (candidate / "metadata.json").is_file():
            return candidate
    raise ArtifactError(f"no {kind} in {given} (no metadata.json there): run launch/{phase}.py first, or check --{kind}_dir")


def path_of_run(config: Mapping[str, Any], name: str) -> Path:
    """What a setting in a run's config.json names: a relative path starts where the run was started."""
    path = Path(config.get("working_directory", ""), Path(name).expanduser())
    return path if path.exists() else Path(name)
