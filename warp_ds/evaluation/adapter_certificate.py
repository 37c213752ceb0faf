"""The freeze certificate of a LoRA adapter: from its files and the masks alone, whether ΔW = s B A reads frozen directions.

ΔW U_F = s B (A U_F) is known to fp64's rounding, since no base weight is subtracted: where A is as the masked step leaves it,
A U_F is what rounding A to its stored dtype made of 0, far smaller than what any other A of its size has there (the numbers are
in docs/adapters.md).
Rounding is bounded as in drift.py, entry by entry of A U_F, and through B by the triangle inequality.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from warp_ds.errors import ArtifactError
from warp_ds.evaluation.certificate import BROKEN, CANNOT_TELL, KEPT, Certificate
from warp_ds.evaluation.drift import Complete, LayerCertificate, explained, grid_of, half_ulp, orthonormal
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
    """The certificate of an adapter directory on the model directory ``before``; moves are of ΔW U, [m, n] of each layer.

    Raises ArtifactError where a file is missing, does not fit, is no plain LoRA, or changes meanwhile, and for masks that are
    not of whole columns.
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
    for target in sorted(masks.layers, key=lambda t: names[t.name]):
        frozen = _columns(masks, target)
        _, factors = next(adapter.of_targets([target]))
        if factors is None:
            count = target.m * int(frozen.sum())
            results[target.name] = _Found(_still(target, count), Sums(), trained=False)
            continue
        if basis is None:
            complete = Complete(Rotation(None, target.n))
        elif complete is None or last != names[target.name]:
            complete = None  # frees the last one first
            last, complete = names[target.name], orthonormal(basis, target)
        results[target.name] = _layer(target, factors, frozen, complete)
    return [results[target.name] for target in masks.layers]


def _columns(masks: MaskStore, target: TargetLayer) -> Tensor:
    """Which columns are frozen, bool [n]; every row of the mask is looked at."""
    first = masks.columns(target.name)
    step = max(1, ROWS // target.n)
    for begin in range(0, target.m, step):
        if not bool((masks.packed(target.name, begin, min(begin + step, target.m)) == first).all()):
            raise ArtifactError(f"{masks.directory}: the mask of {target.name} is not of whole columns; run phase 2 again")
    return unpack_bits(first, target.n)[0]


def _still(target: TargetLayer, frozen: int) -> LayerCertificate:
    """A layer to which nothing is added."""
    return LayerCertificate(
        target.name, frozen, target.m * target.n - frozen, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0, not_finite=0
    )


def _layer(target: TargetLayer, factors: LoraFactors, columns: Tensor, basis: Complete) -> _Found:
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
    problems = [problem for each in layers for problem in _problems(each, log_tests)] + [
        f"it brings a weight of its own for a masked layer, {name}" for name in _replaced(adapter, masks)
    ]
    reasons = [] if problems else _cannot_tell(layers, log_tests)
    outcome = BROKEN if problems else CANNOT_TELL if reasons else KEPT
    for each in layers:
        # Through B: how long s B R can be for an R that rounding explains.
        share = each.layer.together / max(each.sums.whole.moved**0.5, torch.finfo(torch.float64).tiny)
        each.layer.together_allowed = share * each.sums.whole.allowed(log_tests)
    certified = [each.layer for each in layers]
    return Certificate(
        outcome=outcome,
        claim=_claim(outcome, layers),
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


def _problems(checked: _Found, log_tests: float) -> list[str]:
    layer = checked.layer
    if layer.not_finite:
        return [f"{layer.layer}: {layer.not_finite} NaN or infinite entries of A and B"]
    if layer.violations:
        return [
            f"{layer.layer}: {layer.violations} of {layer.frozen} frozen coefficients of ΔW U are more than A's rounding "
            f"allows (the worst {layer.worst_move:.3e}, where rounding allows {layer.worst_allowed:.3e})"
        ]
    return [f"{layer.layer}: A U: {problem}" for problem in checked.sums.excesses(log_tests)] if checked.trained else []


def _replaced(adapter: AdapterDirectory, masks: MaskStore) -> list[str]:
    """Whole weights of masked layers among what it holds besides A and B."""
    return [name for name in adapter.others if any(name.startswith(f"{layer.name}.") for layer in masks.layers)]


def _cannot_tell(layers: list[_Found], log_tests: float) -> list[str]:
    if not sum(each.layer.frozen for each in layers):
        return ["the masks freeze nothing, so there is nothing to keep: make masks with a keep_ratio above 0"]
    trained = [each for each in layers if each.trained and each.layer.frozen]
    if not trained:
        return ["the adapter adds nothing to the masked layers (B is 0, or it has other layers): train it first"]
    # Had A's rows as much in the frozen directions as in the others, would that be found?
    coarse = [
        each.layer.layer
        for each in trained
        if each.layer.free
        and not each.layer.free_rms * each.layer.frozen**0.5
        > (each.layer.together / max(each.sums.whole.moved**0.5, 1e-300)) * each.sums.whole.allowed(log_tests)
    ]
    if coarse:
        return [f"A is stored too coarsely to tell for {len(coarse)} layers ({coarse[0]}): save the adapter in float32"]
    return []


def _claim(outcome: str, layers: list[_Found]) -> str:
    frozen, adapted = sum(each.layer.frozen for each in layers), sum(each.trained for each in layers)
    subject = f"of {len(layers)} masked layers, {adapted} with an adapter"
    return {
        KEPT: f"{subject}: ΔW U_F = s B A U_F is 0 within the rounding of A in all {frozen} frozen coefficients, so no input "
        "in a frozen direction is answered differently by these layers",
        BROKEN: f"{subject}: ΔW U_F = s B A U_F is more than the rounding of A in some of {frozen} frozen coefficients",
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
