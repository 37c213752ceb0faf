"""Runs a model block by block: every block's parameters are gathered once for all the samples that wait before it.

A block is called as the model itself calls it: the model's own forward runs with every other block stepping aside, so
masks, positions and whatever else blocks are given stay the model's business. That works for models which pass each
block's output, as it is, to the next; ``BlockWalk.why_not`` finds out without fetching a block.
"""

from __future__ import annotations

import inspect
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from warp_ds.cluster.memory import free_gpu_memory
from warp_ds.cluster.processes import all_gather_object
from warp_ds.store.files import remove_own
from warp_ds.zero.batches import Batch
from warp_ds.zero.fetch import gathered, outside

Forward = Callable[..., Any]
#: position, hidden states, the block's forward with all its other arguments -> hidden states after the block
Step = Callable[[int, Tensor, Callable[[Tensor], Tensor]], Tensor]


class NotAChain(Exception):
    """The model does not pass hidden states straight from block to block."""


class _Done(Exception):
    """The wanted block has run: the rest of the forward pass is of no interest."""


class BlockWalk:
    """A model whose blocks can be run one at a time."""

    def __init__(self, model: Any, blocks: Sequence[nn.Module]):
        self.model = model
        self.blocks = list(blocks)
        self.fetches = [0] * len(self.blocks)
        """How often each block's parameters were gathered."""
        embedding = model.get_input_embeddings()
        self._embedding = list(embedding.parameters())
        others = [p for m in outside(model, self.blocks) if m is not embedding for p in m.parameters(recurse=False)]
        self._head = list({id(p): p for p in others}.values())

    def why_not(self, batch: Batch) -> str | None:
        """Why this model cannot be walked, None where it can; the same on every rank. Gathers the embedding alone."""
        reason = None
        with self.embedding(), torch.no_grad():
            try:
                self._check(batch)
            except Exception as error:  # whatever an unknown model does here, it is not a chain
                reason = f"{type(error).__name__}: {error}"
        return next((r for r in all_gather_object(reason) if r is not None), None)

    def _check(self, batch: Batch) -> None:
        passed: list[Tensor] = []

        def aside(position: int, hidden: Tensor, _: Any) -> Tensor:
            if position != len(passed) or (passed and hidden is not passed[-1]):
                raise NotAChain(f"block {position} does not get what the block before it returned")
            passed.append(hidden.clone())
            if position == len(self.blocks) - 1:
                raise _Done
            return passed[-1]

        self._forward(aside, **batch.inputs)
        if len(passed) != len(self.blocks):
            raise NotAChain(f"{len(passed)} of {len(self.blocks)} blocks were run")

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """The input embedding's parameters are whole inside."""
        with gathered(self._embedding):
            yield

    @contextmanager
    def block(self, index: int) -> Iterator[list[nn.Parameter]]:
        """The block's parameters are whole inside."""
        self.fetches[index] += 1
        parameters = list(self.blocks[index].parameters())
        with gathered(parameters):
            yield parameters

    @contextmanager
    def head(self) -> Iterator[None]:
        """The parameters of all that follows the blocks are whole inside."""
        with gathered(self._head):
            yield

    def embed(self, batch: Batch) -> Tensor:
        """Hidden states [B, L, h] before the first block; inside ``embedding``."""
        taken: list[Tensor] = []

        def take(position: int, hidden: Tensor, _: Any) -> Tensor:
            taken.append(hidden)
            raise _Done

        self._forward(take, **batch.inputs)
        return taken[0]

    def run(self, index: int, hidden: Tensor, batch: Batch) -> Tensor:
        """Hidden states after block ``index``, from those before it; inside ``block(index)``."""
        taken: list[Tensor] = []

        def take(position: int, passing: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
            if position < index:
                return passing
            taken.append(forward(hidden))
            raise _Done

        # The embeddings stand for shape and dtype alone: the block is given ``hidden`` itself.
        self._forward(take, inputs_embeds=hidden.detach(), **batch.context)
        return taken[0]

    def logits(self, hidden: Tensor, batch: Batch, last: int) -> Tensor:
        """Logits [B, last, V] of the ``last`` positions, from hidden states after the last block; inside ``head``."""
        final = len(self.blocks) - 1

        def replace(position: int, passing: Tensor, _: Any) -> Tensor:
            return hidden if position == final else passing

        with self._replaced(replace):
            inputs = {"inputs_embeds": hidden.detach(), **batch.context}
            output = self.model(**inputs, use_cache=False, **keep_last(self.model, last))
        return output.logits[:, -last:]

    def _forward(self, step: Step, **inputs: Tensor) -> None:
        with self._replaced(step):
            try:
                self.model.base_model(**inputs, use_cache=False)
            except _Done:
                pass

    @contextmanager
    def _replaced(self, step: Step) -> Iterator[None]:
        """Calls of the blocks go to ``step``; module hooks inside a block work as ever."""

        def substitute(position: int, original: Forward) -> Forward:
            def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
                return step(position, hidden_states, lambda hidden: original(hidden, *args, **kwargs))

            return forward

        for position, block in enumerate(self.blocks):
            block.forward = substitute(position, block.forward)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block in self.blocks:
                del block.__dict__["forward"]


def keep_last(model: Any, positions: int) -> dict[str, int]:
    """The argument by which ``model`` makes logits of the last positions alone, where it has one."""
    return {"logits_to_keep": positions} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


class HiddenStates:
    """Hidden states of this rank's micro-batches between blocks.

    On a GPU as far as a quarter of the memory that is free at the first ``put`` goes (through host memory they took 2.7
    times as long as the forward pass itself, on an H200); then in host memory; beyond ``limit`` bytes of that, on disk.
    The files lie in ``directory``, which ``close`` removes.
    """

    def __init__(self, directory: Path, limit: int):
        self.directory = directory
        self.limit = limit
        self.bytes = 0
        """In host memory and on disk."""
        self.gpu_bytes_left: int | None = None
        self._kept: dict[Any, Tensor] = {}
        self._on_disk: dict[Any, Path] = {}
        self._made = 0

    def put(self, key: Any, hidden: Tensor) -> None:
        """Keeps ``hidden`` under ``key``, over what was kept there (of the same shape)."""
        hidden = hidden.detach()
        size = hidden.numel() * hidden.element_size()
        if hidden.is_cuda and self.gpu_bytes_left is None:
            self.gpu_bytes_left = free_gpu_memory(hidden.device) // 4
        if key not in self._kept and self.gpu_bytes_left is not None and size <= self.gpu_bytes_left:
            self.gpu_bytes_left -= size
            self._kept[key] = torch.empty_like(hidden)
        elif key not in self._kept:
            self.bytes += size
            if self.bytes <= self.limit and size:
                # Apart from the heap: what stays, among what comes and goes, would leave holes everywhere.
                self._kept[key] = torch.frombuffer(mmap.mmap(-1, size), dtype=hidden.dtype).view(hidden.shape)
            elif size:
                self._on_disk[key] = self._new_file()
                self._kept[key] = torch.from_file(
                    str(self._on_disk[key]), shared=True, size=hidden.numel(), dtype=hidden.dtype
                ).view(hidden.shape)
        kept = self._kept.get(key)
        if kept is not None and (key in self._on_disk or kept.dtype == hidden.dtype):
            kept.copy_(hidden)
        else:
            self._kept[key] = hidden.to(hidden.device if kept is not None and kept.is_cuda else "cpu", copy=True)

    def get(self, key: Any, device: torch.device | str) -> Tensor:
        return self._kept[key].to(device)

    def drop(self, key: Any) -> None:
        kept = self._kept.pop(key)
        size = kept.numel() * kept.element_size()
        if kept.is_cuda and self.gpu_bytes_left is not None:
            self.gpu_bytes_left += size
        else:
            self.bytes -= size
        if key in self._on_disk:
            self._on_disk.pop(key).unlink()

    def close(self) -> None:
        """Forgets everything, files too."""
        self._kept.clear()
        self._on_disk.clear()
        remove_own(self.directory, r"\d+\.bin")

    def _new_file(self) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        self._made += 1
        return self.directory / f"{self._made}.bin"
