"""Load a causal LM onto ZeRO-3 ranks, each rank reading the bytes of its own partitions and nothing else.

transformers opens the whole checkpoint on rank 0 and gathers, overwrites, broadcasts and splits each parameter in turn.
Here the model is built on meta, and every partition, a flat range of the parameter, is a byte range of a safetensors
file, or several: they are read straight into ``ds_tensor``. A rank's peak memory is its shard and one read buffer.
"""

from __future__ import annotations

import copy
import gc
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from warp_ds.cluster.consensus import on_every_rank_or_none
from warp_ds.cluster.processes import all_gather_object, collective_device, rank
from warp_ds.models.classes import auto_class_of
from warp_ds.models.copies import CannotMap
from warp_ds.models.expert_rows import Turning, hold_in_rows
from warp_ds.models.transformers_internals import (
    DEQUANTISED,
    Conversion,
    MetaModel,
    check_loading,
    load_on_meta,
    quantisation,
    zero3_hidden_from_transformers,
)
from warp_ds.store.checkpoint_index import RangeReader, ReadAhead, TensorLocation
from warp_ds.store.pieces import Piece
from warp_ds.zero.partitioned_param import Partitioner, own_range, why_not_by_hand

logger = logging.getLogger(__name__)

Pieces = list[Piece[TensorLocation]]
Turned = dict[int, tuple[nn.Parameter, Turning]]
"""Experts that are stored transposed, by the id of what is held of them: the parameter as stored, and how it is held."""


@dataclass(frozen=True)
class Source:
    """Where a parameter comes from: pieces of stored tensors, or what a conversion makes of them; and how that is held."""

    made_of: Pieces | Conversion
    turning: Turning | None


@dataclass(frozen=True)
class Converted:
    """A parameter that is no pieces of stored tensors."""

    name: str
    param: Any
    conversion: Conversion
    turning: Turning | None


def load_sharded(
    model_name_or_path: str | os.PathLike,
    *,
    ds_config: dict[str, Any] | None,
    dtype: torch.dtype,
    device: str = "cpu",
    trust_remote_code: bool = False,
    revision: str | None = None,
    attn_implementation: str | None = None,
    experts_in_rows: bool = False,
    progress: bool = True,
) -> PreTrainedModel:
    """A causal LM with ZeRO-3 partitioned parameters: for ``deepspeed.initialize``, or for use as it is with
    ``deepspeed.zero.GatheredParameters``. Parameters, buffers, ties, configs and warnings are ``from_pretrained``'s.

    Every rank calls it, after torch.distributed was initialised. Parameters that transformers stacks, fuses, splits or
    permutes from stored tensors are read from these, experts in MXFP4 one at a time by the ranks that have parts of them;
    those that it transposes, and float8, are made whole, in turns, by one rank each.
    Checkpoints and settings whose partitions are no byte ranges (pickled ``.bin``, quantised weights, offload to NVMe, ...)
    go through ``from_pretrained`` under ``zero.Init``, and the log says why.

    Args:
        model_name_or_path: local folder or hub name (cached files serve offline).
        ds_config: DeepSpeed's config as a dict, stage 3; None: stage 3 with DeepSpeed's defaults.
        dtype: of the parameters; the files' dtype is converted in passing. Buffers keep their own, as ever.
        device: "cpu" or "cuda", the one that DeepSpeed's accelerator drives.
        trust_remote_code: as in ``from_pretrained``, like the next two.
        revision: of a hub model.
        attn_implementation: how attention is computed.
        experts_in_rows: experts that are stored transposed (gpt-oss, Llama 4) are held as [E, outputs, inputs], so that they
            can be masked. They compute the same; only ``save_sharded`` writes such a model as it was stored.
        progress: a bar in bytes on rank 0.

    Raises:
        ValueError: the config is not stage 3, or the device is not DeepSpeed's.
        CheckpointError: a file is missing, truncated, or has a header that contradicts it; or a weight is in no file.
        OtherRankError: another rank failed; its message is in it.
    """
    name = os.fspath(model_name_or_path)
    _check_settings(ds_config, device)
    hub: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision}
    if attn_implementation is not None:
        hub["attn_implementation"] = attn_implementation
    begun = time.monotonic()
    built, plan, reason = _built_on_meta(name, ds_config, dtype, hub, experts_in_rows)
    reasons = [r for r in all_gather_object(reason) if r is not None]
    if built is None or reasons:
        logger.warning("%s is loaded by from_pretrained on rank 0, not in shards: %s", name, reasons[0])
        return _from_pretrained(name, ds_config, dtype, hub)
    nbytes = _read_shards(built, plan, Partitioner(ds_config, dtype), name, progress)
    logger.info("%s: read %.3f GB on this rank in %.1f s", name, nbytes / 1e9, time.monotonic() - begun)
    _tie_equal(built.model)
    return built.model


