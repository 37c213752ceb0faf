"""transformers' own loading and saving, run without data: the one place that reaches into its modules.

``from_pretrained`` and ``save_pretrained`` know names, renamings, ties, missing keys, buffers, configs and layout.
Rather than repeat that, both run here as they are, with the two functions through which they touch tensor data
(``safe_open`` and ``safe_save_file`` in ``transformers.modeling_utils``) replaced: loading meets meta tensors that
remember where their data lies, saving records which tensor goes to which file. Known to hold for transformers 5.23.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedModel, modeling_utils
from transformers.core_model_loading import WeightConverter
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils import logging as hf_logging

from warp_ds.errors import CheckpointError
from warp_ds.models.classes import auto_class_of
from warp_ds.store.checkpoint_index import ReadAhead, TensorLocation, read_header, resolve_checkpoint

logger = logging.getLogger(__name__)


def keeps_logits(model: Any) -> bool:
    """Whether the model makes logits where a bool ``logits_to_keep`` [batch, tokens] says, flattened."""
    return hasattr(modeling_utils, "slice_logits_to_keep") and "logits_to_keep" in inspect.signature(model.forward).parameters


class CannotMap(Exception):
    """The checkpoint's bytes are not the parameters' bytes; the message says why."""


@dataclass
class MetaModel:
    """A model as ``from_pretrained`` leaves it, but for its weights, which are on meta."""

    model: PreTrainedModel
    _sources: dict[int, tuple[torch.Tensor, TensorLocation]] = field(repr=False)

    def source(self, tensor: torch.Tensor) -> TensorLocation:
        """Where the data of a meta parameter or buffer lies.

        Raises:
            CannotMap: the tensor is the result of an operation on checkpoint tensors.
        """
        source = self._sources.get(tensor.untyped_storage()._cdata)
        if source is None or source[0].shape != tensor.shape or not tensor.is_contiguous():
            raise CannotMap("its tensors are fused, split or converted on the way into the model")
        return source[1]


@dataclass
class _CheckpointSlice:
    """Stands for safetensors' slice object; becomes a meta tensor where that would read."""

    location: TensorLocation
    sources: dict[int, tuple[torch.Tensor, TensorLocation]]

    def __getitem__(self, index: object) -> _CheckpointSlice:
        return self

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = torch.empty(self.location.shape, dtype=dtype or self.location.dtype, device="meta")
        # nn.Parameter(tensor) is another object over the same storage: the storage is what can be found again.
        self.sources[tensor.untyped_storage()._cdata] = (tensor, self.location)
        return tensor


class _HeaderOnlyFile:
    """Stands for ``safetensors.safe_open``."""

    def __init__(self, path: str, sources: dict[int, tuple[torch.Tensor, TensorLocation]], ahead: ReadAhead | None) -> None:
        self.tensors = read_header(path)
        self.sources = sources
        if ahead is not None:
            ahead.start(self.tensors.values())

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_slice(self, name: str) -> _CheckpointSlice:
        return _CheckpointSlice(self.tensors[name], self.sources)

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def _replaced(name: str, substitute: object) -> Iterator[None]:
    """``transformers.modeling_utils.<name>`` is ``substitute`` within."""
    if not hasattr(modeling_utils, name):
        raise CannotMap(f"transformers {transformers.__version__} has no modeling_utils.{name}; known is 5.23")
    original = getattr(modeling_utils, name)
    setattr(modeling_utils, name, substitute)
    try:
        yield
    finally:
        setattr(modeling_utils, name, original)


