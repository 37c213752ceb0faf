"""A smaller basis for masks at hand: without the columns in which nothing is frozen (``warp-ds shrink``).

The same coefficients stay frozen, in the same directions. The columns that are dropped become part of the complement,
which the remaining columns' reflectors complete (method/rotation.py): other coordinates for what trains freely, and Adam,
which acts entry by entry, takes another path in them. So this is a choice, and nothing makes it by itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from warp_ds.errors import ArtifactError
from warp_ds.method.mask import pack_bits, unpack_bits
from warp_ds.method.rotation import Rotation
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import write_json, write_tensors, written_aside
from warp_ds.store.masks import MaskStore, write_mask
from warp_ds.store.metadata import BASIS_FORMAT, metadata_dict
from warp_ds.store.runs import find_artifact


@dataclass(frozen=True)
class Shrunk:
    """What one basis became."""

    file: str
    n: int
    stored: int
    """Columns before."""
    kept: int
    """Columns that some layer has a frozen coefficient in."""
    held_before: int
    """Bytes of the fp32 rotation in training, to which its products are nearly proportional; so is ``held_after``."""
    held_after: int


def shrink(masks_dir: str | Path, basis_dir: str | Path | None, output: Path) -> list[Shrunk]:
    """Writes ``output``/basis and ``output``/masks, of the same formats; one basis is in memory at a time.

    Layers that share a basis keep every column that one of them needs. Raises ArtifactError where an artefact is missing
    or does not belong to the other, where the masks have no basis, or where ``output`` exists.
    """
    masks = MaskStore(find_artifact(str(masks_dir), "masks", "."))
    basis = masks.find_basis(basis_dir)
    if basis is None:
        raise ArtifactError(f"the masks in {masks.directory} are of the identity basis, which has nothing to drop")
    masks.check(basis, None, "")
    basis.check(masks.layers, None, masks.metadata.model_name)
    if output.exists():
        raise ArtifactError(f"{output} exists: remove it, or give another --output")
    with written_aside(output) as aside:
        return _write(masks, basis, aside, output)


def _write(masks: MaskStore, basis: BasisStore, aside: Path, output: Path) -> list[Shrunk]:
    by_file: dict[str, list[str]] = {}
    for layer in masks.layers:
        by_file.setdefault(basis.metadata.layers[layer.name]["file"], []).append(layer.name)
    layers = {layer.name: layer for layer in masks.layers}
    entries: dict[str, Any] = {}
    shrunk = []
    for file, names in by_file.items():
        u, s = basis.columns(names[0])
        n, stored = u.shape
        frozen = {name: unpack_bits(masks.packed(name), n) for name in names}
        used = torch.stack([bits.any(dim=0) for bits in frozen.values()]).any(dim=0)
        if used[stored:].any():
            raise ArtifactError(
                f"{masks.directory}: {names[0]} freezes coefficients beyond the {stored} stored columns, as "
                "--mask_unit row does: there is nothing to drop, train with the masks as they are"
            )
        used[0] |= ~used.any()  # a basis has a column
        kept = used[:stored].nonzero().squeeze(1)
        write_tensors(aside / "basis" / file, {"U": u[:, kept], "S": s[kept]}, {BASIS_FORMAT: json.dumps({"layers": names})})
        for name, bits in frozen.items():
            write_mask(aside / "masks", layers[name], pack_bits(_moved(bits, kept)))
        entries[file] = {**basis.metadata.bases[file], "rank": len(kept), "bytes": (aside / "basis" / file).stat().st_size}
        for of_the_whole in ("energy", "residual", "orthogonality_error"):
            entries[file].pop(of_the_whole, None)
        shrunk.append(Shrunk(file, n, stored, len(kept), Rotation.held_bytes(n, stored), Rotation.held_bytes(n, len(kept))))
    for name in layers if basis.two_sided else ():  # what is frozen of the outputs' directions stays as it is
        file, (v, s) = basis.metadata.layers[name]["output"], basis.output_columns(name)
        write_tensors(aside / "basis" / file, {"U": v, "S": s}, {BASIS_FORMAT: json.dumps({"layers": [name]})})
        entries[file] = {**basis.metadata.bases[file], "bytes": (aside / "basis" / file).stat().st_size}
    smaller = replace(
        basis.metadata, bases=entries, layers={layer.name: basis.metadata.layers[layer.name] for layer in masks.layers}
    )
    write_json(aside / "basis" / "metadata.json", metadata_dict(smaller))
    note = f"the columns of {basis.directory} in which nothing is frozen were dropped"
    write_json(
        aside / "masks" / "metadata.json",
        metadata_dict(
            replace(
                masks.metadata,
                basis_dir=str((output / "basis").resolve()),
                basis_fingerprint=BasisStore(aside / "basis").fingerprint(),
                notes=[*masks.metadata.notes, note],
            )
        ),
    )
    return shrunk


def _moved(frozen: Tensor, kept: Tensor) -> Tensor:
    """bool [m, n]: what is frozen in the columns ``kept``, which come first now."""
    result = torch.zeros_like(frozen)
    result[:, : len(kept)] = frozen[:, kept]
    return result


def print_shrunk(shrunk: list[Shrunk]) -> None:
    """What was dropped, and what that saves."""
    table = Table(title="Columns in which something is frozen")
    for column in ("basis", "inputs", "stored", "kept", "bytes in training", "of before"):
        table.add_column(column, justify="left" if column == "basis" else "right")
    for one in shrunk:
        table.add_row(
            one.file,
            str(one.n),
            str(one.stored),
            str(one.kept),
            f"{one.held_after:,}",
            f"{one.held_after / one.held_before:.0%}",
        )
    console = Console(width=120, markup=False)
    console.print(table)
    before, after = sum(one.held_before for one in shrunk), sum(one.held_after for one in shrunk)
    console.print(f"all bases: {before:,} -> {after:,} bytes ({after / before:.0%}), and a rotation's products with them")
