"""Phase 1's covariances: what the target layers see, brought to the rank that decomposes it.

Layer by layer (``walk``), so that each block is fetched once and one block's inputs are alive at a time; or all at once
by whole forward passes (``hooks``), for models that cannot be walked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from warp_ds.cluster.consensus import on_every_rank_or_none
from warp_ds.cluster.memory import host_memory
from warp_ds.cluster.peaks import LARGE_PIECE, return_freed_memory
from warp_ds.cluster.processes import all_gather_object, collective_device, rank, world_size
from warp_ds.data.collate import EMPTY
from warp_ds.method.covariance import Covariance
from warp_ds.models.expert_taps import tapped
from warp_ds.models.experts import by_module
from warp_ds.models.layer_names import ROUTER, type_order
from warp_ds.models.routers import watch
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.batches import Batch, Samples
from warp_ds.zero.expert_inputs import ExpertInputs
from warp_ds.zero.fetch import FetchHooks, outside
from warp_ds.zero.walk import BlockWalk, HiddenStates

logger = logging.getLogger(__name__)


class NotFinite(RuntimeError):
    """NaN or infinite activations or gradients: the phase cannot go on."""


REMEDY = (
    "remedy: check that the model's weights are finite, use --dtype bfloat16 or float32 rather than float16, or "
    "leave the sample out"
)


# ---------------------------------------------------------------- how inputs reach their owner

TOKENS, SEND, REDUCE, ROUTED = "tokens", "send", "reduce", "routed"


def route(tokens: int, n: int, ranks: int, itemsize: int) -> str:
    """How one layer's inputs reach the rank that decomposes them.

    ``tokens``: fewer tokens than inputs: the owner gets them and decomposes their Gram matrix. ``send``: the owner
    gets the tokens and forms Σ, which is fewer bytes than ``reduce``: each rank forms its part of Σ, and these are
    summed.
    """
    if tokens < n:
        return TOKENS
    # Over all links: all tokens but the owner's own; or the upper triangle of fp32 from every rank but the owner.
    sent = tokens * n * itemsize * (ranks - 1) / ranks
    reduced = n * n / 2 * 4 * (ranks - 1)
    return SEND if sent < reduced else REDUCE


def _empty(layers: list[TargetLayer], samples: Samples, itemsize: int, routed: bool) -> LayerInput:
    """How many tokens an expert is given is known at the end, so they are kept as they are (``routed``)."""
    n = layers[0].n
    way = ROUTED if routed else route(samples.tokens, n, world_size(), itemsize)
    return LayerInput(layers, way, Covariance(n, samples.device) if way == REDUCE else None)


@dataclass(eq=False)
class LayerInput:
    """An input that some target layers share, and what this rank has seen of it."""

    layers: list[TargetLayer]
    route: str
    covariance: Covariance | None
    pieces: list[Tensor] = field(default_factory=list)
    """The tokens themselves, where they are sent."""
    tokens: int = 0

    @property
    def first(self) -> TargetLayer:
        """The layer that the basis is named by."""
        return min(self.layers, key=lambda layer: type_order(layer.type))

    def add(self, x: Tensor) -> None:
        """Adds tokens x [t, n]."""
        self.tokens += x.shape[0]
        if self.covariance is None:
            self.pieces.append(x.clone())  # what the model does with it later is its own business
        else:
            self.covariance.add(x)


@dataclass
class Delivered:
    """A layer input of all ranks, on its owner: either all tokens x [T, n] or Σ [n, n]."""

    layers: list[TargetLayer]
    tokens: int
    x: Tensor | None
    sigma: Tensor | None


@dataclass
class Traffic:
    """Payload bytes that this rank has sent to owners."""

    bytes: int = 0


def deliver(shared: LayerInput, owner: int, dtype: torch.dtype, traffic: Traffic) -> tuple[int, Delivered | None]:
    """(tokens of all ranks, the whole input on ``owner`` and None elsewhere); every rank calls it. Frees its part."""
    counts = all_gather_object(shared.tokens)
    n = shared.layers[0].n
    mine = owner == rank()
    x = sigma = None
    if shared.covariance is not None:
        total, shared.covariance = shared.covariance, None
        total.flush()
        if world_size() > 1:
            _reduce(total, owner, traffic)
        sigma = total.result(sum(counts)) if mine else None
    else:
        local = torch.cat(shared.pieces) if shared.pieces else torch.empty(0, n, dtype=dtype)
        shared.pieces.clear()
        x = _send(local, counts, owner, traffic)
        x = None if x is not None and not len(x) else x  # an expert that no token was routed to
        if x is not None and (shared.route == SEND or (shared.route == ROUTED and len(x) >= n)):
            total = Covariance(n, x.device)
            total.add(x)
            x, sigma = None, total.result()
    return sum(counts), Delivered(shared.layers, sum(counts), x, sigma) if mine else None


def _reduce(total: Covariance, owner: int, traffic: Traffic) -> None:
    """Sums the kept blocks on ``owner``, one row block at a time."""
    for block in total.blocks():
        part = total.sum[block, block.start :].contiguous().to(collective_device())
        dist.reduce(part, dst=owner)
        if owner == rank():
            total.sum[block, block.start :] = part
        else:
            traffic.bytes += part.numel() * part.element_size()


def _send(local: Tensor, counts: Sequence[int], owner: int, traffic: Traffic) -> Tensor | None:
    """All ranks' tokens in rank order on ``owner``."""
    if world_size() == 1:
        return local
    local = local.to(collective_device()).contiguous()
    if rank() != owner:
        if len(local):
            dist.send(local.view(torch.uint8), dst=owner)
            traffic.bytes += local.numel() * local.element_size()
        return None
    parts = []
    for source, count in enumerate(counts):
        part = local if source == owner else local.new_empty(count, local.shape[1])
        if source != owner and count:
            dist.recv(part.view(torch.uint8), src=source)
        parts.append(part)
    return torch.cat(parts)