def load_on_meta(name_or_path: str, *, dtype: torch.dtype, ahead: ReadAhead | None = None, **kwargs: Any) -> MetaModel:
    """``from_pretrained`` of ``classes.auto_class`` without reading a weight.

    Parameters and buffers found in the checkpoint are on meta; missing ones are initialised as ever. ``ahead`` hears of
    each file as soon as its header is read.

    Raises:
        CannotMap: the checkpoint is pickled, or its weights are converted on loading.
        CheckpointError: a file is missing or damaged, a weight has another shape than the config gives it, is in no file,
            or is stored under two names.
    """
    sources: dict[int, tuple[torch.Tensor, TensorLocation]] = {}

    def refuse_pickle(path: str | os.PathLike, *args: object, **kwargs: object) -> None:
        raise CannotMap(f"{os.path.basename(path)} is pickled, not safetensors")

    with ExitStack() as stack:
        stack.enter_context(_replaced("safe_open", lambda path, **_: _HeaderOnlyFile(path, sources, ahead)))
        stack.enter_context(_replaced("load_state_dict", refuse_pickle))
        stack.enter_context(zero3_hidden_from_transformers())
        stack.enter_context(quiet_transformers())
        # transformers' own error for wrong shapes names none of them.
        loaded: Any = auto_class_of(name_or_path, kwargs).from_pretrained(
            name_or_path, dtype=dtype, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        model, told = loaded
    if told["mismatched_keys"]:
        name, stored, expected = sorted(told["mismatched_keys"])[0]
        raise CheckpointError(
            f"{name} is {list(stored)} in the checkpoint {name_or_path}, but its config makes it {list(expected)} "
            f"({len(told['mismatched_keys'])} such weights): the config and the weights are not of one model."
        )
    check_loading(model, name_or_path, told)
    _refuse_two_names(model, name_or_path, {location.name for _, location in sources.values()})
    if _converts(model):
        raise CannotMap("its tensors are fused, split or converted on the way into the model")
    return MetaModel(model, sources)


def check_loading(model: PreTrainedModel, name: str | os.PathLike, told: dict[str, Any]) -> None:
    """What ``from_pretrained`` says of its loading (``output_loading_info``): a weight that it had to invent is refused, and
    stored ones that it left out are named on rank 0.

    Weights that transformers makes itself by rule (tied ones, ``_keys_to_ignore_on_load_missing``) are not among them.

    Raises:
        CheckpointError: naming the weights that are missing, those that are stored instead, and the cure.
    """
    missing, unexpected = sorted(told["missing_keys"]), sorted(told["unexpected_keys"])
    if not missing:
        if unexpected and (not dist.is_initialized() or dist.get_rank() == 0):
            logger.warning(
                "%s stores %d tensors that %s has no place for: they are left out, as from_pretrained leaves them "
                "out (UNEXPECTED: %s)",
                name,
                len(unexpected),
                type(model).__name__,
                _some(unexpected),
            )
        return
    stored = f"; its files hold {len(unexpected)} tensors that it does not know ({_some(unexpected)})" if unexpected else ""
    raise CheckpointError(
        f"{name}: {len(missing)} of the {len(model.state_dict())} weights of {type(model).__name__} are MISSING in its files "
        f"({_some(missing)}){stored}. from_pretrained would fill them with random numbers. {_cure(model, missing, unexpected)}"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _cure(model: PreTrainedModel, missing: list[str], unexpected: list[str]) -> str:
    wanted, stored = set(missing), set(unexpected)
    before = sorted({name[: -len(end)] for name in unexpected for end in _endings(name) if end in wanted})
    if before and all(any(prefix + name in stored for prefix in before) for name in missing):
        return (
            f"The stored names begin with {', '.join(map(repr, before))}, as a compiled or wrapped model's do: save the "
            "inner model with save_pretrained, or rename the tensors in the files."
        )
    output = model.get_output_embeddings()
    if output is not None and missing == [name for name, p in model.named_parameters() if p is getattr(output, "weight", None)]:
        return (
            "If the output embedding is the input embedding, set tie_word_embeddings to true in config.json; else the "
            "checkpoint lacks its head: download or save the whole model again."
        )
    return "The weights are not whole, or not of this config.json: download the model again, or save it with save_pretrained."


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(1, len(parts))]


def _refuse_two_names(model: PreTrainedModel, name: str | os.PathLike, stored: set[str]) -> None:
    """A weight under its name and under the name without the base model's prefix: which one counts is chance."""
    prefix = f"{model.base_model_prefix}."
    twice = sorted(n for n in stored if prefix + n in stored)
    if twice:
        raise CheckpointError(
            f"{name} stores {twice[0]} and {prefix + twice[0]} ({len(twice)} such pairs), which are one "
            "weight of the model: which one counts depends on the reader; save the model again with "
            "save_pretrained"
        )


def weights_as_loaded(directory: str | os.PathLike) -> dict[str, TensorLocation]:
    """Where the data of each parameter of the causal LM in a local directory lies, by the parameter's name, as
    ``from_pretrained`` finds it; of tied parameters the one that is kept. Needs no process group.

    Raises:
        CannotMap: weights are pickled, quantised or converted on loading.
        CheckpointError: as ``resolve_checkpoint`` and ``load_on_meta``.
    """
    resolve_checkpoint(directory)
    built = load_on_meta(os.fspath(directory), dtype=torch.float32, trust_remote_code=False)
    return {name: built.source(param) for name, param in built.model.named_parameters() if param.is_meta}


def _converts(model: Any) -> bool:
    """Whether loading ``model`` fused, split or transposed weights."""
    return any(isinstance(step, WeightConverter) for step in getattr(model, "_weight_conversions", None) or ())


@contextmanager
def zero3_hidden_from_transformers() -> Iterator[None]:
    """While a live HfDeepSpeedConfig is seen, ``from_pretrained`` partitions by itself."""
    seen = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = seen


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bar for weights that are not read; what is missing or unexpected is told by rank 0 alone."""
    verbosity, bar = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    if dist.is_initialized() and dist.get_rank() != 0:
        hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bar:
            hf_logging.enable_progress_bar()


def save_without_weights(
    model: PreTrainedModel, directory: str, state: dict[str, torch.Tensor], max_shard_size: int | str
) -> dict[str, dict[str, str]]:
    """``model.save_pretrained`` without a weight file: configs and index only.

    Args:
        state: by state-dict name, one meta tensor a stored tensor (the same object for tied ones).

    Returns:
        For each weight file its tensors: name in the file to name in the model, in ``save_pretrained``'s order.
    """
    by_storage = {tensor.untyped_storage()._cdata: name for name, tensor in state.items()}
    files: dict[str, dict[str, str]] = {}

    def record(tensors: dict[str, torch.Tensor], path: str, metadata: object = None) -> None:
        for name, tensor in tensors.items():
            model_name = by_storage.get(tensor.untyped_storage()._cdata)
            if model_name is None or state[model_name].shape != tensor.shape:
                raise CannotMap(f"{name} is split or fused from the model's parameters")
            files.setdefault(os.path.basename(path), {})[name] = model_name

    def save(original_format: bool) -> None:
        files.clear()
        with _replaced("safe_save_file", record), quiet_transformers():
            model.save_pretrained(
                directory, state_dict=dict(state), max_shard_size=max_shard_size, save_original_format=original_format
            )

    try:
        save(original_format=True)
    except CannotMap as cause:
        logger.warning("saving under transformers' own names, which from_pretrained reads as well: %s", cause)
        save(original_format=False)
    return files
