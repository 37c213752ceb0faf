"""Save a ZeRO-3 model as an ordinary Hugging Face directory, every rank writing its share of the files.

The files are those of ``save_pretrained``, byte for byte, in the layout that the model was loaded from. Each weight file
has one writing rank (concurrent writers of one file are not safe on every network file system); the pieces of a parameter
are gathered to it in bounded chunks and go to their places in the file at once, so no rank holds a parameter, let alone the
model. All is written in a directory beside the target, synced, and takes the target's name only when whole.
"""

from __future__ import annotations

import copy
import json
import math
import os
import queue
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub import ModelCardData
from tqdm import tqdm
from transformers import PreTrainedModel

from warp_ds.cluster.consensus import on_every_rank_or_none
from warp_ds.cluster.processes import broadcast_object, collective_device, rank, world_size
from warp_ds.models.expert_rows import Turning, own_classes, turnings
from warp_ds.models.transformers_internals import SavedTensor, save_without_weights
from warp_ds.store.checkpoint_index import DTYPES
from warp_ds.zero import saved_directory
from warp_ds.zero.fetch import gathered
from warp_ds.zero.partition import RowPartition

GATHER_BYTES = 32 << 20
"""Bytes of a parameter gathered at once. A writing rank holds at most four such buffers."""


@dataclass(frozen=True)
class StoredRange:
    """Elements [first, first + length) of a state-dict tensor, and where they go."""

    model_name: str
    first: int
    length: int
    dtype: torch.dtype
    offset: int
    """First byte in the file."""


@dataclass(frozen=True)
class WeightFile:
    """One safetensors file to be written."""

    name: str
    header: bytes
    ranges: list[StoredRange]
    size: int


def save_sharded(
    model_or_engine: Any,
    directory: str | os.PathLike,
    *,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str = "5GB",
    model_card: str | None = None,
    progress: bool = True,
) -> None:
    """Write the model's weights, config, generation config, tokenizer and model card to ``directory``.

    Every rank calls it. The directory must be on storage that all ranks share. A model already there is replaced in
    one step when the new one is whole and on disk; until then, and if the save fails or is killed, it stays as it is.
    Files there that are no part of a saved model are kept, as ``save_pretrained`` keeps them.

    Args:
        model_or_engine: a transformers model, or what DeepSpeed or DDP wrapped around one; partitioned or not.
        tokenizer: saved with its chat template.
        dtype: of the floating-point weights in the files; None: as the model has them.
        max_shard_size: of one weight file, as in ``save_pretrained``.
        model_card: text of README.md; None: the one that is there, else a minimal one.
        progress: a bar in bytes on rank 0.

    Raises:
        OSError: the disk is full, or the directory cannot be written.
        ValueError: ``directory`` is a file, or holds something other than a model.
        OtherRankError: another rank failed; its message is in it.
    """
    model = _unwrap(model_or_engine)
    target = Path(os.path.realpath(directory))
    state = model.state_dict(keep_vars=True)
    files: list[WeightFile] = []
    with saved_directory.replaced(target) as aside:
        with on_every_rank_or_none(f"saving to {target}"):
            if rank() == 0:
                files = _write_all_but_weights(model, state, aside, target, dtype, max_shard_size, tokenizer, model_card)
                saved_directory.check_space(aside, sum(file.size for file in files))
        files = broadcast_object(files)
        with on_every_rank_or_none(f"saving to {target}"):
            if not aside.is_dir():
                raise OSError(f"{aside}, made by rank 0, is not seen here: save to storage that all nodes share.")
        _write_weights(state, turnings(model), files, aside, progress)


def _unwrap(model_or_engine: Any) -> PreTrainedModel:
    model = model_or_engine
    while not isinstance(model, PreTrainedModel):
        if not hasattr(model, "module"):
            raise ValueError(f"save_sharded saves transformers models (or engines around them), not {type(model)}.")
        model = model.module
    return model


# What is written --------------------------------------------------------------------------------------------------


