"""The freeze certificate: from two model directories alone, whether frozen coefficients moved further than rounding allows."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warp_ds.errors import ArtifactError
from warp_ds.evaluation import unmasked
from warp_ds.evaluation.drift import LayerCertificate, certify_layers, relative_drift
from warp_ds.method.systematic import FALSE_ALARM, Sums
from warp_ds.models.directory import FLOATS, ModelDirectory
from warp_ds.store.bases import BasisStore
from warp_ds.store.checkpoint_index import INDEX
from warp_ds.store.digests import FileState, afresh
from warp_ds.store.fingerprints import Contents, fingerprint_model, model_contents, whole_part
from warp_ds.store.layers import uncovered
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import phase_of, run_config

KEPT, BROKEN, CANNOT_TELL = "kept", "broken", "cannot tell"
EXIT = {KEPT: 0, BROKEN: 1, CANNOT_TELL: 3}
"""2 is wrong input."""
VERSION = 2


@dataclass(frozen=True)
class Certificate:
    """What is said of a pair of models and one set of masks."""

    outcome: str
    """A key of EXIT."""
    claim: str
    problems: list[str]
    reasons: list[str]
    """Why it cannot tell."""
    notes: list[str]
    not_claimed: list[unmasked.Difference]
    before: str
    after: str
    masks: str
    basis: str | None
    before_fingerprint: str
    after_fingerprint: str
    masks_fingerprint: str
    basis_fingerprint: str | None
    files: dict[str, dict[str, str]]
    """Whose -> path -> SHA-256 of every file that was read."""
    layers: list[LayerCertificate]

    @property
    def kept(self) -> bool:
        return self.outcome == KEPT

    @property
    def frozen(self) -> int:
        return sum(layer.frozen for layer in self.layers)

    @property
    def free(self) -> int:
        return sum(layer.free for layer in self.layers)

    @property
    def frozen_drift(self) -> float:
        """‖ΔC‖ / ‖C‖ over all frozen coefficients."""
        return relative_drift([(c.frozen * c.frozen_rms**2, c.frozen * c.coefficient_rms**2) for c in self.layers])

    def values(self) -> dict[str, Any]:
        """As JSON has it, where what is not finite is null."""
        said = {key: value for key, value in asdict(self).items() if key != "layers"}
        return {
            **{"format": "warp_ds.certificate", "version": VERSION, "kept": self.kept, "false_alarm": FALSE_ALARM, **said},
            **{"frozen": self.frozen, "free": self.free, "frozen_drift": _finite(self.frozen_drift)},
            "layers": [{key: _finite(value) for key, value in asdict(layer).items()} for layer in self.layers],
        }


def certify(before: str | Path, after: str | Path, masks_dir: str | Path, basis_dir: str | Path | None = None) -> Certificate:
    """The certificate of a pair of model directories.

    Every file is digested now, whatever earlier runs remember, in one pass; masked weights are read once more to be compared.
    Raises ArtifactError where a file is missing, does not fit (a ``before`` that the masks were not made for, such as swapped
    directories), or changes meanwhile.
    """
    masks = _masks_of_start(masks_dir)
    old, new = ModelDirectory.of(Path(before), masks.layers), ModelDirectory.of(Path(after), masks.layers)
    if new.others():
        raise ArtifactError(f"{new.others()}: another reader could load them; remove them, or certify them by themselves")
    basis = masks.find_basis(basis_dir)
    paths = _read_files(old, new, masks, basis)
    states = _states(paths)
    with afresh():
        files = _digest_all(paths, old, new, masks)
        fingerprint = fingerprint_model(old.directory)
        masks.check(basis, fingerprint, str(before))
        if basis is not None:
            basis.check(masks.layers, fingerprint, str(before))
        layers, sums = map(list, zip(*certify_layers(old, new, masks, basis), strict=True))
        not_claimed, strange = _rest(old, new, masks)
        moved, log_tests = _problems(layers, sums)
        problems = moved + strange
        reasons = [] if problems else _cannot_tell(layers, sums, log_tests)
        outcome = BROKEN if problems else CANNOT_TELL if reasons else KEPT
        certificate = Certificate(
            outcome=outcome,
            claim=_claim(outcome, layers),
            problems=problems,
            reasons=reasons,
            notes=[*_trained_with(new.directory, masks, bool(problems)), *_notes(old, masks, layers)],
            not_claimed=not_claimed,
            before=str(before),
            after=str(after),
            masks=str(masks.directory),
            basis=None if basis is None else str(basis.directory),
            before_fingerprint=fingerprint,
            after_fingerprint=fingerprint_model(new.directory),
            masks_fingerprint=masks.fingerprint(),
            basis_fingerprint=masks.metadata.basis_fingerprint,
            files=files,
            layers=layers,
        )
    if _states(paths) != states:
        raise ArtifactError(
            f"files of {before}, {after} or the masks changed while they were read: try again when nothing writes to them"
        )
    return certificate


def _masks_of_start(masks_dir: str | Path) -> MaskStore:
    """ArtifactError for masks that were found during a training."""
    masks = MaskStore(masks_dir)
    if step := masks.metadata.since_step:
        raise ArtifactError(
            f"the masks in {masks.directory} hold from optimizer step {step} of a training on, at the values of that step, "
            "which no model directory has: give the masks that it started with, which hold from its start"
        )
    return masks


def _read_files(old: ModelDirectory, new: ModelDirectory, masks: MaskStore, basis: BasisStore | None) -> dict[str, list[Path]]:
    """Whose -> every file that is read."""

    def of(store: MaskStore | BasisStore) -> list[Path]:
        files = sorted(
            {str(entry[key]) for entry in store.metadata.layers.values() for key in ("file", "output") if key in entry}
        )
        return [store.directory / name for name in (*files, "metadata.json")]

    def of_model(model: ModelDirectory) -> list[Path]:
        names = {*unmasked.config_files(), INDEX}
        extra = [model.directory / name for name in sorted(names) if os.path.isfile(model.directory / name)]
        return [*sorted({Path(tensor.path) for tensor in model.tensors.values()}), *extra]

    return {"before": of_model(old), "after": of_model(new), "masks": of(masks), "basis": [] if basis is None else of(basis)}


def _digest_all(
    paths: dict[str, list[Path]], old: ModelDirectory, new: ModelDirectory, masks: MaskStore
) -> dict[str, dict[str, str]]:
    """Whose -> path -> SHA-256; besides, the digests of the tensors and the masks' bits are known from the same pass."""
    covered = [model_contents(old.directory), model_contents(new.directory), masks.contents()]
    parts = [part for contents in covered for part in contents.parts.values()]
    parts += [whole_part(path) for group in paths.values() for path in group]
    digests = Contents("", {str(number): part for number, part in enumerate(parts)}).digests()
    sha256 = {part: digest.sha256 for part, digest in zip(parts, digests, strict=True)}
    return {kind: {str(path): sha256[whole_part(path)] for path in group} for kind, group in paths.items()}


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
        problems += [f"{c.layer}: {problem}" for problem in s.excesses(log_tests) if not c.violations]
    if not problems:
        problems = [f"all layers together: {problem}" for problem in total.excesses(log_tests)]
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


