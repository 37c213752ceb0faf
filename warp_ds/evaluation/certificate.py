"""The freeze certificate: from two model directories alone, how far frozen and free coefficients moved.

One layer is in memory at a time and no model is built. With Δ = (W_after - W_before) U, a frozen coefficient may have
moved by what rounding W_after to its stored dtype allows and no more. With e_ik the largest rounding error of entry
(i, k): |Δ_ij| <= Σ_k |U_kj| e_ik in the worst case, and, the errors being independent, at most SIGMAS standard
deviations, (Σ_k U_kj² e_ik² / 3)^½ each. The smaller of the two is allowed; and C_i (UᵀU - I)_j besides, since the
stored U is orthonormal to fp32 only. That finds one large move; method/systematic.py finds many small ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from warp_ds.errors import ArtifactError
from warp_ds.evaluation import unmasked
from warp_ds.evaluation.drift import LayerCertificate, certify_layers, relative_drift
from warp_ds.method.systematic import FALSE_ALARM, Sums
from warp_ds.models.directory import FLOATS, ModelDirectory
from warp_ds.store.bases import BasisStore
from warp_ds.store.checkpoint_index import INDEX
from warp_ds.store.digests import FileState, digest_parts, is_regular, whole_file
from warp_ds.store.fingerprints import fingerprint_model, model_contents
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import phase_of, run_config

KEPT, BROKEN, CANNOT_TELL = "kept", "broken", "cannot tell"
EXIT = {KEPT: 0, BROKEN: 1, CANNOT_TELL: 3}
"""2 is wrong input."""
VERSION = 2


def certify(
    before: str | Path, after: str | Path, masks_dir: str | Path, basis_dir: str | Path | None = None, check_before: bool = True
) -> dict[str, Any]:
    """The certificate as a dictionary: ``outcome`` (a key of EXIT), ``kept`` (bool), ``claim``, ``problems``, ``reasons``
    (why it cannot tell), ``notes``, ``not_claimed``, ``files`` (name -> SHA-256 of every file read), totals and ``layers``.

    Every byte is read now, whatever earlier runs remember. ``check_before`` refuses a ``before`` that is not the model the
    masks were made for, such as swapped directories. Raises ArtifactError where a file is missing, does not fit, or changes
    meanwhile.
    """
    masks = MaskStore(masks_dir)
    old, new = ModelDirectory.of(Path(before), masks.layers), ModelDirectory.of(Path(after), masks.layers)
    if new.others():
        raise ArtifactError(f"{new.others()}: another reader could load them; remove them, or certify them by themselves")
    basis = masks.find_basis(basis_dir)
    paths = _read_files(old, new, masks, basis)
    states = _states(paths)
    fingerprints = {
        "before": fingerprint_model(old.directory, remember=False),
        "after": fingerprint_model(new.directory, remember=False),
    }
    masks.check(basis, fingerprints["before"] if check_before else None, str(before), remember=False)
    if basis is not None:
        basis.check(masks.layers, fingerprints["before"] if check_before else None, str(before))
    certified = certify_layers(old, new, masks, basis)
    layers, sums = [c for c, _ in certified], [s for _, s in certified]
    not_claimed, strange = _rest(old, new, masks)
    problems, log_tests = _problems(layers, sums)
    problems += strange
    reasons = [] if problems else _cannot_tell(layers, sums, log_tests)
    outcome = BROKEN if problems else CANNOT_TELL if reasons else KEPT
    files = {kind: _sha256(group) for kind, group in paths.items()}
    if _states(paths) != states:
        raise ArtifactError(
            f"files of {before}, {after} or the masks changed while they were read: try again when nothing writes to them"
        )
    frozen = sum(c.frozen for c in layers)
    return {
        "format": "warp_ds.certificate",
        "version": VERSION,
        "outcome": outcome,
        "kept": outcome == KEPT,
        "claim": _claim(outcome, layers),
        "false_alarm": FALSE_ALARM,
        "problems": problems,
        "reasons": reasons,
        "notes": [*_trained_with(new.directory, masks, bool(problems)), *_notes(old, masks, layers)],
        "not_claimed": not_claimed,
        "before": str(before),
        "after": str(after),
        "masks": str(masks.directory),
        "basis": None if basis is None else str(basis.directory),
        "before_fingerprint": fingerprints["before"],
        "after_fingerprint": fingerprints["after"],
        "masks_fingerprint": masks.fingerprint(remember=False),
        "basis_fingerprint": masks.metadata.basis_fingerprint,
        "files": files,
        "frozen": frozen,
        "free": sum(c.free for c in layers),
        "frozen_drift": _finite(
            relative_drift([(c.frozen * c.frozen_rms**2, c.frozen * c.coefficient_rms**2) for c in layers])
        ),
        "layers": [{key: _finite(value) for key, value in asdict(c).items()} for c in layers],
    }


def _read_files(old: ModelDirectory, new: ModelDirectory, masks: MaskStore, basis: BasisStore | None) -> dict[str, list[Path]]:
    """Whose -> every file that is read."""

    def of(store: MaskStore | BasisStore) -> list[Path]:
        files = sorted({entry["file"] for entry in store.metadata.layers.values()})
        return [store.directory / name for name in (*files, "metadata.json")]

    def of_model(model: ModelDirectory) -> list[Path]:
        names = {*unmasked.config_files(), INDEX}
        extra = [model.directory / name for name in sorted(names) if is_regular(model.directory / name)]
        return [*sorted({Path(tensor.path) for tensor in model.tensors.values()}), *extra]

    return {"before": of_model(old), "after": of_model(new), "masks": of(masks), "basis": [] if basis is None else of(basis)}


def _sha256(paths: list[Path]) -> dict[str, str]:
    digests = digest_parts([whole_file(path) for path in paths], remember=False)
    return {str(path): digest.sha256 for path, digest in zip(paths, digests, strict=True)}


def _states(paths: dict[str, list[Path]]) -> dict[Path, FileState]:
    try:
        return {path: FileState.of(path) for group in paths.values() for path in group}
    except OSError as error:
        raise ArtifactError(f"{error}: run the phase that wrote it again") from error


def _finite(value: Any) -> Any:
    """None for what JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _problems(layers: Sequence[LayerCertificate], sums: Sequence[Sums]) -> tuple[list[str], float]:
    """What shows that frozen coefficients moved; and the logarithm of how many sums were looked at."""
    problems = [f"{c.layer}: {c.not_finite} NaN or infinite weights, before or after" for c in layers if c.not_finite]
    problems += [
        f"{c.layer}: {c.violations} of {c.frozen} frozen coefficients moved further than rounding allows "
        f"(the worst by {c.worst_move:.3e}, where rounding allows {c.worst_allowed:.3e})"
        for c in layers
        if c.violations
    ]
    total = sum((s.totals() for s in sums), Sums())
    log_tests = math.log(max(1, total.number + sum(s.number for s in sums)))
    for c, s in zip(layers, sums, strict=True):
        c.together, c.together_allowed = s.whole.moved**0.5, s.whole.allowed(log_tests)
        problems += [f"{c.layer}: {found}" for found in s.found(log_tests) if not c.violations]
    if not problems:
        problems = [f"all layers together: {found}" for found in total.found(log_tests)]
    return problems, log_tests