def decomposition_cost(tokens: int, n: int) -> float:
    """Operations of a decomposition, roughly: a symmetric eigenproblem of the smaller size, and the products around."""
    size = min(tokens, n)
    return 9.0 * size**3 + (4.0 * tokens * tokens * n if tokens < n else 3.0 * n**3)


class Background:
    """Runs jobs one after another beside this rank's own work; never more than one waits. Failures come at ``meet``."""

    def __init__(self, what: str, device: torch.device | str = "cpu"):
        self.what = what
        self.device = torch.device(device)
        self.error: BaseException | None = None
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *_: Any) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def start(self, job: Callable[[], None]) -> None:
        """Starts ``job`` once the one before has ended. A lone rank on a CPU does it at once: the same cores would do both,
        and hold both's memory."""
        self.wait()
        if self.device.type == "cpu" and world_size() == 1:
            self._guarded(job)
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # its inputs are ready
        self._running = self._pool.submit(self._guarded, job)

    def wait(self) -> None:
        """Waits for the running job."""
        if self._running is not None:
            self._running.result()
            self._running = None

    def _guarded(self, job: Callable[[], None]) -> None:
        try:
            if self.error is None:
                if self.device.type == "cuda":
                    with torch.cuda.device(self.device), torch.cuda.stream(torch.cuda.Stream(self.device)):
                        job()
                        torch.cuda.current_stream().synchronize()
                else:
                    job()
                    return_freed_memory()
        except Exception as error:  # raised on every rank by ``meet``
            self.error = error

    def meet(self) -> None:
        """Waits for the running job; raises a failure on its rank, and OtherRankError on the others. Collective."""
        self.wait()
        with on_every_rank_or_none(self.what):
            if self.error is not None:
                raise self.error


# ---------------------------------------------------------------- what the layers see


