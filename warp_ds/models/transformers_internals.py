"""transformers' own loading and saving, run without data: the one place that reaches into its modules.

``from_pretrained`` and ``save_pretrained`` know names, renamings, ties, missing keys, buffers, configs and layout.
Rather than repeat that, both run here as they are, with the two functions through which they touch tensor data
(``safe_open`` and ``safe_save_file`` in ``transformers.modeling_utils``) replaced: loading meets meta tensors that
remember where their data lies, saving records which tensor goes to which file. Known to hold for transformers 5.23.
"""

from __future__ import annotations

import copy
import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import transformers
from huggingface_hub import StateDictSplit, get_torch_storage_size, split_state_dict_into_shards_factory
from transformers import AutoConfig, PreTrainedModel, modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.utils import logging as hf_logging
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from warp_ds.errors import CheckpointError
from warp_ds.models.classes import auto_class_of
from warp_ds.models.conversion import Conversion
from warp_ds.models.copies import CannotMap, Copies
from warp_ds.models.expert_rows import Turning, hold_in_rows
from warp_ds.store.checkpoint_index import DTYPES, ReadAhead, TensorLocation, read_header, resolve_checkpoint
from warp_ds.store.pieces import Piece

logger = logging.getLogger(__name__)


def keeps_logits(model: Any) -> bool:
    """Whether the model makes logits where a bool ``logits_to_keep`` [batch, tokens] says, flattened."""
    return hasattr(modeling_utils, "slice_logits_to_keep") and "logits_to_keep" in inspect.signature(model.forward).parameters


@dataclass
class MetaModel:
    """A model as ``from_pretrained`` leaves it, but for its weights, which are on meta."""

    model: PreTrainedModel
    _copies: Copies[TensorLocation] = field(repr=False)
    _conversions: dict[int, Conversion] = field(repr=False)

    def source(self, tensor: torch.Tensor) -> list[Piece[TensorLocation]]:
        """Which elements of the checkpoint's tensors a meta parameter or buffer is made of, in its order.

        Raises:
            CannotMap: it holds other values than stored ones, or is scattered over the stored tensors.
        """
        return self._copies.pieces(tensor)

    def conversion(self, tensor: torch.Tensor) -> Conversion:
        """How transformers makes a meta parameter that has no ``source``. Raises CannotMap where it does not say how."""
        try:
            return self._conversions[tensor.untyped_storage()._cdata]
        except KeyError:
            raise CannotMap("its tensors are changed on the way into the model") from None