def _cannot_tell(layers: Sequence[LayerCertificate], sums: Sequence[Sums], log_tests: float) -> list[str]:
    """Why a pair in which nothing is wrong shows nothing: [] where it does."""
    if not sum(c.frozen for c in layers):
        return ["the masks freeze nothing, so there is nothing to keep: make masks with a keep_ratio above 0"]
    if not any(c.free_max > 0 or c.frozen_max > 0 for c in layers):
        # Not broken, since nothing moved; not kept, since no training stood against the masks.
        return [
            "nothing moved at all: both directories hold the same weights in the masked layers; give the model before "
            "training and the one after it"
        ]
    moved = [(c, s) for c, s in zip(layers, sums, strict=True) if c.frozen and (c.free_max > 0 or c.frozen_max > 0)]
    coarse = [c for c, s in moved if not _would_show(c, s, log_tests)]
    # A layer that is frozen whole has nothing to compare with: it counts as told where another one is.
    if any(c.free for c, _ in moved) and len(coarse) < len(moved):
        coarse = [c for c in coarse if c.free]
    if not coarse:
        return []
    shown = ", ".join(c.layer for c in coarse[:3]) + (f" and {len(coarse) - 3} more" if len(coarse) > 3 else "")
    return [
        f"the files are too coarse to tell for {len(coarse)} of {len(layers)} layers ({shown}): had their frozen "
        "coefficients moved as far as the free ones, or been lost, rounding would hide it. What helps: save the trained "
        "model in float32 (--dtype float32), or train further or at a higher rate, and certify that"
    ]


