"""Backward passes of importance batches: what they show of the target layers, block by block or by whole passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from warp_ds.cluster.memory import host_memory
from warp_ds.cluster.processes import all_gather_object, rank
from warp_ds.data.formats import IGNORE
from warp_ds.errors import ConfigError
from warp_ds.models.expert_taps import tapped
from warp_ds.models.experts import by_expert, by_module
from warp_ds.models.layer_names import ROUTER
from warp_ds.models.routers import watch
from warp_ds.store.layers import Ranges, TargetLayer
from warp_ds.zero.batches import Batch, Samples
from warp_ds.zero.fetch import FetchHooks, outside, saved_by_reference
from warp_ds.zero.importance_steps import Step
from warp_ds.zero.walk import BlockWalk, HiddenStates, keep_last


@dataclass
class Tapped:
    """What one backward pass shows of a target layer: x [B, L, n] and g = ∂L/∂y [B, L, m]; of an expert x [t, n] and
    g [t, m] of the tokens ``places`` [t] of the batch."""

    x: Tensor
    g: Tensor
    places: Tensor | None = None


def _tap(taken: dict[str, Tapped], name: str, y: Tensor, x: Tensor, columns: Ranges = (), places: Tensor | None = None) -> None:
    """Lets the backward pass leave x and ∂L/∂y, of y as the layer made it, whatever the model then does to it in place."""

    def take(gradients: tuple[Tensor, ...]) -> None:
        (g,) = gradients
        parts = [g[..., first:end] for first, end in columns] or [g]
        taken[name] = Tapped(x, parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1), places)

    if y.grad_fn is not None:
        y.grad_fn.register_prehook(take)


@dataclass
class _ExpertGradients:
    """Taps what a block's experts are given, and the gradients of what they make of it."""

    taken: dict[str, Tapped]
    ups: dict[int, list[TargetLayer]]
    downs: dict[int, list[TargetLayer]]

    def given(self, hidden: Tensor) -> None:
        pass

    def dealt(self, x: Tensor, places: Tensor) -> None:
        pass

    def up(self, expert: int, places: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self._tap(self.ups.get(expert, []), expert, places, x, y)

    def down(self, expert: int, places: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return self._tap(self.downs.get(expert, []), expert, places, x, y)

    def _tap(self, layers: list[TargetLayer], expert: int, places: Tensor, x: Tensor, y: Tensor) -> Tensor:
        first = expert * y.shape[-1]  # of the expert's rows in the stacked parameter
        for layer in layers:
            columns = tuple((begin - first, end - first) for begin, end in layer.rows)
            _tap(self.taken, layer.name, y, x.detach(), columns, places)
        return y


@dataclass
class GradientTaps:
    """Within the context, a backward pass leaves inputs and output gradients of the target layers in ``taken``."""

    model: nn.Module
    layers: Sequence[TargetLayer]
    taken: dict[str, Tapped] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> GradientTaps:
        experts = by_module(self.layers)
        if experts:
            taps = {
                name: _ExpertGradients(self.taken, by_expert(layers, down=False), by_expert(layers, down=True))
                for name, layers in experts.items()
            }
            self._stack.enter_context(tapped(self.model, taps))
        for layer in (layer for layer in self.layers if layer.expert is None):

            def hook(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor, layer: TargetLayer = layer) -> None:
                _tap(self.taken, layer.name, y, inputs[0].detach(), layer.rows)

            module = self.model.get_submodule(layer.module)
            if layer.type == ROUTER:
                self._handles += watch(module, partial(self._take_product, layer))
            else:
                self._handles.append(module.register_forward_hook(hook))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._stack.close()

    def _take_product(self, layer: TargetLayer, x: Tensor, y: Tensor) -> None:
        _tap(self.taken, layer.name, y, x.detach())


# ---------------------------------------------------------------- backward passes

Loss = Callable[[Tensor, Batch, int], Tensor]
"""(logits [B, k, V] of the last k positions, batch, k) -> this micro-batch's part of Σ_b L_b"""
Shown = Iterator[tuple[Step, Batch, dict[str, Tapped]]]
"""What backward passes show of target layers: a step, this rank's micro-batch of it, layer name -> x and g"""


def last_positions(batch: Batch) -> int:
    """How many of the last positions hold all labels and the positions before them."""
    chosen = (batch.labels != IGNORE).any(dim=0).nonzero()
    length = batch.labels.shape[1]
    return length - max(0, int(chosen[0]) - 1) if len(chosen) else 1


Graph = tuple[Tensor, Tensor, dict[str, Tapped]]
"""A block's pass: the hidden states that entered it, a leaf; what left it; layer name -> what its backward pass shows"""


class GradientWalk:
    """Forward and backward passes of some steps together, block by block: two fetches a block for all of them.

    Blocks below the lowest target have no backward pass. ``recompute``: activations are made anew, from each block's
    input, rather than kept. ``scratch``: where hidden states go that host memory does not hold.
    """

    def __init__(
        self,
        walk: BlockWalk,
        layers: Sequence[TargetLayer],
        steps: Sequence[Step],
        samples: Samples,
        loss: Loss,
        recompute: bool,
        scratch: Path,
    ):
        self.walk, self.layers, self.steps, self.loss, self.recompute = walk, layers, steps, loss, recompute
        self.batches = [samples.batch(step.parts[rank()]) for step in steps]
        self.lowest, self.device = min(layer.layer for layer in layers), samples.device
        self.hidden = HiddenStates(scratch / f"hidden_rank_{rank()}", host_memory() // 2)
        self.graphs: dict[tuple[int, int], Graph] = {}
        self.flowing: dict[int, Tensor] = {}
        """batch -> ∂L/∂(hidden states), at the block that the backward passes have reached"""

    def shown(self) -> Shown:
        """Blocks with targets from the last to the first, and steps in order."""
        try:
            self._forward()
            self._head()
            yield from self._backward()
        finally:
            self.hidden.close()

    def _bar(self, desc: str, blocks: range) -> Iterable[int]:
        """``blocks`` with a bar of their own where one walk is of several steps: it may be all that there is."""
        return tqdm(blocks, desc=desc, unit="block", leave=False, disable=rank() != 0 or len(self.steps) == 1)

    def _graph(self, index: int, number: int) -> Graph:
        leaf = self.hidden.get((index, number), self.device).requires_grad_(True)
        targets = [layer for layer in self.layers if layer.layer == index]
        with torch.enable_grad(), GradientTaps(self.walk.model, targets) as taps:
            return leaf, self.walk.run(index, leaf, self.batches[number]), taps.taken

    @torch.no_grad()
    def _forward(self) -> None:
        with self.walk.embedding():
            for number, batch in enumerate(self.batches):
                self.hidden.put((0, number), self.walk.embed(batch))
        for index in self._bar("forward", range(len(self.walk.blocks))):
            kept = index >= self.lowest and not self.recompute
            with self.walk.block(index) as parameters:
                for number, batch in enumerate(self.batches):
                    if kept:
                        with saved_by_reference(parameters):
                            self.graphs[index, number] = self._graph(index, number)
                        after = self.graphs[index, number][1].detach()
                    else:
                        after = self.walk.run(index, self.hidden.get((index, number), self.device), batch)
                    self.hidden.put((index + 1, number), after)
                    if index < self.lowest or kept:
                        self.hidden.drop((index, number))

    def _head(self) -> None:
        final = len(self.walk.blocks)
        with self.walk.head(), torch.enable_grad():
            for number, batch in enumerate(self.batches):
                leaf = self.hidden.get((final, number), self.device).requires_grad_(True)
                last = last_positions(batch)
                self.loss(self.walk.logits(leaf, batch, last), batch, last).backward()
                assert leaf.grad is not None
                self.flowing[number] = leaf.grad
                self.hidden.drop((final, number))

    def _backward(self) -> Shown:
        for index in self._bar("backward", range(len(self.walk.blocks) - 1, self.lowest - 1, -1)):
            with self.walk.block(index):
                for number, (step, batch) in enumerate(zip(self.steps, self.batches, strict=True)):
                    leaf, after, taken = self._graph(index, number) if self.recompute else self.graphs.pop((index, number))
                    torch.autograd.backward(after, self.flowing[number])
                    assert leaf.grad is not None
                    self.flowing[number] = leaf.grad
                    del leaf, after
                    if self.recompute:
                        self.hidden.drop((index, number))
                    if taken:
                        yield step, batch, taken


def gradients_with_hooks(
    model: Any, blocks: Sequence[nn.Module], layers: Sequence[TargetLayer], steps: Sequence[Step], samples: Samples, loss: Loss
) -> Shown:
    """The same by whole passes, for models that cannot be walked.

    Raises ConfigError, naming the model, where it writes over what its modules return, which hooks on them do not survive.
    """
    handle = model.get_input_embeddings().register_forward_hook(lambda module, inputs, y: y.requires_grad_(True))
    try:
        with GradientTaps(model, layers) as taps, FetchHooks(outside(model, blocks), blocks, backward=True):
            for step in steps:
                batch = samples.batch(step.parts[rank()])
                last = last_positions(batch)
                logits = model(**batch.inputs, use_cache=False, **keep_last(model, last)).logits[:, -last:]
                loss(logits, batch, last).backward()
                yield step, batch, taps.taken
    except RuntimeError as error:
        if "modified inplace" not in str(error):
            raise
        raise ConfigError(
            f"phase 2 cannot run a {type(model).__name__}: it is no chain of blocks, and it writes over what its modules return"
        ) from error
    finally:
        handle.remove()


def steps_at_once(
    walk: BlockWalk, layers: Sequence[TargetLayer], steps: Sequence[Step], samples: Samples, itemsize: int
) -> list[Sequence[Step]]:
    """``steps`` cut into parts whose hidden states fit in a quarter of the host memory of every rank."""
    budget = min(all_gather_object(host_memory())) // 4
    depth = len(walk.blocks) - min(layer.layer for layer in layers) + 1
    width = walk.model.get_input_embeddings().embedding_dim
    parts: list[list[Step]] = [[]]
    used = 0
    for step in steps:
        size = max(1, *map(samples.area, step.parts)) * width * itemsize * depth
        if parts[-1] and used + size > budget:
            parts.append([])
            used = 0
        parts[-1].append(step)
        used += size
    return [part for part in parts if part]
