"""The masked, rotated optimizer step, over any optimizer that a ``Driver`` knows: no gathered parameter, no rewritten module.

While a model is protected, the fp32 master of each masked layer holds the rotated coefficients C = W U (Vᵀ W U with
an output basis). Around the optimizer's own, unmodified step:

    gradient  <-  (dL/dW) U, frozen entries 0      before the norm, so that norm and clipping see the mask
    C         <-  the optimizer's step on C        weight decay applied here, to free entries alone
    weights   <-  C Uᵀ                             what forward and backward use

so frozen coefficients stay constant to the bit and rotation error never accumulates.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from warp_ds.errors import UnsupportedSetting
from warp_ds.zero.left_side import LeftProjection
from warp_ds.zero.placements import Placement
from warp_ds.zero.protected_layer import ProtectedLayer


@dataclass
class StepMetrics:
    """What the last optimizer step did."""

    masked_fraction: float
    """Frozen share of the masked layers' coefficients."""
    grad_norm_removed: float
    """Norm of the gradient that the mask removed over the norm of the masked layers' whole gradient."""
    rotate_seconds: float
    """Seconds a step that this rank spent rotating, masking and exchanging shards or cut rows."""
    rotate_bytes: int = 0
    """Bytes a step that this rank sent to others for that."""