class InputHooks:
    """Collects the inputs of target layers during forward passes.

    Layers that see the same input are found by the input itself: the same memory within one block's pass.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[TargetLayer], samples: Samples, itemsize: int, expert_basis: str = "block"
    ):
        self.model = model
        self.layers = layers
        self.expert_basis = expert_basis
        self.samples = samples
        self.itemsize = itemsize
        self.inputs: dict[str, LayerInput] = {}
        """layer name -> what it sees, in the order in which it was met"""
        self.batch: Batch | None = None
        self._sums: list[tuple[TargetLayer, Batch, Tensor]] = []
        self._seen: list[tuple[TargetLayer, Tensor]] = []
        self._handles: list[Any] = []
        self._stack = ExitStack()

    def __enter__(self) -> InputHooks:
        experts = by_module(self.layers)
        if experts:
            taps = {name: ExpertInputs.of(self, layers) for name, layers in experts.items()}
            self._stack.enter_context(tapped(self.model, taps))
        for layer in (layer for layer in self.layers if layer.expert is None):

            def hook(module: nn.Module, inputs: tuple[Tensor, ...], layer: TargetLayer = layer) -> None:
                self._take(layer, inputs[0].detach())

            module = self.model.get_submodule(layer.module)
            if layer.type == ROUTER:
                self._handles += watch(module, partial(self._take_product, layer))
            else:
                self._handles.append(module.register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._stack.close()

    def take_routed(self, layers: list[TargetLayer], x: Tensor, places: Tensor) -> None:
        """Adds what experts' layers are given, the same: x [t, n] of the batch's tokens ``places``."""
        assert self.batch is not None
        if layers[0].name not in self.inputs:
            shared = _empty(layers, self.samples, self.itemsize, routed=True)
            self.inputs.update({layer.name: shared for layer in layers})
        self._sums.append((layers[0], self.batch, self.batch.sums_at(x, places)))
        self.inputs[layers[0].name].add(self.batch.take_at(x, places)[0])

    def take(self, layer: TargetLayer, x: Tensor) -> None:
        """Adds what a layer is given: all tokens of the batch, [B, L, n], or flat."""
        assert self.batch is not None
        self._take(layer, self.batch.shaped(x))

    def _take_product(self, layer: TargetLayer, x: Tensor, y: Tensor) -> None:
        self.take(layer, x.detach())

    def _take(self, layer: TargetLayer, x: Tensor) -> None:
        assert self.batch is not None
        self._seen = [(other, t) for other, t in self._seen if other.layer == layer.layer]
        for other, t in self._seen:
            if _same_memory(t, x):
                if layer.name not in self.inputs:
                    self.inputs[layer.name] = self.inputs[other.name]
                    self.inputs[other.name].layers.append(layer)
                return
        self._seen.append((layer, x))
        if layer.name not in self.inputs:
            self.inputs[layer.name] = _empty([layer], self.samples, self.itemsize, routed=False)
        # Padding counts too, since real tokens attend to nothing that is not finite.
        self._sums.append((layer, self.batch, self.batch.sums(x)))
        self.inputs[layer.name].add(self.batch.take(x))

    def end_of_pass(self) -> None:
        """Lets go of the last pass's activations."""
        self._seen.clear()

    def failure(self) -> tuple[int, str, int] | None:
        """(block, layer name, sample) of the first input since the last call that was not finite."""
        failures: list[tuple[int, str, int]] = []
        for layer, batch, sums in self._sums:
            bad = ~torch.isfinite(sums)
            if bool(bad.any()):
                samples = [s for s, b in zip(batch.samples, bad.tolist(), strict=True) if b and s != EMPTY]
                failures += [(layer.layer, layer.name, sample) for sample in samples]
        self._sums.clear()
        return min(failures, default=None)

    def distinct(self) -> list[LayerInput]:
        """The different inputs, in the order in which they were met."""
        return list(dict.fromkeys(self.inputs.values()))


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


def stop_together(failure: tuple[int, str, int] | None, what: str, samples: Samples) -> None:
    """NotFinite on every rank where any rank has found one: (block, layer name, sample), the lowest block's first."""
    failures = [f for f in all_gather_object(failure) if f is not None]
    if failures:
        _, name, sample = min(failures)
        raise NotFinite(f"{what} of {name} are NaN or infinite in sample {samples.places[sample]} of the safety set; {REMEDY}")