def _built_on_meta(
    name: str, ds_config: dict[str, Any] | None, dtype: torch.dtype, hub: dict[str, Any], in_rows: bool
) -> tuple[MetaModel | None, dict[int, Source], str | None]:
    """(the model on meta, where each of its parameters comes from, None), or why it cannot be read in shards. Collective."""
    reason = why_not_by_hand(ds_config or {})
    ahead = ReadAhead(rank(), dist.get_world_size())
    with on_every_rank_or_none(f"opening {name}"), _no_garbage_collection():
        try:
            reason = reason or _why_quantised(name, hub)
            if reason is None:
                built = load_on_meta(name, dtype=dtype, ahead=ahead, **hub)
                turned = {id(held): (was, how) for was, held, how in (hold_in_rows(built.model) if in_rows else [])}
                return built, _plan(built, turned), None
        except CannotMap as cause:
            reason = str(cause)
    return None, {}, reason


def _read_shards(built: MetaModel, plan: dict[int, Source], partitioner: Partitioner, name: str, progress: bool) -> int:
    """Partitions the model on meta, and reads this rank's pieces; returns their bytes. Collective."""
    with _no_garbage_collection():
        reads, converted, whole = _replace_parameters(built.model, plan, partitioner)
    for param in whole:
        partitioner.cut(param)
    with RangeReader() as reader:
        with on_every_rank_or_none(f"reading {name}"):
            _fill(reads, [one for one in converted if one.conversion.by_expert], reader, progress and rank() == 0)
            _fill_buffers(built, reader, partitioner.device)
        _convert([one for one in converted if not one.conversion.by_expert], reader, name)
    return reader.bytes_requested


def _check_settings(ds_config: dict[str, Any] | None, device: str) -> None:
    stage = (ds_config or {}).get("zero_optimization", {}).get("stage", 3 if not ds_config else 0)
    if stage != 3:
        raise ValueError(
            f"load_sharded partitions parameters, which is ZeRO stage 3; the config has stage {stage}. "
            'Set "zero_optimization": {"stage": 3}, or load with from_pretrained.'
        )
    if not dist.is_initialized():
        raise ValueError("load_sharded needs torch.distributed: call deepspeed.init_distributed() first.")
    theirs = get_accelerator().device_name()
    if torch.device(device).type != theirs:
        raise ValueError(f"device is {device}, but DeepSpeed drives {theirs}: set DS_ACCELERATOR={torch.device(device).type}.")
    if "LOCAL_RANK" not in os.environ:
        if dist.get_world_size() > 1 and theirs != "cpu":
            raise ValueError("LOCAL_RANK is not set: start the ranks with torchrun, deepspeed, accelerate or srun.")
        os.environ["LOCAL_RANK"] = "0"


def _why_quantised(name: str, hub: dict[str, Any]) -> str | None:
    method = quantisation(name, hub)
    return None if method is None or method in DEQUANTISED else f"it is quantised ({method})"


def _plan(built: MetaModel, turned: Turned) -> dict[int, Source]:
    """Where each parameter that is still on meta comes from, by id. Raises CannotMap."""
    plan: dict[int, Source] = {}
    for name, param in built.model.named_parameters():
        if not param.is_meta or id(param) in plan:
            continue
        was, turning = turned.get(id(param), (param, None))
        try:
            pieces = built.source(was)
        except CannotMap:
            plan[id(param)] = Source(built.conversion(was), turning)
            continue
        plan[id(param)] = Source(pieces, turning)
        for location in {piece.origin for piece in pieces}:
            if param.is_floating_point() and not location.dtype.is_floating_point:
                raise ValueError(
                    f"{location.path}: {location.name} is stored as {location.dtype}, but {name} is a floating-point "
                    "weight and the config names no quantisation: the header is wrong, or the file is of another model."
                )
    return plan