class Driver(ABC):
    """Where an optimizer keeps gradients and masters, how it steps, and what its weights are written to.

    A *unit* is what the optimizer steps at once with one set of hyperparameters: a sub-group of ZeRO-3, a parameter group
    of a plain optimizer. All tensors of a layer are this rank's share of it (``RowPartition``), flat and without padding.
    Layers may be rows of one parameter; what no layer has of it trains unmasked, or is held where it is (``hold_rest``).
    """

    optimizer: Any
    units: dict[int, list[ProtectedLayer]]
    """The masked layers of each unit that has some."""
    device: torch.device
    """Where what a step did is added up."""
    hold_rest = False
    """Whether rows that no layer has, of a parameter that some layer has rows of, keep their values."""
    ends_with_training = False
    """Whether a Trainer's training must end with ``release``."""
    max_grad_norm = 0.0
    """The masked norm to which the driver clips; 0: it does not."""

    @abstractmethod
    def install(self, step: MaskedStep) -> None:
        """Makes the masters C, and puts the three parts of ``step`` into the optimizer's own. Collective."""

    @abstractmethod
    def release(self, step: MaskedStep) -> None:
        """Takes them out again; the masters are W. Collective."""

    @contextmanager
    def resident(self, unit: int) -> Iterator[None]:
        """A block in which a unit's gradients are in memory, and are kept as they are changed."""
        yield

    @abstractmethod
    def gradient(self, layer: ProtectedLayer) -> Tensor:
        """dL/dW, of the dtype that the optimizer holds it in; to be read."""

    @abstractmethod
    def set_gradient(self, layer: ProtectedLayer, rotated: Tensor) -> None:
        """Gives the optimizer the masked dL/dC, fp32, rounded to the dtype that it holds gradients in."""

    @abstractmethod
    def coefficients(self, layer: ProtectedLayer) -> Tensor:
        """The fp32 master's; to be read."""

    @abstractmethod
    def set_coefficients(self, layer: ProtectedLayer, c: Tensor) -> None:
        """Writes the fp32 master's; ``c`` may be a view of it."""

    @abstractmethod
    def write(self, layer: ProtectedLayer, weights: Tensor) -> None:
        """Gives forward and backward fp32 ``weights``, rounded to their dtype."""

    @abstractmethod
    def hyperparameters(self, unit: int) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        """The optimizer that steps a unit, and the parameter group that it reads."""

    @abstractmethod
    def masked(self, layer: ProtectedLayer) -> AbstractContextManager[tuple[Tensor, Tensor]]:
        """A block with (C, dL/dC) that the optimizer is about to step with, changed as they are changed in it."""

    @abstractmethod
    def others(self, unit: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(master, gradient) of all else that the optimizer is about to move with a unit."""

    def over_ranks(self, norms: Tensor) -> Tensor:
        """Sums over the ranks that hold pieces of a gradient. Collective."""
        return norms

    def clips(self, max_grad_norm: float) -> bool:
        """Whether the driver now clips by the masked norm itself; else whoever does so already sees the masked norm."""
        return False

    def clipped_norm(self) -> float | None:
        """The masked norm before the last clipping, where the driver has clipped."""
        return None


class MaskedStep:
    """Stands between the parts of an optimizer's step; made by ``warp_ds.protect``."""

    def __init__(self, driver: Driver, placement: Placement, left: bool = False):
        """Collective. Raises UnsupportedSetting where the step would not be exact, ValueError as ``Driver.install``.

        ``left``: what is free stays out of the frozen columns' left directions too (``LeftProjection``).
        """
        for group in driver.optimizer.param_groups:
            weight_decay_kind(driver.optimizer, group)
        self.driver, self.placement = driver, placement
        self.layers = [layer for unit in sorted(driver.units) for layer in driver.units[unit]]
        self.count_frozen()
        self._norms = torch.zeros(2, dtype=torch.float64, device=driver.device)
        self._clock = Clock(driver.device)
        self._steps = self._sent = 0
        driver.install(self)
        self.left = LeftProjection(self.layers, driver.coefficients, driver.over_ranks) if left else None

    def count_frozen(self) -> None:
        """Takes ``masked_fraction`` from the layers."""
        entries = sum(layer.target.m * layer.target.n for layer in self.layers)
        self.masked_fraction = sum(layer.frozen_count for layer in self.layers) / max(1, entries)

    @property
    def max_grad_norm(self) -> float:
        """The masked norm to which gradients are clipped here; 0: not here."""
        return self.driver.max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float) -> None:
        if not self.driver.clips(value):
            raise UnsupportedSetting("DeepSpeed clips by the masked norm itself: set gradient_clipping in its configuration")

    @property
    def grad_norm(self) -> float | None:
        """The masked norm before the last clipping; None where nothing was clipped here."""
        return self.driver.clipped_norm()

    # ------------------------------------------------------------ the three parts of a step

    @torch.no_grad()
    def rotate_gradients(self) -> None:
        """Every gradient becomes (dL/dW) U with its frozen entries 0."""
        self._steps += 1
        with self._measured():
            norms = torch.zeros_like(self._norms)
            for unit, layers in self.driver.units.items():
                with self.driver.resident(unit):
                    for layer, rotated in self.placement.rotate(layers, self.driver.gradient, fast=True):
                        norms[0] += _square(rotated).to(norms.device)
                        layer.clear(rotated)
                        if self.left is not None:
                            self.left.project(layer, rotated)
                        norms[1] += _square(rotated).to(norms.device)
                        self.driver.set_gradient(layer, rotated)
            self._norms = norms

    @torch.no_grad()
    def decay_free(self, unit: int) -> Callable[[], None]:
        """Applies weight decay to a unit's free entries alone, for the optimizer's step to come, which applies none.

        Returns what gives the optimizer its weight decay back after that step.
        """
        optimizer, group = self.driver.hyperparameters(unit)
        weight_decay = group.get("weight_decay", 0.0)
        if not weight_decay or unit not in self.driver.units:
            return lambda: None
        kind = weight_decay_kind(optimizer, group)
        with self._measured():
            for values, gradient in self.driver.others(unit):
                decay(kind, group, values, gradient, None)
            for layer in self.driver.units[unit]:
                with self.driver.masked(layer) as (c, gradient):
                    for piece, frozen in layer.frozen_pieces(c.device):
                        decay(kind, group, c[piece], gradient[piece], frozen)
        group["weight_decay"] = 0.0
        return lambda: group.update(weight_decay=weight_decay)

    @torch.no_grad()
    def write_weights(self, unit: int) -> None:
        """The weights of a unit become C Uᵀ."""
        layers = self.driver.units.get(unit, [])
        with self._measured():
            if self.left is not None:
                for layer in layers:
                    c = self.driver.coefficients(layer)
                    self.left.project(layer, c)
                    self.driver.set_coefficients(layer, c)
            for layer, weights in self.placement.rotate_back(layers, self.driver.coefficients, fast=True):
                self.driver.write(layer, weights)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """A block whose time and traffic are a step's."""
        before = self.placement.sent
        with self._clock.running():
            yield
        self._sent += self.placement.sent - before

    # ------------------------------------------------------------ what users call

    def metrics(self) -> StepMetrics:
        """What the last step did. Collective."""
        whole, kept = self.driver.over_ranks(self._norms.clone()).tolist()
        steps, sent = max(1, self._steps), self._sent
        self._steps = self._sent = 0
        return StepMetrics(
            self.masked_fraction,
            (max(0.0, whole - kept) / whole) ** 0.5 if whole else 0.0,
            self._clock.take() / steps,
            sent // steps,
        )

    def logged(self) -> dict[str, float]:
        """``metrics``, and the masked gradient norm where nobody else knows it, by the names that are logged. Collective."""
        norm = self.driver.clipped_norm()
        return {**({} if norm is None else {"grad_norm": norm}), **vars(self.metrics())}

    def release(self) -> None:
        """Ends the protection: the optimizer is its own again. Collective."""
        self.driver.release(self)


