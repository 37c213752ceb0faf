"""The freeze certificate of a LoRA adapter: from its files and the masks alone, whether ΔW = s B A reads frozen directions, or,
with masks of whole rows, writes into them.

ΔW U_F = s B (A U_F) is known to fp64's rounding, since no base weight is subtracted: where A is as the masked step leaves it,
A U_F is what rounding A to its stored dtype made of 0, far smaller than what any other A of its size has there (the numbers are
in docs/adapters.md).
Rounding is bounded as in drift.py, entry by entry of A U_F, and through B by the triangle inequality. Rows are columns of the
transposed: of ΔWᵀ V_F = s Aᵀ (Bᵀ V_F) the same is said, V the basis of the outputs, or the identity without one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from warp_ds.errors import ArtifactError
from warp_ds.evaluation.certificate import BROKEN, CANNOT_TELL, KEPT, Certificate
from warp_ds.evaluation.drift import Complete, LayerCertificate, explained, grid_of, half_ulp, orthonormal, orthonormal_outputs
from warp_ds.evaluation.unmasked import CHANGED, Difference
from warp_ds.method.mask import unpack_bits
from warp_ds.method.rotation import Rotation
from warp_ds.method.systematic import Sums
from warp_ds.models.adapter_directory import CONFIG, WEIGHTS, AdapterDirectory, LoraFactors
from warp_ds.models.directory import ModelDirectory
from warp_ds.store.bases import BasisStore
from warp_ds.store.digests import FileState, afresh
from warp_ds.store.fingerprints import Contents, fingerprint_model, model_contents, whole_part
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore

ROWS = 1 << 23
"""Elements of ΔW U that are in memory at once."""
COLUMNS_SAID, ROWS_SAID = ("ΔW U", "A", "A U"), ("Vᵀ ΔW", "B", "Bᵀ V")
"""What is looked at, whose rounding it may be, and its factor."""


@dataclass(frozen=True)
class _Found:
    """What is said of one layer, and the sums of A U in its frozen columns."""

    layer: LayerCertificate
    sums: Sums
    trained: bool
    """Whether the adapter adds anything to it."""


def certify_adapter(
    before: str | Path, adapter: str | Path, masks_dir: str | Path, basis_dir: str | Path | None = None
) -> Certificate:
    """The certificate of an adapter directory on the model directory ``before``; moves are of ΔW U, [m, n] of each layer, or
    with masks of whole rows of Vᵀ ΔW.

    Raises ArtifactError where a file is missing, does not fit, is no plain LoRA, or changes meanwhile, and for masks that are
    neither of whole columns nor of whole rows.
    """
    masks, opened = MaskStore(masks_dir), AdapterDirectory.of(adapter)
    old = ModelDirectory.of(Path(before), masks.layers)
    basis = masks.find_basis(basis_dir)
    files = _files(old, opened, masks, basis)
    states = {path: FileState.of(path) for path in files}
    with afresh():
        fingerprint = fingerprint_model(old.directory)
        masks.check(basis, fingerprint, str(before))
        if basis is not None:
            basis.check(masks.layers, fingerprint, str(before))
        layers = _layers(opened, masks, basis)
        adapter_digests = _sha256([opened.directory / CONFIG, opened.directory / WEIGHTS])
        certificate = _certificate(old, opened, masks, basis, layers, fingerprint, adapter_digests)
    if {path: FileState.of(path) for path in files} != states:
        raise ArtifactError(f"files of {before}, {adapter} or the masks changed while they were read: try again")
    return certificate


def _files(old: ModelDirectory, adapter: AdapterDirectory, masks: MaskStore, basis: BasisStore | None) -> list[Path]:
    stores: list[MaskStore | BasisStore] = [masks] if basis is None else [masks, basis]
    files = [store.directory / entry["file"] for store in stores for entry in store.metadata.layers.values()]
    files += [Path(tensor.path) for tensor in old.tensors.values()]
    return sorted({*files, adapter.directory / CONFIG, adapter.directory / WEIGHTS})


def _sha256(paths: list[Path]) -> dict[str, str]:
    parts = {str(path): whole_part(path) for path in paths}
    return {path: digest.sha256 for path, digest in zip(parts, Contents("", parts).digests(), strict=True)}


def _layers(adapter: AdapterDirectory, masks: MaskStore, basis: BasisStore | None) -> list[_Found]:
    """Of every masked layer, in the masks' order; those of one basis file one after another."""
    names = {t.name: "" if basis is None else basis.metadata.layers[t.name]["file"] for t in masks.layers}
    results: dict[str, _Found] = {}
    last, complete = None, None
    by_rows = masks.metadata.unit == "row"
    for target in sorted(masks.layers, key=lambda t: names[t.name]):
        frozen = _directions(masks, target)
        _, factors = next(adapter.of_targets([target]))
        if factors is None:
            count = int(frozen.sum()) * (target.n if by_rows else target.m)
            results[target.name] = _Found(_still(target, count), Sums(), trained=False)
            continue
        if by_rows:
            outputs = basis is not None and basis.two_sided
            left = orthonormal_outputs(basis, target) if basis is not None and outputs else Complete(Rotation(None, target.m))
            turned = LoraFactors(factors.b.T, factors.a.T, factors.scaling)
            results[target.name] = _layer(replace(target, m=target.n, n=target.m), turned, frozen, left)
            continue
        if basis is None:
            complete = Complete(Rotation(None, target.n))
        elif complete is None or last != names[target.name]:
            complete = None  # frees the last one first
            last, complete = names[target.name], orthonormal(basis, target)
        results[target.name] = _layer(target, factors, frozen, complete)
    return [results[target.name] for target in masks.layers]


