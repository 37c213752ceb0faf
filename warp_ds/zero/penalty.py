"""A penalty on the adapters of a ZeRO-3 step: its gradient is added to that of the micro-batches, before both are clipped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from warp_ds.cluster import processes
from warp_ds.zero import deepspeed_internals
from warp_ds.zero.fetch import gathered

Penalty = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(A [r, n], B [m, r], V [m, n]) -> the penalty and its gradients by A and B."""


@dataclass(frozen=True)
class Penalised:
    """The adapter of one layer."""

    a: nn.Parameter
    b: nn.Parameter
    owner: int
    """The rank that holds V, and reckons."""
    v: Tensor | None
    """V [m, n], on its owner."""


class AdapterPenalty:
    """Adds ``weight`` x Σ ``penalty``(A, B, V) to what a ZeRO-3 optimizer minimises, once a step.

    A and B are gathered a layer at a time; V stays on one rank each, and what is sent of a layer is r (m + n) floats. Under a
    masked step it is added to the whole gradients, before these are rotated and masked.
    """

    def __init__(self, optimizer: Any, layers: Sequence[Penalised], penalty: Penalty, weight: float):
        """After a ``MaskedStep`` is made, if there is one. Raises UnsupportedSetting where gradients cannot be read."""
        self.zero, self.layers, self.penalty, self.weight = optimizer, layers, penalty, weight
        deepspeed_internals.refuse_swapped_gradients(self.zero, "--lora_method asft")
        self.value = 0.0
        """Σ ``penalty`` at the last step, without its weight."""

        def norms(original: Callable[[], Any]) -> Any:
            self._add()
            return original()

        deepspeed_internals.wrap(self.zero, "_get_norm_groups", norms)

    @torch.no_grad()
    def _add(self) -> None:
        total = torch.zeros(1, device=processes.collective_device())
        # fp16's gradients are scaled still.
        factor = self.weight * float(self.zero.loss_scale)
        for layer in self.layers:
            with gathered([layer.a, layer.b]):
                shapes = [layer.a.shape, layer.b.shape]
                flat = torch.zeros(sum(shape.numel() for shape in shapes), device=total.device)
                if layer.v is not None:
                    v = layer.v.to(total.device, torch.float32)
                    value, *gradients = self.penalty(layer.a.float(), layer.b.float(), v)
                    flat = torch.cat([g.flatten() for g in gradients])
                    total += value
            flat = processes.all_reduce_sum(flat)
            for param, whole in zip((layer.a, layer.b), flat.split([shape.numel() for shape in shapes]), strict=True):
                own = deepspeed_internals.get_gradient(self.zero, param)
                value = own.float() + factor * _shard(whole, own.numel()).to(own.device)
                deepspeed_internals.set_gradient(self.zero, param, value.to(own.dtype))
        self.value = float(processes.all_reduce_sum(total))


def _shard(whole: Tensor, length: int) -> Tensor:
    """This rank's flat shard of ``length`` elements, of which the last rank's may be padding."""
    begin = min(processes.rank() * length, whole.numel())
    own = whole[begin : begin + length]
    return nn.functional.pad(own, (0, length - own.numel()))