def _write_all_but_weights(
    model: PreTrainedModel,
    state: dict[str, torch.Tensor],
    directory: Path,
    target: Path,
    dtype: torch.dtype | None,
    max_shard_size: int | str,
    tokenizer: Any,
    model_card: str | None,
) -> list[WeightFile]:
    """Rank 0's part; returns the weight files to be written."""
    on_meta: dict[torch.Tensor, torch.Tensor] = {}
    turned = turnings(model)
    for name, tensor in state.items():
        stored = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        shape = turned[name].stored if name in turned else getattr(tensor, "ds_shape", tensor.shape)
        on_meta.setdefault(tensor, torch.empty(shape, dtype=stored, device="meta"))
    metas = {name: on_meta[tensor] for name, tensor in state.items()}
    with own_classes(model):
        contents = save_without_weights(model, str(directory), metas, max_shard_size)
    if dtype is not None:
        config = copy.deepcopy(model.config)
        config.dtype = str(dtype).removeprefix("torch.")
        config.save_pretrained(directory)
    index = directory / "model.safetensors.index.json"
    if index.exists():
        # transformers counts the elements that this rank holds.
        content = json.loads(index.read_text())
        unique = {id(p): getattr(p, "ds_numel", p.numel()) for p in model.parameters()}
        content["metadata"]["total_parameters"] = sum(unique.values())
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if model_card is not None:
        (directory / "README.md").write_text(model_card, encoding="utf-8")
    elif not (target / "README.md").exists():
        (directory / "README.md").write_text(_minimal_card(model), encoding="utf-8")
    return [_lay_out(name, tensors) for name, tensors in contents.items()]


def _minimal_card(model: PreTrainedModel) -> str:
    base = model.config.name_or_path
    # The card's base_model must be a name on the hub, which a local folder is not.
    data = ModelCardData(library_name="transformers", base_model=base if base and not os.path.exists(base) else None)
    return f"---\n{data.to_yaml()}\n---\n\n# {type(model).__name__}\n"


