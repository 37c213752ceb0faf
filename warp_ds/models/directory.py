"""A model directory as from_pretrained reads it: every tensor in one place, of one name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from warp_ds.errors import ArtifactError, CheckpointError
from warp_ds.store.checkpoint_index import RangeReader, TensorLocation, resolve_checkpoint
from warp_ds.store.layers import TargetLayer

if TYPE_CHECKING:  # which imports transformers
    from warp_ds.models.transformers_internals import LoadedWeight

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "pytorch_model*.json")
"""Files from which one reader or another would load weights."""
NO_WEIGHTS = ("training_args.", "optimizer.", "scheduler.", "rng_state")
"""... and what Trainer leaves beside a model."""


_QUANTISED = (
    "of a model that was quantised after training certify the one before; a start model save again in the training's dtype, by "
    "from_pretrained and save_pretrained, before phase 1"
)


@dataclass(frozen=True)
class ModelDirectory:
    """A model directory as from_pretrained reads it: every tensor in one place, of one name."""

    directory: Path
    tensors: dict[str, TensorLocation]
    """By the name under which it is stored, or by its parameter's where those differ."""
    assembled: Mapping[str, LoadedWeight] = field(default_factory=dict)
    """Parameters made of several of these, or of parts of them, or stored transposed."""

    @staticmethod
    def of(directory: Path, targets: Sequence[TargetLayer] = ()) -> ModelDirectory:
        """Raises ArtifactError where the directory is no model, or from_pretrained does not find ``targets`` in it."""
        try:
            tensors = resolve_checkpoint(directory)
        except OSError as error:
            raise ArtifactError(f"{directory} cannot be read as a model directory: {error}") from error
        # Experts may be stored transposed, or in fewer bits, which shapes and names need not tell.
        if all(target.parameter in tensors and target.expert is None for target in targets):
            return ModelDirectory(directory, tensors)
        return ModelDirectory(directory, *_by_parameter(directory, tensors))

    def parts_of(self, parameter: str) -> set[str]:
        """Names of the tensors that hold a parameter."""
        if parameter not in self.assembled:
            return {parameter}
        stored = self.assembled[parameter].stored_in()
        return {name for name, location in self.tensors.items() if location.name in stored}

    @property
    def computed(self) -> set[str]:
        """The parameters that are stored in fewer bits and can be read."""
        return {name for name, loaded in self.assembled.items() if loaded.conversion and loaded.conversion.by_expert}

    def others(self) -> str:
        """Other weights beside those that from_pretrained loads, as a message; empty where there are none."""
        loaded = {Path(tensor.path).name for tensor in self.tensors.values()}
        others = sorted(
            path.name
            for pattern in OTHER_WEIGHTS
            for path in self.directory.glob(pattern)
            if path.name not in loaded and not path.name.startswith(NO_WEIGHTS)
        )
        return f"{self.directory} holds other weights beside those that from_pretrained loads ({others[0]})" if others else ""

    def weight(self, target: TargetLayer) -> Tensor:
        """W [m, n]; ArtifactError where it is missing, quantised, of another shape, or stored under two names."""
        name = target.parameter
        if name in self.assembled:
            return self._rows(target)
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
                f"{location.path}: {name} is stored as {short_dtype(location.dtype)}, which is quantised: {_QUANTISED}"
            )
        if not target.fits(location.shape):
            raise ArtifactError(
                f"{location.path}: {name} is {location.shape}, not {target.whole_shape} as the masks or the basis have it"
            )
        return target.of(self.read(name))

    def _rows(self, target: TargetLayer) -> Tensor:
        """W [m, n] of a parameter that is made of several stored tensors; reads no others than its rows are of."""
        loaded = self.assembled[target.parameter]
        if not target.fits(loaded.shape):
            raise ArtifactError(
                f"{self.directory}: {target.parameter} is {loaded.shape}, not {target.whole_shape} as the masks or the basis "
                "have it"
            )
        rows = target.rows or ((0, target.m),)
        parts = [self._elements(target.parameter, first * target.n, end * target.n) for first, end in rows]
        return torch.cat(parts).view(target.shape)

    def _elements(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of an assembled parameter, flat, as it is held. Raises ArtifactError."""
        loaded, turning = self.assembled[name], self.assembled[name].turning
        if turning is None and loaded.conversion is None:
            return self._stored(name, start, stop)
        size, parts = math.prod(loaded.shape[1:]), []
        for first in range(start // size * size, stop, size):  # an expert
            w = self._stored(name, first, first + size) if loaded.conversion is None else self._computed(name, first // size)
            rows = w.view(-1) if turning is None else turning.in_rows(w.view(turning.stored[1:])).view(-1)
            parts.append(rows[max(start - first, 0) : stop - first])
        return torch.cat(parts)

    def _computed(self, name: str, expert: int) -> Tensor:
        """An expert of a parameter that is stored in fewer bits, fp32, as it is stored. Raises ArtifactError."""
        conversion = self.assembled[name].conversion
        assert conversion is not None
        if not conversion.by_expert:
            raise ArtifactError(
                f"{self.directory}: {name} is computed from what is stored, of which no expert can be read by itself (float8, "
                f"or transposed). If it is quantised: {_QUANTISED}"
            )
        try:
            with RangeReader() as reader:
                return conversion.run(reader, expert)[name].detach()
        except (OSError, CheckpointError) as error:
            raise ArtifactError(f"{self.directory} has no readable weight {name} ({error})") from error

    def _stored(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of what an assembled parameter is made of, flat. Raises ArtifactError."""
        pieces = [piece.within(start, stop) for piece in self.assembled[name].pieces]
        pieces = [piece for piece in pieces if piece.length > 0]
        dtype = pieces[0].origin.dtype
        if any(piece.origin.dtype != dtype or dtype not in FLOATS for piece in pieces):
            raise ArtifactError(
                f"{self.directory}: {name} is stored as {short_dtype(dtype)}, or partly, which is quantised: {_QUANTISED}"
            )
        out = torch.empty(stop - start, dtype=dtype)
        try:
            with RangeReader() as reader:
                for piece in pieces:
                    reader.read(piece.origin, piece.first, out[piece.begin - start : piece.end - start])
        except (OSError, CheckpointError) as error:
            raise ArtifactError(f"{self.directory} has no readable weight {name} ({error})") from error
        return out

    def parameter(self, name: str) -> Tensor:
        """The parameter called ``name``, of the shape of which masks and bases name rows. Raises ArtifactError."""
        if name not in self.assembled:
            return self.read(name)
        shape = self.assembled[name].shape
        return self._elements(name, 0, math.prod(shape)).view(shape)

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``, in the shape and dtype it is stored in. Raises ArtifactError."""
        if name in self.assembled and (self.assembled[name].turning is None or self.assembled[name].conversion):
            return self.parameter(name)
        if name not in self.tensors:
            raise ArtifactError(f"{self.directory} has no parameter {name}: it is another kind of model")
        try:
            with safe_open(self.tensors[name].path, framework="pt") as file:
                return file.get_tensor(self.tensors[name].name)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{self.directory} has no readable weight {name} ({error})") from error


def by_parameter(model: ModelDirectory) -> ModelDirectory:
    """The same directory by the names that from_pretrained gives its parameters, where those are not the stored ones."""
    return ModelDirectory(model.directory, *_by_parameter(model.directory, model.tensors))


def _by_parameter(
    directory: Path, tensors: dict[str, TensorLocation]
) -> tuple[dict[str, TensorLocation], dict[str, LoadedWeight]]:
    """The tensors in the same order, by the names of the parameters that from_pretrained makes of them; those that it makes
    none of keep theirs. And the parameters that it makes of several, or of parts, or holds in another order."""
    from warp_ds.models.transformers_internals import CannotMap, weights_as_loaded

    try:
        loaded = weights_as_loaded(directory)
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
    names = {weight.location.name: name for name, weight in loaded.items() if weight.location is not None}
    renamed = {names.get(name, name): location for name, location in tensors.items()}
    if len(renamed) < len(tensors):
        raise ArtifactError(
            f"{directory} stores a weight under two names: which one counts depends on the reader; save the "
            "model again by from_pretrained and save_pretrained"
        )
    return renamed, {name: weight for name, weight in loaded.items() if weight.location is None}


def short_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