def _replace_parameters(
    model: PreTrainedModel, plan: dict[int, Source], partitioner: Partitioner
) -> tuple[list[tuple[nn.Parameter, Source]], list[Converted], list[nn.Parameter]]:
    """Put partitioned parameters, still empty, in the place of those on meta; tied ones stay one.

    Returns the empty ones with their sources, and those that hold values already (missing in the checkpoint).
    """
    made: dict[int, nn.Parameter] = {}
    reads: list[tuple[nn.Parameter, Source]] = []
    converted: list[Converted] = []
    whole: list[nn.Parameter] = []
    for path, module in model.named_modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in made:
                source = plan.get(id(param))
                made[id(param)] = param if source is None else partitioner.empty(param)
                if source is None:
                    whole.append(param)
                elif isinstance(source.made_of, Conversion):
                    named = f"{path}.{name}" if path else name
                    converted.append(Converted(named, made[id(param)], source.made_of, source.turning))
                else:
                    reads.append((made[id(param)], source))
            module._parameters[name] = made[id(param)]
    return reads, converted, whole


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Each parameter is many objects: their number alone would start collections, of 0.5 s each with all that is
    imported."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _fill(reads: list[tuple[Any, Source]], computed: list[Converted], reader: RangeReader, progress: bool) -> None:
    """Read this rank's range of each parameter, in the files' own order; then what is made expert by expert."""
    plain: list[Any] = [(param, source.made_of) for param, source in reads if source.turning is None]
    turned: list[Any] = [(param, source.made_of, source.turning) for param, source in reads if source.turning is not None]
    experts = [(param, partial(_turned, param, pieces, turning, reader)) for param, pieces, turning in turned]
    experts += [(one.param, partial(_computed, one, reader)) for one in computed]
    jobs = [job for param, pieces in plain for job in _own(param, pieces)]
    jobs.sort(key=lambda job: (job[1].origin.path, job[1].origin.offset, job[1].first))
    total = sum(piece.length * piece.origin.dtype.itemsize for _, piece in jobs)
    total += sum(param.ds_tensor.nbytes for param, _ in experts)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Loading rank 0's shard", disable=not progress) as bar:
        for param, piece in jobs:
            begin = piece.begin - own_range(param).start
            reader.read(piece.origin, piece.first, param.ds_tensor[begin : begin + piece.length])
            bar.update(piece.length * piece.origin.dtype.itemsize)
        for param, of_expert in experts:
            _fill_experts(param, of_expert)
            bar.update(param.ds_tensor.nbytes)