def _lay_out(file_name: str, tensors: dict[str, SavedTensor]) -> WeightFile:
    """Header and offsets as the safetensors library writes them: by dtype, then by name, padded to 8 bytes."""
    dtype_names = {dtype: name for name, dtype in DTYPES.items()}
    rank_of = {dtype: index for index, dtype in enumerate(DTYPES.values())}
    order = sorted(tensors, key=lambda name: (rank_of[tensors[name].dtype], name.encode()))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name in order:
        tensor = tensors[name]
        end = begin + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {"dtype": dtype_names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    data = 8 + len(text)
    ranges = [
        StoredRange(
            piece.origin,
            piece.first,
            piece.length,
            tensors[name].dtype,
            data + header[name]["data_offsets"][0] + piece.begin * tensors[name].dtype.itemsize,
        )
        for name in order
        for piece in tensors[name].pieces
    ]
    return WeightFile(file_name, len(text).to_bytes(8, "little") + text, ranges, data + begin)


# Weights ----------------------------------------------------------------------------------------------------------


def _write_weights(
    state: dict[str, Any], turned: dict[str, Turning], files: list[WeightFile], directory: Path, progress: bool
) -> None:
    """Each round writes one file a rank, all of them side by side."""
    total = sum(file.size for file in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc="Saving", disable=not (progress and rank() == 0)) as bar:
        for first in range(0, len(files), world_size()):
            batch = files[first : first + world_size()]
            writer = _FileWriter(directory, batch[rank()]) if rank() < len(batch) else None
            # Every rank takes part in every gather, with an error of its own too: the writer keeps it until the end.
            steps = [_chunks(state, turned, file, owner) for owner, file in enumerate(batch)]
            for step in zip_longest(*steps):
                for chunk in filter(None, step):
                    for offset, data in chunk.gather():
                        if writer is not None:
                            writer.put(offset, data)
                    bar.update(chunk.nbytes)
            with on_every_rank_or_none(f"writing to {directory}"):
                if writer is not None:
                    writer.finish()


@dataclass(frozen=True)
class _Chunk:
    """Elements [begin, begin + length) of every rank's piece of a tensor, to be gathered at one rank."""

    ranges: list[StoredRange]
    """What the file holds of the tensor, in the tensor's order."""
    tensor: Any
    begin: int
    length: int
    owner: int

    @property
    def place(self) -> RowPartition:
        """The pieces; a tensor that is whole on every rank is one piece."""
        if _is_partitioned(self.tensor):
            return RowPartition(self.tensor.ds_numel, 1, world_size(), rank())
        return RowPartition(self.tensor.numel(), 1, 1, 0)

    @property
    def nbytes(self) -> int:
        return sum(stop - start for piece in range(self.place.world_size) for _, start, stop in self._wanted(piece)) * (
            self.ranges[0].dtype.itemsize
        )

    def _wanted(self, piece: int) -> Iterator[tuple[StoredRange, int, int]]:
        """What the file holds of one rank's part of the chunk: elements [start, stop) of the flat tensor, padding left out."""
        place = self.place
        first = piece * place.length + self.begin
        last = max(first, min(first + self.length, (piece + 1) * place.length, place.m))
        index = bisect_right(self.ranges, first, key=lambda stored: stored.first + stored.length)
        for stored in islice(self.ranges, index, None):
            if stored.first >= last:
                return
            yield stored, max(first, stored.first), min(last, stored.first + stored.length)

    def gather(self) -> Iterator[tuple[int, torch.Tensor]]:
        """On the owner: file offsets, and bytes that belong there. Collective for partitioned tensors."""
        partitioned, dtype = _is_partitioned(self.tensor), self.ranges[0].dtype
        flat = self.tensor.ds_tensor if partitioned else self.tensor.detach().reshape(-1)
        mine = flat[self.begin : self.begin + self.length].to(dtype).view(torch.uint8)
        pieces = [mine]
        if partitioned and world_size() > 1:
            mine = mine.to(collective_device())
            pieces = [torch.empty_like(mine) for _ in range(world_size())] if rank() == self.owner else []
            dist.gather(mine, pieces or None, dst=self.owner)
        if rank() == self.owner:
            for index, data in enumerate(pieces):
                first = index * self.place.length + self.begin
                for stored, start, stop in self._wanted(index):
                    here = data[(start - first) * dtype.itemsize : (stop - first) * dtype.itemsize]
                    yield stored.offset + (start - stored.first) * dtype.itemsize, here.cpu()


@dataclass(frozen=True)
class _Expert:
    """An expert that is held row by row and stored transposed, to be brought together at one rank."""

    ranges: list[StoredRange]
    """What the file holds of the stacked tensor, in the stored order."""
    tensor: Any
    turning: Turning
    expert: int
    owner: int

    def _wanted(self) -> Iterator[tuple[StoredRange, int, int]]:
        """What the file holds of the expert: elements [start, stop) of the stored tensor."""
        begin, end = self.expert * self.turning.matrix, (self.expert + 1) * self.turning.matrix
        for stored in self.ranges:
            start, stop = max(begin, stored.first), min(end, stored.first + stored.length)
            if start < stop:
                yield stored, start, stop

    @property
    def nbytes(self) -> int:
        return sum(stop - start for _, start, stop in self._wanted()) * self.ranges[0].dtype.itemsize

    def _rows(self) -> torch.Tensor | None:
        """On the owner: the expert [m, n], from the ranks that have parts of it."""
        first, size = self.expert * self.turning.matrix, self.turning.matrix
        if not _is_partitioned(self.tensor):
            return self.tensor.detach().reshape(-1)[first : first + size] if rank() == self.owner else None
        length, held = self.tensor.ds_tensor.numel(), []
        for source in range(world_size()):
            begin, end = max(first, source * length), min(first + size, (source + 1) * length)
            if begin >= end or rank() not in (source, self.owner):
                continue
            if source == rank():
                part = self.tensor.ds_tensor[begin - source * length : end - source * length].to(collective_device())
            else:
                part = torch.empty(end - begin, dtype=self.tensor.ds_tensor.dtype, device=collective_device())
                dist.recv(part.view(torch.uint8), src=source)
            if rank() == self.owner:
                held.append(part)
            else:
                dist.send(part.contiguous().view(torch.uint8), dst=self.owner)
        return torch.cat(held) if held else None

    def gather(self) -> Iterator[tuple[int, torch.Tensor]]:
        """On the owner: file offsets, and bytes that belong there. Every rank calls it."""
        rows, dtype = self._rows(), self.ranges[0].dtype
        if rows is not None:
            first, (_, m, n) = self.expert * self.turning.matrix, self.turning.held
            data = self.turning.as_stored(rows.to(dtype).view(m, n)).view(-1).view(torch.uint8)
            for stored, start, stop in self._wanted():
                here = data[(start - first) * dtype.itemsize : (stop - first) * dtype.itemsize]
                yield stored.offset + (start - stored.first) * dtype.itemsize, here.cpu()


def _chunks(state: dict[str, Any], turned: dict[str, Turning], file: WeightFile, owner: int) -> Iterator[_Chunk | _Expert]:
    by_tensor: dict[str, list[StoredRange]] = {}
    for stored in file.ranges:
        by_tensor.setdefault(stored.model_name, []).append(stored)
    for name, ranges in by_tensor.items():
        ranges.sort(key=lambda stored: stored.first)
        tensor = state[name]
        # Pieces on NVMe, quantised, or over other groups of ranks: DeepSpeed puts the parameter together, whole.
        foreign = hasattr(tensor, "ds_tensor") and not _is_partitioned(tensor)
        with gathered([tensor] if foreign else []):
            if name in turned:
                experts = (_Expert(ranges, tensor, turned[name], e, owner) for e in range(turned[name].stored[0]))
                yield from (expert for expert in experts if expert.nbytes)
                continue
            place = _Chunk(ranges, tensor, 0, 0, owner).place
            length = max(1, GATHER_BYTES // place.world_size // ranges[0].dtype.itemsize)
            for begin in range(0, place.length, length):
                chunk = _Chunk(ranges, tensor, begin, min(length, place.length - begin), owner)
                if chunk.nbytes:  # the rest of it is in other files
                    yield chunk


def _is_partitioned(tensor: Any) -> bool:
    """Whether the tensor lies in plain pieces over all ranks."""
    return (
        hasattr(tensor, "ds_tensor")
        and tensor.ds_zero_partition_world_size == world_size()
        and tensor.ds_tensor.final_location is None
        and not hasattr(tensor.ds_tensor, "ds_quant_scale")
    )


class _FileWriter:
    """Writes one file in a thread of its own, so that the next chunk is gathered meanwhile."""

    def __init__(self, directory: Path, file: WeightFile) -> None:
        self.path = directory / file.name
        self.error: OSError | None = None
        self._chunks: queue.Queue[tuple[int, torch.Tensor] | None] = queue.Queue(maxsize=2 * world_size())
        self._thread = threading.Thread(target=self._work, args=(file.header,), daemon=True)
        self._thread.start()

    def put(self, offset: int, data: torch.Tensor) -> None:
        self._chunks.put((offset, data))

    def finish(self) -> None:
        """Wait until all is on disk.

        Raises:
            OSError: opening, writing or syncing failed.
        """
        self._chunks.put(None)
        self._thread.join()
        if self.error is not None:
            error = self.error
            raise OSError(error.errno, f"{error.strerror}; nothing was replaced", str(self.path)) from error

    def _work(self, header: bytes) -> None:
        chunk: Any = ()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
            try:
                _write(descriptor, 0, memoryview(header))
                while (chunk := self._chunks.get()) is not None:
                    _write(descriptor, chunk[0], memoryview(chunk[1].numpy()))  # type: ignore[arg-type]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            self.error = error
            while chunk is not None:
                chunk = self._chunks.get()


def _write(descriptor: int, offset: int, data: memoryview) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written
