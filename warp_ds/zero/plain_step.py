"""The masked step on a plain torch optimizer: one process, or replicas under DDP, without DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from warp_ds.errors import UnsupportedSetting
from warp_ds.zero.marks import FROZEN, MARK, other_masks
from warp_ds.zero.masked_step import Driver, MaskedStep
from warp_ds.zero.partition import between
from warp_ds.zero.protected_layer import ProtectedLayer

_PROTECTED = "_warp_ds_protected"


class PlainDriver(Driver):
    """For the length of ``optimizer.step`` each masked parameter is its rotated coefficients C, kept in fp32.

    Costs one fp32 copy of the masked parameters, which holds C between steps, and W in rows that no layer has. Checkpoints
    of the optimizer hold moments of C; the model's hold W, from which C is made anew (within rounding). A unit is a
    parameter group.
    """

    ends_with_training = True

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layers: list[ProtectedLayer],
        hold_rest: bool = False,
        digests: dict[str, str] | None = None,
    ):
        """``layers`` have one partition each (world size 1). ``digests``: of the masks of entries that are frozen without a
        basis, by parameter; the optimizer's state says them. UnsupportedSetting where the optimizer cannot be masked."""
        if getattr(optimizer, _PROTECTED, False):
            raise UnsupportedSetting("this optimizer is protected already: release the first protection before a second one")
        self.optimizer, self.hold_rest, self.digests = optimizer, hold_rest, digests
        self.device = layers[0].device
        self._norm: float | None = None
        group_of = {p: index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
        self.units = {}
        for layer in layers:
            if layer.param not in group_of:
                raise UnsupportedSetting(
                    f"{layer.target.name} is not among the optimizer's parameters, so there is nothing to mask: give it "
                    "to the optimizer, or make masks without it"
                )
            self.units.setdefault(group_of[layer.param], []).append(layer)
        self._layers = layers
        own: dict[nn.Parameter, list[slice]] = {}
        for layer in layers:
            own.setdefault(layer.param, []).extend(layer.partition.own)
        self._rest = {p: [] if hold_rest else list(between(parts, p.numel())) for p, parts in own.items()}
        """What of each masked parameter no layer has, and is not held."""
        self._masters: dict[nn.Parameter, Tensor] = {}
        """Flat, fp32."""
        self._rotated: dict[nn.Parameter, Tensor] = {}
        """Flat, fp32."""
        self._weights: dict[nn.Parameter, Tensor] = {}
        self._handles: list[Any] = []

    def install(self, step: MaskedStep) -> None:
        problems = []
        for layer, c in step.placement.rotate(step.layers, _weights):
            trained = layer.adapter_b is not None and bool(layer.adapter_b.any())
            started = layer.start(c)
            if trained:
                problems.append(layer.lost(*started))
            if not step.placement.rotates:
                self._masters[layer.param] = layer.param.detach().view(-1)  # the weights themselves: they are stepped as ever
                continue
            master = self._masters.setdefault(layer.param, layer.param.detach().float().flatten().clone())
            layer.partition.put(master, c)
            # A checkpoint's moments were loaded as the weights' dtype; those of C are fp32.
            state = self.optimizer.state.get(layer.param, {})
            state.update({k: v.float() for k, v in state.items() if torch.is_tensor(v) and v.is_floating_point()})
        if problem := next(filter(None, problems), None):
            raise ValueError(problem)
        adapters = [layer for layer in step.layers if layer.adapter_b is not None]
        for layer, weights in step.placement.rotate_back(adapters, self.coefficients, fast=True):
            layer.partition.put(layer.param.data.view(-1), weights)
        if self.digests is not None:
            self._take_state(self.optimizer)
            self._handles.append(self.optimizer.register_load_state_dict_post_hook(self._take_state))
        setattr(self.optimizer, _PROTECTED, True)
        restores: list[Callable[[], None]] = []

        def before(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            skipped = self._refuse_unready()
            step.rotate_gradients()
            self._swap_in()
            if skipped:
                return
            if self.max_grad_norm:
                every = [p for group in optimizer.param_groups for p in group["params"]]
                self._norm = float(torch.nn.utils.clip_grad_norm_(every, self.max_grad_norm))
            restores[:] = [step.decay_free(unit) for unit in self.units]

        def after(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            while restores:
                restores.pop()()
            for unit in self.units:
                step.write_weights(unit)
            for param, master in self._masters.items():
                param.grad, param.data = None, self._weights.pop(param)
                for rest in self._rest[param]:
                    param.data.view(-1)[rest] = master[rest].to(param.dtype)

        self._handles += [self.optimizer.register_step_pre_hook(before), self.optimizer.register_step_post_hook(after)]

    def release(self, step: MaskedStep) -> None:
        for handle in self._handles:
            handle.remove()
        for group in self.optimizer.param_groups:
            group.pop(MARK, None)
        setattr(self.optimizer, _PROTECTED, False)

    @torch.no_grad()
    def _take_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes up the state that the optimizer has or has just loaded: moments of frozen entries become 0, and the masks are
        said in it. ValueError where it was trained with others."""
        assert self.digests is not None
        for group in optimizer.param_groups:
            if (mark := group.get(MARK)) is not None and (problem := other_masks(mark, self.digests)):
                raise ValueError(problem)
            group[MARK] = {FROZEN: dict(self.digests)}
        for layer in self._layers:
            for moment in optimizer.state.get(layer.param, {}).values():
                if torch.is_tensor(moment) and moment.shape == layer.param.shape and moment.dim():
                    flat = moment.view(-1)
                    layer.partition.put(flat, layer.clear(layer.partition.take(flat)))

    def _refuse_unready(self) -> bool:
        """Raises where a step would not be right, before anything is changed. Whether the optimizer will skip the step."""
        # torch's GradScaler leaves scale and overflow to optimizers that can take them (fused AdamW).
        if getattr(self.optimizer, "grad_scale", None) is not None:
            raise UnsupportedSetting(
                "the gradients are still scaled by a GradScaler, so neither clipping nor decay would "
                "be right: call scaler.unscale_(optimizer) before the step, or use bf16"
            )
        for layer in self._layers:
            if layer.param.grad is None:
                raise ValueError(f"{layer.target.name} has no gradient at the optimizer step")
            kept = getattr(layer.param, "grad_dtype", None)  # newer torch lets it be another than the parameter's
            if kept not in (None, layer.param.dtype, torch.float32):
                raise UnsupportedSetting(
                    f"{layer.target.name} keeps its gradient in {kept} (grad_dtype), which the fp32 gradient of its rotated "
                    "coefficients does not fit: leave grad_dtype as it was, or set torch.float32"
                )
        overflow = getattr(self.optimizer, "found_inf", None)
        return overflow is not None and bool(overflow)

    def _swap_in(self) -> None:
        """Makes each masked parameter its C, and its gradient that of C."""
        for param, master in self._masters.items():
            self._weights[param] = param.data
            shape, param.grad = param.shape, None
            param.data = master.view(shape)
            param.grad = self._rotated.pop(param).view(shape)

    def gradient(self, layer: ProtectedLayer) -> Tensor:
        assert layer.param.grad is not None
        return layer.partition.take(layer.param.grad.flatten())

    def set_gradient(self, layer: ProtectedLayer, rotated: Tensor) -> None:
        if layer.param not in self._rotated:
            assert layer.param.grad is not None
            of_rest = torch.zeros_like(self._masters[layer.param])
            for rest in self._rest[layer.param]:
                of_rest[rest] = layer.param.grad.flatten()[rest].float()
            self._rotated[layer.param] = of_rest
        layer.partition.put(self._rotated[layer.param], rotated)

    def coefficients(self, layer: ProtectedLayer) -> Tensor:
        return layer.partition.take(self._masters[layer.param])

    def set_coefficients(self, layer: ProtectedLayer, c: Tensor) -> None:
        layer.partition.put(self._masters[layer.param], c)

    def write(self, layer: ProtectedLayer, weights: Tensor) -> None:
        layer.partition.put(self._weights[layer.param].view(-1), weights)

    def hyperparameters(self, unit: int) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        return self.optimizer, self.optimizer.param_groups[unit]

    @contextmanager
    def masked(self, layer: ProtectedLayer) -> Iterator[tuple[Tensor, Tensor]]:
        assert layer.param.grad is not None
        c, gradient = self.coefficients(layer), layer.partition.take(layer.param.grad.view(-1))
        yield c, gradient
        layer.partition.put(self._masters[layer.param], c)
        layer.partition.put(layer.param.grad.view(-1), gradient)

    def others(self, unit: int) -> Iterator[tuple[Tensor, Tensor]]:
        masked = {layer.param for layer in self.units[unit]}
        for param in self.optimizer.param_groups[unit]["params"]:
            if param.grad is not None and param not in masked:
                yield param.data, param.grad
        for param in masked:
            assert param.grad is not None
            for rest in self._rest[param]:
                yield param.data.view(-1)[rest], param.grad.view(-1)[rest]

    def clips(self, max_grad_norm: float) -> bool:
        # Whoever clips before ``optimizer.step`` would do so before the mask is applied.
        self.max_grad_norm = max_grad_norm
        return True

    def clipped_norm(self) -> float | None:
        return self._norm

    def all_coefficients(self) -> dict[str, Tensor]:
        """C [m, n] fp32 of every masked layer, by name."""
        return {layer.target.name: self.coefficients(layer).view(layer.target.shape) for layer in self._layers}


def _weights(layer: ProtectedLayer) -> Tensor:
    return layer.partition.take(layer.param.detach().flatten())
