"""The masked step on DeepSpeed's ZeRO-3 optimizer: its parts stand between DeepSpeed's own (``deepspeed_internals.HOOKED``).

Checkpoints of a protected run hold W where DeepSpeed's readers expect weights (zero_to_fp32, universal checkpoints, a load
without protection), and C beside the optimizer's moments, from where a protected run takes it back, to the bit.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from warp_ds.cluster import processes
from warp_ds.errors import UnsupportedSetting
from warp_ds.zero import deepspeed_internals
from warp_ds.zero.marks import FROZEN, MARK, other_masks
from warp_ds.zero.masked_step import Driver, MaskedStep
from warp_ds.zero.partition import between
from warp_ds.zero.placements import Placement, Rotated
from warp_ds.zero.protected_layer import ProtectedLayer

logger = logging.getLogger(__name__)

#: Where a checkpoint keeps C: in the optimizer's state of each sub-group, beside the moments.
COEFFICIENTS = "warp_coefficients"
NO_CHECKPOINTS = (
    "with the optimizer on NVMe, or partly on the device (offload_optimizer.ratio below 1), a protected run can neither "
    "save nor load DeepSpeed checkpoints: DeepSpeed leaves moments behind, and copies swap files, which hold rotated "
    "coefficients. Offload the whole optimizer to the CPU to be able to resume; the weights can always be exported "
    "(engine.save_16bit_model)"
)


@dataclass(frozen=True)
class Span:
    """Where the local piece of a layer's parameter lies in the optimizer's flat buffers."""

    sub_group: int
    offset: int


class Zero3Driver(Driver):
    """Gradients and masters are ZeRO-3 shards; a unit is a sub-group."""

    def __init__(
        self,
        optimizer: Any,
        layers: list[ProtectedLayer],
        fingerprint: str,
        hold_rest: bool = False,
        digests: dict[str, str] | None = None,
    ):
        """``fingerprint`` names basis and masks together. ``digests``: of the masks of entries that are frozen without a
        basis, by parameter. UnsupportedSetting where the step would not be exact."""
        deepspeed_internals.refuse_unsupported(optimizer)
        self.hold_rest = hold_rest
        self.zero, self.optimizer = optimizer, optimizer.optimizer
        self.fingerprint, self.digests = fingerprint, digests
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
        self._layers_of = Counter(layer.param for layer in layers)
        self._read: tuple[nn.Parameter, Tensor] | None = None
        """The parameter whose gradient was read last, and that: its layers come one after another."""
        self._rotated: dict[nn.Parameter, tuple[Tensor, int]] = {}
        """Of parameters whose layers are being rotated: the gradient's local piece, fp32, and how many layers are left."""
        self._undo: list[Callable[[], None]] = []

    # ------------------------------------------------------------ where things are

    @contextmanager
    def resident(self, unit: int) -> Iterator[None]:
        with deepspeed_internals.resident(self.zero, unit, gradients=True):
            yield
            self._read = None

    def local(self, flat: Tensor, layer: ProtectedLayer) -> Tensor:
        """View of the local piece of the layer's parameter in a flat buffer of its sub-group."""
        return flat.data.narrow(0, self.spans[layer].offset, layer.partition.length)

    def gradient(self, layer: ProtectedLayer) -> Tensor:
        if self._read is None or self._read[0] is not layer.param:
            self._read = layer.param, deepspeed_internals.get_gradient(self.zero, layer.param)
        return layer.partition.take(self._read[1])

    def set_gradient(self, layer: ProtectedLayer, rotated: Tensor) -> None:
        partition, of_param = layer.partition, self._layers_of[layer.param]
        if of_param == 1 and rotated.numel() == partition.length:
            deepspeed_internals.set_gradient(self.zero, layer.param, rotated)
            return
        if layer.param not in self._rotated:
            before = deepspeed_internals.get_gradient(self.zero, layer.param)
            rest_trains = bool(partition.ranges) and not self.hold_rest
            piece = before.float().clone() if rest_trains else torch.zeros_like(before, dtype=torch.float32)
            self._rotated[layer.param] = piece, of_param
        piece, left = self._rotated.pop(layer.param)
        partition.put(piece, rotated)
        if left > 1:
            self._rotated[layer.param] = piece, left - 1
        else:
            deepspeed_internals.set_gradient(self.zero, layer.param, piece)

    def coefficients(self, layer: ProtectedLayer) -> Tensor:
        return layer.partition.take(self._master(layer))

    def _master(self, layer: ProtectedLayer) -> Tensor:
        return self.local(deepspeed_internals.master(self.zero, self.spans[layer].sub_group), layer)

    def set_coefficients(self, layer: ProtectedLayer, c: Tensor) -> None:
        """Writes the fp32 master's; the padding of its piece becomes 0."""
        piece = self._master(layer)
        layer.partition.put(piece, c)
        piece[layer.partition.padding] = 0.0

    def clear_moments(self, layer: ProtectedLayer) -> None:
        """Puts the moments of frozen entries to 0: those of training before the masks would go on to move them."""
        unit = self.spans[layer].sub_group
        flat = deepspeed_internals.master(self.zero, unit)
        for moment in self.hyperparameters(unit)[0].state.get(flat, {}).values():
            if torch.is_tensor(moment) and moment.numel() == flat.numel() and moment.dim():
                piece = self.local(moment, layer)
                layer.partition.put(piece, layer.clear(layer.partition.take(piece)))

    def write(self, layer: ProtectedLayer, weights: Tensor) -> None:
        layer.partition.put(deepspeed_internals.shard(layer.param), weights)

    def hyperparameters(self, unit: int) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
        return deepspeed_internals.stepping(self.zero, unit)

    @contextmanager
    def masked(self, layer: ProtectedLayer) -> Iterator[tuple[Tensor, Tensor]]:
        gradients = self.local(deepspeed_internals.master_gradient(self.zero, self.spans[layer].sub_group), layer)
        c, gradient = self.coefficients(layer), layer.partition.take(gradients)
        yield c, gradient
        layer.partition.put(self._master(layer), c)
        layer.partition.put(gradients, gradient)

    def others(self, unit: int) -> Iterator[tuple[Tensor, Tensor]]:
        flat, gradient = deepspeed_internals.master(self.zero, unit), deepspeed_internals.master_gradient(self.zero, unit)
        masked = []
        for layer in self.units[unit]:
            offset, partition = self.spans[layer].offset, layer.partition
            whole = self.hold_rest or not partition.ranges
            parts = [slice(0, partition.length)] if whole else [*partition.own, partition.padding]
            masked += [slice(offset + part.start, offset + part.stop) for part in parts]
        return ((flat.data[other], gradient[other]) for other in between(masked, flat.numel()))

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
                    layer.partition.put(self._master(layer), weights)


