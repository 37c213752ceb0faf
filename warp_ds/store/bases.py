"""basis/: the bases of phase 1 and their metadata."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from warp_ds.errors import ArtifactError
from warp_ds.method.eigenbasis import BAR, orthogonality_error, probed_orthogonality
from warp_ds.method.rotation import Rotation
from warp_ds.method.two_sided import TwoSided
from warp_ds.store.fingerprints import Contents, whole_part
from warp_ds.store.layers import TargetLayer
from warp_ds.store.metadata import (
    BASIS_FORMAT,
    BasisMetadata,
    LayerEntry,
    check_entries,
    check_layer_in_header,
    check_layers,
    check_model,
    layers_of,
    metadata_dict,
    open_tensors,
    read_metadata,
    shapes_in,
    shown,
)
from warp_ds.store.schema import SchemaError

PIECE = 1 << 20
"""Elements of a file that ``chosen`` reads at once."""
OUTPUT = "_output_svd.safetensors"
"""How the name of a file of V ends."""


class BasisStore:
    """Reads a basis directory. Every reader of the same directory gets the same rotation.

    Whatever its metadata say is checked when it is opened, each file when it is first read: ArtifactError where one
    contradicts the other, or U is not orthonormal within ``method.eigenbasis.BAR``.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.metadata: BasisMetadata = read_metadata(self.directory, BasisMetadata, BASIS_FORMAT, "basis", "phase 1")
        self._checked: set[str] = set()
        """Layers whose file's header was looked at, and files whose U and S were."""
        try:
            self._check_metadata()
        except SchemaError as error:
            raise ArtifactError(f"{self.directory / 'metadata.json'}: {error}; run phase 1 again") from error

    def _check_metadata(self) -> None:
        meta = self.metadata
        check_entries(meta.layers)
        outputs = {name: entry["output"] for name, entry in meta.layers.items() if "output" in entry}
        if {entry["file"] for entry in meta.layers.values()} | {*outputs.values()} != meta.bases.keys():
            raise SchemaError("the files that 'layers' names are not those of 'bases'")
        if outputs and len({*outputs.values()}) < len(meta.layers):
            raise SchemaError("not every layer has a basis of its own outputs, as all have where one has")
        for name, entry in meta.layers.items():
            self._check_named(name, entry, entry["file"], entry["shape"][1], "inputs")
            if name in outputs:
                self._check_named(name, entry, outputs[name], entry["shape"][0], "outputs")
        if meta.tokens < 0:
            raise SchemaError(f"tokens is {meta.tokens}")

    def _check_named(self, name: str, entry: LayerEntry, file: str, size: int, of: str) -> None:
        """The file of a layer's ``of``, of which there are ``size``, is what its metadata say. Raises SchemaError."""
        of_file = self.metadata.bases[file]
        if not 0 <= of_file.get("rank", -1) <= of_file.get("n", -1) == size:
            raise SchemaError(f"{name} has {size} {of}, but {file} says n {of_file.get('n')}, rank {of_file.get('rank')}")
        kind = "" if of == "inputs" else "_output"
        if not re.fullmatch(rf"layer_{entry['layer']:02d}_[a-z0-9_]+{kind}_svd\.safetensors", file):
            raise SchemaError(f"{name}, a layer of block {entry['layer']}, names the file {file}")

    @property
    def two_sided(self) -> bool:
        """Whether its layers have a basis of their outputs too, so that C = Vᵀ W U."""
        return any("output" in entry for entry in self.metadata.layers.values())

    def columns(self, name: str) -> tuple[Tensor, Tensor]:
        """U [n, r] and S [r] (descending), fp32, of the layer called ``name``."""
        return self._read(name, self._check_file(name))

    def output_columns(self, name: str) -> tuple[Tensor, Tensor]:
        """V [m, q] and its eigenvalues [q] (descending), fp32, of the outputs of the layer called ``name``."""
        self._check_file(name)
        return self._read(name, self.metadata.layers[name]["output"])

    def _read(self, name: str, file: str) -> tuple[Tensor, Tensor]:
        with open_tensors(self.directory / file) as opened:
            u, s = opened.get_tensor("U"), opened.get_tensor("S")
        if file not in self._checked:
            _check_basis(u, s, self.directory / file)
            self._checked.add(file)
        return u, s

    def chosen(self, name: str, wanted: Tensor, outputs: bool = False) -> Tensor:
        """The columns of U, or of the V of its ``outputs``, that ``wanted``, bool [r], names: fp32 [n, number of them]. A piece
        of the file is in memory at a time. ArtifactError for NaN and infinities; whether they are orthonormal is seen by
        ``Rotation``."""
        file = self._check_file(name)
        path = self.directory / (self.metadata.layers[name]["output"] if outputs else file)
        (n, r), parts = (self.metadata.layers[name]["shape"][0 if outputs else 1], len(wanted)), []
        step = max(1, PIECE // max(1, r))
        for begin in range(0, n, step):
            with open_tensors(path) as opened:  # anew: what was mapped before is given back
                parts.append(opened.get_slice("U")[begin : min(begin + step, n)][:, wanted])
        u = torch.cat(parts)
        if not bool(torch.isfinite(u).all()):
            raise ArtifactError(f"{path} holds NaN or infinities; run phase 1 again")
        return u

    def _check_file(self, name: str) -> str:
        """The name of the layer's file, whose header, as that of its outputs, is what the metadata say, or ArtifactError."""
        entry = self.metadata.layers[name]
        if name not in self._checked:
            for file in (entry["file"], *([entry["output"]] if "output" in entry else [])):
                self._check_header(name, file)
            self._checked.add(name)
        return entry["file"]

    def _check_header(self, name: str, file: str) -> None:
        path, of_file = self.directory / file, self.metadata.bases[file]
        n, r, of = of_file["n"], of_file["rank"], "outputs" if file.endswith(OUTPUT) else "inputs"
        shapes = shapes_in(path)
        if shapes != {"U": (torch.float32, (n, r)), "S": (torch.float32, (r,))}:
            raise ArtifactError(
                f"{path} holds {shown(shapes)}, where a basis of {n} {of} and rank {r} has U [{n}, {r}] and S [{r}] "
                f"in float32; run phase 1 again"
            )
        if of_file.get("bytes", path.stat().st_size) != path.stat().st_size:
            raise ArtifactError(
                f"{path} has {path.stat().st_size} bytes, but its metadata say {of_file['bytes']}; run phase 1 again"
            )
        check_layer_in_header(path, BASIS_FORMAT, name, "phase 1")

    def held(self, name: str) -> tuple[str, int]:
        """The file of the basis of the layer called ``name``, and the bytes that its fp32 ``rotation`` takes; of one of both
        sides that of V, which no other layer has."""
        file, entry = self._check_file(name), self.metadata.layers[name]
        if not self.two_sided:
            return file, self._held(file)
        return entry["output"], self._held(file) + self.held_left(name)

    def held_left(self, name: str) -> int:
        """Of ``held``, the bytes of V: 0 without one."""
        return self._held(self.metadata.layers[name]["output"]) if self.two_sided else 0

    def rank(self, name: str) -> int:
        """r: the stored columns of U of the layer called ``name``."""
        return int(self.metadata.bases[self.metadata.layers[name]["file"]]["rank"])

    def left_rank(self, name: str) -> int:
        """q: those of V, of a basis of both sides."""
        return int(self.metadata.bases[self.metadata.layers[name]["output"]]["rank"])

    def _held(self, file: str) -> int:
        return Rotation.held_bytes(self.metadata.bases[file]["n"], self.metadata.bases[file]["rank"])

    def rotation(self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Rotation:
        """The complete basis of the layer called ``name``, made and held on ``device``; of both sides, where it has an output
        basis: then it takes a whole W."""
        right = self.right_rotation(name, dtype, device)
        if not self.two_sided:
            return right
        columns, _ = self.output_columns(name)
        return TwoSided(Rotation(columns.to(device), columns.shape[0], dtype), right)

    def right_rotation(self, name: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Rotation:
        """The complete basis of the inputs alone."""
        columns, _ = self.columns(name)
        return Rotation(columns.to(device), columns.shape[0], dtype)

    def contents(self) -> Contents:
        """What ``fingerprint`` covers: every byte of the files, and the metadata but for seconds."""
        values = metadata_dict(self.metadata)
        for entry in values["bases"].values():
            entry.pop("seconds", None)
        return Contents(
            json.dumps(values, sort_keys=True), {file: whole_part(self.directory / file) for file in self.metadata.bases}
        )

    def fingerprint(self) -> str:
        """64 hex digits over ``contents``."""
        return self.contents().fingerprint()

    @property
    def layers(self) -> list[TargetLayer]:
        return layers_of(self.metadata.layers)

    def check(self, layers: Iterable[TargetLayer], model_fingerprint: str | None, model_name: str) -> None:
        """ArtifactError naming both sides where the basis belongs to another model, layers or shapes, or a file's header
        contradicts the metadata."""
        check_model(self.directory, self.metadata, model_fingerprint, model_name, "basis", "phase 1")
        layers = list(layers)
        check_layers(self.directory, self.metadata.layers, layers, model_name, "basis", "phase 1")
        for layer in layers:
            self._check_file(layer.name)


def _check_basis(u: Tensor, s: Tensor, path: Path) -> None:
    """U is orthonormal and S a descending spectrum, or ArtifactError."""
    if not (torch.isfinite(u).all() and torch.isfinite(s).all()):
        raise ArtifactError(f"{path} holds NaN or infinities; run phase 1 again")
    if (s < 0).any() or (s[1:] > s[:-1]).any():
        raise ArtifactError(f"{path}: S is negative or does not descend; run phase 1 again")
    # As phase 1 measures it: by probes, and entry by entry where those are above the bar.
    if probed_orthogonality(u) > BAR and (error := orthogonality_error(u.double())) > BAR:
        raise ArtifactError(
            f"{path}: U is not orthonormal (an entry of its UᵀU - I is {error:.1e}, more than {BAR:g}); run phase 1 again"
        )
