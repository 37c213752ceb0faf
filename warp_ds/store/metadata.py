"""metadata.json of a basis and of masks: its fields, and what must hold of them.

Nothing is unpickled; a file that was edited or belongs to something else is refused with the cure.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open

from warp_ds.errors import ArtifactError
from warp_ds.store.files import read_json
from warp_ds.store.fingerprints import SHOWN, header_of
from warp_ds.store.layers import TargetLayer
from warp_ds.store.schema import SchemaError, check_fields

AT_STEP = "importance at step "
"""What the score of masks begins with that were found during training."""
BASIS_FORMAT, MASKS_FORMAT, VERSION = "warp_ds.basis", "warp_ds.masks", 2


# ---------------------------------------------------------------- bases and masks


class RowsEntry(TypedDict, total=False):
    """Of a layer that is some rows of a parameter."""

    rows: list[list[int]]
    """[first, end] of each range of them, ascending, ..."""
    height: int
    """... and the rows of the whole parameter."""
    stored: str
    """The parameter's name, where it is not the weight of the module that the layer's name begins with."""


class OutputEntry(TypedDict, total=False):
    """Of a layer with a basis of its outputs too."""

    output: str
    """The file of V [m, q], the layer's own; either every layer has one or none."""


class LayerEntry(RowsEntry, OutputEntry):
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
BasisEntry = TypedDict(
    "BasisEntry",
    {
        "n": int,
        "rank": int,
        "tokens": int,
        "energy": float,
        "orthogonality_error": float,
        "residual": float,
        "from": str,
        "seconds": float | None,
        "bytes": int,
    },
    total=False,
)


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

    @property
    def since_step(self) -> int:
        """The optimizer step of a training that they were found after, and hold from; 0: they were found before any."""
        match = re.fullmatch(re.escape(AT_STEP) + r"(\d{1,12})", self.score, re.ASCII)
        return int(match[1]) if match else 0


def layers_of(entries: Mapping[str, Mapping[str, Any]]) -> list[TargetLayer]:
    return [
        TargetLayer(
            name,
            e["layer"],
            e["type"],
            m=e["shape"][0],
            n=e["shape"][1],
            rows=tuple((first, end) for first, end in e.get("rows", ())),
            height=e.get("height", 0),
            stored=e.get("stored", ""),
        )
        for name, e in entries.items()
    ]


def layer_entry(layer: TargetLayer, file: str, **more: Any) -> Any:
    """A layer's entry in either metadata file."""
    entry = {"layer": layer.layer, "type": layer.type, "shape": list(layer.shape), "file": file}
    if layer.rows:
        entry.update(rows=[list(part) for part in layer.rows], height=layer.height)
    if layer.stored:
        entry["stored"] = layer.stored
    return {**entry, **more}


def metadata_dict(metadata: BasisMetadata | MasksMetadata) -> dict[str, Any]:
    """What is written to metadata.json, format and version first."""
    values = asdict(metadata)
    return {"format": values.pop("format"), "version": values.pop("version"), **values}


def check_entries(entries: Mapping[str, LayerEntry] | Mapping[str, MaskedLayerEntry]) -> None:
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
        _check_rows(name, entry)
    _check_apart(entries)


def _check_rows(name: str, entry: Mapping[str, Any]) -> None:
    """The rows that a layer is, of a parameter of more, are as many as its shape says. Raises SchemaError."""
    rows, height = entry.get("rows"), entry.get("height")
    if rows is None and height is None:
        return
    if not rows or height is None or any(len(part) != 2 for part in rows):
        raise SchemaError(f"{name} is rows {rows} of {height}")
    ends = [0, *(end for part in rows for end in part)]
    if sorted(ends) != ends or any(first == end for first, end in rows) or ends[-1] > height:
        raise SchemaError(f"{name} is rows {rows} of {height}: no ascending ranges of them")
    if (count := sum(end - first for first, end in rows)) != entry["shape"][0]:
        raise SchemaError(f"{name} has shape {entry['shape']}, but is {count} rows of its parameter")


