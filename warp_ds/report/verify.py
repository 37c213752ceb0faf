"""The freeze certificate: from two model directories alone, how far frozen and free coefficients moved.

One layer is in memory at a time and no model is built. With Δ = (W_after - W_before) U, a frozen coefficient may have
moved by what rounding W_after to its stored dtype allows and no more. With e_ik the largest rounding error of entry
(i, k): |Δ_ij| <= Σ_k |U_kj| e_ik in the worst case, and, the errors being independent, at most SIGMAS standard
deviations, (Σ_k U_kj² e_ik² / 3)^½ each. The smaller of the two is allowed; and C_i (UᵀU - I)_j besides, since the
stored U is orthonormal to fp32 only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from warp_ds.artifacts import (
    ArtifactError,
    BasisStore,
    MaskStore,
    TargetLayer,
    fingerprint_model,
    phase_of,
    read_json,
    write_json,
)
from warp_ds.method.mask import unpack_bits
from warp_ds.method.rotation import Rotation

SIGMAS = 12.0
#: The masked step makes W from C by fp32 products of n terms: an error of about n^½ units of 2^-24 of the row's size.
FP32_PRODUCTS = 2.0**-24
#: ... and by TF32 products on a GPU where W is stored in 16 bits.
TF32_PRODUCTS = 2.0**-11


@dataclass
class LayerCertificate:
    """One layer of the certificate; moves in the units of the weights."""

    layer: str
    frozen: int
    free: int
    frozen_max: float
    frozen_rms: float
    free_max: float
    free_rms: float
    coefficient_rms: float
    """Root mean square of the frozen coefficients before."""
    allowed_max: float
    """Largest move of a frozen coefficient that rounding allows in this layer."""
    violations: int
    """Frozen coefficients that moved further than rounding allows for them."""
    worst_move: float
    """Of the frozen coefficient that moved furthest for what rounding allows it."""
    worst_allowed: float
    """What rounding allows that one."""
    free_beyond: int
    """Free coefficients that moved further than rounding allows a frozen one in their place."""


def certify(before: str | Path, after: str | Path, masks_dir: str | Path, basis_dir: str | Path | None = None,
            check_before: bool = True) -> dict[str, Any]:
    """The certificate as a dictionary: ``kept`` (bool), ``problems``, ``notes``, totals and ``layers``.

    ``check_before`` refuses a ``before`` that is not the model the masks were made for, such as swapped
    directories. Raises ArtifactError where a file is missing or does not fit.
    """
    before, after = Path(before), Path(after)
    masks = MaskStore(masks_dir)
    basis = masks.find_basis(basis_dir)
    masks.check(basis, fingerprint_model(before) if check_before else None, str(before))
    layers = [_certify_layer(target, before, after, masks, basis) for target in masks.layers]
    problems = [f"{c.layer}: {c.violations} of {c.frozen} frozen coefficients moved further than rounding allows "
                f"(the worst by {c.worst_move:.3e}, where rounding allows {c.worst_allowed:.3e})" for c in layers
                if c.violations]
    if not any(c.free_max > 0 or c.frozen_max > 0 for c in layers):
        problems.append("nothing moved at all: both directories hold the same weights in the masked layers")
    frozen = sum(c.frozen for c in layers)
    return {
        "format": "warp_ds.certificate", "version": 2, "kept": not problems, "problems": problems,
        "notes": [*_trained_with(after, masks, bool(problems)), *_too_coarse(layers)],
        "before": str(before), "after": str(after), "masks": str(masks.directory),
        "basis": None if basis is None else str(basis.directory),
        "before_fingerprint": fingerprint_model(before), "after_fingerprint": fingerprint_model(after),
        "masks_fingerprint": masks.fingerprint(), "frozen": frozen, "free": sum(c.free for c in layers),
        "frozen_drift": relative_drift([(c.frozen * c.frozen_rms**2, c.frozen * c.coefficient_rms**2) for c in layers]),
        "layers": [asdict(c) for c in layers],
    }


def _trained_with(after: Path, masks: MaskStore, broken: bool) -> list[str]:
    """What the run that ``after`` lies in says, where it trained with other masks than these or with none."""
    run = after.resolve().parent
    if phase_of(run) != "phase3":
        return []
    config = read_json(run / "config.json")
    used = config.get("inputs", {}).get("masks")
    if "inputs" not in config or used == masks.fingerprint():
        return []
    with_what = "without masks" if used is None else f"with other masks ({config.get('settings', {}).get('masks_dir') or used})"
    return [f"{run} was trained {with_what}, not with those in {masks.directory}"
            + (": nothing kept these coefficients where they were" if broken else "")]


def _too_coarse(layers: Sequence[LayerCertificate]) -> list[str]:
    """Names the layers in which frozen and free coefficients cannot be told apart."""
    coarse = [c.layer for c in layers if c.free and not c.free_beyond and c.free_max > 0]
    if not coarse:
        return []
    shown = ", ".join(coarse[:3]) + (f" and {len(coarse) - 3} more" if len(coarse) > 3 else "")
    return [f"the files are too coarse to tell for {len(coarse)} of {len(layers)} layers ({shown}): their free coefficients, "
            "too, moved no further than rounding allows"]


def relative_drift(layers: Sequence[tuple[float, float]]) -> float:
    """‖ΔC‖ / ‖C‖ over all frozen coefficients, from each layer's ``layer_drift``."""
    moved, size = (sum(part) for part in zip(*layers, strict=True)) if layers else (0.0, 0.0)
    return (moved / size) ** 0.5 if size else 0.0


