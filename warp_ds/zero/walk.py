"""Runs a model block by block: every block's parameters are gathered once for all the samples that wait before it.

A block is called as the model itself calls it: the model's own forward runs with every other block stepping aside, so
masks, positions and whatever else blocks are given stay the model's business. That works for models which pass each
block's output, as it is, to the next, and nothing else of it; ``BlockWalk.why_not`` tries it on a small batch, against a
plain forward pass.
"""

from __future__ import annotations

import inspect
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from warp_ds.cluster.memory import free_gpu_memory
from warp_ds.cluster.processes import all_gather_object
from warp_ds.store.files import remove_own
from warp_ds.store.layers import TargetLayer
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
        self._forwards: list[Forward] = [block.forward for block in self.blocks]
        self.fetches = [0] * len(self.blocks)
        """How often each block's parameters were gathered."""
        embedding, around = model.get_input_embeddings(), outside(model, self.blocks)
        # Learned positions, which run again with every block: as wide as tokens, where embeddings of tokens per layer are not.
        positions = [
            module
            for module in around
            if isinstance(module, nn.Embedding) and module is not embedding and _width(module) == _width(embedding)
        ]
        self._position_embeddings = [p for module in positions for p in module.parameters()]
        self._embedding = [*embedding.parameters(), *self._position_embeddings]
        others = [p for m in around if m is not embedding and m not in positions for p in m.parameters(recurse=False)]
        self._head = list({id(p): p for p in [*others, *self._position_embeddings]}.values())

    def why_not(self, batches: Sequence[Batch], layers: Sequence[TargetLayer], logits: bool = False) -> str | None:
        """Why the walk is not to be trusted with this model, None where it is; the same on every rank, given the same batches.

        All ``batches`` are walked side by side. Every one of ``layers`` must see the same of the first as in a plain forward
        pass; with ``logits`` all blocks are walked, and what comes out must be the same too. Gathers the embedding (and the
        head, for logits), and each block twice.
        """
        reason = None
        with torch.no_grad():
            try:
                _Proof(self, batches, layers, logits).run()
            except Exception as error:  # whatever an unknown model does here, it is not a chain
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return next((r for r in all_gather_object(reason) if r is not None), None)

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """The input embedding's parameters are whole inside."""
        with gathered(self._embedding):
            yield

    @contextmanager
    def block(self, index: int, alone: bool = False) -> Iterator[list[nn.Parameter]]:
        """The block's parameters are whole inside, and unless it is to be ``alone`` learned positions."""
        self.fetches[index] += 1
        parameters = list(self.blocks[index].parameters())
        with gathered([*parameters, *([] if alone else self._position_embeddings)]):
            yield parameters

    @contextmanager
    def head(self) -> Iterator[None]:
        """The parameters of all that follows the blocks are whole inside."""
        with gathered(self._head):
            yield

    @contextmanager
    def around(self, head: bool) -> Iterator[None]:
        """All but the blocks is whole inside; without ``head`` what comes before them."""
        whole = {id(p): p for p in self._embedding + (self._head if head else [])}
        with gathered(whole.values()):
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

        before = [block.__dict__.get("forward") for block in self.blocks]
        for position, block in enumerate(self.blocks):
            block.forward = substitute(position, self._forwards[position])  # type: ignore[method-assign]
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, before, strict=True):
                if forward is None:
                    del block.__dict__["forward"]
                else:
                    block.forward = forward  # type: ignore[method-assign]