@torch.no_grad()
def collect_by_walk(
    walk: BlockWalk,
    layers: Sequence[TargetLayer],
    samples: Samples,
    batch_size: int,
    scratch: Path,
    itemsize: int,
    expert_basis: str = "block",
) -> Iterator[LayerInput]:
    """Each distinct input of ``layers`` once all this rank's samples have passed its block, block by block.

    ``scratch``: where hidden states go that host memory does not hold.
    """
    batches = [[i for i in part if i != EMPTY] for part in samples.deal(batch_size, world_size(), rank())]
    batches = in_small_pieces([part for part in batches if part], layers, samples, itemsize)
    by_block: dict[int, list[TargetLayer]] = {}
    for layer in layers:
        by_block.setdefault(layer.layer, []).append(layer)
    hidden = HiddenStates(scratch / f"hidden_rank_{rank()}", host_memory() // 2)
    try:
        with walk.embedding():
            for number, indices in enumerate(batches):
                hidden.put(number, walk.embed(samples.batch(indices)))
        for index in tqdm(range(max(by_block) + 1), desc="covariances", unit="block", disable=rank() != 0):
            hooks = InputHooks(walk.model, by_block.get(index, []), samples, itemsize, expert_basis)
            with walk.block(index), hooks:
                for number, indices in enumerate(batches):
                    hooks.batch = samples.batch(indices)
                    hidden.put(number, walk.run(index, hidden.get(number, samples.device), hooks.batch))
                    hooks.end_of_pass()
            return_freed_memory()  # before the wait for the decomposition that still runs
            if index in by_block:
                stop_together(hooks.failure(), "inputs", samples)
                yield from _on_every_rank(hooks, by_block[index], samples, itemsize)
            return_freed_memory()
    finally:
        hidden.close()


def in_small_pieces(
    batches: list[list[int]], layers: Sequence[TargetLayer], samples: Samples, itemsize: int
) -> list[list[int]]:
    """On a CPU, micro-batches cut until their widest activation is below LARGE_PIECE, or down to single rows.

    Smaller ones are no slower there, and memory for them need not be asked of the system in every pass.
    """
    if torch.device(samples.device).type != "cpu":
        return batches
    width = max(max(layer.m, layer.n) for layer in layers) * itemsize
    pieces = []
    for part in batches:
        rows = samples.packed(part)
        most = max(1, (LARGE_PIECE - 1) // (max(map(samples.length, rows)) * width))
        together = [rows[first : first + most] for first in range(0, len(rows), most)]
        pieces += [[i for row in piece for i in row] for piece in together]
    return pieces


def _on_every_rank(hooks: InputHooks, layers: Sequence[TargetLayer], samples: Samples, itemsize: int) -> list[LayerInput]:
    """The distinct inputs in the same order on every rank, also on one that had no sample to see them with."""
    seen = [(f.route == ROUTED, [layer.name for layer in f.layers]) for f in hooks.distinct()]
    shared = next(s for s in all_gather_object(seen) if s)
    named = {layer.name: layer for layer in layers}
    empty = [_empty([named[name] for name in names], samples, itemsize, routed) for routed, names in shared]
    return hooks.distinct() or empty


@torch.no_grad()
def collect_with_hooks(
    model: Any,
    blocks: Sequence[nn.Module],
    layers: Sequence[TargetLayer],
    samples: Samples,
    batch_size: int,
    itemsize: int,
    expert_basis: str = "block",
) -> Iterator[LayerInput]:
    """The same by whole forward passes, everything at once: for models that cannot be walked."""
    batches = samples.deal(batch_size, world_size(), rank())
    hooks = InputHooks(model, layers, samples, itemsize, expert_basis)
    with hooks, FetchHooks(outside(model, blocks), blocks):
        for indices in tqdm(batches, desc="covariances", unit="batch", disable=rank() != 0):
            hooks.batch = samples.batch(indices)
            model.base_model(**hooks.batch.inputs, use_cache=False)
            hooks.end_of_pass()
            stop_together(hooks.failure(), "inputs", samples)
    yield from hooks.distinct()
