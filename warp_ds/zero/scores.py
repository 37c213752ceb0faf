"""Phase 2's scores: taps on the target layers, and the rows of S spread over ranks.

Every rank runs its own samples. The tokens' output gradients then go to the ranks that hold the rows, and their rotated
inputs to every rank, so each rank adds to its own rows of S alone: its memory falls with the world size, and a batch
that is spread over ranks is summed before the absolute value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from warp_ds.cluster.consensus import on_every_rank_or_none, on_rank_0
from warp_ds.cluster.memory import host_memory
from warp_ds.cluster.processes import all_gather_object, collective_device, rank, world_size
from warp_ds.data.collate import EMPTY
from warp_ds.data.formats import IGNORE
from warp_ds.errors import ArtifactError
from warp_ds.method.importance import add_importance
from warp_ds.store.files import read_json, remove_own, write_json, write_tensors
from warp_ds.store.layers import TargetLayer
from warp_ds.store.sealed import contents, difference
from warp_ds.zero.batches import Batch, Samples, sample_sums
from warp_ds.zero.fetch import FetchHooks, outside, saved_by_reference
from warp_ds.zero.walk import BlockWalk, HiddenStates, keep_last


@dataclass(frozen=True)
class Rows:
    """The contiguous block of a layer's m rows whose scores a rank holds."""

    m: int
    world_size: int
    rank: int

    @property
    def most(self) -> int:
        """Rows of the largest block."""
        return -(-self.m // self.world_size)

    @property
    def block(self) -> range:
        return range(min(self.rank * self.most, self.m), min((self.rank + 1) * self.most, self.m))


@dataclass
class Step:
    """One micro-batch on each rank."""

    parts: list[list[int]]
    """rank -> its samples, EMPTY where it has none"""
    segments: list[tuple[int, int, bool]]
    """(first token, end, last) of each importance batch among the tokens of all ranks in order; ``last``: no later step
    holds more of this batch"""
    tokens: list[int]
    """rank -> how many tokens its samples have"""


def importance_batches(samples: Samples, size: int) -> tuple[list[range], list[range]]:
    """The safety set cut into batches of ``size`` samples: those with a response token, and those without."""
    batches = [range(first, min(first + size, len(samples))) for first in range(0, len(samples), size)]
    speaking = [batch for batch in batches if any(samples.responses(i) for i in batch)]
    return speaking, [batch for batch in batches if batch not in speaking]


def plan_steps(batches: Sequence[range], samples: Samples, batch_size: int, ranks: int) -> list[Step]:
    """The steps that run ``batches``, the importance batches, at most ``batch_size`` samples a rank and step.

    A step holds whole importance batches wherever one fits into it, so that no unfinished sum need be kept between
    steps.
    """
    capacity = batch_size * ranks
    together = max(1, capacity // max((len(batch) for batch in batches), default=1))
    steps = []
    for first in range(0, len(batches), together):
        chosen = batches[first : first + together]
        flat = [(i, b) for b, batch in enumerate(chosen) for i in batch]
        for start in range(0, len(flat), capacity):
            piece = flat[start : start + capacity]
            rest = {b for _, b in flat[start + capacity :]}
            steps.append(_step(piece, rest, samples, ranks))
    return steps


def _step(piece: list[tuple[int, int]], rest: set[int], samples: Samples, ranks: int) -> Step:
    most, more = divmod(len(piece), ranks)
    cuts = [r * most + min(r, more) for r in range(ranks + 1)]
    parts = [[i for i, _ in piece[a:b]] or [EMPTY] for a, b in zip(cuts, cuts[1:], strict=False)]
    segments: list[tuple[int, int, bool]] = []
    position = 0
    for b in dict.fromkeys(b for _, b in piece):
        length = sum(samples.counts(i) for i, other in piece if other == b)
        segments.append((position, position + length, b not in rest))
        position += length
    tokens = [sum(samples.counts(i) for i in part if i != EMPTY) for part in parts]
    return Step(parts, segments, tokens)


@dataclass
class Tapped:
    """What one backward pass shows of a target layer: x [B, L, n] and g = ∂L/∂y [B, L, m]."""

    x: Tensor
    g: Tensor


class _Tap(torch.autograd.Function):
    """The identity on y; its backward pass hands on x and ∂L/∂y. Saved tensors let checkpointing drop and remake x."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, taken: dict[str, Tapped], name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.taken, ctx.name = taken, name
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        ctx.taken[ctx.name] = Tapped(x, g)
        return g, None, None, None


@dataclass
class GradientTaps:
    """Within the context, a backward pass leaves inputs and output gradients of the target layers in ``taken``."""

    model: nn.Module
    layers: Sequence[TargetLayer]
    taken: dict[str, Tapped] = field(default_factory=dict)
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> GradientTaps:
        for layer in self.layers:

            def hook(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor, layer: TargetLayer = layer) -> Tensor:
                return _Tap.apply(y, inputs[0].detach(), self.taken, layer.name) if y.requires_grad else y

            self._handles.append(self.model.get_submodule(layer.name).register_forward_hook(hook))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()


class Finite:
    """Watches inputs and gradients of the target layers; looks at what it saw once, in ``failure``."""

    def __init__(self) -> None:
        self._seen: list[tuple[TargetLayer, Batch, Tensor]] = []

    def watch(self, layer: TargetLayer, batch: Batch, tapped: Tapped) -> None:
        """One pass over each; padding counts too, since real tokens attend to nothing that is not finite."""
        self._seen.append((layer, batch, torch.stack([sample_sums(tapped.x), sample_sums(tapped.g)])))

    def failure(self) -> tuple[int, str, int] | None:
        """(order, layer name, sample) of the first that was not finite: an input of the lowest block, else a gradient
        of the highest."""
        found: list[tuple[int, str, int]] = []
        for layer, batch, sums in self._seen:
            bad = ~torch.isfinite(sums)
            if bool(bad.any()):
                for kind, order in ((0, layer.layer - 10**6), (1, -layer.layer)):
                    found += [
                        (order, layer.name, s)
                        for s, b in zip(batch.samples, bad[kind].tolist(), strict=True)
                        if b and s != EMPTY
                    ]
        self._seen.clear()
        return min(found, default=None)


def gather_tokens(local: Tensor, step: Step) -> Tensor:
    """The tokens of all ranks in order, [all tokens, k], from this rank's [t, k]; on every rank."""
    if world_size() == 1:
        return local
    most = max(step.tokens)
    padded = local.new_zeros(most, local.shape[1], device=collective_device())
    padded[: local.shape[0]] = local
    found = [torch.empty_like(padded) for _ in step.tokens]
    dist.all_gather(found, padded)
    return torch.cat([t[:n] for t, n in zip(found, step.tokens, strict=True)])


def gather_rows(local: Tensor, step: Step, rows: Rows) -> Tensor:
    """Own rows of the output gradients of all ranks' tokens, [all tokens, own rows], from this rank's tokens [t, m]."""
    if world_size() == 1:
        return local
    blocks = [Rows(rows.m, rows.world_size, r).block for r in range(rows.world_size)]
    sent = [local[:, b.start : b.stop].reshape(-1).to(collective_device()) for b in blocks]
    own = len(rows.block)
    received = local.new_empty(sum(step.tokens) * own, device=collective_device())
    dist.all_to_all_single(received, torch.cat(sent), [t * own for t in step.tokens], [piece.numel() for piece in sent])
    return received.view(sum(step.tokens), own)


@dataclass
class ScoredInput:
    """Target layers that see one input, and how their coefficients' gradients are made."""

    layers: list[TargetLayer]
    rank: int
    """r: the columns that can have a score."""
    tokens_first: bool
    """Whether inputs are rotated rather than gradients."""


class RowScores:
    """This rank's rows of S for each target layer: fp32 [rows, r]."""

    def __init__(self, inputs: Sequence[ScoredInput], device: torch.device | str):
        self.rows: dict[str, Rows] = {}
        self.sums: dict[str, Tensor] = {}
        for found in inputs:
            for layer in found.layers:
                self.rows[layer.name] = rows = Rows(layer.m, world_size(), rank())
                self.sums[layer.name] = torch.zeros(len(rows.block), found.rank, device=device)
        self._pending: dict[str, Tensor] = {}

    @property
    def complete(self) -> bool:
        """No importance batch is half added."""
        return not self._pending

    def add(
        self, found: ScoredInput, taken: dict[str, Tapped], batch: Batch, step: Step, columns: Tensor | None, scale: float
    ) -> None:
        """Adds |∂L_b/∂C| of the step's importance batches for the layers that share an input. Collective.

        ``taken``: this rank's x and g, removed from it; ``columns``: U [n, r], None for the identity; ``scale``: what
        the loss must be multiplied by.
        """
        x = batch.take(taken[found.layers[0].name].x)
        if columns is not None and found.tokens_first:
            x, columns = x.float() @ columns, None
        right = gather_tokens(x, step)
        for layer in found.layers:
            g = gather_rows(batch.take(taken.pop(layer.name).g), step, self.rows[layer.name])
            for first, end, last in step.segments:
                pending = self._pending.pop(layer.name, None)
                if last:
                    add_importance(self.sums[layer.name], g[first:end], right[first:end], columns, pending, scale)
                else:
                    part = g[first:end].float().T @ right[first:end].float()
                    self._pending[layer.name] = part if pending is None else part.add_(pending)


_AGAIN = "remove {}, and phase 2 begins its scores anew"


class SavedScores:
    """Scores of the importance batches that are done, so that a run that was stopped goes on with the rest.

    ``directory``/progress.json names the files that belong together: it is written when all ranks' are whole.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.progress = directory / "progress.json"

    def load(self, scores: RowScores) -> int:
        """Fills ``scores`` with what was saved, by any number of ranks; returns the importance batches in it."""
        saved = on_rank_0(self._whole, "reading saved scores")
        if saved is None:
            return 0
        batches, ranks = saved
        with on_every_rank_or_none("reading saved scores"):
            for other in range(ranks):
                path = self._file(batches, other)
                try:
                    self._add(path, scores, ranks, other)
                except (SafetensorError, OSError, RuntimeError, IndexError) as error:
                    raise ArtifactError(f"{path} cannot be read ({error}): {_AGAIN.format(self.directory)}") from error
        return batches

    def _whole(self) -> tuple[int, int] | None:
        """(importance batches that are done, ranks that saved them); None for none. ArtifactError where a file was changed."""
        if not self.progress.is_file():
            return None
        saved = read_json(self.progress)
        batches, ranks = (saved.get(name) if isinstance(saved, dict) else None for name in ("batches", "ranks"))
        if type(batches) is not int or type(ranks) is not int or min(batches, ranks) < 1:
            raise ArtifactError(f"{self.progress} is not what this program writes: {_AGAIN.format(self.directory)}")
        # A process that was killed may have left files of the batches before, or after.
        if changed := difference(self.directory, self.progress.name, saved.get("files"), added=False):
            raise ArtifactError(f"{self.directory} is not as this program left it: {changed}; {_AGAIN.format(self.directory)}")
        return batches, ranks

    def _add(self, path: Path, scores: RowScores, ranks: int, other: int) -> None:
        """Puts the rows of ``scores`` that rank ``other`` of ``ranks`` saved where they belong."""
        with safe_open(str(path), framework="pt") as file:
            for name, rows in scores.rows.items():
                theirs, own = Rows(rows.m, ranks, other).block, rows.block
                first, last = max(theirs.start, own.start), min(theirs.stop, own.stop)
                if first < last:
                    part = file.get_slice(name)[first - theirs.start : last - theirs.start]
                    mine = scores.sums[name][first - own.start : last - own.start]
                    if part.shape != mine.shape or part.dtype != mine.dtype:
                        raise RuntimeError(f"{name} is {list(part.shape)} in {part.dtype}, not {list(mine.shape)}")
                    mine.copy_(part)

    def save(self, scores: RowScores, batches: int) -> None:
        """Saves the scores of the first ``batches`` importance batches. Collective."""
        with on_every_rank_or_none("saving scores"):
            write_tensors(self._file(batches, rank()), scores.sums)

        def mark() -> None:
            of_others = [path.name for path in self.directory.glob("*.safetensors") if not path.name.startswith(f"{batches}_")]
            files = contents(self.directory, self.progress.name)
            write_json(
                self.progress,
                {
                    "batches": batches,
                    "ranks": world_size(),
                    "files": {name: what for name, what in files.items() if name not in of_others},
                },
            )
            remove_own(self.directory, rf"(?!{batches}_)\d+_rank_\d+\.safetensors")

        on_rank_0(mark, "saving scores")

    def remove(self) -> None:
        """Forgets what was saved. Collective."""
        on_rank_0(lambda: remove_own(self.directory, r"progress\.json|\d+_rank_\d+\.safetensors"), "removing saved scores")

    def _file(self, batches: int, other: int) -> Path:
        return self.directory / f"{batches}_rank_{other}.safetensors"


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


def gradients_by_walk(
    walk: BlockWalk,
    layers: Sequence[TargetLayer],
    steps: Sequence[Step],
    samples: Samples,
    loss: Loss,
    recompute: bool,
    scratch: Path,
) -> Shown:
    """Forward and backward passes of ``steps`` together, block by block: two fetches a block for all of them.

    Blocks below the lowest target have no backward pass. ``recompute``: activations are made anew, from each block's
    input, rather than kept. Yields blocks with targets from the last to the first, and steps in order.
    """
    batches = [samples.batch(step.parts[rank()]) for step in steps]
    lowest, device = min(layer.layer for layer in layers), samples.device
    graphs: dict[tuple[int, int], tuple[Tensor, Tensor, dict[str, Tapped]]] = {}
    hidden = HiddenStates(scratch / f"hidden_rank_{rank()}", host_memory() // 2)

    def traced(index: int, number: int) -> tuple[Tensor, Tensor, dict[str, Tapped]]:
        leaf = hidden.get((index, number), device).requires_grad_(True)
        targets = [layer for layer in layers if layer.layer == index]
        with torch.enable_grad(), GradientTaps(walk.model, targets) as taps:
            return leaf, walk.run(index, leaf, batches[number]), taps.taken

    try:
        with walk.embedding(), torch.no_grad():
            for number, batch in enumerate(batches):
                hidden.put((0, number), walk.embed(batch))
        for index in range(len(walk.blocks)):
            with walk.block(index) as parameters:
                for number, batch in enumerate(batches):
                    if index < lowest or recompute:
                        with torch.no_grad():
                            after = walk.run(index, hidden.get((index, number), device), batch)
                    else:
                        with saved_by_reference(parameters):
                            graphs[index, number] = traced(index, number)
                        after = graphs[index, number][1].detach()
                    hidden.put((index + 1, number), after)
                    if index < lowest or not recompute:
                        hidden.drop((index, number))
        final, flowing = len(walk.blocks), {}
        with walk.head(), torch.enable_grad():
            for number, batch in enumerate(batches):
                leaf = hidden.get((final, number), device).requires_grad_(True)
                last = last_positions(batch)
                loss(walk.logits(leaf, batch, last), batch, last).backward()
                flowing[number] = leaf.grad
                hidden.drop((final, number))
        for index in range(final - 1, lowest - 1, -1):
            with walk.block(index):
                for number, batch in enumerate(batches):
                    leaf, after, taken = traced(index, number) if recompute else graphs.pop((index, number))
                    torch.autograd.backward(after, flowing[number])
                    flowing[number] = leaf.grad
                    del leaf, after
                    if recompute:
                        hidden.drop((index, number))
                    if taken:
                        yield steps[number], batch, taken
    finally:
        hidden.close()


def gradients_with_hooks(
    model: Any, blocks: Sequence[nn.Module], layers: Sequence[TargetLayer], steps: Sequence[Step], samples: Samples, loss: Loss
) -> Shown:
    """The same by whole passes, for models that cannot be walked."""
    handle = model.get_input_embeddings().register_forward_hook(lambda module, inputs, y: y.requires_grad_(True))
    try:
        with GradientTaps(model, layers) as taps, FetchHooks(outside(model, blocks), blocks, backward=True):
            for step in steps:
                batch = samples.batch(step.parts[rank()])
                last = last_positions(batch)
                logits = model(**batch.inputs, use_cache=False, **keep_last(model, last)).logits[:, -last:]
                loss(logits, batch, last).backward()
                yield step, batch, taps.taken
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
        longest = max(len(part) * max((samples.counts(i) for i in part if i != EMPTY), default=1) for part in step.parts)
        size = longest * width * itemsize * depth
        if parts[-1] and used + size > budget:
            parts.append([])
            used = 0
        parts[-1].append(step)
        used += size
    return [part for part in parts if part]