def _directions(masks: MaskStore, target: TargetLayer) -> Tensor:
    """Which columns are frozen, bool [n], or which rows, bool [m]; every bit of the mask is looked at."""
    by_rows = masks.metadata.unit == "row"
    chosen = masks.rows(target.name) if by_rows else unpack_bits(masks.columns(target.name), target.n)[0]
    step = max(1, ROWS // target.n)
    for begin in range(0, target.m, step):
        bits = unpack_bits(masks.packed(target.name, begin, min(begin + step, target.m)), target.n)
        if not bool((bits == (chosen[begin : begin + step, None] if by_rows else chosen)).all()):
            raise ArtifactError(
                f"{masks.directory}: the mask of {target.name} is not of whole {'rows' if by_rows else 'columns'}; run phase 2 "
                "again"
            )
    return chosen


def _still(target: TargetLayer, frozen: int) -> LayerCertificate:
    """A layer to which nothing is added."""
    return LayerCertificate(
        target.name, frozen, target.m * target.n - frozen, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0, not_finite=0
    )


def _layer(target: TargetLayer, factors: LoraFactors, columns: Tensor, basis: Complete) -> _Found:
    """Of one layer and whole columns of A U; of rows all is given transposed, with V as the basis."""
    a, b = factors.a.double(), factors.b.double() * factors.scaling
    count = target.m * int(columns.sum())
    not_finite = int((~torch.isfinite(a)).sum()) + int((~torch.isfinite(b)).sum())
    if not_finite:
        layer = _still(target, count)
        layer.not_finite, layer.frozen_max, layer.frozen_rms, layer.free_max, layer.free_rms = not_finite, *([math.nan] * 4)
        return _Found(layer, Sums(), trained=True)
    used = (b != 0).any(dim=0)  # a row of A that B does not use adds nothing
    a, b = a[used], b[:, used]
    if not bool(a.any()):
        return _Found(_still(target, count), Sums(), trained=False)
    grid = grid_of(factors.a)
    rounding = half_ulp(a, grid).masked_fill(a == 0, torch.finfo(grid).tiny)  # what rounds to 0 was as small
    coefficients = basis.rotation.rotate(a)
    allowed, variance, typical = explained(
        rounding, a.square().mean(dim=1, keepdim=True).sqrt(), torch.finfo(grid).eps > 1e-6, basis
    )
    sums = Sums()
    frozen = columns.expand(len(a), -1)
    # No coefficient before, so no patterns: its length, rows and columns are what is looked at.
    sums.add(coefficients, torch.zeros_like(coefficients), frozen, variance, rounding, typical, basis.matrix)
    return _Found(_figures(target, b, coefficients, allowed, columns), sums, trained=True)


def _figures(target: TargetLayer, b: Tensor, coefficients: Tensor, allowed: Tensor, columns: Tensor) -> LayerCertificate:
    """Moves of ΔW U = s B A U, and what the rounding of A allows them, a block of rows at a time."""
    layer = _still(target, target.m * int(columns.sum()))
    squares, worst = {"frozen": 0.0, "free": 0.0}, 0.0
    step = max(1, ROWS // target.n)
    for begin in range(0, target.m, step):
        part = b[begin : begin + step]
        moved, most = part @ coefficients, part.abs() @ allowed
        for name, which in (("frozen", columns), ("free", ~columns)):
            chosen, bar = moved[:, which].abs(), most[:, which]
            if not chosen.numel():
                continue
            squares[name] += float(chosen.square().sum())
            setattr(layer, f"{name}_max", max(getattr(layer, f"{name}_max"), float(chosen.max())))
            if name == "free":
                layer.free_beyond += int((chosen > bar).sum())
                continue
            layer.violations += int((chosen > bar).sum())
            layer.allowed_max = max(layer.allowed_max, float(bar.max()))
            furthest = int((chosen / bar.clamp_min(torch.finfo(torch.float64).tiny)).argmax())
            ratio = float(chosen.flatten()[furthest] / bar.flatten()[furthest].clamp_min(torch.finfo(torch.float64).tiny))
            if ratio > worst:
                worst, layer.worst_move = ratio, float(chosen.flatten()[furthest])
                layer.worst_allowed = float(bar.flatten()[furthest])
    layer.frozen_rms = (squares["frozen"] / max(1, layer.frozen)) ** 0.5
    layer.free_rms = (squares["free"] / max(1, layer.free)) ** 0.5
    layer.together = squares["frozen"] ** 0.5
    return layer


def _certificate(
    old: ModelDirectory,
    adapter: AdapterDirectory,
    masks: MaskStore,
    basis: BasisStore | None,
    layers: list[_Found],
    fingerprint: str,
    digests: dict[str, str],
) -> Certificate:
    log_tests = math.log(max(1, sum(each.sums.number for each in layers)))
    by_rows = masks.metadata.unit == "row"
    problems = [problem for each in layers for problem in _problems(each, log_tests, by_rows)] + [
        f"it brings a weight of its own for a masked layer, {name}" for name in _replaced(adapter, masks)
    ]
    reasons = [] if problems else _cannot_tell(layers, log_tests, by_rows)
    outcome = BROKEN if problems else CANNOT_TELL if reasons else KEPT
    for each in layers:
        # Through B: how long s B R can be for an R that rounding explains.
        share = each.layer.together / max(each.sums.whole.moved**0.5, torch.finfo(torch.float64).tiny)
        each.layer.together_allowed = share * each.sums.whole.allowed(log_tests)
    certified = [each.layer for each in layers]
    return Certificate(
        outcome=outcome,
        claim=_claim(outcome, layers, by_rows),
        problems=problems,
        reasons=reasons,
        notes=[*(f"masks: {note}" for note in masks.metadata.notes), *_notes(adapter, old, masks, layers)],
        not_claimed=_not_claimed(adapter, masks),
        before=str(old.directory),
        after=str(adapter.directory),
        masks=str(masks.directory),
        basis=None if basis is None else str(basis.directory),
        before_fingerprint=fingerprint,
        after_fingerprint=digests[str(adapter.directory / WEIGHTS)],
        masks_fingerprint=masks.fingerprint(),
        basis_fingerprint=masks.metadata.basis_fingerprint,
        files={"before": _of_model(old), "after": digests},
        layers=certified,
    )


def _of_model(old: ModelDirectory) -> dict[str, str]:
    """Tensor -> SHA-256 of the model that the adapter is put on."""
    digests = model_contents(old.directory).digests()
    return {name: digest.sha256 for name, digest in zip(old.tensors, digests, strict=True)}


def _problems(checked: _Found, log_tests: float, by_rows: bool) -> list[str]:
    layer, (change, side, turned) = checked.layer, ROWS_SAID if by_rows else COLUMNS_SAID
    if layer.not_finite:
        return [f"{layer.layer}: {layer.not_finite} NaN or infinite entries of A and B"]
    if layer.violations:
        return [
            f"{layer.layer}: {layer.violations} of {layer.frozen} frozen coefficients of {change} are more than {side}'s "
            f"rounding allows (the worst {layer.worst_move:.3e}, where rounding allows {layer.worst_allowed:.3e})"
        ]
    return [f"{layer.layer}: {turned}: {problem}" for problem in checked.sums.excesses(log_tests)] if checked.trained else []


def _replaced(adapter: AdapterDirectory, masks: MaskStore) -> list[str]:
    """Whole weights of masked layers among what it holds besides A and B."""
    return [name for name in adapter.others if any(name.startswith(f"{layer.name}.") for layer in masks.layers)]


def _cannot_tell(layers: list[_Found], log_tests: float, by_rows: bool) -> list[str]:
    if not sum(each.layer.frozen for each in layers):
        return ["the masks freeze nothing, so there is nothing to keep: make masks with a keep_ratio above 0"]
    trained = [each for each in layers if each.trained and each.layer.frozen]
    if not trained:
        return ["the adapter adds nothing to the masked layers (B is 0, or it has other layers): train it first"]
    # Had A's rows, or B's columns, as much in the frozen directions as in the others, would that be found?
    coarse = [
        each.layer.layer
        for each in trained
        if each.layer.free
        and not each.layer.free_rms * each.layer.frozen**0.5
        > (each.layer.together / max(each.sums.whole.moved**0.5, 1e-300)) * each.sums.whole.allowed(log_tests)
    ]
    if coarse:
        side = (ROWS_SAID if by_rows else COLUMNS_SAID)[1]
        return [f"{side} is stored too coarsely to tell for {len(coarse)} layers ({coarse[0]}): save the adapter in float32"]
    return []


def _claim(outcome: str, layers: list[_Found], by_rows: bool) -> str:
    frozen, adapted = sum(each.layer.frozen for each in layers), sum(each.trained for each in layers)
    subject = f"of {len(layers)} masked layers, {adapted} with an adapter"
    change, side = ("V_Fᵀ ΔW = s V_Fᵀ B A", "B") if by_rows else ("ΔW U_F = s B A U_F", "A")
    so = (
        "these layers' outputs are the same in the frozen directions, whatever the input"
        if by_rows
        else "no input in a frozen direction is answered differently by these layers"
    )
    return {
        KEPT: f"{subject}: {change} is 0 within the rounding of {side} in all {frozen} frozen coefficients, so {so}",
        BROKEN: f"{subject}: {change} is more than the rounding of {side} in some of {frozen} frozen coefficients",
        CANNOT_TELL: f"{subject}: whether {frozen} frozen coefficients were kept does not show in these files",
    }[outcome]


def _notes(adapter: AdapterDirectory, old: ModelDirectory, masks: MaskStore, layers: list[_Found]) -> list[str]:
    notes = []
    base = adapter.config.get("base_model_name_or_path")
    if base and Path(str(base)).is_dir() and Path(str(base)).resolve() != old.directory.resolve():
        notes.append(f"the adapter names {base} as its base model; what is certified is its use on {old.directory}")
    if plain := [each.layer.layer for each in layers if not each.trained]:
        notes.append(f"the adapter adds nothing to {len(plain)} masked layers ({plain[0]}), which stay as they are")
    return notes


def _not_claimed(adapter: AdapterDirectory, masks: MaskStore) -> list[Difference]:
    masked = {layer.name for layer in masks.layers}
    free = [name for name in adapter.layers if name not in masked]
    parts = []
    if free:
        parts.append(Difference("adapters of layers without a mask", CHANGED, f"{len(free)}, the first {free[0]}"))
    if adapter.others:
        parts.append(Difference("weights beside A and B", CHANGED, f"{len(adapter.others)}, the first {adapter.others[0]}"))
    return parts
