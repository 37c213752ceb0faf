"""The freeze certificate: from two model directories alone, how far frozen and free coefficients moved.

One layer is in memory at a time and no model is built. With Δ = (W_after - W_before) U, a frozen coefficient may have
moved by what rounding W_after to its stored dtype allows and no more. With e_ik the largest rounding error of entry
(i, k): |Δ_ij| <= Σ_k |U_kj| e_ik in the worst case, and, the errors being independent, at most SIGMAS standard
deviations, (Σ_k U_kj² e_ik² / 3)^½ each. The smaller of the two is allowed; and C_i (UᵀU - I)_j besides, since the
stored U is orthonormal to fp32 only. That finds one large move; method/systematic.py finds many small ones.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from warp_ds.errors import ArtifactError
from warp_ds.evaluation import unmasked
from warp_ds.method.eigenbasis import BAR, orthogonality_error
from warp_ds.method.mask import unpack_bits
from warp_ds.method.rotation import Rotation
from warp_ds.method.systematic import FALSE_ALARM, Sums
from warp_ds.names import printable
from warp_ds.store.bases import BasisStore
from warp_ds.store.checkpoint_index import INDEX, CheckpointError, TensorLocation, resolve_checkpoint
from warp_ds.store.digests import FileState, digest_parts, is_regular, whole_file
from warp_ds.store.files import write_text
from warp_ds.store.fingerprints import fingerprint_model, model_contents
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import phase_of, run_config

KEPT, BROKEN, CANNOT_TELL = "kept", "broken", "cannot tell"
EXIT = {KEPT: 0, BROKEN: 1, CANNOT_TELL: 3}
"""2 is wrong input."""
VERSION = 2

SIGMAS = 12.0
#: The masked step makes W from C by fp32 products of n terms: an error of about n^½ units of 2^-24 of the row's size.
FP32_PRODUCTS = 2.0**-24
#: ... and by TF32 products on a GPU where W is stored in 16 bits.
TF32_PRODUCTS = 2.0**-11
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "pytorch_model*.json")
"""Files from which one reader or another would load weights."""
NO_WEIGHTS = ("training_args.", "optimizer.", "scheduler.", "rng_state")
"""... and what Trainer leaves beside a model."""


@dataclass
class LayerCertificate:
    """One layer of the certificate; moves in the units of the weights. NaN where the layer holds no finite numbers."""

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
    not_finite: int
    """NaN and infinities in the layer, before and after."""
    together: float = 0.0
    """Length of the move of all its frozen coefficients."""
    together_allowed: float = 0.0
    """What rounding allows that."""
    grid: str = ""
    """The coarsest dtype that holds every weight after training."""


@dataclass(frozen=True)
class Model:
    """A model directory as from_pretrained reads it: every tensor in one place, of one name."""

    directory: Path
    tensors: dict[str, TensorLocation]
    """By the name under which it is stored, or by its parameter's where those differ."""

    @staticmethod
    def of(directory: Path, targets: Sequence[TargetLayer] = ()) -> Model:
        """Raises ArtifactError where the directory is no model, or from_pretrained does not find ``targets`` in it."""
        try:
            tensors = resolve_checkpoint(directory)
        except (CheckpointError, OSError) as error:
            raise ArtifactError(f"{error} (read {directory} as a model directory)") from error
        if not all(f"{target.name}.weight" in tensors for target in targets):
            tensors = _by_parameter(directory, tensors)
        return Model(directory, tensors)

    def others(self) -> str:
        """Other weights beside those that from_pretrained loads, as a message; empty where there are none."""
        loaded = {Path(tensor.path).name for tensor in self.tensors.values()}
        found = sorted(
            path.name
            for pattern in OTHER_WEIGHTS
            for path in self.directory.glob(pattern)
            if path.name not in loaded and not path.name.startswith(NO_WEIGHTS)
        )
        return f"{self.directory} holds other weights beside those that from_pretrained loads ({found[0]})" if found else ""

    def files(self) -> list[Path]:
        """Everything that is read of it."""
        names = {*unmasked.config_files(), INDEX}
        extra = [self.directory / name for name in sorted(names) if is_regular(self.directory / name)]
        return [*sorted({Path(t.path) for t in self.tensors.values()}), *extra]

    def weight(self, target: TargetLayer) -> Tensor:
        """W [m, n]; ArtifactError where it is missing, quantised, of another shape, or stored under two names."""
        name = f"{target.name}.weight"
        alike = [o for o in self.tensors if o != name and (o.endswith(f".{name}") or name.endswith(f".{o}"))]
        if name not in self.tensors:
            raise ArtifactError(
                f"{self.directory} has no readable weight {name}"
                + (
                    f" (but {alike[0]}): save it again by from_pretrained and save_pretrained"
                    if alike
                    else ": is it the model that the masks were made for?"
                )
            )
        if alike:
            raise ArtifactError(
                f"{self.directory} has {name} and {alike[0]}, which from_pretrained takes for the same "
                "parameter: which one counts depends on the reader; save the model again"
            )
        location = self.tensors[name]
        if location.dtype not in FLOATS:
            raise ArtifactError(
                f"{location.path}: {name} is stored as {_short(location.dtype)}, which is quantised: certify "
                "the model before quantising it"
            )
        if location.shape != (target.m, target.n):
            raise ArtifactError(
                f"{location.path}: {name} is {location.shape}, not {(target.m, target.n)} as the masks or the basis have it"
            )
        return self.read(name)

    def read(self, name: str) -> Tensor:
        try:
            with safe_open(self.tensors[name].path, framework="pt") as file:
                return file.get_tensor(self.tensors[name].name)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{self.directory} has no readable weight {name} ({error})") from error


