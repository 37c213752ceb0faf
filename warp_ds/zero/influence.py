"""Inner products of single samples' gradients with a safety gradient, its rows spread over ranks as phase 2's scores are.

With A = (F ∘ (G U)) Uᵀ for the safety gradient G of a layer, and g_t, x_t the output gradients and inputs of a sample's
tokens, <F ∘ (∂L_s/∂C), F ∘ (∂L_safety/∂C)> = <Σ_t g_t x_tᵀ, A> = Σ_t g_tᵀ A x_t: no sample's gradient is ever formed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from warp_ds.cluster.processes import all_reduce_sum, collective_device, rank, world_size
from warp_ds.data.collate import EMPTY
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.batches import Batch
from warp_ds.zero.gradients import Tapped
from warp_ds.zero.importance_steps import Step
from warp_ds.zero.scores import Rows, gather_rows, gather_tokens


def own_rows(layer: TargetLayer) -> Rows:
    return Rows(layer.m, world_size(), rank())


class GradientSums:
    """This rank's rows of the gradient G = Σ_t g_t x_tᵀ of each layer, summed over all samples: fp32 [rows, n]."""

    def __init__(self, layers: Sequence[TargetLayer], device: torch.device | str):
        self.sums = {layer.name: torch.zeros(len(own_rows(layer).block), layer.n, device=device) for layer in layers}

    def add(self, group: Sequence[TargetLayer], taken: dict[str, Tapped], batch: Batch, step: Step) -> None:
        """Of layers that see one input; their taps are removed from ``taken``. Collective."""
        x = gather_tokens(batch.take(taken[group[0].name].x), step).float()
        for layer in group:
            g = gather_rows(batch.take(taken.pop(layer.name).g), step, own_rows(layer)).float()
            self.sums[layer.name] += g.T @ x


class SampleProducts:
    """For every sample s the inner product <g_s, A> over all layers, and |g_s|² (of the layers' whole gradients)."""

    def __init__(self, kept: Mapping[str, Tensor], samples: int):
        """``kept``: this rank's rows of A [rows, n]."""
        self.kept = kept
        self.products, self.squares = torch.zeros(2, samples, dtype=torch.float64)

    def add(self, group: Sequence[TargetLayer], taken: dict[str, Tapped], batch: Batch, step: Step) -> None:
        """Of layers that see one input; importance batches are single samples. Collective."""
        x = gather_tokens(batch.take(taken[group[0].name].x), step).float()
        samples = [i for part in step.parts for i in part if i != EMPTY]
        for layer in group:
            g = gather_rows(batch.take(taken.pop(layer.name).g), step, own_rows(layer)).float()
            of_tokens = ((g @ self.kept[layer.name]) * x).sum(dim=1, dtype=torch.float64)
            for i, (first, end, _) in zip(samples, step.segments, strict=True):
                part = slice(first, end)
                self.products[i] += float(of_tokens[part].sum())
                self.squares[i] += float(((g[part] @ g[part].T) * (x[part] @ x[part].T)).sum(dtype=torch.float64))

    def meet(self) -> tuple[Tensor, Tensor]:
        """Both, of all ranks' rows, fp64 [samples]. Collective."""
        both = all_reduce_sum(torch.stack([self.products, self.squares]).to(collective_device())).cpu()
        return both[0], both[1]