def layer_drift(target: TargetLayer, before: Path, after: Path, masks: MaskStore, basis: BasisStore) -> tuple[float, float]:
    """‖ΔC‖² and ‖C‖² of one layer's frozen coefficients, without what a certificate asks besides."""
    rotation = basis.rotation(target.name, torch.float64)
    w_before, w_after = (layer_weight(directory, target) for directory in (before, after))
    moved = size = 0.0
    for rows in _chunks(target.m, target.n):
        frozen = unpack_bits(masks.packed(target.name, rows.start, rows.stop), target.n)
        old = w_before[rows].double()
        moved += float(rotation.rotate(w_after[rows].double() - old)[frozen].square().sum())
        size += float(rotation.rotate(old)[frozen].square().sum())
    return moved, size


def _certify_layer(target: TargetLayer, before: Path, after: Path, masks: MaskStore,
                   basis: BasisStore | None) -> LayerCertificate:
    rotation = Rotation(None, target.n) if basis is None else basis.rotation(target.name, torch.float64)
    absolute, skew = _absolute(rotation)
    w_before, w_after = (layer_weight(directory, target) for directory in (before, after))
    low_precision = torch.finfo(w_after.dtype).eps > 1e-6
    totals = {"frozen": 0, "free": 0, "violations": 0, "free beyond": 0}
    worst = (0.0, 0.0)
    sums = {"frozen": 0.0, "free": 0.0, "size": 0.0}
    largest = {"frozen": 0.0, "free": 0.0, "allowed": 0.0}
    for rows in _chunks(target.m, target.n):
        old, new = w_before[rows].double(), w_after[rows].double()
        moved, size = rotation.rotate(new - old), rotation.rotate(old)
        # The start model is exact as stored: only W after training was rounded.
        row_size = old.square().mean(dim=1, keepdim=True).sqrt()
        products = FP32_PRODUCTS * max(16.0, 2 * target.n**0.5)
        error = _half_ulp(w_after[rows]) + max(products, TF32_PRODUCTS if low_precision else 0.0) * row_size
        allowed = error
        if absolute is not None:
            allowed = torch.minimum(error @ absolute, SIGMAS * (error.square() @ absolute.square() / 3).sqrt())
            allowed = allowed + row_size * target.n**0.5 * skew
        frozen = unpack_bits(masks.packed(target.name, rows.start, rows.stop), target.n)
        free = ~frozen
        totals["frozen"] += int(frozen.sum())
        totals["free"] += int(free.sum())
        beyond = moved.abs() > allowed
        totals["violations"] += int(beyond[frozen].sum())
        totals["free beyond"] += int(beyond[free].sum())
        for name, which in (("frozen", frozen), ("free", free)):
            if which.any():
                values = moved[which]
                sums[name] += float(values.square().sum())
                largest[name] = max(largest[name], float(values.abs().max()))
        if frozen.any():
            sums["size"] += float(size[frozen].square().sum())
            moves, allowances = moved[frozen].abs(), allowed[frozen]
            largest["allowed"] = max(largest["allowed"], float(allowances.max()))
            most = int((moves / allowances).argmax())
            worst = max(worst, (float(moves[most]), float(allowances[most])), key=lambda w: w[0] / w[1] if w[1] else 0.0)

    def rms(name: str, count: int) -> float:
        return (sums[name] / count) ** 0.5 if count else 0.0

    return LayerCertificate(
        target.name, totals["frozen"], totals["free"], largest["frozen"], rms("frozen", totals["frozen"]),
        largest["free"], rms("free", totals["free"]), rms("size", totals["frozen"]), largest["allowed"],
        totals["violations"], *worst, totals["free beyond"],
    )


