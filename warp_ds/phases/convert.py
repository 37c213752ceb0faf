"""Bases and masks of the original Safety-WaRP-LLM (pickled .pt files) in this project's formats (``warp-ds convert-basis``).

The original writes basis/<layer type>/layer_00_svd.pt, {U [n, n], S [n], UT}, where W = C Uᵀ as here (its first version
basis/layer_00_svd.pt, of one layer type, {U, S, Vh}), and masks/<layer type>/layer_00_mask.pt, {mask [m, n]}, 1 = frozen.
They are read by torch's unpickler for weights, which runs no code; what is anything else is refused by name.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.method.eigenbasis import BAR, orthogonality_error
from warp_ds.method.mask import frozen_count, pack_bits
from warp_ds.models.layer_names import LAYER_TYPES
from warp_ds.models.targets import targets_of
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import read_json, write_json, write_tensors, written_aside
from warp_ds.store.fingerprints import fingerprint_model
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore, write_mask
from warp_ds.store.metadata import BASIS_FORMAT, BasisMetadata, MasksMetadata, layer_entry, metadata_dict

UNKNOWN = "unknown"
"""What the original's files do not say: the token scope, and the fingerprint of the safety set."""
_FILE = re.compile(r"layer_(\d+)_(svd|mask)\.pt")
# The original's masks are NumPy arrays. By both names that NumPy's versions give its own constructor.
_ARRAYS: list[Any] = [
    *((np.zeros(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *(np.ndarray, np.dtype),
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "uint8", "bool")),
]


@dataclass(frozen=True)
class Original:
    """A directory of the original's files."""

    directory: Path
    files: dict[tuple[int, str], Path]
    """(block, layer type) -> its file"""
    metadata: Mapping[str, Any]

    @classmethod
    def find(cls, given: str | Path, kind: str, layer_type: str | None = None) -> Original:
        """``given`` is the directory, its run, or the run's checkpoints/; ``kind``: 'basis' or 'masks'. ``layer_type``: of
        files that lie in no layer type's directory. Raises ArtifactError."""
        ending = "svd" if kind == "basis" else "mask"
        for directory in (Path(given), Path(given) / kind, Path(given) / "checkpoints" / kind):
            paths = sorted({*directory.glob("layer_*.pt"), *directory.glob("*/layer_*.pt")})
            matching = {p: m for p in paths if (m := _FILE.fullmatch(p.name)) and m[2] == ending}
            if matching:
                break
        else:
            raise ArtifactError(
                f"no layer_00_{ending}.pt in {given}, nor in directories of layer types there: check --{kind}_dir"
            )
        metadata = read_json(directory / "metadata.json") if (directory / "metadata.json").is_file() else {}
        metadata = metadata if isinstance(metadata, dict) else {}
        files: dict[tuple[int, str], Path] = {}
        for path, match in matching.items():
            named = path.parent.name if path.parent != directory else layer_type or metadata.get("layer_type")
            if named not in LAYER_TYPES:
                raise ArtifactError(
                    f"{path}: of which layer type it is, its directory does not say ({', '.join(LAYER_TYPES)}): "
                    "give --layer_type"
                )
            files[int(match[1]), str(named)] = path
        return cls(directory, files, metadata)


def convert(
    basis_dir: str, masks_dir: str | None, model_dir: Path, model_name: str, output: Path, layer_type: str | None = None
) -> tuple[BasisMetadata, MasksMetadata | None]:
    """Writes ``output``/basis, and ``output``/masks where ``masks_dir`` is given; one layer is in memory at a time.

    Raises ArtifactError, naming the file, for what is no basis or mask of the model in ``model_dir``, and where
    ``output`` exists; ConfigError for layers that the model does not have.
    """
    if output.exists():
        raise ArtifactError(f"{output} exists: remove it, or give another --output")
    bases = Original.find(basis_dir, "basis", layer_type)
    masks = None if masks_dir is None else Original.find(masks_dir, "masks", layer_type)
    layers = _layers(bases, model_dir)
    fingerprint = fingerprint_model(model_dir)
    with written_aside(output) as aside:
        basis = _convert_bases(bases, layers, aside / "basis", fingerprint, model_name)
        written = None
        if masks is not None:
            written = _convert_masks(masks, layers, aside, output, fingerprint, model_name)
            MaskStore(aside / "masks").check(BasisStore(aside / "basis"), fingerprint, model_name)
    return basis, written


def _layers(bases: Original, model_dir: Path) -> dict[tuple[int, str], TargetLayer]:
    types = ",".join(kind for kind in LAYER_TYPES if kind in {kind for _, kind in bases.files})
    there = {(layer.layer, layer.type): layer for layer in targets_of(model_dir, "all", types)}
    if missing := sorted(bases.files.keys() - there.keys()):
        blocks = len({block for block, _ in there})
        raise ConfigError(f"{bases.files[missing[0]]} is of block {missing[0][0]}, but {model_dir} has {blocks} blocks")
    return {place: there[place] for place in sorted(bases.files, key=lambda place: (place[0], LAYER_TYPES.index(place[1])))}


def _convert_bases(
    bases: Original, layers: Mapping[tuple[int, str], TargetLayer], directory: Path, fingerprint: str, model_name: str
) -> BasisMetadata:
    metadata = BasisMetadata(
        basis="activation",
        model_fingerprint=fingerprint,
        data_fingerprint=UNKNOWN,
        token_scope=UNKNOWN,
        model_name=model_name,
        tokens=tokens if type(tokens := bases.metadata.get("total_tokens")) is int and tokens >= 0 else 0,
    )
    for place, layer in layers.items():
        u, s, error = _read_basis(bases.files[place], layer)
        file = f"{layer.stem}_svd.safetensors"
        write_tensors(directory / file, {"U": u, "S": s}, {BASIS_FORMAT: json.dumps({"layers": [layer.name]})})
        metadata.layers[layer.name] = layer_entry(layer, file)
        metadata.bases[file] = {
            "n": layer.n,
            "rank": u.shape[1],
            "tokens": metadata.tokens,
            "orthogonality_error": error,
            "from": "original",
            "bytes": (directory / file).stat().st_size,
        }
    write_json(directory / "metadata.json", metadata_dict(metadata))
    return metadata


def _read_basis(path: Path, layer: TargetLayer) -> tuple[Tensor, Tensor, float]:
    """U [n, r] and S [r] in fp32, and how far U is from orthonormal."""
    held = _load(path)
    u, s, ut = (held.get(key) for key in ("U", "S", "UT"))
    if not isinstance(u, Tensor) or not isinstance(s, Tensor):
        raise ArtifactError(
            f"{path} holds {', '.join(map(ascii, held))[:200] or 'nothing'}, not the tensors U and S of a basis"
        )
    if u.dim() != 2 or u.shape[0] != layer.n or not 0 < u.shape[1] <= layer.n or s.shape != u.shape[1:]:
        raise ArtifactError(
            f"{path} holds U {list(u.shape)} and S {list(s.shape)}, but {layer.name} has {layer.n} inputs: it is of another "
            "model or layer"
        )
    if isinstance(ut, Tensor) and not torch.equal(ut, u.T):
        raise ArtifactError(f"{path}: UT is not U transposed, so which of them the rotation is, it does not say")
    u, s = u.float(), s.float()
    if not (torch.isfinite(u).all() and torch.isfinite(s).all()) or (s < 0).any() or (s[1:] > s[:-1]).any():
        raise ArtifactError(f"{path}: S is no descending spectrum, or NaN or infinities stand in U or S")
    error = orthogonality_error(u.double())
    if error > BAR:
        raise ArtifactError(
            f"{path}: U is not orthonormal (an entry of its UᵀU - I is {error:.1e}, more than {BAR:g}), as one saved in 16 "
            "bits is: run phase 1 again"
        )
    return u, s, error


def _convert_masks(
    masks: Original, layers: Mapping[tuple[int, str], TargetLayer], aside: Path, output: Path, fingerprint: str, model_name: str
) -> MasksMetadata:
    if foreign := sorted(masks.files.keys() - layers.keys()):
        raise ArtifactError(
            f"{masks.files[foreign[0]]} has no basis in --basis_dir: give the basis that the masks were made with"
        )
    of_layers = {place: layer for place, layer in layers.items() if place in masks.files}
    counts: dict[str, int] = {}
    for place, layer in of_layers.items():
        frozen = _read_mask(masks.files[place], layer)
        write_mask(aside / "masks", layer, pack_bits(frozen))
        counts[layer.name] = int(frozen.sum())
    ratio, scope, notes = _share(masks.metadata.get("keep_ratio"), counts, {layer.name: layer for layer in of_layers.values()})
    metadata = MasksMetadata(
        keep_ratio=ratio,
        scope=scope,
        unit="entry",
        score="importance",
        basis="activation",
        basis_dir=str((output / "basis").resolve()),
        basis_fingerprint=BasisStore(aside / "basis").fingerprint(),
        model_fingerprint=fingerprint,
        data_fingerprint=UNKNOWN,
        model_name=model_name,
        frozen=sum(counts.values()),
        entries=sum(layer.m * layer.n for layer in of_layers.values()),
        notes=notes,
    )
    for layer in of_layers.values():
        count = counts[layer.name]
        wanted = count if scope == "layer" else None
        metadata.layers[layer.name] = layer_entry(layer, layer.mask_file, frozen=count, wanted=wanted, threshold=None)
    write_json(aside / "masks" / "metadata.json", metadata_dict(metadata))
    return metadata


def _share(said: Any, counts: Mapping[str, int], layers: Mapping[str, TargetLayer]) -> tuple[float, str, list[str]]:
    """keep_ratio, scope and notes of the masks' metadata, which promise exact counts.

    The original freezes what is not below a quantile, which ties and rounding make more or less than the share of a layer:
    then the share is that of all layers.
    """
    sizes = {name: layer.m * layer.n for name, layer in layers.items()}
    known = type(said) in (int, float) and 0.0 <= said <= 1.0
    notes = [f"converted from the original's masks, of keep_ratio {said if known else UNKNOWN}"]
    if known and all(counts[name] == frozen_count(said, size) for name, size in sizes.items()):
        return float(said), "layer", notes
    notes.append("their counts are those of its quantiles: keep_ratio here is the share of all layers together")
    return sum(counts.values()) / sum(sizes.values()), "global", notes


def _read_mask(path: Path, layer: TargetLayer) -> Tensor:
    """bool [m, n], True = frozen."""
    mask = _load(path).get("mask")
    values = torch.from_numpy(mask) if isinstance(mask, np.ndarray) else mask
    if not isinstance(values, Tensor) or values.shape != layer.shape:
        shape = list(values.shape) if isinstance(values, Tensor) else "no array"
        raise ArtifactError(
            f"{path} holds {shape} as its mask, but {layer.name} is {list(layer.shape)}: it is of another model"
        )
    frozen = values == 1
    if not (frozen | (values == 0)).all():
        raise ArtifactError(f"{path}: a mask of 0 (trains) and 1 (frozen) has no other entries")
    return frozen


def _load(path: Path) -> dict[Any, Any]:
    """What torch.save wrote into ``path``: tensors and arrays in a dictionary, or ArtifactError. No code is run."""
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, TypeError, KeyError, AttributeError) as error:
        cause = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        raise ArtifactError(
            f"{path} is no file of tensors alone ({cause}): nothing else is unpickled, for that runs whatever code "
            "the file holds"
        ) from error
    if not isinstance(held, dict):
        raise ArtifactError(f"{path} holds a {type(held).__name__}, not a dictionary of tensors")
    return held