def _would_show(c: LayerCertificate, s: Sums, log_tests: float) -> bool:
    """Whether the layer's frozen coefficients would have been found moved, had they moved as the free ones did."""
    together = c.free_rms * c.frozen**0.5 > s.whole.allowed(log_tests)
    # Of so many, none beyond its allowance has less than FALSE_ALARM's probability.
    singly = bool(c.free) and c.free_beyond / c.free * c.frozen >= -math.log(FALSE_ALARM)
    # Rounding of huge free parts can be as large as the frozen ones: then nothing would show even their loss.
    lost = c.coefficient_rms * c.frozen**0.5 > s.whole.allowed(log_tests)
    return lost and (together or singly)


def _claim(outcome: str, layers: Sequence[LayerCertificate]) -> str:
    frozen = sum(c.frozen for c in layers)
    return {
        KEPT: f"of {len(layers)} masked layers, none of {frozen} frozen coefficients moved further than rounding allows, alone "
        "or together",
        BROKEN: f"of {len(layers)} masked layers with {frozen} frozen coefficients, some moved further than rounding allows",
        CANNOT_TELL: f"whether {frozen} frozen coefficients of {len(layers)} masked layers were kept does not show in these "
        "files",
    }[outcome]


def _rest(old: ModelDirectory, new: ModelDirectory, masks: MaskStore) -> tuple[list[dict[str, str]], list[str]]:
    """What else changed, which no claim covers; and problems: NaN and infinities where something did."""
    masked = {f"{layer.name}.weight" for layer in masks.layers}
    sides = []
    for model in (old, new):
        contents = model_contents(model.directory)
        digests = contents.digests(remember=False)
        sides.append(
            {
                name: unmasked.StoredTensor(location.dtype, location.shape, digest.sha256)
                for (name, location), digest in zip(model.tensors.items(), digests, strict=True)
                if name not in masked
            }
        )
    problems = []
    for name in sorted(sides[1]):
        if sides[1][name] != sides[0].get(name) and sides[1][name].dtype in FLOATS and not torch.isfinite(new.read(name)).all():
            problems.append(f"{name}, which no mask covers, holds NaN or infinities after training")
    compared = unmasked.compare_tensors(sides[0], sides[1], lambda name: (old.read(name), new.read(name)))
    return [*compared, *unmasked.compare_files(old.directory, new.directory)], problems


def _notes(old: ModelDirectory, masks: MaskStore, layers: Sequence[LayerCertificate]) -> list[str]:
    notes = [f"masks: {note}" for note in masks.metadata.notes]
    if old.others():
        notes.append(f"{old.others()}, which were not looked at")
    grids = sorted({c.grid for c in layers if c.grid})
    if grids:
        notes.append(f"the weights after training lie on the grid of {', '.join(grids)}, whose rounding is what is allowed")
    return notes


def _trained_with(after: Path, masks: MaskStore, broken: bool) -> list[str]:
    """What the run that ``after`` lies in says, where it trained with other masks than these or with none."""
    run = after.resolve().parent
    if phase_of(run) != "phase3":
        return []
    config = run_config(run)
    inputs, settings = config.get("inputs"), config.get("settings")
    if not isinstance(inputs, dict) or inputs.get("masks") == masks.fingerprint(remember=False):
        return []
    used = inputs.get("masks")
    place = settings.get("masks_dir") if isinstance(settings, dict) else None
    with_what = "without masks" if used is None else f"with other masks ({place or used})"
    return [
        f"{run} was trained {with_what}, not with those in {masks.directory}"
        + (": nothing kept these coefficients where they were" if broken else "")
    ]


def still_describes(certificate: Any, directory: Path) -> bool:
    """Whether a certificate's verdict is of the model that lies in ``directory`` now: by the digest of all its bytes.

    False for anything that is no certificate of this version, and for a directory that cannot be read.
    """
    if not isinstance(certificate, dict) or certificate.get("version") != VERSION or certificate.get("outcome") not in EXIT:
        return False
    try:
        return bool(certificate.get("after_fingerprint") == fingerprint_model(directory))
    except (ArtifactError, OSError):
        return False