def _check_apart(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """No row of a parameter belongs to two layers, and all layers of one say the same of it. Raises SchemaError."""
    of_parameter: dict[str, list[TargetLayer]] = {}
    for layer in layers_of(entries):
        of_parameter.setdefault(layer.parameter, []).append(layer)
    for parameter, layers in of_parameter.items():
        if len({layer.whole_shape for layer in layers}) > 1 or (len(layers) > 1 and not all(layer.rows for layer in layers)):
            raise SchemaError(f"{' and '.join(layer.name for layer in layers[:2])} are {parameter}, of different shapes")
        rows = sorted(part for layer in layers for part in layer.rows)
        if any(second[0] < first[1] for first, second in pairwise(rows)):
            raise SchemaError(f"two layers have the same rows of {parameter}")


def shapes_in(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in header_of(path).items()}


def shown(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> str:
    return (
        ", ".join(
            f"{ascii(name)[1:-1][:40]} {list(shape)} in {str(dtype).removeprefix('torch.')}"
            for name, (dtype, shape) in list(tensors.items())[:5]
        )
        or "no tensor"
    )


def check_layer_in_header(path: Path, key: str, name: str, phase: str) -> None:
    """The file was written for the layer ``name``, where its header says for which: ArtifactError."""
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
    try:
        made_for = json.loads(metadata.get(key, "{}")).get("layers", [name])
        right = name in made_for
    except (ValueError, AttributeError, TypeError, RecursionError):
        made_for, right = "nothing readable", False
    if not right:
        raise ArtifactError(
            f"{path} was made for {ascii(made_for)[:200]}, but the metadata give it to {name}: files or names "
            f"were swapped; run {phase} again"
        )


def read_metadata(directory: Path, declared: Any, expected: str, kind: str, phase: str) -> Any:
    path = directory / "metadata.json"
    if not path.exists():
        raise ArtifactError(
            f"no {kind} in {directory} (no metadata.json there): run {phase} first, or give its "
            f"directory with --{'basis' if kind == 'basis' else 'masks'}_dir"
        )
    values = read_json(path, finite=True)
    marks = (values.get("format"), values.get("version")) if isinstance(values, dict) else (type(values).__name__, None)
    if marks == (expected, 1) and marks[1] is not True:
        raise ArtifactError(
            f"{path} was made by an earlier version of warp_ds, whose fingerprints do not cover every byte: run {phase} again"
        )
    if marks != (expected, VERSION) or isinstance(marks[1], bool):
        raise ArtifactError(
            f"{path} is {ascii(marks)[:100]}, not {(expected, VERSION)}: it was written by another program or version"
        )
    try:
        check_fields(values, declared)
        for entry in (*values["layers"].values(), *({"file": file} for file in values.get("bases", ()))):
            # A name and nothing more: no directory, no way out of this one.
            if Path(entry["file"]).name != entry["file"] or entry["file"] in ("", ".", ".."):
                raise SchemaError(f"{ascii(entry['file'])} is no file of this directory")
    except SchemaError as error:
        raise ArtifactError(f"{path}: {error}; it is damaged or was edited: run {phase} again") from error
    return declared(**values)


def open_tensors(path: Path) -> Any:
    try:
        if not os.path.isfile(path):
            raise OSError("it is missing, or no regular file")
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); run the phase that wrote it again") from error


def check_model(
    directory: Path, metadata: BasisMetadata | MasksMetadata, fingerprint: str | None, name: str, kind: str, phase: str
) -> None:
    if fingerprint is not None and metadata.model_fingerprint != fingerprint:
        raise ArtifactError(
            f"the {kind} in {directory} belong to the model {metadata.model_name} ({metadata.model_fingerprint[:SHOWN]}), "
            f"not to {name} ({fingerprint[:SHOWN]}): give that model, or run {phase} on this one"
        )


def check_layers(
    directory: Path,
    entries: Mapping[str, Mapping[str, Any]],
    layers: Iterable[TargetLayer],
    model_name: str,
    kind: str,
    phase: str,
) -> None:
    known = {layer.name: layer for layer in layers_of(entries)}
    for layer in layers:
        entry = entries.get(layer.name)
        if entry is None:
            raise ArtifactError(
                f"the {kind} in {directory} has no layer {layer.name}: it was made for "
                f"{summary(entries)}; run {phase} with the layers wanted now"
            )
        if list(entry["shape"]) != list(layer.shape):
            raise ArtifactError(
                f"the {kind} in {directory} has {layer.name} as {entry['shape']}, but {model_name} has "
                f"{list(layer.shape)}: it belongs to another model"
            )
        if known[layer.name] != layer:
            raise ArtifactError(
                f"the {kind} in {directory} has {layer.name} as other rows of {layer.parameter} than {model_name} has: it "
                "belongs to another model"
            )


def summary(entries: Mapping[str, Mapping[str, Any]]) -> str:
    types = sorted({e["type"] for e in entries.values()})
    blocks = sorted({e["layer"] for e in entries.values()})
    return f"{', '.join(types)} of blocks {blocks[0]}-{blocks[-1]}" if entries else "no layers"
