"""Phase 2's scores: taps on the target layers, and the rows of S spread over ranks.

Every rank runs its own samples. The tokens' output gradients then go to the ranks that hold the rows, and their rotated
inputs to every rank, so each rank adds to its own rows of S alone: its memory falls with the world size, and a batch
that is spread over ranks is summed before the absolute value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from warp_ds.artifacts import TargetLayer
from warp_ds.data.collate import EMPTY
from warp_ds.method.importance import coefficient_gradient
from warp_ds.zero.batches import Batch, Samples
from warp_ds.zero.runtime import collective_device, rank, world_size


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


def plan_steps(
    samples: Samples, batch_size: int, importance_batch_size: int, ranks: int
) -> tuple[list[Step], list[int]]:
    """The steps of phase 2, and the importance batches that have no response token, which are left out.

    A step holds whole importance batches wherever one fits into batch_size samples a rank, so that no unfinished sum
    need be kept between steps.
    """
    count, size = len(samples), importance_batch_size
    batches = [range(first, min(first + size, count)) for first in range(0, count, size)]
    silent = [b for b, batch in enumerate(batches) if not any(samples.responses(i) for i in batch)]
    speaking = [batch for b, batch in enumerate(batches) if b not in set(silent)]
    capacity = batch_size * ranks
    together = max(1, capacity // importance_batch_size)
    steps = []
    for first in range(0, len(speaking), together):
        chosen = speaking[first : first + together]
        flat = [(i, b) for b, batch in enumerate(chosen) for i in batch]
        for start in range(0, len(flat), capacity):
            piece = flat[start : start + capacity]
            rest = {b for _, b in flat[start + capacity :]}
            steps.append(_step(piece, rest, samples, ranks))
    return steps, silent


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


def first_not_finite(tapped: Tapped, batch: Batch) -> int | None:
    """The first sample in which a counted token's input or gradient is NaN or infinite."""
    finite = torch.isfinite(tapped.x.abs().amax(dim=-1)) & torch.isfinite(tapped.g.abs().amax(dim=-1))
    bad = ~(finite | ~batch.counted).all(dim=1)
    return batch.samples[int(bad.nonzero()[0])] if bool(bad.any()) else None


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
    sent = [
        local[:, Rows(rows.m, rows.world_size, r).block.start : Rows(rows.m, rows.world_size, r).block.stop]
        .reshape(-1).to(collective_device())
        for r in range(rows.world_size)
    ]
    own = len(rows.block)
    received = local.new_empty(sum(step.tokens) * own, device=collective_device())
    dist.all_to_all_single(
        received, torch.cat(sent), [t * own for t in step.tokens], [piece.numel() for piece in sent]
    )
    return received.view(sum(step.tokens), own)


class RowScores:
    """This rank's rows of S for each target layer: fp32 [rows, r]."""

    def __init__(self, layers: Sequence[TargetLayer], ranks: dict[str, int], device: torch.device | str):
        """``ranks``: layer name -> r, the columns that can have a score."""
        self.rows = {layer.name: Rows(layer.m, world_size(), rank()) for layer in layers}
        self.sums = {
            layer.name: torch.zeros(len(self.rows[layer.name].block), ranks[layer.name], device=device)
            for layer in layers
        }
        self.pending: dict[str, Tensor] = {}

    def add(self, name: str, g: Tensor, xu: Tensor, step: Step, scale: float = 1.0) -> None:
        """Adds |∂L_b/∂C| of the step's batches: g [all tokens, own rows], xu [all tokens, r], times ``scale``."""
        total = self.sums[name]
        for first, end, last in step.segments:
            part = coefficient_gradient(g[first:end], xu[first:end])
            if name in self.pending:
                part += self.pending.pop(name)
            if last:
                total.add_(part.abs_(), alpha=scale)
            else:
                self.pending[name] = part