def _fill_experts(param: Any, of_expert: Callable[[int], torch.Tensor]) -> None:
    """Whole experts are made, one at a time, and this rank's part of each is kept."""
    place, size = own_range(param), param.ds_numel // param.ds_shape[0]
    for expert in range(place.start // size, -(-place.stop // size)):
        first = expert * size
        begin, end = max(place.start, first), min(place.stop, first + size)
        param.ds_tensor[begin - place.start : end - place.start].copy_(of_expert(expert).view(-1)[begin - first : end - first])


def _turned(param: Any, pieces: Pieces, turning: Turning, reader: RangeReader, expert: int) -> torch.Tensor:
    """An expert that is stored transposed."""
    stored, first = torch.empty(turning.stored[1:], dtype=param.dtype), expert * turning.matrix
    for piece in (piece.within(first, first + turning.matrix) for piece in pieces):
        if piece.length > 0:
            reader.read(piece.origin, piece.first, stored.view(-1)[piece.begin - first : piece.end - first])
    return turning.in_rows(stored)


def _computed(one: Converted, reader: RangeReader, expert: int) -> torch.Tensor:
    """An expert that is stored in fewer bits."""
    value = one.conversion.run(reader, expert)[one.name].detach()
    return value if one.turning is None else one.turning.in_rows(value)


def _convert(converted: list[Converted], reader: RangeReader, name: str) -> None:
    """Parameters whose elements are no ranges of stored ones: the ranks take turns to make one whole, as transformers makes it,
    and deal it out. Collective."""
    by_run: dict[int, list[Converted]] = {}
    for one in converted:
        by_run.setdefault(id(one.conversion), []).append(one)
    runs = list(by_run.values())
    if runs and rank() == 0:
        logger.warning(
            "%s: %d of its parameters (%s, ...) are transposed or computed from what is stored: the ranks make them whole, "
            "one at a time each, with transformers' own conversion",
            name,
            len(converted),
            converted[0].name,
        )
    for turn in range(0, len(runs), dist.get_world_size()):
        batch = runs[turn : turn + dist.get_world_size()]
        with on_every_rank_or_none(f"converting {name}"):
            values = batch[rank()][0].conversion.run(reader) if rank() < len(batch) else {}
        for owner, parameters in enumerate(batch):
            for one in parameters:
                value = values.pop(one.name) if owner == rank() else None
                if value is not None and one.turning is not None:
                    value = one.turning.in_rows(value)
                _deal_out(value, one.param, owner)


def _deal_out(value: torch.Tensor | None, param: Any, owner: int) -> None:
    """Fills every rank's piece of ``param`` from its whole value on the owner. Collective."""
    out = torch.empty(param.ds_tensor.numel(), dtype=param.dtype, device=collective_device())
    pieces = None
    if value is not None:
        flat = out.new_zeros(dist.get_world_size() * out.numel())
        flat[: param.ds_numel] = value.reshape(-1)
        pieces = [piece.view(torch.uint8) for piece in flat.split(out.numel())]
    dist.scatter(out.view(torch.uint8), pieces, src=owner)
    param.ds_tensor.copy_(out)


def _own(param: Any, pieces: Pieces) -> Iterator[tuple[Any, Piece[TensorLocation]]]:
    """What of a parameter's pieces lies in this rank's range."""
    place = own_range(param)
    for piece in pieces:
        if (own := piece.within(place.start, place.stop)).length > 0:
            yield param, own


def _fill_buffers(built: MetaModel, reader: RangeReader, device: torch.device) -> None:
    """Buffers are whole on every rank: from the checkpoint where it has them, else as they were made."""
    for module in built.model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            if buffer.is_meta:
                module._buffers[name] = value = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
                for piece in built.source(buffer):
                    reader.read(piece.origin, piece.first, value.view(-1)[piece.begin : piece.end])
            else:
                module._buffers[name] = buffer.to(device)


def _tie_equal(model: PreTrainedModel) -> None:
    """Where a checkpoint holds both of two tied weights, they are tied if equal, else told apart, as transformers does.

    transformers compares the values, which on meta it cannot.
    """
    for target, source in list(model.all_tied_weights_keys.items()):
        kept: Any = model.get_parameter(source)
        other: Any = model.get_parameter(target)
        if kept is other:
            continue
        place = own_range(kept)
        same_here = kept.ds_shape == other.ds_shape and torch.equal(
            kept.ds_tensor[: place.stop - place.start], other.ds_tensor[: place.stop - place.start]
        )
        if all(all_gather_object(same_here)):
            module, _, attribute = target.rpartition(".")
            setattr(model.get_submodule(module), attribute, kept)
            continue
        del model.all_tied_weights_keys[target]
        if rank() == 0:
            logger.warning(
                "%s and %s are tied by the config but differ in the checkpoint: they are NOT tied. Set "
                "tie_word_embeddings to false in the config to silence this.",
                source,
                target,
            )


def _from_pretrained(name: str, ds_config: dict[str, Any] | None, dtype: torch.dtype, hub: dict[str, Any]) -> PreTrainedModel:
    config: dict[str, Any] = copy.deepcopy(ds_config) if ds_config else {"zero_optimization": {"stage": 3}}
    # zero.Init takes the dtype from the config, and reads no batch size but refuses a config without one.
    config.update(bf16={"enabled": dtype == torch.bfloat16}, fp16={"enabled": dtype == torch.float16})
    for key in ("train_batch_size", "gradient_accumulation_steps"):
        config.pop(key, None)
    config["train_micro_batch_size_per_gpu"] = 1
    with zero3_hidden_from_transformers():
        seen_by_transformers = HfDeepSpeedConfig(config)
        loaded: Any = auto_class_of(name, hub).from_pretrained(name, dtype=dtype, output_loading_info=True, **hub)
        del seen_by_transformers
    model, told = loaded
    with on_every_rank_or_none(f"checking what was found in {name}"):
        check_loading(model, name, told)
    return model