def _square(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float64) ** 2


# ---------------------------------------------------------------- weight decay

#: Optimizers that act entry by entry, so that a zero gradient moves nothing but by weight decay; and their decay.
ENTRYWISE = {"AdamW": "decoupled", "Adam": "by flag", "FusedAdam": "by flag", "DeepSpeedCPUAdam": "by flag", "SGD": "coupled"}


def weight_decay_kind(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> str:
    """'decoupled' or 'coupled'; UnsupportedSetting, by name, for an optimizer not known to act entry by entry."""
    name, origin = type(optimizer).__name__, type(optimizer).__module__.split(".")[0]
    if name not in ENTRYWISE or origin not in ("torch", "deepspeed", "apex"):
        raise UnsupportedSetting(
            f"the optimizer {name} (of {origin}) is not known to act entry by entry, so frozen coefficients could move: "
            f"use one of {', '.join(sorted(ENTRYWISE))}"
        )
    if ENTRYWISE[name] != "by flag":
        return ENTRYWISE[name]
    flags = (getattr(optimizer, "adam_w_mode", None), group.get("decoupled_weight_decay"))
    return "decoupled" if next((flag for flag in flags if flag is not None), False) else "coupled"


def decay(kind: str, group: dict[str, Any], c: Tensor, gradient: Tensor, frozen: Tensor | None) -> None:
    """One step's weight decay of the free entries of ``c``, in place; ``frozen`` bool as ``c``, or None for none.

    'decoupled' (Loshchilov and Hutter, as in AdamW): C <- (1 - lr * decay) C. 'coupled' (the L2 penalty, as in Adam and
    SGD): gradient <- gradient + decay * C.
    """
    if kind == "decoupled":
        factor = 1.0 - group["lr"] * group["weight_decay"]
        c.mul_(factor if frozen is None else torch.where(frozen, 1.0, factor))
    else:
        # Maximizing optimizers turn the gradient round before they add the penalty.
        alpha = -group["weight_decay"] if group.get("maximize") else group["weight_decay"]
        gradient.add_(c if frozen is None else c.masked_fill(frozen, 0.0), alpha=alpha)


# ---------------------------------------------------------------- time


class Clock:
    """Seconds spent in marked blocks since last asked; on a GPU by events, so that nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._by_events = device.type == "cuda"
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._by_events:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
            while len(self._events) > 64 and self._events[0][1].query():  # a loop that never asks must not pile them up
                done = self._events.pop(0)
                self._seconds += done[0].elapsed_time(done[1]) / 1e3
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def take(self) -> float:
        if self._events:
            torch.cuda.synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
        seconds, self._seconds, self._events = self._seconds, 0.0, []
        return seconds
