"""Phase 2's scores: taps on the target layers, and the rows of S spread over ranks.

Every rank runs its own samples. The tokens' output gradients then go to the ranks that hold the rows, and their rotated
inputs to every rank, so each rank adds to its own rows of S alone: its memory falls with the world size, and a batch
that is spread over ranks is summed before the absolute value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from warp_ds.cluster.dealing import block
from warp_ds.cluster.processes import all_gather_object, all_reduce_sum, collective_device, rank, world_size
from warp_ds.data.collate import EMPTY
from warp_ds.method.importance import add_importance
from warp_ds.method.products import EXACT, Products
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.batches import Batch
from warp_ds.zero.gradients import Tapped
from warp_ds.zero.importance_steps import Step


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
        return block(self.m, self.world_size, self.rank)


class Finite:
    """Watches inputs and gradients of the target layers; looks at what it saw once, in ``failure``."""

    def __init__(self) -> None:
        self._seen: list[tuple[TargetLayer, Batch, Tensor]] = []

    def watch(self, layer: TargetLayer, batch: Batch, tapped: Tapped) -> None:
        """One pass over each; padding counts too, since real tokens attend to nothing that is not finite."""
        sums = batch.sums if tapped.places is None else partial(batch.sums_at, places=tapped.places)
        self._seen.append((layer, batch, torch.stack([sums(tapped.x), sums(tapped.g)])))

    def failure(self) -> tuple[int, str, int] | None:
        """(order, layer name, sample) of the first that was not finite: an input of the lowest block, else a gradient
        of the highest."""
        failures: list[tuple[int, str, int]] = []
        for layer, batch, sums in self._seen:
            bad = ~torch.isfinite(sums)
            if bool(bad.any()):
                for kind, order in ((0, layer.layer - 10**6), (1, -layer.layer)):
                    failures += [
                        (order, layer.name, s)
                        for s, b in zip(batch.samples, bad[kind].tolist(), strict=True)
                        if b and s != EMPTY
                    ]
        self._seen.clear()
        return min(failures, default=None)


def _counted(tapped: Tapped, batch: Batch, step: Step) -> tuple[Tensor, Step]:
    """This rank's tokens that count of x, and the step by these: an expert is given some of its tokens. Collective."""
    if tapped.places is None:
        return batch.take(tapped.x), step
    x, numbers = batch.take_at(tapped.x, tapped.places)
    tokens = [int(count) for count in all_gather_object(len(numbers))]
    of_experts = Step(step.parts, [], tokens)
    before = sum(step.tokens[: rank()])
    numbers = gather_tokens((numbers + before).unsqueeze(1), of_experts).squeeze(1).cpu()
    for first, end, last in step.segments:
        cuts = torch.searchsorted(numbers, torch.tensor([first, end])).tolist()
        of_experts.segments.append((cuts[0], cuts[1], last))
    return x, of_experts


def gather_tokens(local: Tensor, step: Step) -> Tensor:
    """The tokens of all ranks in order, [all tokens, k], from this rank's [t, k]; on every rank."""
    if world_size() == 1:
        return local
    most = max(step.tokens)
    if not most:  # no token was routed to the expert
        return local
    padded = local.new_zeros(most, local.shape[1], device=collective_device())
    padded[: local.shape[0]] = local
    of_ranks = [torch.empty_like(padded) for _ in step.tokens]
    dist.all_gather(of_ranks, padded)
    return torch.cat([t[:n] for t, n in zip(of_ranks, step.tokens, strict=True)])


def gather_rows(local: Tensor, step: Step, rows: Rows) -> Tensor:
    """Own rows of the output gradients of all ranks' tokens, [all tokens, own rows], from this rank's tokens [t, m]."""
    if world_size() == 1:
        return local
    blocks = [Rows(rows.m, rows.world_size, r).block for r in range(rows.world_size)]
    sent = [local[:, b.start : b.stop].reshape(-1).to(collective_device()) for b in blocks]
    own = len(rows.block)
    if not sum(step.tokens):
        return local[:, rows.block.start : rows.block.stop]
    received = local.new_empty(sum(step.tokens) * own, device=collective_device())
    dist.all_to_all_single(received, torch.cat(sent), [t * own for t in step.tokens], [piece.numel() for piece in sent])
    return received.view(sum(step.tokens), own)


