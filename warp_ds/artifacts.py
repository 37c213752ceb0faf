"""The files that phases hand to one another, and the run directories they lie in (section 5 of the design).

Every file appears under its final name only when whole: written aside, fsynced, renamed. Nothing is unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from warp_ds.held import check_there
from warp_ds.method.rotation import Rotation
from warp_ds.secrets import redact

BASIS_FORMAT, MASKS_FORMAT, VERSION = "warp_ds.basis", "warp_ds.masks", 1


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


def fingerprint_files(paths: Iterable[Path], sample: int = 1 << 16) -> str:
    """16 hex digits from each file's name, size and three samples of ``sample`` bytes: cheap at any size."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=lambda p: p.name):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with open(path, "rb") as file:
            for offset in sorted({0, max(0, size // 2 - sample // 2), max(0, size - sample)}):
                file.seek(offset)
                digest.update(file.read(sample))
    return digest.hexdigest()[:16]


def fingerprint_model(directory: Path) -> str:
    """Fingerprint of a model's weights and shapes: its files wherever they lie, whatever their directory is called."""
    weights = [p for pattern in ("*.safetensors", "*.bin") for p in directory.glob(pattern)]
    if not weights:
        raise ArtifactError(f"{directory} holds no model weights (*.safetensors)")
    config = read_json(directory / "config.json")
    for volatile in ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache"):
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    digest.update(fingerprint_files(weights).encode())
    return digest.hexdigest()[:16]


def fingerprint_rows(rows: Iterable[Any]) -> str:
    """Fingerprint of a data set's rows."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------- bases and masks


@dataclass
class BasisMetadata:
    """basis/metadata.json"""

    basis: str
    model_fingerprint: str
    data_fingerprint: str
    token_scope: str
    model_name: str
    tokens: int
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """module name -> {layer, type, shape: [m, n], file}; layers that see the same input name the same file"""
    bases: dict[str, dict[str, Any]] = field(default_factory=dict)
    """file -> {n, rank, tokens, energy, orthogonality_error, residual, seconds, bytes, ...}"""
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
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """module name -> {layer, type, shape: [m, n], file, frozen, wanted, threshold}"""
    frozen: int = 0
    entries: int = 0
    notes: list[str] = field(default_factory=list)
    format: str = MASKS_FORMAT
    version: int = VERSION


class BasisStore:
    """Reads a basis directory. Every reader of the same directory gets the same rotation."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.metadata = BasisMetadata(**_read_metadata(self.directory, BASIS_FORMAT, "basis", "phase 1"))

    def columns(self, name: str) -> tuple[Tensor, Tensor]:
        """U [n, r] and S [r] (descending), fp32, of the layer called ``name``."""
        entry = self.metadata.layers[name]
        with _open(self.directory / entry["file"]) as file:
            u, s = file.get_tensor("U"), file.get_tensor("S")
        n = entry["shape"][1]
        if u.shape[0] != n or u.shape[1] > n or s.shape != u.shape[1:]:
            raise ArtifactError(f"{self.directory / entry['file']}: U {tuple(u.shape)} and S {tuple(s.shape)} do not "
                                f"fit a layer of {n} inputs; run phase 1 again")
        return u, s

    def held(self, name: str) -> tuple[str, int]:
        """The file of the basis of the layer called ``name``, and the bytes that its fp32 ``rotation`` takes."""
        file = self.metadata.layers[name]["file"]
        with _open(self.directory / file) as opened:
            n, r = opened.get_slice("U").get_shape()
        return file, Rotation.held_bytes(n, r)

    def rotation(
        self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> Rotation:
        """The complete basis of the layer called ``name``, made and held on ``device``."""
        columns, _ = self.columns(name)
        return Rotation(columns.to(device), columns.shape[0], dtype)

    def fingerprint(self) -> str:
        return fingerprint_files([self.directory / file for file in self.metadata.bases])

    @property
    def layers(self) -> list[TargetLayer]:
        return _layers(self.metadata.layers)

    def check(self, layers: Iterable[TargetLayer], model_fingerprint: str | None, model_name: str) -> None:
        """ArtifactError naming both sides where the basis belongs to another model, layers or shapes."""
        _check_model(self.directory, self.metadata, model_fingerprint, model_name, "basis", "phase 1")
        _check_layers(self.directory, self.metadata.layers, layers, model_name, "basis", "phase 1")


class MaskStore:
    """Reads a masks directory, any rows of any layer at a time."""

    SCORES = "scores.json"

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.metadata = MasksMetadata(**_read_metadata(self.directory, MASKS_FORMAT, "masks", "phase 2"))

    def packed(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Packed bits uint8 [last - first, ceil(n / 8)] of rows first to last - 1 of the layer called ``name``."""
        entry = self.metadata.layers[name]
        m, n = entry["shape"]
        with _open(self.directory / entry["file"]) as file:
            rows = file.get_slice("frozen")
            if list(rows.get_shape()) != [m, (n + 7) // 8]:
                raise ArtifactError(f"{self.directory / entry['file']}: 'frozen' is {rows.get_shape()}, but a layer "
                                    f"of {m} x {n} wants {[m, (n + 7) // 8]}; run phase 2 again")
            return rows[first : m if last is None else last]

    def scores(self) -> dict[str, Any] | None:
        """How the scores lie: bins_per_decade b; layer name -> {zeros, first, counts}, the counts of the bins that begin at
        10^(first / b), 10^((first + 1) / b) ... None where the masks have none: older ones, shrunk ones."""
        path = self.directory / self.SCORES
        return read_json(path) if path.is_file() else None

    def fingerprint(self) -> str:
        return fingerprint_files([self.directory / entry["file"] for entry in self.metadata.layers.values()])

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

    def check(self, basis: BasisStore | None, model_fingerprint: str | None, model_name: str) -> None:
        """ArtifactError naming both sides where the masks belong to another model or basis."""
        _check_model(self.directory, self.metadata, model_fingerprint, model_name, "masks", "phase 2")
        if basis is None:
            if self.metadata.basis != "identity":
                raise ArtifactError(f"the masks in {self.directory} were made with the basis in "
                                    f"{self.metadata.basis_dir}, which was not given; use --basis_dir")
            return
        if self.metadata.basis_fingerprint != basis.fingerprint():
            raise ArtifactError(
                f"the masks in {self.directory} were made with the basis {self.metadata.basis_fingerprint} (in "
                f"{self.metadata.basis_dir}), but {basis.directory} holds {basis.fingerprint()}: give the basis they "
                "belong to with --basis_dir, or run phase 2 again"
            )

    @property
    def layers(self) -> list[TargetLayer]:
        return _layers(self.metadata.layers)


def _layers(entries: Mapping[str, Mapping[str, Any]]) -> list[TargetLayer]:
    return [TargetLayer(name, e["layer"], e["type"], *e["shape"]) for name, e in entries.items()]


def layer_entry(layer: TargetLayer, file: str, **more: Any) -> dict[str, Any]:
    """A layer's entry in either metadata file."""
    return {"layer": layer.layer, "type": layer.type, "shape": [layer.m, layer.n], "file": file, **more}


def metadata_dict(metadata: BasisMetadata | MasksMetadata) -> dict[str, Any]:
    """What is written to metadata.json, format and version first."""
    values = asdict(metadata)
    return {"format": values.pop("format"), "version": values.pop("version"), **values}


def _read_metadata(directory: Path, expected: str, kind: str, phase: str) -> dict[str, Any]:
    path = directory / "metadata.json"
    if not path.is_file():
        raise ArtifactError(f"no {kind} in {directory} (no metadata.json there): run {phase} first, or give its "
                            f"directory with --{'basis' if kind == 'basis' else 'masks'}_dir")
    values = read_json(path)
    if not isinstance(values, dict) or values.get("format") != expected or values.get("version") != VERSION:
        found = (values.get("format"), values.get("version")) if isinstance(values, dict) else type(values).__name__
        raise ArtifactError(f"{path} is {found}, not {(expected, VERSION)}: it was written by another program or version")
    return values


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); run the phase that wrote it again") from error


def _check_model(directory: Path, metadata: BasisMetadata | MasksMetadata, fingerprint: str | None, name: str,
                 kind: str, phase: str) -> None:
    if fingerprint is not None and metadata.model_fingerprint != fingerprint:
        raise ArtifactError(
            f"the {kind} in {directory} belong to the model {metadata.model_name} ({metadata.model_fingerprint}), "
            f"not to {name} ({fingerprint}): give that model, or run {phase} on this one"
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
    """A run's config.json; empty where ``run`` is no run's directory."""
    try:
        found = read_json(run / "config.json")
    except ArtifactError:
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