@dataclass
class _CheckpointSlice:
    """Stands for safetensors' slice object; becomes a meta tensor where that would read."""

    location: TensorLocation
    copies: Copies[TensorLocation]

    def __getitem__(self, index: object) -> _CheckpointSlice:
        return self

    def get_dtype(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.location.dtype)

    def to(self, device: object = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        tensor = torch.empty(self.location.shape, dtype=dtype or self.location.dtype, device="meta")
        # nn.Parameter(tensor) is another object over the same storage: the storage is what can be found again.
        self.copies.add(tensor, self.location)
        return tensor


class _HeaderOnlyFile:
    """Stands for ``safetensors.safe_open``."""

    def __init__(self, path: str, copies: Copies[TensorLocation], ahead: ReadAhead | None) -> None:
        self.tensors = read_header(path)
        self.copies = copies
        if ahead is not None:
            # Ranks share each tensor; of stacked experts' tensors they take some whole, which is not known yet.
            ahead.start(tensor for name, tensor in self.tensors.items() if ".experts." not in name)

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_slice(self, name: str) -> _CheckpointSlice:
        return _CheckpointSlice(self.tensors[name], self.copies)

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


@contextmanager
def _run_within(name: str, context: AbstractContextManager[Any]) -> Iterator[None]:
    """``transformers.modeling_utils.<name>`` runs as it is, but within ``context``."""
    original = getattr(modeling_utils, name, None)

    def run(*args: Any, **kwargs: Any) -> Any:
        assert original is not None
        with context:
            return original(*args, **kwargs)

    with _replaced(name, run):
        yield


@contextmanager
def _conversions_noted(copies: Copies[TensorLocation]) -> Iterator[dict[int, Conversion]]:
    """Within: by the storage of what they make, what transformers' converters are given."""
    original: Any = WeightConverter.convert
    found: dict[int, Conversion] = {}

    def convert(self: WeightConverter, layer_name: str, model: Any = None, **kwargs: Any) -> dict[str, Any]:
        given = self.materialize_tensors()
        conversion = Conversion(copy.deepcopy(self), layer_name, model, given, copies)
        self.collected_tensors.update({pattern: list(tensors) for pattern, tensors in given.items()})  # type: ignore[arg-type]
        made = original(self, layer_name, model=model, **kwargs)
        for value in made.values():
            tensor = value[0] if isinstance(value, list) else value
            found[tensor.untyped_storage()._cdata] = conversion
        return made

    WeightConverter.convert = convert  # type: ignore[assignment, method-assign]
    try:
        yield found
    finally:
        WeightConverter.convert = original  # type: ignore[method-assign]


def load_on_meta(name_or_path: str, *, dtype: torch.dtype, ahead: ReadAhead | None = None, **kwargs: Any) -> MetaModel:
    """``from_pretrained`` of ``classes.auto_class`` without reading a weight.

    Parameters and buffers found in the checkpoint are on meta; missing ones are initialised as ever. ``ahead`` hears of
    each file as soon as its header is read.

    Raises:
        CannotMap: the checkpoint is pickled.
        CheckpointError: a file is missing or damaged, a weight has another shape than the config gives it, is in no file,
            or is stored under two names.
    """
    copies: Copies[TensorLocation] = Copies()

    def refuse_pickle(path: str | os.PathLike, *args: object, **kwargs: object) -> None:
        raise CannotMap(f"{os.path.basename(path)} is pickled, not safetensors")

    with ExitStack() as stack:
        stack.enter_context(_replaced("safe_open", lambda path, **_: _HeaderOnlyFile(path, copies, ahead)))
        conversions = stack.enter_context(_conversions_noted(copies))
        stack.enter_context(_run_within("convert_and_load_state_dict_in_model", copies))
        stack.enter_context(_replaced("load_state_dict", refuse_pickle))
        stack.enter_context(zero3_hidden_from_transformers())
        stack.enter_context(quiet_transformers())
        kwargs |= _dequantising(name_or_path, kwargs)
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
    _refuse_two_names(model, name_or_path, {location.name for location in copies.origins()})
    _forget_dequantising(model)
    return MetaModel(model, copies, conversions)


DEQUANTISED = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
"""Quantisation methods whose weights transformers makes floating-point numbers of as it loads them, if asked to."""


def quantisation(name_or_path: str, hub: dict[str, Any]) -> str | None:
    """The method by which the model's weights are stored in fewer bits, as its config names it."""
    return quantisation_of(
        AutoConfig.from_pretrained(name_or_path, **{k: v for k, v in hub.items() if k != "attn_implementation"})
    )


def quantisation_of(config: Any) -> str | None:
    """``quantisation`` of a configuration."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    return str((found if isinstance(found, dict) else found.to_dict()).get("quant_method"))


def _dequantising(name_or_path: str, hub: dict[str, Any]) -> dict[str, Any]:
    method = quantisation(name_or_path, hub)
    return {"quantization_config": DEQUANTISED[method](dequantize=True)} if method in DEQUANTISED else {}


def _forget_dequantising(model: PreTrainedModel) -> None:
    """``save_pretrained`` reverses what loading did: half of it (FP8), under the names of what is no longer stored (MXFP4)."""
    steps: Any = model._weight_conversions
    if any(getattr(operation, "hf_quantizer", None) for step in steps for operation in getattr(step, "operations", ())):
        used = {tuple(step._original_target_patterns) for step in steps}
        steps[:] = [step for step in get_model_conversion_mapping(model) if tuple(step._original_target_patterns) in used]


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


@dataclass(frozen=True)
class LoadedWeight:
    """A parameter of a loaded model, and which elements of the stored tensors it is made of."""

    shape: tuple[int, ...]
    pieces: list[Piece[TensorLocation]]
    turning: Turning | None = None
    """Of experts that are stored transposed, and held as ``shape`` says: the pieces are of what is stored."""
    conversion: Conversion | None = None
    """What computes it of what is stored, where it is no pieces of that."""

    @property
    def location(self) -> TensorLocation | None:
        """The one stored tensor that it is, where it is one."""
        first = self.pieces[0].origin if len(self.pieces) == 1 and self.turning is None else None
        return first if first is not None and first.shape == self.shape else None

    def stored_in(self) -> set[str]:
        """Names of the stored tensors that it is made of."""
        origins = {piece.origin for piece in self.pieces} if self.conversion is None else self.conversion.origins()
        return {origin.name for origin in origins}


def weights_as_loaded(directory: str | os.PathLike) -> dict[str, LoadedWeight]:
    """What each parameter of the causal LM in a local directory is made of, by the parameter's name, as ``from_pretrained``
    makes it, but with experts held row by row; of tied parameters the one that is kept. Needs no process group.

    Raises:
        CannotMap: weights are pickled.
        CheckpointError: as ``resolve_checkpoint`` and ``load_on_meta``.
    """
    resolve_checkpoint(directory)
    built = load_on_meta(os.fspath(directory), dtype=torch.float32, trust_remote_code=False)
    turned = {id(held): (was, how) for was, held, how in hold_in_rows(built.model)}
    found = {}
    for name, param in built.model.named_parameters():
        was, how = turned.get(id(param), (param, None))
        if not param.is_meta:
            continue
        try:
            found[name] = LoadedWeight(tuple(param.shape), built.source(was), how)
        except CannotMap:
            with suppress(CannotMap):
                found[name] = LoadedWeight(tuple(param.shape), [], how, built.conversion(was))
    return found


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


def _split_by_storage(state: dict[str, torch.Tensor], **kwargs: Any) -> StateDictSplit:
    """Tensors of one storage go to one file, as everywhere; on meta, huggingface_hub takes every one for a storage."""
    return split_state_dict_into_shards_factory(
        state, get_storage_size=get_torch_storage_size, get_storage_id=lambda tensor: tensor.untyped_storage()._cdata, **kwargs
    )


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of a weight file, and which elements of the state dict's tensors it is made of."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: list[Piece[str]]


def save_without_weights(
    model: PreTrainedModel, directory: str, state: dict[str, torch.Tensor], max_shard_size: int | str
) -> dict[str, dict[str, SavedTensor]]:
    """``model.save_pretrained`` without a weight file: configs and index only.

    Args:
        state: by state-dict name, one meta tensor a stored tensor (the same object for tied ones).

    Returns:
        For each weight file its tensors by their names in the file, in ``save_pretrained``'s order. What loading stacked,
        fused, renamed or permuted is taken apart again, where that is a matter of copying row ranges.
    """
    copies: Copies[str] = Copies()
    for name, tensor in state.items():
        copies.add(tensor, name)
    files: dict[str, dict[str, SavedTensor]] = {}

    def record(tensors: dict[str, torch.Tensor], path: str, metadata: object = None) -> None:
        for name, tensor in tensors.items():
            try:
                saved = SavedTensor(tuple(tensor.shape), tensor.dtype, copies.pieces(tensor))
            except CannotMap as cause:
                raise CannotMap(f"{name}: {cause}") from cause
            files.setdefault(os.path.basename(path), {})[name] = saved

    def save(original_format: bool) -> None:
        files.clear()
        with ExitStack() as stack:
            stack.enter_context(_replaced("safe_save_file", record))
            stack.enter_context(_replaced("split_torch_state_dict_into_shards", _split_by_storage))
            stack.enter_context(_run_within("revert_weight_conversion", copies))
            stack.enter_context(quiet_transformers())
            model.save_pretrained(
                directory, state_dict=dict(state), max_shard_size=max_shard_size, save_original_format=original_format
            )

    try:
        save(original_format=True)
    except CannotMap as cause:
        logger.warning("saving under transformers' own names, which from_pretrained reads as well: %s", cause)
        save(original_format=False)
    return files
