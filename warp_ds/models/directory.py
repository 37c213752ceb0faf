"""A model directory as from_pretrained reads it: every tensor in one place, of one name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from warp_ds.errors import ArtifactError
from warp_ds.store.checkpoint_index import TensorLocation, resolve_checkpoint
from warp_ds.store.layers import TargetLayer

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


OTHER_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "pytorch_model*.json")
"""Files from which one reader or another would load weights."""
NO_WEIGHTS = ("training_args.", "optimizer.", "scheduler.", "rng_state")
"""... and what Trainer leaves beside a model."""


@dataclass(frozen=True)
class ModelDirectory:
    """A model directory as from_pretrained reads it: every tensor in one place, of one name."""

    directory: Path
    tensors: dict[str, TensorLocation]
    """By the name under which it is stored, or by its parameter's where those differ."""

    @staticmethod
    def of(directory: Path, targets: Sequence[TargetLayer] = ()) -> ModelDirectory:
        """Raises ArtifactError where the directory is no model, or from_pretrained does not find ``targets`` in it."""
        try:
            tensors = resolve_checkpoint(directory)
        except OSError as error:
            raise ArtifactError(f"{directory} cannot be read as a model directory: {error}") from error
        if not all(target.parameter in tensors for target in targets):
            tensors = _by_parameter(directory, tensors)
        return ModelDirectory(directory, tensors)

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
                f"{location.path}: {name} is stored as {short_dtype(location.dtype)}, which is quantised: certify "
                "the model before quantising it"
            )
        if not target.fits(location.shape):
            raise ArtifactError(
                f"{location.path}: {name} is {location.shape}, not {target.whole_shape} as the masks or the basis have it"
            )
        return target.of(self.read(name))

    def read(self, name: str) -> Tensor:
        """The tensor called ``name``, in the shape and dtype it is stored in. Raises ArtifactError."""
        if name not in self.tensors:
            raise ArtifactError(f"{self.directory} has no parameter {name}: it is another kind of model")
        try:
            with safe_open(self.tensors[name].path, framework="pt") as file:
                return file.get_tensor(self.tensors[name].name)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{self.directory} has no readable weight {name} ({error})") from error


def by_parameter(model: ModelDirectory) -> ModelDirectory:
    """The same directory by the names that from_pretrained gives its parameters, where those are not the stored ones."""
    return ModelDirectory(model.directory, _by_parameter(model.directory, model.tensors))


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


def short_dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