class _Proof:
    """The walk of some small batches, and a plain forward pass of the first of them."""

    def __init__(self, walk: BlockWalk, batches: Sequence[Batch], layers: Sequence[TargetLayer], logits: bool):
        self.walk, self.batches, self.logits = walk, batches, logits
        self.last = len(walk.blocks) - 1 if logits else max(layer.layer for layer in layers)
        self.modules = sorted({layer.module for layer in layers})
        self.seen: dict[str, Tensor] | None = None
        """module -> a sketch of what it sees; None while nobody looks"""
        self.directions: dict[int, Tensor] = {}
        self.rounding = 0.0
        """What the two may differ by, relative to their size: the same kernels on the same numbers, sums in another order."""

    def run(self) -> None:
        """Raises NotAChain where walk and plain pass differ by more than rounding, or what the model raises in the walk."""

        def note(module: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
            if self.seen is not None:
                self.seen[name] = self._sketch(inputs[0])

        handles = [self.walk.model.get_submodule(n).register_forward_pre_hook(partial(note, name=n)) for n in self.modules]
        try:
            walked, out = self._walk()
            plain, expected = self._plain()
        finally:
            for handle in handles:
                handle.remove()
        for name in sorted(walked.keys() | plain.keys()):
            self._compare(f"what {name} sees", plain.get(name), walked.get(name))
        if self.logits:
            self._compare("the logits", expected, out)

    def _walk(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """What the modules see of the first batch, and its last logits; the others are walked beside it."""
        walked: dict[str, Tensor] = {}
        # Nothing else is whole than when it counts: a model that wants more of itself must fail here.
        with self.walk.embedding():
            hidden = [self.walk.embed(batch) for batch in self.batches]
        self.rounding = torch.finfo(hidden[0].dtype).eps ** 0.5 / 8
        for index in range(self.last + 1):
            with self.walk.block(index):
                for number, batch in enumerate(self.batches):
                    self.seen = None if number else walked
                    hidden[number] = self.walk.run(index, hidden[number], batch)
                    if not isinstance(hidden[number], Tensor):
                        raise NotAChain(f"block {index} returns a {type(hidden[number]).__name__}")
        self.seen = None
        if not self.logits:
            return walked, None
        with self.walk.head():
            return walked, self.walk.logits(hidden[0], self.batches[0], self._positions)

    def _plain(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """The same of a plain forward pass."""
        plain: dict[str, Tensor] = {}
        order = iter(range(self.last + 1))

        def step(position: int, hidden: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
            if position != next(order, None):
                raise NotAChain(f"block {position} is not run once, after the one before it")
            with self.walk.block(position, alone=True):
                after = forward(hidden)
            if position == self.last and not self.logits:
                raise _Done
            return after

        self.seen, model, inputs = plain, self.walk.model, self.batches[0].inputs
        with self.walk.around(head=self.logits):
            if not self.logits:
                self.walk._forward(step, **inputs)
                return plain, None
            with self.walk._replaced(step):
                logits = model(**inputs, use_cache=False, **keep_last(model, self._positions)).logits
        return plain, logits[:, -self._positions :]

    @property
    def _positions(self) -> int:
        return min(16, self.batches[0].labels.shape[1])

    def _sketch(self, x: Tensor) -> Tensor:
        """x in eight random directions, which keep its size and any difference's, and take little room for all layers."""
        n = x.shape[-1]
        if n not in self.directions:
            self.directions[n] = torch.randn(n, 8, generator=torch.Generator().manual_seed(n)).to(x.device)
        return x.float() @ self.directions[n]

    def _compare(self, what: str, plain: Tensor | None, walked: Tensor | None) -> None:
        """Raises NotAChain unless the two agree to rounding."""
        if plain is None or walked is None or plain.shape != walked.shape:
            raise NotAChain(f"{what} is not the same in the walk")
        # What is not finite is the phases' to find, with the sample that it is in.
        first, second = (x.float().nan_to_num(0.0, 0.0, 0.0) for x in (plain, walked))
        off, size = float(torch.linalg.vector_norm(second - first)), float(torch.linalg.vector_norm(first))
        if not off <= self.rounding * size:
            raise NotAChain(f"{what} differs by {off / max(size, 1e-30):.1e} of its size in the walk")


def _width(embedding: Any) -> int:
    """Of an embedding's rows, partitioned or not."""
    return int(getattr(embedding.weight, "ds_shape", embedding.weight.shape)[-1])


def keep_last(model: Any, positions: int) -> dict[str, int]:
    """The argument by which ``model`` makes logits of the last positions alone, where it has one.

    Not where layers share keys (Gemma 4): those are then given the last positions alone, too.
    """
    config = getattr(model, "config", None)
    if config is not None and getattr(config.get_text_config(), "num_kv_shared_layers", None):
        return {}
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
