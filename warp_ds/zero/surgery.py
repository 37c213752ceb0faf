"""Two gradients of one ZeRO-3 step: one is put aside, and the other loses what points against it before the optimizer steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from warp_ds.cluster import processes
from warp_ds.method.objectives import conflict
from warp_ds.zero import deepspeed_internals

logger = logging.getLogger(__name__)


class GradientSurgery:
    """Of an engine's trained parameters: ``begin``, ``backward`` of what is put aside, ``put_aside``; then the step's own
    micro-batches, and the optimizer's step, in which the conflict is taken out.

    Inner products are of shards, summed over ranks by one all-reduce of three numbers; under a masked step they are of the
    whole gradients, before these are rotated and masked. Takes as much memory again as the gradients' shards.
    """

    def __init__(self, engine: Any):
        """After a ``MaskedStep`` is made, if there is one. Raises UnsupportedSetting where gradients cannot be read."""
        self.engine, self.zero = engine, engine.optimizer
        deepspeed_internals.refuse_swapped_gradients(self.zero)
        self.params: Sequence[nn.Parameter] = [p for p in engine.module.parameters() if p.requires_grad]
        self._aside: list[Tensor] = []
        self.removed = 0.0
        """How much of the gradient put aside the last step has taken from its own: c of ``conflict``."""

        def norms(original: Callable[[], Any]) -> Any:
            self._operate()
            return original()

        deepspeed_internals.wrap(self.zero, "_get_norm_groups", norms)

    def begin(self) -> None:
        """Before the first backward pass of a step."""
        for param in self.params:
            deepspeed_internals.accumulated(self.zero, param).zero_()

    def backward(self, loss: Tensor) -> None:
        """A micro-batch's, of what will be put aside. Collective."""
        self.engine.set_gradient_accumulation_boundary(False)
        self.engine.backward(loss, scale_wrt_gas=False)

    @torch.no_grad()
    def put_aside(self) -> None:
        """What has accumulated is the first gradient; the step's own begins at 0."""
        sums = [deepspeed_internals.accumulated(self.zero, param) for param in self.params]
        self._aside = [shard.clone() for shard in sums]
        for shard in sums:
            shard.zero_()

    @torch.no_grad()
    def _operate(self) -> None:
        sums = torch.zeros(3, dtype=torch.float64, device=processes.collective_device())
        for param, aside in zip(self.params, self._aside, strict=True):
            own = deepspeed_internals.get_gradient(self.zero, param).double()
            other = aside.to(own.device, torch.float64)
            sums += torch.stack([own @ other, own @ own, other @ other]).to(sums.device)
        inner, task, safety = processes.all_reduce_sum(sums).tolist()
        if not math.isfinite(safety) and processes.rank() == 0:
            logger.warning("the safety gradient of this step is not finite (fp16?): nothing is taken out of the task's")
        self.removed = conflict(inner, task, safety) if math.isfinite(safety) else 0.0
        if self.removed:
            for param, aside in zip(self.params, self._aside, strict=True):
                own = deepspeed_internals.get_gradient(self.zero, param).float()
                deepspeed_internals.set_gradient(self.zero, param, own - self.removed * aside.to(own.device, torch.float32))
        self._aside = []
