"""The masked step on DeepSpeed's ZeRO-3 optimizer: its parts stand between DeepSpeed's own (``deepspeed_internals.HOOKED``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from warp_ds.errors import UnsupportedSetting
from warp_ds.zero import deepspeed_internals
from warp_ds.zero.masked_step import Driver, MaskedStep, between
from warp_ds.zero.protected_layer import ProtectedLayer
from warp_ds.zero.step_checkpoints import NO_CHECKPOINTS, StepCheckpoints

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """Where a layer's local partition lies in the optimizer's flat buffers."""

    sub_group: int
    offset: int


class Zero3Driver(Driver):
    """Gradients and masters are ZeRO-3 shards; a unit is a sub-group."""

    def __init__(self, optimizer: Any, layers: list[ProtectedLayer], fingerprint: str):
        """``fingerprint`` names basis and masks together. UnsupportedSetting where the step would not be exact."""
        deepspeed_internals.refuse_unsupported(optimizer)
        self.zero, self.optimizer = optimizer, optimizer.optimizer
        self.fingerprint = fingerprint
        self.device = torch.device(get_accelerator().current_device_name())
        self.units = {}
        self.spans: dict[ProtectedLayer, Span] = {}
        for layer in layers:
            sub_group, offset, length = deepspeed_internals.locate(optimizer, layer.param)
            if length != layer.partition.length:
                raise UnsupportedSetting(
                    f"{layer.target.name} is stored in pieces of {length} elements, not of the {layer.partition.length} "
                    f"that plain ZeRO-3 over {layer.partition.world_size} ranks makes: turn off other partitioning"
                )
            self.units.setdefault(sub_group, []).append(layer)
            self.spans[layer] = Span(sub_group, offset)
        self._undo: list[Callable[[], None]] = []

    # ------------------------------------------------------------ where things are

    @contextmanager
    def resident(self, unit: int) -> Iterator[None]:
        with deepspeed_internals.resident(self.zero, unit, gradients=True):
            yield

    def local(self, flat: Tensor, layer: ProtectedLayer) -> Tensor:
        """View of the layer's part in a flat buffer of its sub-group."""
        return flat.data.narrow(0, self.spans[layer].offset, layer.partition.length)

    def gradient(self, layer: ProtectedLayer) -> Tensor:
        return deepspeed_internals.get_gradient(self.zero, layer.param)

    def set_gradient(self, layer: ProtectedLayer, rotated: Tensor) -> None:
        deepspeed_internals.set_gradient(self.zero, layer.param, rotated)

    def coefficients(self, layer: ProtectedLayer) -> Tensor:
        return self.local(deepspeed_internals.master(self.zero, self.spans[layer].sub_group), layer)

    def write(self, layer: ProtectedLayer, weights: Tensor) -> None:
        deepspeed_internals.shard(layer.param)[layer.real].copy_(weights[layer.real])

    def hyperparameters(self, unit: int) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        return deepspeed_internals.stepping(self.zero, unit)

    def masked(self, layer: ProtectedLayer) -> tuple[Tensor, Tensor]:
        gradient = deepspeed_internals.master_gradient(self.zero, self.spans[layer].sub_group)
        return self.coefficients(layer), self.local(gradient, layer)

    def others(self, unit: int) -> Iterator[tuple[Tensor, Tensor]]:
        flat, gradient = deepspeed_internals.master(self.zero, unit), deepspeed_internals.master_gradient(self.zero, unit)
        spans = [(self.spans[layer].offset, layer.partition.length) for layer in self.units[unit]]
        return ((flat.data[other], gradient[other]) for other in between(spans, flat.numel()))

    def over_ranks(self, norms: Tensor) -> Tensor:
        if dist.is_initialized():
            dist.all_reduce(norms)
        return norms

    # ------------------------------------------------------------ standing between DeepSpeed's steps

    def install(self, step: MaskedStep) -> None:
        """Raises ValueError where a checkpoint of another basis or masks, or of an unprotected run, has been loaded."""
        checkpoints = StepCheckpoints(self, step.placement)
        checkpoints.take_masters(checkpoints.pop_marks())

        def norms(original: Callable[[], Any]) -> Any:
            step.rotate_gradients()
            return original()

        def stepped(original: Callable[[int], None], sub_group: int) -> None:
            restore = step.decay_free(sub_group)
            try:
                original(sub_group)
            finally:
                restore()

        def reassigned(original: Callable[[int], None], sub_group: int) -> None:
            original(sub_group)
            step.write_weights(sub_group)

        hooks: dict[str, Callable[..., Any]] = {
            "_get_norm_groups": norms,
            "_optimizer_step": stepped,
            "_reassign_or_swap_out_partitioned_parameters": reassigned,
            "state_dict": checkpoints.state_dict,
            "load_state_dict": checkpoints.load_state_dict,
            "_restore_from_bit16_weights": checkpoints.restore,
            "reset_swap_buffers": checkpoints.refuse,
        }
        self._undo = [deepspeed_internals.wrap(self.zero, name, around) for name, around in hooks.items()]
        if deepspeed_internals.forgotten_by_checkpoints(self.zero) and (not dist.is_initialized() or dist.get_rank() == 0):
            logger.warning("%s", NO_CHECKPOINTS)

    @torch.no_grad()
    def release(self, step: MaskedStep) -> None:
        for undo in self._undo:
            undo()
        self._undo = []
        for sub_group, layers in self.units.items():
            with deepspeed_internals.resident(self.zero, sub_group, weights=True):
                for layer, weights in step.placement.rotate_back(layers, self.coefficients):
                    self.coefficients(layer).copy_(weights)