def turned(g: Tensor, v: Tensor, products: Products = EXACT) -> Tensor:
    """V_cᵀ g of each token's output gradient g [t, m], fp32 [t, m]: 0 in directions beyond the q columns of V [m, q]."""
    result = g.new_zeros(g.shape, dtype=torch.float32)
    result[:, : v.shape[1]] = products.mm(g, v)
    return result


@dataclass
class ScoredInput:
    """Target layers that see one input, and how their coefficients' gradients are made."""

    layers: list[TargetLayer]
    rank: int
    """r: the columns that can have a score."""
    tokens_first: bool
    """Whether inputs are rotated rather than gradients."""


def of_units(scores: Tensor, unit: str) -> Tensor:
    """What is compared of a layer's S, of which this rank has some rows: its entries [rows, c], rows' norms [rows, 1], or all
    columns' norms [1, c], on rank 0 alone. Collective."""
    if unit == "entry":
        return scores
    if unit == "row":
        return torch.linalg.vector_norm(scores, dim=1, keepdim=True)
    squares = torch.zeros(scores.shape[1], dtype=torch.float64, device=scores.device)
    for rows in scores.split(1024):  # all of them in fp64 would be twice a block's scores
        squares += rows.double().square_().sum(dim=0)
    squares = all_reduce_sum(squares.to(collective_device()))
    norms = squares.sqrt().float().to(scores.device).unsqueeze(0)
    return norms if rank() == 0 else norms[:0]


class RowScores:
    """This rank's rows of S for each target layer: fp32 [rows, r], made when they are first wanted."""

    def __init__(
        self, inputs: Sequence[ScoredInput], device: torch.device | str, products: Products = EXACT, unit: str = "entry"
    ):
        """``unit``: what is frozen together (``of_units``)."""
        self.products, self.device, self.unit = products, device, unit
        self.rows = {layer.name: Rows(layer.m, world_size(), rank()) for scored in inputs for layer in scored.layers}
        self._columns = {layer.name: scored.rank for scored in inputs for layer in scored.layers}
        self._sums: dict[str, Tensor] = {}
        self._compared: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}

    def of(self, name: str) -> Tensor:
        """A layer's rows so far, to be added to."""
        if name not in self._sums:
            assert name not in self._compared, f"{name} is finished: nothing is added to it any more"
            self._sums[name] = torch.zeros(len(self.rows[name].block), self._columns[name], device=self.device)
        return self._sums[name]

    def finish(self, name: str) -> None:
        """Nothing is added to a layer any more: of its rows what is compared is kept. Collective."""
        assert name not in self._pending, f"an importance batch is half added to {name}"
        rows = self.of(name)
        del self._sums[name]
        self._compared[name] = of_units(rows, self.unit)

    def compared(self) -> dict[str, Tensor]:
        """What is compared of every layer (``of_units``); nothing is added any more. Collective."""
        for name in self.rows:
            if name not in self._compared:
                self.finish(name)
        return {name: self._compared.pop(name) for name in self.rows}

    @property
    def complete(self) -> bool:
        """No importance batch is half added."""
        return not self._pending

    def add(
        self,
        scored: ScoredInput,
        taken: dict[str, Tapped],
        batch: Batch,
        step: Step,
        columns: Tensor | None,
        scale: float,
        left: Callable[[str], Tensor | None] = lambda name: None,
    ) -> None:
        """Adds |∂L_b/∂C| of the step's importance batches for the layers that share an input. Collective.

        ``taken``: this rank's x and g, removed from it; ``columns``: U [n, r], None for the identity; ``scale``: what
        the loss must be multiplied by; ``left``: V [m, q] of a layer, by its name, None for the identity: then the rows of S
        are the outputs' directions, those beyond q without a score.
        """
        x, step = _counted(taken[scored.layers[0].name], batch, step)
        if columns is not None and scored.tokens_first:
            x, columns = self.products.mm(x, columns), None
        right = gather_tokens(x, step)
        for layer in scored.layers:
            tapped = taken.pop(layer.name)
            own = batch.take(tapped.g) if tapped.places is None else batch.take_at(tapped.g, tapped.places)[0]
            if (v := left(layer.name)) is not None:
                own = turned(own, v, self.products)
            g = gather_rows(own, step, self.rows[layer.name])
            for first, end, last in step.segments:
                pending = self._pending.pop(layer.name, None)
                added = g[first:end], right[first:end]
                if last:
                    add_importance(self.of(layer.name), *added, columns, pending, scale, self.products)
                else:
                    part = self.products.mm(added[0].T, added[1])
                    self._pending[layer.name] = part if pending is None else part.add_(pending)