def _absolute(rotation: Rotation) -> tuple[Tensor | None, Tensor | None]:
    """|U| [n, n] and the length [n] of each column of UᵀU - I, fp64; None for the identity."""
    if rotation.is_identity:
        return None, None
    eye = torch.eye(rotation.n, dtype=torch.float64)
    u = rotation.rotate(eye)
    return u.abs(), torch.linalg.vector_norm(u.T @ u - eye, dim=0)


def _half_ulp(w: Tensor) -> Tensor:
    """Half the distance between neighbours of each entry, fp64."""
    info = torch.finfo(w.dtype)
    _, exponent = torch.frexp(w.double())
    return torch.ldexp(torch.full_like(w, info.eps / 4, dtype=torch.float64), exponent).clamp_min(info.tiny * info.eps)


def layer_weight(directory: Path, target: TargetLayer) -> Tensor:
    """W [m, n] of a layer as a model directory stores it; ArtifactError where it is missing or of another shape."""
    name = f"{target.name}.weight"
    index = directory / "model.safetensors.index.json"
    path = directory / (json.loads(index.read_text())["weight_map"].get(name, "") if index.is_file() else "model.safetensors")
    try:
        with safe_open(str(path), framework="pt") as file:
            weight = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{directory} has no readable weight {name} ({error}): is it a model directory with "
                            "safetensors files?") from error
    if tuple(weight.shape) != (target.m, target.n):
        raise ArtifactError(f"{path}: {name} is {tuple(weight.shape)}, not {(target.m, target.n)} as the masks or the basis "
                            "have it")
    return weight


def _chunks(rows: int, n: int) -> Iterator[slice]:
    step = max(1, (1 << 23) // n)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


def certificate_path(after: Path) -> Path:
    """certificate.json in the run that ``after`` lies in, where ``warp-ds report`` finds it; else in this directory."""
    runs = [directory for directory in (after.resolve(), *after.resolve().parents) if phase_of(directory)]
    return (runs[0] if runs and os.access(runs[0], os.W_OK) else Path()) / "certificate.json"


def still_describes(certificate: Any, directory: Path) -> bool:
    """Whether a certificate's verdict is of the model that lies in ``directory`` now: by the digest of all its bytes.

    False for anything that is no certificate of this version, and for a directory that cannot be read.
    """
    if not isinstance(certificate, dict) or certificate.get("version") != 2:
        return False
    try:
        return bool(certificate.get("after_fingerprint") == fingerprint_model(directory))
    except (ArtifactError, OSError):
        return False


def write_certificate(certificate: dict[str, Any], path: Path) -> None:
    """Writes the certificate as JSON, whole or not at all."""
    write_json(path, certificate)


def print_certificate(certificate: dict[str, Any]) -> None:
    """The certificate as a table on standard output."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Moves of rotated coefficients, in the weights' units")
    table.add_column("layer")
    for column in ("frozen", "largest", "rms", "allowed", "free: largest", "rms"):
        table.add_column(column, justify="right")
    for layer in certificate["layers"]:
        table.add_row(
            layer["layer"], str(layer["frozen"]), f"{layer['frozen_max']:.2e}", f"{layer['frozen_rms']:.2e}",
            f"{layer['allowed_max']:.2e}", f"{layer['free_max']:.2e}", f"{layer['free_rms']:.2e}",
        )
    console = Console(width=140)
    console.print(table)
    for problem in certificate["problems"]:
        console.print(f"[red]{problem}")
    for note in certificate["notes"]:
        console.print(f"[yellow]note: {note}", highlight=False)
    verdict = "KEPT: no frozen coefficient moved further than rounding allows" if certificate["kept"] else "BROKEN"
    console.print(f"{verdict} ({certificate['frozen']} frozen, {certificate['free']} free; {certificate['before']} -> "
                  f"{certificate['after']})")