class StepCheckpoints:
    """What DeepSpeed saves and loads of a ZeRO-3 optimizer whose masters hold C."""

    def __init__(self, driver: Zero3Driver, placement: Placement):
        self.driver, self.placement = driver, placement
        self.zero, self.base = driver.zero, driver.optimizer
        self._loading = False

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
            with deepspeed_internals.resident(self.zero, sub_group):
                # Collective: a rank that has found a problem must not leave the others waiting.
                found_here = self._foreign_weights(sub_group, saved[sub_group])
                problem = problem or found_here
        _raise_together(problem)
        adapters: dict[ProtectedLayer, tuple[bool, float, float]] = {}
        for sub_group, layers in self.driver.units.items():
            with deepspeed_internals.resident(self.zero, sub_group, weights=True):
                taken_up: Rotated
                if sub_group in saved:
                    taken_up = iter([(x, x.partition.take(self.driver.local(saved[sub_group], x))) for x in layers])
                else:
                    taken_up = self.placement.rotate(layers, self.driver.coefficients)
                for layer, c in taken_up:
                    if layer.adapter_b is not None:
                        adapters[layer] = (deepspeed_internals.any_nonzero(layer.adapter_b), *layer.start(c))
                    self.driver.set_coefficients(layer, c)
                    if self.driver.digests is not None:
                        self.driver.clear_moments(layer)
                self._write_adapters(layers)
        if adapters:
            _raise_together(_lost_of_trained(adapters))
            deepspeed_internals.gather_persistent(self.zero)
        if marks is not None:
            self._repair_universal(marks)

    def _write_adapters(self, layers: list[ProtectedLayer]) -> None:
        """Gives forward and backward what ``ProtectedLayer.start`` has left of an adapter. Collective."""
        adapters = [layer for layer in layers if layer.adapter_b is not None]
        for layer, weights in self.placement.rotate_back(adapters, self.driver.coefficients, fast=True):
            self.driver.write(layer, weights)

    def _foreign_state(self, marks: list[dict[str, Any] | None]) -> str:
        """Why the loaded moments are not those of this run's rotated coefficients; empty where they are."""
        steps = _steps(self.base)
        known = [mark for mark in marks if mark is not None]
        if not known:
            return (
                ""
                if steps == 0 or self.driver.digests is not None  # then C is W, and ``take_masters`` clears its moments
                else (
                    "the optimizer has already stepped without protection: its moments belong to W, not to the rotated "
                    "coefficients; protect before the first step, or load without optimizer states"
                )
            )
        if self.driver.digests is not None and (problem := other_masks(known[0], self.driver.digests)):
            return problem
        if any(mark["fingerprint"] != self.driver.fingerprint for mark in known):
            return (
                f"the loaded checkpoint was trained with other basis and masks ({known[0]['fingerprint']}, not "
                f"{self.driver.fingerprint}): give those it was trained with, or start anew from its weights"
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
        layers = self.driver.units.get(sub_group, [])
        for layer, again in self.placement.rotate_back(layers, lambda x: x.partition.take(self.driver.local(saved, x))):
            weights = self.driver.coefficients(layer).to(self.driver.device)
            if not weights.numel():
                continue
            # W was made from C on this kind of hardware or another: rounding of fp32 products apart, which is relative to
            # the size of a row.
            row = (again.square().mean() * layer.target.n).sqrt()
            moved = float((again - weights).abs().max())
            if not moved <= float(row) * 2.0**-17:
                problem = problem or (
                    f"the checkpoint's weights of {layer.target.name} are not those of its rotated coefficients "
                    f"(off by {moved:.1e}): it was trained on without protection; start anew from its weights"
                )
        return problem

    def pop_marks(self) -> list[dict[str, Any] | None]:
        return [group.pop(MARK, None) for group in self.base.param_groups]

    def _pop_saved_coefficients(self) -> dict[int, Tensor]:
        """C of each sub-group as a checkpoint brought it, removed from the optimizer's state."""
        saved = {}
        for sub_group in range(deepspeed_internals.sub_group_count(self.zero)):
            state = self.base.state.get(deepspeed_internals.master(self.zero, sub_group), {})
            if COEFFICIENTS in state:
                saved[sub_group] = state.pop(COEFFICIENTS)
        return saved

    def _repair_universal(self, marks: list[dict[str, Any] | None]) -> None:
        """Mends what DeepSpeed's loading of universal checkpoints does; each group's mark says what every group had."""
        foreign = [mark for index, mark in enumerate(marks) if mark is not None and mark["group"] != index]
        deepspeed_internals.repair_universal(self.base, foreign[0]["groups"] if foreign else None)

    @torch.no_grad()
    def state_dict(self, original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """DeepSpeed's state with W as weights (copies on the host) and C beside the moments. Collective."""
        if deepspeed_internals.forgotten_by_checkpoints(self.zero):
            raise UnsupportedSetting(NO_CHECKPOINTS)
        state = original()
        masters = list(state[deepspeed_internals.MASTERS])
        base = dict(state[deepspeed_internals.OPTIMIZER_STATE])
        base["state"] = dict(base["state"])
        for sub_group, layers in self.driver.units.items() if self.placement.rotates else ():
            coefficients = masters[sub_group].detach()
            masters[sub_group] = coefficients.to("cpu", copy=True)
            for layer, weights in self.placement.rotate_back(layers, self.driver.coefficients):
                layer.partition.put(self.driver.local(masters[sub_group], layer), weights)
            index = deepspeed_internals.state_index(self.zero, sub_group)
            # An Adam that finds anything in a state takes it as its own: without moments there is none to add C to.
            if index in base["state"] or type(self.base).__name__ == "SGD":
                base["state"][index] = {**base["state"].get(index, {}), COEFFICIENTS: coefficients}
        own = [{k: v for k, v in group.items() if k != "params"} for group in base["param_groups"]]
        mark: dict[str, Any] = {"fingerprint": self.driver.fingerprint, "steps": _steps(self.base), "groups": own}
        if self.driver.digests is not None:
            mark[FROZEN] = self.driver.digests
        base["param_groups"] = [{**group, MARK: {**mark, "group": index}} for index, group in enumerate(base["param_groups"])]
        return {**state, deepspeed_internals.MASTERS: masters, deepspeed_internals.OPTIMIZER_STATE: base}

    def load_state_dict(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's load, after which the masters hold C again. Collective."""
        if deepspeed_internals.forgotten_by_checkpoints(self.zero):
            raise UnsupportedSetting(NO_CHECKPOINTS)
        self._loading = True
        try:
            original(*args, **kwargs)
        finally:
            self._loading = False
        self.take_masters(self.pop_marks() if kwargs.get("load_optimizer_states", True) else None)

    def restore(self, original: Callable[[], None]) -> None:
        """DeepSpeed's making of masters from the 16-bit weights, after which they hold C again. Collective."""
        original()
        if not self._loading:
            self.take_masters(None)

    def refuse(self, original: Callable[[], None]) -> None:
        """Masters made anew from swap files, of which nobody knows whether they hold C. Raises UnsupportedSetting."""
        raise UnsupportedSetting(NO_CHECKPOINTS)


def _steps(optimizer: torch.optim.Optimizer) -> int:
    """How often the optimizer has stepped; for one that does not count (SGD), 1 once it has a momentum."""
    steps = 0
    for state in optimizer.state.values():
        if "step" in state:
            steps = max(steps, int(state["step"]))
        else:
            steps = max(steps, int(any(torch.is_tensor(v) for k, v in state.items() if k != COEFFICIENTS)))
    return steps


def _lost_of_trained(adapters: dict[ProtectedLayer, tuple[bool, float, float]]) -> str:
    """What is wrong with the first adapter that has been trained already: of this rank's share of each, whether its B is not 0
    and what ``start`` found. Collective."""
    of_ranks = zip(*processes.all_gather_object(list(adapters.values())), strict=True)
    for layer, shares in zip(adapters, of_ranks, strict=True):
        trained, lost, squares = zip(*shares, strict=True)
        if any(trained) and (problem := layer.lost(max(lost), sum(squares))):
            return problem
    return ""


def _raise_together(problem: str) -> None:
    problems: list[str] = [problem]
    if dist.is_initialized() and dist.get_world_size() > 1:
        problems = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    first = next((text for text in problems if text), None)
    if first:
        raise ValueError(first)
