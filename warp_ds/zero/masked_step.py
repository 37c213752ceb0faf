"""The masked, rotated optimizer step on ZeRO-3 shards: no gathered parameter, no rewritten module.

While a model is protected, the fp32 master partition of each masked layer holds the rotated coefficients C = W U.
Around DeepSpeed's own, unmodified step, once per optimizer step:

    gradient shard  <-  (dL/dW) U, frozen entries 0      before the norm, so that norm and clipping see the mask
    C               <-  the optimizer's step on C        weight decay applied here, to free entries alone
    16-bit shard    <-  C Uᵀ                             what forward and backward use

so frozen coefficients stay constant to the bit and rotation error never accumulates. Checkpoints hold W where
DeepSpeed's readers expect weights (zero_to_fp32, universal checkpoints, a load without protection), and C beside the
optimizer's moments, from where a protected run takes it back, to the bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from warp_ds.errors import UnsupportedSetting
from warp_ds.method.rotation import Rotation
from warp_ds.zero import deepspeed_internals
from warp_ds.zero.shard_rotation import ProtectedLayer, ShardRotation

logger = logging.getLogger(__name__)

#: Where a checkpoint keeps C: in the optimizer's state of each sub-group, beside the moments.
COEFFICIENTS = "warp_coefficients"
#: Where a checkpoint says who wrote it: in each of the optimizer's parameter groups.
MARK = "warp_ds"
NO_CHECKPOINTS = (
    "with the optimizer on NVMe, or partly on the device (offload_optimizer.ratio below 1), a protected run can neither "
    "save nor load DeepSpeed checkpoints: DeepSpeed leaves moments behind, and copies swap files, which hold rotated "
    "coefficients. Offload the whole optimizer to the CPU to be able to resume; the weights can always be exported "
    "(engine.save_16bit_model)"
)


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


class MaskedStep:
    """Stands between the steps of one ZeRO-3 optimizer; made by ``warp_ds.protect``."""

    def __init__(self, optimizer: Any, layers: list[ProtectedLayer], fingerprint: str):
        """``fingerprint`` names basis and masks together. Collective.

        Raises UnsupportedSetting where the step would not be exact, ValueError where a checkpoint of another basis
        or masks, or of an unprotected run, has been loaded into the optimizer.
        """
        deepspeed_internals.refuse_unsupported(optimizer)
        for group in optimizer.optimizer.param_groups:
            weight_decay_kind(optimizer.optimizer, group)
        self.optimizer = optimizer
        self.fingerprint = fingerprint
        self.by_sub_group: dict[int, list[ProtectedLayer]] = {}
        self.sub_group: dict[int, int] = {}
        self.offset: dict[int, int] = {}
        for layer in layers:
            sub_group, offset, length = deepspeed_internals.locate(optimizer, layer.param)
            if length != layer.partition.length:
                raise UnsupportedSetting(
                    f"{layer.target.name} is stored in pieces of {length} elements, not of the {layer.partition.length} "
                    f"that plain ZeRO-3 over {layer.partition.world_size} ranks makes: turn off other partitioning"
                )
            self.by_sub_group.setdefault(sub_group, []).append(layer)
            self.sub_group[id(layer)], self.offset[id(layer)] = sub_group, offset
        self.layers = [layer for index in sorted(self.by_sub_group) for layer in self.by_sub_group[index]]
        entries = sum(layer.target.m * layer.target.n for layer in self.layers)
        self.masked_fraction = sum(layer.frozen_count for layer in self.layers) / max(1, entries)
        self.device = torch.device(get_accelerator().current_device_name())
        self._norms = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._rotating = ShardRotation(self.device)
        self._rotating_aside = ShardRotation(self.device)
        """For what is no part of a step: entering, saving, loading."""
        self._clock = Clock(self.device)
        self._steps = 0
        self._undo: list[Callable[[], None]] = []
        self._loading = False
        self.take_masters(self._pop_marks())
        self._install()
        if deepspeed_internals.forgotten_by_checkpoints(optimizer) and (not dist.is_initialized() or dist.get_rank() == 0):
            logger.warning("%s", NO_CHECKPOINTS)

    # ------------------------------------------------------------ the three parts of a step

    @torch.no_grad()
    def rotate_gradients(self) -> None:
        """Every gradient shard becomes (dL/dW) U with its frozen entries 0."""
        self._steps += 1
        with self._clock.running():
            norms = torch.zeros(2, dtype=torch.float64, device=self.device)
            for sub_group, layers in self.by_sub_group.items():
                with deepspeed_internals.resident(self.optimizer, sub_group, gradients=True):
                    for layer, rotated in self._rotating(layers, self._gradient, Rotation.rotate, fast=True):
                        norms[0] += torch.linalg.vector_norm(rotated, dtype=torch.float64) ** 2
                        for piece, frozen in layer.frozen_pieces(rotated.device):
                            rotated[piece].masked_fill_(frozen, 0.0)
                        norms[1] += torch.linalg.vector_norm(rotated, dtype=torch.float64) ** 2
                        deepspeed_internals.set_gradient(self.optimizer, layer.param, rotated)
            self._norms = norms

    @torch.no_grad()
    def decay_free(self, sub_group: int, step: Callable[[int], None]) -> None:
        """The optimizer's step of a sub-group, with weight decay applied to free entries alone."""
        base, group = deepspeed_internals.stepping(self.optimizer, sub_group)
        weight_decay = group.get("weight_decay", 0.0)
        if not weight_decay or sub_group not in self.by_sub_group:
            step(sub_group)
            return
        flat, flat_gradient = (
            deepspeed_internals.master(self.optimizer, sub_group),
            deepspeed_internals.master_gradient(self.optimizer, sub_group),
        )
        kind = weight_decay_kind(base, group)
        layers = self.by_sub_group[sub_group]
        with self._clock.running():
            spans = [(self.offset[id(layer)], layer.partition.length) for layer in layers]
            for other in _between(spans, flat.numel()):
                decay(kind, group, flat.data[other], flat_gradient[other], None)
            for layer in layers:
                c, gradient = self._local(flat, layer), self._local(flat_gradient, layer)
                for piece, frozen in layer.frozen_pieces(flat.device):
                    decay(kind, group, c[piece], gradient[piece], frozen)
        group["weight_decay"] = 0.0
        try:
            step(sub_group)
        finally:
            group["weight_decay"] = weight_decay

    @torch.no_grad()
    def write_weights(self, sub_group: int) -> None:
        """The 16-bit (or fp32) shards of a sub-group become C Uᵀ."""
        layers = self.by_sub_group.get(sub_group, [])
        with self._clock.running():
            for layer, weights in self._rotating(layers, self._coefficients, Rotation.unrotate, fast=True):
                real = slice(0, layer.partition.stop - layer.partition.start)
                deepspeed_internals.shard(layer.param)[real].copy_(weights[real])

    # ------------------------------------------------------------ entering, saving, loading

    @torch.no_grad()
    def take_masters(self, marks: list[dict[str, Any] | None] | None) -> None:
        """Makes the masters, which hold W, hold C: that of a protected run's checkpoint, or W U. Collective.

        ``marks`` are those that the optimizer state now loaded carries, one a parameter group; None where no state
        has been loaded, so that the moments are this run's own. Raises ValueError, and changes nothing, where the
        moments do not belong to the rotated coefficients.
        """
        saved = self._pop_saved_coefficients()
        problem = "" if marks is None else self._foreign_state(marks)
        for sub_group in saved:
            with deepspeed_internals.resident(self.optimizer, sub_group):
                # Collective: a rank that has found a problem must not leave the others waiting.
                found_here = self._foreign_weights(sub_group, saved[sub_group])
                problem = problem or found_here
        _raise_together(problem)
        for sub_group, layers in self.by_sub_group.items():
            with deepspeed_internals.resident(self.optimizer, sub_group, weights=True):
                found: Iterator[tuple[ProtectedLayer, Tensor]]
                if sub_group in saved:
                    found = iter([(layer, self._local(saved[sub_group], layer)) for layer in layers])
                else:
                    found = self._rotating_aside(layers, self._coefficients, Rotation.rotate)
                for layer, c in found:
                    local = self._coefficients(layer)
                    real = slice(0, layer.partition.stop - layer.partition.start)
                    local[real].copy_(c[real])
                    local[real.stop :] = 0.0
        if marks is not None:
            self._repair_universal(marks)

    def _foreign_state(self, marks: list[dict[str, Any] | None]) -> str:
        """Why the loaded moments are not those of this run's rotated coefficients; empty where they are."""
        steps = _steps(self.optimizer.optimizer)
        known = [mark for mark in marks if mark is not None]
        if not known:
            return (
                ""
                if steps == 0
                else (
                    "the optimizer has already stepped without protection: its moments belong to W, not to the rotated "
                    "coefficients; protect before the first step, or load without optimizer states"
                )
            )
        if any(mark["fingerprint"] != self.fingerprint for mark in known):
            return (
                f"the loaded checkpoint was trained with other basis and masks ({known[0]['fingerprint']}, not "
                f"{self.fingerprint}): give those it was trained with, or start anew from its weights"
            )
        if any(mark["steps"] != steps for mark in known):
            return (
                f"the loaded checkpoint was trained on without protection (protected until step "
                f"{known[0]['steps']}, now at step {steps}): start anew from its weights"
            )
        if any(len(mark["groups"]) != len(marks) for mark in known):
            return (
                f"the loaded checkpoint was trained with {len(known[0]['groups'])} parameter groups, this run has "
                f"{len(marks)}: make the same ones, or load without optimizer states"
            )
        return ""

    def _foreign_weights(self, sub_group: int, saved: Tensor) -> str:
        """Why the checkpoint's W are not those of its C; empty where they are. Collective."""
        problem = ""
        layers = self.by_sub_group.get(sub_group, [])
        for layer, again in self._rotating_aside(layers, lambda layer: self._local(saved, layer), Rotation.unrotate):
            real = slice(0, layer.partition.stop - layer.partition.start)
            weights = self._coefficients(layer)[real].to(self.device)
            if not weights.numel():
                continue
            # W was made from C on this kind of hardware or another: rounding of fp32 products apart, which is relative to
            # the size of a row.
            row = (again[real].square().mean() * layer.target.n).sqrt()
            moved = float((again[real] - weights).abs().max())
            if not moved <= float(row) * 2.0**-17:
                problem = problem or (
                    f"the checkpoint's weights of {layer.target.name} are not those of its rotated coefficients "
                    f"(off by {moved:.1e}): it was trained on without protection; start anew from its weights"
                )
        return problem

    def _pop_marks(self) -> list[dict[str, Any] | None]:
        return [group.pop(MARK, None) for group in self.optimizer.optimizer.param_groups]

    def _pop_saved_coefficients(self) -> dict[int, Tensor]:
        """C of each sub-group as a checkpoint brought it, removed from the optimizer's state."""
        found = {}
        for sub_group in range(deepspeed_internals.sub_group_count(self.optimizer)):
            state = self.optimizer.optimizer.state.get(deepspeed_internals.master(self.optimizer, sub_group), {})
            if COEFFICIENTS in state:
                found[sub_group] = state.pop(COEFFICIENTS)
        return found

    def _repair_universal(self, marks: list[dict[str, Any] | None]) -> None:
        """Mends what DeepSpeed's loading of universal checkpoints does; each group's mark says what every group had."""
        foreign = [mark for index, mark in enumerate(marks) if mark is not None and mark["group"] != index]
        deepspeed_internals.repair_universal(self.optimizer.optimizer, foreign[0]["groups"] if foreign else None)

    @torch.no_grad()
    def state_dict(self, original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """DeepSpeed's state with W as weights (copies on the host) and C beside the moments. Collective."""
        if deepspeed_internals.forgotten_by_checkpoints(self.optimizer):
            raise UnsupportedSetting(NO_CHECKPOINTS)
        state = original()
        masters = list(state[deepspeed_internals.MASTERS])
        base = dict(state[deepspeed_internals.OPTIMIZER_STATE])
        base["state"] = dict(base["state"])
        for sub_group, layers in self.by_sub_group.items():
            coefficients = masters[sub_group].detach()
            masters[sub_group] = coefficients.to("cpu", copy=True)
            for layer, weights in self._rotating_aside(layers, self._coefficients, Rotation.unrotate):
                self._local(masters[sub_group], layer).copy_(weights)
            index = deepspeed_internals.state_index(self.optimizer, sub_group)
            # An Adam that finds anything in a state takes it as its own: without moments there is none to add C to.
            if index in base["state"] or type(self.optimizer.optimizer).__name__ == "SGD":
                base["state"][index] = {**base["state"].get(index, {}), COEFFICIENTS: coefficients}
        own = [{k: v for k, v in group.items() if k != "params"} for group in base["param_groups"]]
        mark = {"fingerprint": self.fingerprint, "steps": _steps(self.optimizer.optimizer), "groups": own}
        base["param_groups"] = [{**group, MARK: {**mark, "group": index}} for index, group in enumerate(base["param_groups"])]
        return {**state, deepspeed_internals.MASTERS: masters, deepspeed_internals.OPTIMIZER_STATE: base}

    def load_state_dict(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's load, after which the masters hold C again. Collective."""
        if deepspeed_internals.forgotten_by_checkpoints(self.optimizer):
            raise UnsupportedSetting(NO_CHECKPOINTS)
        self._loading = True
        try:
            original(*args, **kwargs)
        finally:
            self._loading = False
        self.take_masters(self._pop_marks() if kwargs.get("load_optimizer_states", True) else None)

    # ------------------------------------------------------------ plumbing

    def _install(self) -> None:
        def norms(original: Callable[..., Any]) -> Callable[..., Any]:
            def hooked() -> Any:
                self.rotate_gradients()
                return original()

            return hooked

        def step(original: Callable[..., Any]) -> Callable[..., Any]:
            return lambda sub_group: self.decay_free(sub_group, original)

        def reassign(original: Callable[..., Any]) -> Callable[..., Any]:
            def hooked(sub_group: int) -> None:
                original(sub_group)
                self.write_weights(sub_group)

            return hooked

        def restore(original: Callable[..., Any]) -> Callable[..., Any]:
            def hooked() -> None:
                original()
                if not self._loading:
                    self.take_masters(None)

            return hooked

        def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
            def hooked() -> None:
                raise UnsupportedSetting(NO_CHECKPOINTS)

            return hooked

        hooks: dict[str, Any] = {
            "_get_norm_groups": norms,
            "_optimizer_step": step,
            "_reassign_or_swap_out_partitioned_parameters": reassign,
            "state_dict": lambda original: lambda: self.state_dict(original),
            "load_state_dict": lambda original: lambda *a, **k: self.load_state_dict(original, *a, **k),
            "_restore_from_bit16_weights": restore,
            "reset_swap_buffers": refuse,
        }
        self._undo = [deepspeed_internals.wrap(self.optimizer, name, make) for name, make in hooks.items()]

    @torch.no_grad()
    def release(self) -> None:
        """Ends the protection: the masters hold W again, and the optimizer is DeepSpeed's own. Collective."""
        for undo in self._undo:
            undo()
        self._undo = []
        for sub_group, layers in self.by_sub_group.items():
            with deepspeed_internals.resident(self.optimizer, sub_group, weights=True):
                for layer, weights in self._rotating_aside(layers, self._coefficients, Rotation.unrotate):
                    self._coefficients(layer).copy_(weights)

    def metrics(self) -> StepMetrics:
        """What the last step did. Collective."""
        norms = self._norms.clone()
        if dist.is_initialized():
            dist.all_reduce(norms)
        whole, kept = norms.tolist()
        steps, self._steps = max(1, self._steps), 0
        return StepMetrics(
            self.masked_fraction,
            (max(0.0, whole - kept) / whole) ** 0.5 if whole else 0.0,
            self._clock.take() / steps,
            self._rotating.take_sent() // steps,
        )

    def _local(self, flat: Tensor, layer: ProtectedLayer) -> Tensor:
        """View of a sub-group's flat buffer: the layer's local partition, padding included."""
        return flat.data.narrow(0, self.offset[id(layer)], layer.partition.length)

    def _coefficients(self, layer: ProtectedLayer) -> Tensor:
        """View of the master: the layer's local partition, padding included."""
        return self._local(deepspeed_internals.master(self.optimizer, self.sub_group[id(layer)]), layer)

    def _gradient(self, layer: ProtectedLayer) -> Tensor:
        return deepspeed_internals.get_gradient(self.optimizer, layer.param)


def _between(spans: Iterable[tuple[int, int]], total: int) -> Iterator[slice]:
    """What of range(total) lies in none of the (offset, length) spans."""
    at = 0
    for offset, length in sorted(spans):
        if at < offset:
            yield slice(at, offset)
        at = offset + length
    if at < total:
        yield slice(at, total)


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


# ---------------------------------------------------------------- small things


def _steps(optimizer: torch.optim.Optimizer) -> int:
    """How often the optimizer has stepped; for one that does not count (SGD), 1 once it has a momentum."""
    found = 0
    for state in optimizer.state.values():
        if "step" in state:
            found = max(found, int(state["step"]))
        else:
            found = max(found, int(any(torch.is_tensor(v) for k, v in state.items() if k != COEFFICIENTS)))
    return found


def _raise_together(problem: str) -> None:
    problems: list[str] = [problem]
    if dist.is_initialized() and dist.get_world_size() > 1:
        problems = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    first = next((text for text in problems if text), None)
    if first:
        raise ValueError(first)


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