def _by_parameter(directory: Path, tensors: dict[str, TensorLocation]) -> dict[str, TensorLocation]:
    """The tensors in the same order, by the names of the parameters that from_pretrained makes of them; those that it makes
    none of keep theirs."""
    from warp_ds.models.transformers_internals import CannotMap, weights_as_loaded

    try:
        names = {location.name: name for name, location in weights_as_loaded(directory).items()}
    except (
        CannotMap,
        ArithmeticError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:  # transformers' own of a directory that it does not load are any of these
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ArtifactError(f"{directory} has no readable weights of the masked layers: {reason[:500]}") from error
    renamed = {names.get(name, name): location for name, location in tensors.items()}
    if len(renamed) < len(tensors):
        raise ArtifactError(
            f"{directory} stores a weight under two names: which one counts depends on the reader; save the "
            "model again by from_pretrained and save_pretrained"
        )
    return renamed


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
    old, new = Model.of(Path(before), masks.layers), Model.of(Path(after), masks.layers)
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
    certified = _certify_layers(old, new, masks, basis)
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


def _read_files(old: Model, new: Model, masks: MaskStore, basis: BasisStore | None) -> dict[str, list[Path]]:
    """Whose -> every file that is read."""

    def of(store: MaskStore | BasisStore) -> list[Path]:
        files = sorted({entry["file"] for entry in store.metadata.layers.values()})
        return [store.directory / name for name in (*files, "metadata.json")]

    return {"before": old.files(), "after": new.files(), "masks": of(masks), "basis": [] if basis is None else of(basis)}


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


def _rest(old: Model, new: Model, masks: MaskStore) -> tuple[list[dict[str, str]], list[str]]:
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


def _notes(old: Model, masks: MaskStore, layers: Sequence[LayerCertificate]) -> list[str]:
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


def relative_drift(layers: Sequence[tuple[float, float]]) -> float:
    """‖ΔC‖ / ‖C‖ over all frozen coefficients, from each layer's ``layer_drift``."""
    moved, size = (sum(part) for part in zip(*layers, strict=True)) if layers else (0.0, 0.0)
    return (moved / size) ** 0.5 if size else 0.0


def layer_drift(target: TargetLayer, before: Model, after: Model, masks: MaskStore, basis: BasisStore) -> tuple[float, float]:
    """‖ΔC‖² and ‖C‖² of one layer's frozen coefficients, without what a certificate asks besides."""
    rotation = basis.rotation(target.name, torch.float64)
    w_before, w_after = before.weight(target), after.weight(target)
    moved = size = 0.0
    for rows in _chunks(target.m, target.n):
        frozen = unpack_bits(masks.packed(target.name, rows.start, rows.stop), target.n)
        old = w_before[rows].double()
        moved += float(rotation.rotate(w_after[rows].double() - old)[frozen].square().sum())
        size += float(rotation.rotate(old)[frozen].square().sum())
    return moved, size


class _Layer:
    """Running figures of one layer, a block of rows at a time."""

    def __init__(self) -> None:
        self.counts = {"frozen": 0, "free": 0, "violations": 0, "free beyond": 0}
        self.squares = {"frozen": 0.0, "free": 0.0, "size": 0.0}
        self.largest = {"frozen": 0.0, "free": 0.0, "allowed": 0.0}
        self.worst = (0.0, 0.0)

    def add(self, moved: Tensor, size: Tensor, allowed: Tensor, frozen: Tensor) -> None:
        """Δ, C before, what rounding allows Δ, and which are frozen: [k, n] each."""
        free = ~frozen
        beyond = moved.abs() > allowed
        self.counts["violations"] += int(beyond[frozen].sum())
        self.counts["free beyond"] += int(beyond[free].sum())
        for name, which in (("frozen", frozen), ("free", free)):
            self.counts[name] += int(which.sum())
            if which.any():
                self.squares[name] += float(moved[which].square().sum())
                self.largest[name] = max(self.largest[name], float(moved[which].abs().max()))
        if frozen.any():
            self.squares["size"] += float(size[frozen].square().sum())
            moves, allowances = moved[frozen].abs(), allowed[frozen]
            self.largest["allowed"] = max(self.largest["allowed"], float(allowances.max()))
            most = int((moves / allowances).argmax())
            found = float(moves[most]), float(allowances[most])
            self.worst = max(self.worst, found, key=lambda w: w[0] / w[1] if w[1] else 0.0)

    def rms(self, name: str, of: str) -> float:
        return (self.squares[name] / self.counts[of]) ** 0.5 if self.counts[of] else 0.0


def _certify_layers(
    before: Model, after: Model, masks: MaskStore, basis: BasisStore | None
) -> list[tuple[LayerCertificate, Sums]]:
    """In the masks' order; layers that share a basis file are done one after another, and the last file's is kept."""
    files = {t.name: "" if basis is None else basis.metadata.layers[t.name]["file"] for t in masks.layers}
    found: dict[str, tuple[LayerCertificate, Sums]] = {}
    last, complete = "", None
    for target in sorted(masks.layers, key=lambda t: files[t.name]):
        if basis is None:
            complete = _Complete(Rotation(None, target.n))
        elif complete is None or last != files[target.name]:
            complete = None  # frees the last one first
            last, complete = files[target.name], _orthonormal(basis, target)
        found[target.name] = _certify_layer(target, before, after, masks, complete)
    return [found[target.name] for target in masks.layers]


def _certify_layer(
    target: TargetLayer, before: Model, after: Model, masks: MaskStore, basis: _Complete
) -> tuple[LayerCertificate, Sums]:
    w_before, w_after = before.weight(target), after.weight(target)
    not_finite = int((~torch.isfinite(w_before)).sum()) + int((~torch.isfinite(w_after)).sum())
    if not_finite:
        count, nan = masks.metadata.layers[target.name]["frozen"], math.nan
        return LayerCertificate(
            target.name, count, target.m * target.n - count, nan, nan, nan, nan, nan, nan, 0, nan, nan, 0, not_finite, nan, nan
        ), Sums()
    rotation, absolute, squared, skew = basis.rotation, basis.absolute, basis.squared, basis.skew
    grid = _grid(w_after)
    low_precision = torch.finfo(grid).eps > 1e-6
    figures, sums = _Layer(), Sums()
    for rows in _chunks(target.m, target.n):
        old, new = w_before[rows].double(), w_after[rows].double()
        moved, size = rotation.rotate(new - old), rotation.rotate(old)
        # The start model is exact as stored: only W after training was rounded.
        row_size = old.square().mean(dim=1, keepdim=True).sqrt()
        rounding = _half_ulp(new, grid)
        products = row_size * max(FP32_PRODUCTS * max(16.0, 2 * target.n**0.5), TF32_PRODUCTS if low_precision else 0.0)
        allowed, variance = rounding + products, rounding.square().div(3)
        skewed: Tensor | float = 0.0
        if absolute is not None and squared is not None and skew is not None:
            variance = _weighted(rounding.square(), squared).div(3)
            deviation = variance.sqrt() + products / 3**0.5
            allowed = torch.minimum(_weighted(allowed, absolute), SIGMAS * deviation) + row_size * target.n**0.5 * skew
            skewed = 2 * row_size * skew.max()
        frozen = unpack_bits(masks.packed(target.name, rows.start, rows.stop), target.n)
        figures.add(moved, size, allowed, frozen)
        typical = row_size * max(FP32_PRODUCTS * max(12.0, 1.5 * target.n**0.5), TF32_PRODUCTS if low_precision else 0.0)
        typical = typical + skewed
        sums.add(moved, size, frozen, variance, rounding, typical, basis.matrix)
    counts = figures.counts
    return LayerCertificate(
        target.name,
        counts["frozen"],
        counts["free"],
        figures.largest["frozen"],
        figures.rms("frozen", "frozen"),
        figures.largest["free"],
        figures.rms("free", "free"),
        figures.rms("size", "frozen"),
        figures.largest["allowed"],
        counts["violations"],
        *figures.worst,
        counts["free beyond"],
        0,
        grid="" if grid == w_after.dtype else f"{_short(grid)} (stored in {_short(w_after.dtype)})",
    ), sums


@dataclass(frozen=True)
class _Complete:
    """A complete basis U [n, n] as it is asked for; None for the identity."""

    rotation: Rotation
    """In fp64."""
    matrix: Tensor | None = None
    """U in fp32; so are |U| and U²."""
    absolute: Tensor | None = None
    squared: Tensor | None = None
    skew: Tensor | None = None
    """Length [n] of each column of UᵀU - I, fp64."""


def _orthonormal(basis: BasisStore, target: TargetLayer) -> _Complete:
    """The layer's basis, every entry of UᵀU - I looked at."""
    columns, _ = basis.columns(target.name)
    try:
        rotation = Rotation(columns, target.n, torch.float64)
    except ValueError as error:
        raise ArtifactError(f"{basis.directory}: the basis of {target.name}: {error}; run phase 1 again") from error
    u = rotation.rotate(torch.eye(target.n, dtype=torch.float64)) if rotation.matrix is None else rotation.matrix
    gram = u.T @ u
    gram.diagonal().sub_(1.0)
    r = columns.shape[1]
    # Reflectors are orthonormal whatever they were made from; a dense U begins with the stored columns.
    off = (
        orthogonality_error(columns.double())
        if rotation.matrix is None
        else float(torch.linalg.vector_norm(gram[:r, :r], float("inf")))
    )
    if not off <= BAR:
        raise ArtifactError(
            f"{basis.directory}: the basis of {target.name} is not orthonormal (an entry of UᵀU - I is "
            f"{off:.1e}, more than {BAR:g}); run phase 1 again"
        )
    skew = torch.linalg.vector_norm(gram, dim=0)
    del gram
    return _Complete(rotation, u.float(), u.abs().float(), u.square().float(), skew)


def _weighted(values: Tensor, weights: Tensor) -> Tensor:
    """values @ weights in fp32, each row first brought to a size that fp32 holds; fp64."""
    largest = values.amax(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return ((values / largest).float() @ weights).double() * largest * (1 + 1e-5)


def _grid(w: Tensor) -> torch.dtype:
    """The coarsest dtype that holds every entry: of a model that was stored in 16 bits once, those."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if dtype.itemsize < w.dtype.itemsize and torch.equal(w.to(dtype).to(w.dtype), w):
            return dtype
    return w.dtype


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _half_ulp(w: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours in ``dtype`` of each entry of w (fp64), fp64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(w)
    return torch.ldexp(torch.full_like(w, info.eps / 4), exponent).clamp_min(info.tiny * info.eps)


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
    if not isinstance(certificate, dict) or certificate.get("version") != VERSION or certificate.get("outcome") not in EXIT:
        return False
    try:
        return bool(certificate.get("after_fingerprint") == fingerprint_model(directory))
    except (ArtifactError, OSError):
        return False


def write_certificate(certificate: dict[str, Any], path: Path) -> None:
    """Writes the certificate as JSON (no NaN, no Infinity), whole or not at all."""
    write_text(path, json.dumps(certificate, indent=2, allow_nan=False) + "\n")


def print_certificate(certificate: dict[str, Any]) -> None:
    """The certificate as a table on standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Moves of rotated coefficients, in the weights' units")

    def line(text: str) -> str:
        """Names come from files that anybody may have written: no line ends, no terminal codes, no markup."""
        return escape(" ".join(printable(text).split()))

    table.add_column("layer")
    for column in ("frozen", "largest", "rms", "allowed", "free: largest", "rms"):
        table.add_column(column, justify="right")
    for layer in certificate["layers"]:
        figures = ("frozen_max", "frozen_rms", "allowed_max", "free_max", "free_rms")
        table.add_row(
            line(layer["layer"]),
            str(layer["frozen"]),
            *("not finite" if layer[name] is None else f"{layer[name]:.2e}" for name in figures),
        )
    console = Console(width=140)
    console.print(table)
    console.print(
        f"[bold]{certificate['outcome'].upper()}[/]: {line(certificate['claim'])} ({certificate['frozen']} frozen, "
        f"{certificate['free']} free; {line(certificate['before'])} -> {line(certificate['after'])})"
    )
    for kind, style in (("problems", "red"), ("reasons", "yellow")):
        for entry in certificate[kind]:
            console.print(f"[{style}]{line(entry)}")
    for note in certificate["notes"]:
        console.print(f"[yellow]note: {line(note)}", highlight=False)
    console.print("This says nothing of what is not masked. There,")
    for part in certificate["not_claimed"]:
        detail = f" ({part['detail']})" if part["detail"] else ""
        console.print("  " + line(f"{part['what']}: {part['state']}{detail}"), highlight=False)
