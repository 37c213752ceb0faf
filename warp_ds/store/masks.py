"""masks/: the masks of phase 2, their metadata, and what those promise."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from warp_ds.errors import ArtifactError
from warp_ds.method.mask import frozen_count, unpack_bits
from warp_ds.store.bases import BasisStore
from warp_ds.store.digests import Part
from warp_ds.store.files import read_json, write_tensors
from warp_ds.store.fingerprints import SHOWN, Contents, header_of, whole_part
from warp_ds.store.layers import SCOPES, TargetLayer, scope_groups
from warp_ds.store.metadata import (
    MASKS_FORMAT,
    MasksMetadata,
    check_entries,
    check_layer_in_header,
    check_model,
    layers_of,
    metadata_dict,
    open_tensors,
    read_metadata,
    shapes_in,
    shown,
)
from warp_ds.store.runs import find_artifact
from warp_ds.store.schema import SchemaError, check_fields


class MaskStore:
    """Reads a masks directory, any rows of any layer at a time.

    Its metadata are checked when it is opened. The bits of the files are counted by ``fingerprint``, and so by ``check``:
    ArtifactError where they are not what the metadata say, so call one of them before ``packed``.
    """

    SCORES = "scores.json"

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.metadata: MasksMetadata = read_metadata(self.directory, MasksMetadata, MASKS_FORMAT, "masks", "phase 2")
        try:
            check_entries(self.metadata.layers)
            _check_promise(self.metadata)
        except SchemaError as error:
            raise ArtifactError(f"{self.directory / 'metadata.json'}: {error}; run phase 2 again") from error

    def packed(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Packed bits uint8 [last - first, ceil(n / 8)] of rows first to last - 1 of the layer called ``name``."""
        entry = self.metadata.layers[name]
        with open_tensors(self.directory / entry["file"]) as file:
            return file.get_slice("frozen")[first : entry["shape"][0] if last is None else last]

    def columns(self, name: str) -> Tensor:
        """Packed bits uint8 [1, ceil(n / 8)] of the columns that a mask of whole columns freezes in the layer called ``name``.

        ArtifactError where it is no such mask. Whether every row is the same is seen by who reads all of them.
        """
        first, entry = self.packed(name, 0, 1), self.metadata.layers[name]
        m, n = entry["shape"]
        if self.metadata.unit != "column" or int(unpack_bits(first, n).sum()) * m != entry["frozen"]:
            raise ArtifactError(
                f"{self.directory / entry['file']} is no mask of whole columns; run phase 2 with --mask_unit column (or row)"
            )
        return first

    def rows(self, name: str) -> Tensor:
        """bool [m]: the rows that a mask of whole rows freezes in the layer called ``name``.

        ArtifactError where it is no such mask. Whether every column is the same is seen by who reads all of them.
        """
        entry = self.metadata.layers[name]
        m, n = entry["shape"]
        with open_tensors(self.directory / entry["file"]) as file:
            first = unpack_bits(file.get_slice("frozen")[:, :1], min(n, 8))[:, 0]
        if self.metadata.unit != "row" or int(first.sum()) * n != entry["frozen"]:
            raise ArtifactError(f"{self.directory / entry['file']} is no mask of whole rows; run phase 2 with --mask_unit row")
        return first

    def scores(self) -> dict[str, Any] | None:
        """How the scores lie: bins_per_decade b; layer name -> {zeros, first, counts}, the counts of the bins that begin at
        10^(first / b), 10^((first + 1) / b) ... None where the masks have none: older ones, shrunk ones."""
        path = self.directory / self.SCORES
        if not path.is_file():
            return None
        scores = read_json(path, finite=True)
        try:
            check_fields(scores, Scores)
            if scores["layers"].keys() != self.metadata.layers.keys() or scores["bins_per_decade"] < 1:
                raise SchemaError("it is of other layers than the masks")
        except SchemaError as error:
            raise ArtifactError(f"{path}: {error}; run phase 2 again, or remove it") from error
        return scores

    def contents(self) -> Contents:
        """What ``fingerprint`` covers: every byte of the masks, of the metadata and of the scores that lie beside them."""
        parts = {}
        for name, entry in self.metadata.layers.items():
            path, (m, n) = self.directory / entry["file"], entry["shape"]
            shapes = shapes_in(path)
            if shapes != {"frozen": (torch.uint8, (m, (n + 7) // 8))}:
                raise ArtifactError(
                    f"{path} holds {shown(shapes)}, where a mask of {m} x {n} has frozen [{m}, {(n + 7) // 8}] "
                    "in uint8; run phase 2 again"
                )
            check_layer_in_header(path, MASKS_FORMAT, name, "phase 2")
            parts[entry["file"]] = Part(str(path), 0, path.stat().st_size, header_of(path)["frozen"].offset, (n + 7) // 8, n)
        if (self.directory / self.SCORES).exists():
            parts[self.SCORES] = whole_part(self.directory / self.SCORES)
        return Contents(json.dumps(metadata_dict(self.metadata), sort_keys=True), parts)

    def fingerprint(self) -> str:
        """64 hex digits over ``contents``. ArtifactError where the masks hold other bits than the metadata promise."""
        contents = self.contents()
        digests = contents.digests()
        for entry, digest in zip(self.metadata.layers.values(), digests, strict=False):
            path = self.directory / entry["file"]
            if digest.bits != entry["frozen"]:
                raise ArtifactError(
                    f"{path} freezes {digest.bits} coefficients, but its metadata promise {entry['frozen']}: "
                    "the file was changed after it was made; run phase 2 again"
                )
            if digest.beyond:
                raise ArtifactError(
                    f"{path} sets {digest.beyond} bits beyond the {entry['shape'][1]} inputs of its layer: "
                    "the file was changed after it was made; run phase 2 again"
                )
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
        raise ArtifactError(
            f"the masks in {self.directory} were made with a basis that is not in "
            f"{' nor in '.join(map(str, places)) or 'any known place'}: give its directory with --basis_dir"
        )

    def basis_places(self) -> list[Path]:
        """Where the basis lay when the masks were made, and where it lies if its run was moved together with theirs."""
        if self.metadata.basis_dir is None:
            return []
        recorded = Path(self.metadata.basis_dir)
        beside = self.directory.resolve().parent.parent / recorded.parent.name / "basis"
        return [recorded] if recorded == beside else [recorded, beside]

    def check(self, basis: BasisStore | None, model_fingerprint: str | None, model_name: str) -> None:
        """ArtifactError naming both sides where the masks belong to another model or basis, or are not what they promise."""
        check_model(self.directory, self.metadata, model_fingerprint, model_name, "masks", "phase 2")
        self.fingerprint()
        if basis is None:
            if self.metadata.basis != "identity":
                raise ArtifactError(
                    f"the masks in {self.directory} were made with the basis in "
                    f"{self.metadata.basis_dir}, which was not given; use --basis_dir"
                )
            return
        fingerprint = basis.fingerprint()
        if self.metadata.basis_fingerprint != fingerprint:
            raise ArtifactError(
                f"the masks in {self.directory} were made with the basis {str(self.metadata.basis_fingerprint)[:SHOWN]} (in "
                f"{self.metadata.basis_dir}), but {basis.directory} holds {fingerprint[:SHOWN]}: give the basis they "
                "belong to with --basis_dir, or run phase 2 again"
            )
        basis.check(self.layers, None, model_name)

    @property
    def layers(self) -> list[TargetLayer]:
        return layers_of(self.metadata.layers)


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


def _check_promise(meta: MasksMetadata) -> None:
    """Files, counts and keep_ratio of the masks' metadata agree with one another. Raises SchemaError."""
    if not 0.0 <= meta.keep_ratio <= 1.0 or meta.scope not in SCOPES or meta.unit not in ("entry", "row", "column", "neuron"):
        raise SchemaError(f"keep_ratio {meta.keep_ratio}, scope {meta.scope!r}, unit {meta.unit!r} is no mask of ours")
    if (meta.basis == "identity") != (meta.basis_fingerprint is None):
        raise SchemaError(f"basis {meta.basis!r} does not go with basis_fingerprint {meta.basis_fingerprint}")
    for layer in layers_of(meta.layers):
        entry = meta.layers[layer.name]
        if entry["file"] != layer.mask_file:
            raise SchemaError(f"{layer.name} names the file {entry['file']}, not {layer.mask_file}")
        if not 0 <= entry["frozen"] <= layer.m * layer.n:
            raise SchemaError(f"{layer.name} has {entry['frozen']} of {layer.m * layer.n} coefficients frozen")
    sums = sum(e["frozen"] for e in meta.layers.values()), sum(layer.m * layer.n for layer in layers_of(meta.layers))
    if sums != (meta.frozen, meta.entries):
        raise SchemaError(f"frozen and entries are {meta.frozen} and {meta.entries}, but the layers' add up to {sums}")
    whole = meta.scope == "global" or meta.unit == "neuron"
    layers = layers_of(meta.layers)
    for group in scope_groups(layers, "global" if whole else meta.scope):
        _check_group(meta, [layers[index].name for index in group], whole)


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
    where = f"all {len(group)} layers" if len(group) > 1 else group[0]
    if len(group) == 1 and not whole and meta.layers[group[0]]["wanted"] != wanted * per_unit[group[0]]:
        raise SchemaError(
            f"{where} wants {meta.layers[group[0]]['wanted']} coefficients, but keep_ratio {meta.keep_ratio} "
            f"makes {wanted * per_unit[group[0]]}"
        )
    # An entry of score 0 is never frozen, and phase 2 notes where that makes fewer.
    said = any(f"only {got} of {wanted} wanted {meta.unit} units are frozen" in note for note in meta.notes)
    if got > wanted or (got < wanted and not said):
        raise SchemaError(f"{where}: {got} {meta.unit} units are frozen, but keep_ratio {meta.keep_ratio} promises {wanted}")