def _rest(old: ModelDirectory, new: ModelDirectory, masks: MaskStore) -> tuple[list[unmasked.Difference], list[str]]:
    """What else changed, which no claim covers; and problems: NaN and infinities where something did."""
    sides = []
    for model in (old, new):
        masked = {name for parameter in {layer.parameter for layer in masks.layers} for name in model.parts_of(parameter)}
        digests = model_contents(model.directory).digests()
        sides.append(
            {
                name: unmasked.StoredTensor(location.dtype, location.shape, digest.sha256)
                for (name, location), digest in zip(model.tensors.items(), digests, strict=True)
                if name not in masked
            }
        )
    # Stored in fewer bits before, and not after: what they are is compared, held in one way.
    whole = (old.computed ^ new.computed) - {layer.parameter for layer in masks.layers}
    parts = {f"{name} (rows without a mask)": (name, rows) for name, rows in uncovered(masks.layers).items()}

    def read(model: ModelDirectory, name: str) -> Tensor:
        if name in whole:
            return model.parameter(name)
        return unmasked.rows_of(model.parameter(parts[name][0]), parts[name][1]) if name in parts else model.read(name)

    for model, side in zip((old, new), sides, strict=True):
        for name in sorted(whole):
            for part in model.parts_of(name):
                side.pop(part, None)
            side[name] = unmasked.stored(read(model, name))
        side.update({name: unmasked.stored(read(model, name)) for name in parts})
    problems = []
    for name in sorted(sides[1]):
        if (
            sides[1][name] != sides[0].get(name)
            and sides[1][name].dtype in FLOATS
            and not torch.isfinite(read(new, name)).all()
        ):
            problems.append(f"{name}, which no mask covers, holds NaN or infinities after training")
    compared = unmasked.compare_tensors(sides[0], sides[1], lambda name: (read(old, name), read(new, name)))
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
    if not isinstance(inputs, dict) or inputs.get("masks") == masks.fingerprint():
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
