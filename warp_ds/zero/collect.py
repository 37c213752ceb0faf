"""Phase 1's covariances: hooks on the target layers, sums over ranks, each basis on the rank that decomposes it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from warp_ds.artifacts import TargetLayer
from warp_ds.config import LAYER_TYPES
from warp_ds.method.covariance import Covariance
from warp_ds.zero.batches import Batch, Samples
from warp_ds.zero.fetch import FetchHooks
from warp_ds.zero.runtime import (
    all_gather_object,
    all_reduce_sum,
    collective_device,
    on_every_rank_or_none,
    rank,
    world_size,
)

logger = logging.getLogger(__name__)


class NotFinite(RuntimeError):
    """NaN or infinite activations or gradients: the phase cannot go on."""


REMEDY = ("remedy: check that the model's weights are finite, use --dtype bfloat16 or float32 rather than float16, or "
          "leave the sample out")


@dataclass
class SharedInput:
    """The layers that see one input, and its covariance on this rank."""

    layers: list[TargetLayer]
    covariance: Covariance

    @property
    def first(self) -> TargetLayer:
        """The layer that the basis is named by."""
        return min(self.layers, key=lambda layer: LAYER_TYPES.index(layer.type))


@dataclass
class InputHooks:
    """Collects the inputs of the target layers during forward passes.

    Layers that see the same input are found by the input itself: the same memory within one block's pass.
    """

    model: nn.Module
    layers: Sequence[TargetLayer]
    device: torch.device | str
    groups: dict[str, SharedInput] = field(default_factory=dict)
    """layer name -> what it shares, in the order in which the inputs were met"""
    batch: Batch | None = None
    bad: dict[str, Tensor] = field(default_factory=dict)
    """layer name -> bool [B], True where a counted token of the sample is not finite"""
    _seen: list[tuple[TargetLayer, Tensor]] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> InputHooks:
        for layer in self.layers:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...], layer: TargetLayer = layer) -> None:
                self._take(layer, inputs[0].detach())

            self._handles.append(self.model.get_submodule(layer.name).register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self._handles:
            handle.remove()

    def _take(self, layer: TargetLayer, x: Tensor) -> None:
        assert self.batch is not None
        self._seen = [(other, t) for other, t in self._seen if other.layer == layer.layer]
        for other, t in self._seen:
            if _same_memory(t, x):
                if layer.name not in self.groups:
                    self.groups[layer.name] = self.groups[other.name]
                    self.groups[other.name].layers.append(layer)
                return
        self._seen.append((layer, x))
        if layer.name not in self.groups:
            self.groups[layer.name] = SharedInput([layer], Covariance(layer.n, self.device))
        finite = torch.isfinite(x.abs().amax(dim=-1)) | ~self.batch.counted
        self.bad[layer.name] = ~finite.all(dim=1)
        self.groups[layer.name].covariance.add(x[self.batch.counted])

    def failure(self) -> tuple[int, str, int] | None:
        """(block, layer name, sample) of the first input of the last pass that was not finite."""
        assert self.batch is not None
        blocks = {layer.name: layer.layer for layer in self.layers}
        found = [
            (blocks[name], name, self.batch.samples[int(bad.nonzero()[0])])
            for name, bad in self.bad.items() if bool(bad.any())
        ]
        self.bad.clear()
        self._seen.clear()
        return min(found, default=None)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


class Deferred:
    """Blocks (without collectives) that this rank may fail while others go on with theirs, until all ``meet``."""

    def __init__(self, what: str):
        self.what = what
        self.error: BaseException | None = None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> bool:
        self.error = self.error or error
        return isinstance(error, Exception)

    def meet(self) -> None:
        """Raises the first error on its rank, and OtherRankError on the others."""
        with on_every_rank_or_none(self.what):
            if self.error is not None:
                raise self.error


def stop_together(failure: tuple[int, str, int] | None, what: str) -> None:
    """NotFinite on every rank where any rank has found one: (block, layer name, sample), the lowest block's first."""
    found = [f for f in all_gather_object(failure) if f is not None]
    if found:
        _, name, sample = min(found)
        raise NotFinite(f"{what} of {name} are NaN or infinite in sample {sample} of the safety set; {REMEDY}")


@torch.no_grad()
def collect_with_hooks(
    model: Any, blocks: Sequence[nn.Module], layers: Sequence[TargetLayer], samples: Samples, batch_size: int
) -> list[SharedInput]:
    """All covariances at once, by whole forward passes: every rank's own part of the sums, not yet reduced."""
    batches = samples.deal(batch_size, world_size(), rank())
    with InputHooks(model, layers, samples.device) as hooks, FetchHooks(model, blocks):
        for indices in tqdm(batches, desc="covariances", unit="batch", disable=rank() != 0):
            hooks.batch = samples.batch(indices)
            model.base_model(**hooks.batch.inputs, use_cache=False)
            stop_together(hooks.failure(), "inputs")
    return list({id(group): group for group in hooks.groups.values()}.values())


def owners(costs: Sequence[float], ranks: int) -> list[int]:
    """An owner for each cost: the dearest first, always to the rank with the least so far (the lowest of equals)."""
    load = [0.0] * ranks
    found = [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[index] = load.index(min(load))
        load[found[index]] += costs[index]
    return found


def reduce_to_owners(groups: Sequence[SharedInput], placement: str) -> Iterator[tuple[SharedInput, int, Tensor | None]]:
    """For each group (group, tokens of all ranks, Σ), Σ being None on ranks that do not own it.

    A rank's own part is freed as soon as it is sent.
    """
    ranks = 1 if placement == "rank0" else world_size()
    for group, owner in zip(groups, owners([float(g.covariance.n) ** 3 for g in groups], ranks), strict=True):
        tokens = int(all_reduce_sum(torch.tensor([group.covariance.tokens], device=collective_device())))
        if world_size() > 1:
            part = group.covariance.sum.to(collective_device())
            dist.reduce(part, dst=owner)
            group.covariance.sum = part
        sigma = group.covariance.result(tokens) if owner == rank() else None
        group.covariance.sum = torch.empty(0)
        yield group, tokens, sigma
