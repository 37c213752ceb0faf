"""The masked, rotated step around a plain torch optimizer: one process, or replicas under DDP, without DeepSpeed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from warp_ds.errors import UnsupportedSetting
from warp_ds.method.rotation import Rotation
from warp_ds.zero.masked_step import Clock, StepMetrics, decay, weight_decay_kind
from warp_ds.zero.shard_rotation import ProtectedLayer, matmul_precision, row_chunks

_PROTECTED = "_warp_ds_protected"


class PlainMaskedStep:
    """For the length of ``optimizer.step`` each masked parameter is its rotated coefficients C, kept in fp32.

    Same arithmetic as ``MaskedStep``; costs one fp32 copy of the masked layers, which hold C between steps.
    Checkpoints of the optimizer hold moments of C; the model's hold W, from which C is made anew (within rounding).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, layers: list[ProtectedLayer]):
        """``layers`` have one partition each (world size 1). UnsupportedSetting for an optimizer that mixes entries."""
        for group in optimizer.param_groups:
            weight_decay_kind(optimizer, group)
        if getattr(optimizer, _PROTECTED, False):
            raise UnsupportedSetting("this optimizer is protected already: release the first protection before a second one")
        setattr(optimizer, _PROTECTED, True)
        self.optimizer = optimizer
        self.layers = layers
        self.max_grad_norm = 0.0
        """Clipping by the masked norm; 0 = none."""
        self.grad_norm: float | None = None
        """The masked norm at the last clipping, before it."""
        entries = sum(layer.target.m * layer.target.n for layer in layers)
        self.masked_fraction = sum(layer.frozen_count for layer in layers) / max(1, entries)
        self._norms, self._clock, self._steps = (0.0, 0.0), Clock(layers[0].param.device), 0
        self._coefficients = [self._apply(layer, Rotation.rotate, layer.param.detach().float()) for layer in layers]
        for layer in layers:
            # A checkpoint's moments were loaded as the weights' dtype; those of C are fp32.
            state = optimizer.state.get(layer.param, {})
            state.update({k: v.float() for k, v in state.items() if torch.is_tensor(v) and v.is_floating_point()})
        self._decays: list[tuple[dict[str, Any], float]] = []
        self._handles = [optimizer.register_step_pre_hook(self._before), optimizer.register_step_post_hook(self._after)]

    @torch.no_grad()
    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._steps += 1
        # torch's GradScaler leaves scale and overflow to optimizers that can take them (fused AdamW).
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if scale is not None:
            raise UnsupportedSetting(
                "the gradients are still scaled by a GradScaler, so neither clipping nor decay would "
                "be right: call scaler.unscale_(optimizer) before the step, or use bf16"
            )
        skipped = overflow is not None and bool(overflow)
        with self._clock.running():
            whole = kept = 0.0
            rotated: list[Tensor] = []
            for layer in self.layers:
                if layer.param.grad is None:
                    raise ValueError(f"{layer.target.name} has no gradient at the optimizer step")
                gradient = self._apply(layer, Rotation.rotate, layer.param.grad.float())
                whole += float(gradient.square().sum(dtype=torch.float64))
                for piece, frozen in layer.frozen_pieces(gradient.device):
                    gradient.view(-1)[piece].masked_fill_(frozen, 0.0)
                kept += float(gradient.square().sum(dtype=torch.float64))
                rotated.append(gradient)
            self._norms = (whole, kept)
            weights = []
            for layer, c, gradient in zip(self.layers, self._coefficients, rotated, strict=True):
                weights.append(layer.param.data)
                layer.param.grad = None
                layer.param.data = c
                layer.param.grad = gradient
            self._weights = weights
            self._decays = []
            if skipped:
                return
            if self.max_grad_norm:
                every = [p for group in optimizer.param_groups for p in group["params"]]
                self.grad_norm = float(torch.nn.utils.clip_grad_norm_(every, self.max_grad_norm))
            self._decay(optimizer)

    def _decay(self, optimizer: torch.optim.Optimizer) -> None:
        masked = {id(layer.param): layer for layer in self.layers}
        for group in optimizer.param_groups:
            weight_decay = group.get("weight_decay", 0.0)
            if not weight_decay or not any(id(p) in masked for p in group["params"]):
                continue
            kind = weight_decay_kind(optimizer, group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if id(p) not in masked:
                    decay(kind, group, p.data, p.grad, None)
                    continue
                for piece, frozen in masked[id(p)].frozen_pieces(p.device):
                    decay(kind, group, p.data.view(-1)[piece], p.grad.view(-1)[piece], frozen)
            self._decays.append((group, weight_decay))
            group["weight_decay"] = 0.0

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        with self._clock.running():
            for group, weight_decay in self._decays:
                group["weight_decay"] = weight_decay
            for layer, weight in zip(self.layers, self._weights, strict=True):
                c, layer.param.grad = layer.param.data, None
                weight.copy_(self._apply(layer, Rotation.unrotate, c))
                layer.param.data = weight

    @staticmethod
    def _apply(layer: ProtectedLayer, apply: Any, source: Tensor) -> Tensor:
        assert layer.rotation is not None, "one process holds every basis"
        result = torch.empty_like(source)
        with matmul_precision(layer.param.dtype):
            for rows in row_chunks(*source.shape):
                result[rows] = apply(layer.rotation, source[rows])
        return result

    def metrics(self) -> StepMetrics:
        """What the last step did."""
        whole, kept = self._norms
        steps, self._steps = max(1, self._steps), 0
        return StepMetrics(
            self.masked_fraction, (max(0.0, whole - kept) / whole) ** 0.5 if whole else 0.0, self._clock.take() / steps
        )

    def coefficients(self) -> dict[str, Tensor]:
        """C [m, n] fp32 of every masked layer, by name."""
        return {layer.target.name: c for layer, c in zip(self.layers, self._coefficients, strict=True)}

    def release(self) -> None:
        """The optimizer is its own again."""
        for handle in self._handles:
            handle.remove()
        setattr(self.optimizer, _PROTECTED, False)
