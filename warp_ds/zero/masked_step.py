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
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_set_local_fp32_param,
    safe_set_local_grad,
)
from torch import Tensor, nn

from warp_ds.artifacts import TargetLayer
from warp_ds.method.mask import unpack_bits
from warp_ds.method.rotation import Rotation
from warp_ds.zero import deepspeed_internals as internals
from warp_ds.zero.deepspeed_internals import UnsupportedSetting
from warp_ds.zero.partition import RowPartition

logger = logging.getLogger(__name__)

#: Rows are rotated in pieces of at most this many elements: bounds temporary memory to 64 MB of fp32 a matrix.
CHUNK = 1 << 24
COEFFICIENTS = "warp_coefficients"
MARK = "warp_ds"


@dataclass
class ProtectedLayer:
    """One masked layer's share on this rank."""

    target: TargetLayer
    param: nn.Parameter
    rotation: Rotation
    partition: RowPartition
    whole_frozen: Tensor
    """Packed bits uint8 [whole rows here, ceil(n / 8)]."""
    cut_frozen: Tensor
    """Packed bits uint8 [rows cut between ranks, ceil(n / 8)], the same on every rank."""
    frozen_count: int
    """Frozen entries of the whole layer, all ranks."""

    def frozen_pieces(self, device: torch.device) -> Iterator[tuple[slice, Tensor]]:
        """(slice of the local partition, which of its entries are frozen: bool), a bounded piece at a time."""
        n, whole = self.target.n, self.partition.whole
        for rows in row_chunks(len(self.partition.rows), n):
            bits = unpack_bits(self.whole_frozen[rows].to(device), n)
            yield slice(whole.start + rows.start * n, whole.start + rows.stop * n), bits.reshape(-1)
        if self.partition.fragments:
            cut = unpack_bits(self.cut_frozen.to(device), n)
            for fragment in self.partition.fragments:
                yield fragment.local, cut[fragment.cut, fragment.columns]


@dataclass
class StepMetrics:
    """What the last optimizer step did."""

    masked_fraction: float
    """Frozen share of the masked layers' coefficients."""
    grad_norm_removed: float
    """Norm of the gradient that the mask removed over the norm of the masked layers' whole gradient."""
    rotate_seconds: float
    """Seconds that this rank spent rotating, masking and exchanging cut rows."""


class MaskedStep:
    """Stands between the steps of one ZeRO-3 optimizer; made by ``warp_ds.protect``."""

    def __init__(self, optimizer: Any, layers: list[ProtectedLayer], fingerprint: str):
        """``fingerprint`` names basis and masks together. Collective.

        Raises UnsupportedSetting where the step would not be exact, ValueError where a checkpoint of another basis
        or masks, or of an unprotected run, has been loaded into the optimizer.
        """
        internals.refuse_unsupported(optimizer)
        _weight_decay_kind(optimizer.optimizer)
        self.optimizer = optimizer
        self.fingerprint = fingerprint
        self.by_sub_group: dict[int, list[ProtectedLayer]] = {}
        self.offset: dict[int, int] = {}
        for layer in layers:
            sub_group, offset, length = internals.locate(optimizer, layer.param)
            if length != layer.partition.length:
                raise UnsupportedSetting(
                    f"{layer.target.name} is stored in pieces of {length} elements, not of the {layer.partition.length} "
                    f"that plain ZeRO-3 over {layer.partition.world_size} ranks makes: turn off other partitioning"
                )
            self.by_sub_group.setdefault(sub_group, []).append(layer)
            self.offset[id(layer)] = offset
        self.layers = [layer for index in sorted(self.by_sub_group) for layer in self.by_sub_group[index]]
        entries = sum(layer.target.m * layer.target.n for layer in self.layers)
        self.masked_fraction = sum(layer.frozen_count for layer in self.layers) / max(1, entries)
        self.device = torch.device(get_accelerator().current_device_name())
        self._norms = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._clock = _Clock()
        self._undo: list[Callable[[], None]] = []
        self.take_masters()
        self._install()

    # ------------------------------------------------------------ the three parts of a step

    @torch.no_grad()
    def rotate_gradients(self) -> None:
        """Every gradient shard becomes (dL/dW) U with its frozen entries 0."""
        with self._clock.running():
            flats = [safe_get_local_grad(layer.param).flatten().float() for layer in self.layers]
            norms = torch.zeros(2, dtype=torch.float64, device=self.device)
            for layer, rotated in zip(self.layers, self._transform(self.layers, flats, Rotation.rotate), strict=True):
                norms[0] += torch.linalg.vector_norm(rotated, dtype=torch.float64) ** 2
                for piece, frozen in layer.frozen_pieces(rotated.device):
                    rotated[piece].masked_fill_(frozen, 0.0)
                norms[1] += torch.linalg.vector_norm(rotated, dtype=torch.float64) ** 2
                safe_set_local_grad(layer.param, rotated)
            self._norms = norms

    @torch.no_grad()
    def decay_free(self, sub_group: int, step: Callable[[int], None]) -> None:
        """The optimizer's step of a sub-group, with weight decay applied to free entries alone."""
        groups = internals.param_groups_of(self.optimizer, sub_group)
        decay = groups[0].get("weight_decay", 0.0)
        if not decay or sub_group not in self.by_sub_group:
            step(sub_group)
            return
        flat = internals.master(self.optimizer, sub_group)
        assert flat.grad is not None, "DeepSpeed puts the sub-group's gradient there before its step"
        decay_entries = _DECAY[_weight_decay_kind(self.optimizer.optimizer)]
        layers = self.by_sub_group[sub_group]
        with self._clock.running():
            spans = [(self.offset[id(layer)], layer.partition.length) for layer in layers]
            for other in _between(spans, flat.numel()):
                decay_entries(flat.data[other], flat.grad[other], groups[0]["lr"], decay, None)
            for layer in layers:
                c, gradient = self._local(flat.data, layer), self._local(flat.grad, layer)
                for piece, frozen in layer.frozen_pieces(flat.device):
                    decay_entries(c[piece], gradient[piece], groups[0]["lr"], decay, frozen)
        for group in groups:
            group["weight_decay"] = 0.0
        try:
            step(sub_group)
        finally:
            for group in groups:
                group["weight_decay"] = decay

    @torch.no_grad()
    def write_weights(self, sub_group: int) -> None:
        """The 16-bit (or fp32) shards of a sub-group become C Uᵀ."""
        layers = self.by_sub_group.get(sub_group, [])
        if not layers:
            return
        with self._clock.running():
            flats = [self._local(internals.master(self.optimizer, sub_group), layer) for layer in layers]
            weights = self._transform(layers, flats, Rotation.unrotate)
            for layer, weight in zip(layers, weights, strict=True):
                real = slice(0, layer.partition.stop - layer.partition.start)
                internals.partition_of(layer.param).view(-1)[real].copy_(weight[real])

    # ------------------------------------------------------------ entering, saving, loading

    @torch.no_grad()
    def take_masters(self) -> None:
        """Makes the masters hold C, whatever is in them: fresh weights, or a checkpoint of a protected run. Collective."""
        saved = self._pop_saved_coefficients()
        base = self.optimizer.optimizer
        marks = {group.get(MARK) for group in base.param_groups}
        foreign = marks - {None, self.fingerprint}
        stepped = any(_steps(state) for state in base.state.values())
        problem = ""
        if foreign:
            problem = (f"the loaded checkpoint was trained with other basis and masks ({', '.join(map(str, foreign))}, not "
                       f"{self.fingerprint}): give those it was trained with, or start anew")
        elif stepped and marks == {None}:
            problem = ("the optimizer has already stepped without protection: its moments belong to W, not to the "
                       "rotated coefficients; protect before the first step, or load without optimizer states")
        for layer in self.layers:
            index, _, _ = internals.locate(self.optimizer, layer.param)
            weights = safe_get_local_fp32_param(layer.param).flatten()
            if index in saved:
                c = self._local(saved[index].to(weights.device), layer).clone()
                (again,) = self._transform([layer], [c], Rotation.unrotate)
                real = slice(0, layer.partition.stop - layer.partition.start)
                moved = (again[real] - weights[real]).abs().max().item() if again[real].numel() else 0.0
                # The checkpoint's W is fp32(C Uᵀ): equal on the same hardware, within rounding of n products elsewhere.
                if moved > 1e-4 * max(1.0, float(weights[real].abs().max()) if again[real].numel() else 1.0):
                    problem = problem or (
                        f"the checkpoint's weights of {layer.target.name} are not those of its rotated coefficients "
                        f"(off by {moved:.1e}): it was trained on without protection; start from its weights instead"
                    )
            else:
                (c,) = self._transform([layer], [weights], Rotation.rotate)
            c[layer.partition.stop - layer.partition.start :] = 0.0
            safe_set_local_fp32_param(layer.param, c)
        _raise_together(problem)
        for group in base.param_groups:
            group[MARK] = self.fingerprint
        self._unshare_steps()

    def _pop_saved_coefficients(self) -> dict[int, Tensor]:
        """C of each sub-group as a checkpoint brought it, removed from the optimizer's state."""
        found = {}
        for sub_group in range(internals.sub_group_count(self.optimizer)):
            state = self.optimizer.optimizer.state.get(internals.master(self.optimizer, sub_group), {})
            if COEFFICIENTS in state:
                found[sub_group] = state.pop(COEFFICIENTS)
        return found

    def _unshare_steps(self) -> None:
        """A universal checkpoint gives every sub-group the same ``step`` tensor, which then counts once per sub-group."""
        seen: set[int] = set()
        for state in self.optimizer.optimizer.state.values():
            step = state.get("step")
            if torch.is_tensor(step):
                if id(step) in seen:
                    state["step"] = step.clone()
                seen.add(id(state["step"]))

    @torch.no_grad()
    def state_dict(self, original: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """DeepSpeed's state with W as weights (copies on the host) and C beside the moments. Collective."""
        state = original()
        masters = list(state[internals.MASTERS])
        base = dict(state[internals.OPTIMIZER_STATE])
        base["state"] = dict(base["state"])
        for sub_group, layers in self.by_sub_group.items():
            coefficients = masters[sub_group]
            weights = coefficients.detach().to("cpu", copy=True)
            flats = [self._local(coefficients.detach(), layer) for layer in layers]
            for layer, weight in zip(layers, self._transform(layers, flats, Rotation.unrotate), strict=True):
                self._local(weights, layer).copy_(weight)
            masters[sub_group] = weights
            index = internals.state_index(self.optimizer, sub_group)
            base["state"][index] = {**base["state"].get(index, {}), COEFFICIENTS: coefficients.detach()}
        return {**state, internals.MASTERS: masters, internals.OPTIMIZER_STATE: base}

    def load_state_dict(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's load, after which the masters hold C again. Collective.

        A universal checkpoint gives every parameter group the hyperparameters of the first one: those of this
        run's own configuration are put back, the learning rate excepted.
        """
        groups = self.optimizer.optimizer.param_groups
        before = [{k: v for k, v in g.items() if k not in ("params", "lr", "initial_lr", MARK)} for g in groups]
        universal = bool(kwargs.get("checkpoint_folder"))
        if universal and len({g["lr"] for g in groups}) > 1:
            raise UnsupportedSetting("universal checkpoints give every parameter group the learning rate of the first: "
                                     "resume on the same world size, or use one learning rate")
        for group in groups:
            group.pop(MARK, None)
        if not kwargs.get("load_optimizer_states", True):
            # Moments stay this run's own, and were made under its own basis and masks.
            for group in groups:
                group[MARK] = self.fingerprint
        original(*args, **kwargs)
        if universal:
            for group, values in zip(self.optimizer.optimizer.param_groups, before, strict=True):
                group.update(values)
        self.take_masters()

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

        def refresh(original: Callable[..., Any]) -> Callable[..., Any]:
            def hooked() -> None:
                original()
                self.take_masters()

            return hooked

        hooks: dict[str, Any] = {
            "_get_norm_groups": norms,
            "_optimizer_step": step,
            "_reassign_or_swap_out_partitioned_parameters": reassign,
            "state_dict": lambda original: lambda: self.state_dict(original),
            "load_state_dict": lambda original: lambda *a, **k: self.load_state_dict(original, *a, **k),
            "refresh_fp32_params": refresh,
        }
        self._undo = [internals.wrap(self.optimizer, name, make) for name, make in hooks.items()]

    @torch.no_grad()
    def release(self) -> None:
        """Ends the protection: the masters hold W again, and the optimizer is DeepSpeed's own. Collective."""
        for undo in self._undo:
            undo()
        self._undo = []
        for layer in self.layers:
            (weights,) = self._transform([layer], [safe_get_local_fp32_param(layer.param).flatten()], Rotation.unrotate)
            safe_set_local_fp32_param(layer.param, weights)
        for group in self.optimizer.optimizer.param_groups:
            group.pop(MARK, None)

    def metrics(self) -> StepMetrics:
        """What the last step did. Collective."""
        norms = self._norms.clone()
        if dist.is_initialized():
            dist.all_reduce(norms)
        whole, kept = norms.tolist()
        return StepMetrics(self.masked_fraction, (max(0.0, whole - kept) / whole) ** 0.5 if whole else 0.0,
                           self._clock.take())

    def _local(self, flat: Tensor, layer: ProtectedLayer) -> Tensor:
        """View of a sub-group's flat buffer: the layer's local partition, padding included."""
        return flat.data.narrow(0, self.offset[id(layer)], layer.partition.length)

    def _transform(
        self, layers: list[ProtectedLayer], flats: list[Tensor], apply: Callable[[Rotation, Tensor], Tensor]
    ) -> list[Tensor]:
        """Rotates each layer's local partition: new fp32 tensors [partition.length], padding 0. Collective.

        Rows cut between ranks meet in one all-reduce for all layers: each rank adds its pieces to zeros, which is exact.
        """
        flats = [flat.to(self.device, torch.float32) for flat in flats]
        cuts = [flat.new_zeros(len(layer.partition.cut_rows), layer.target.n)
                for layer, flat in zip(layers, flats, strict=True)]
        for layer, flat, cut in zip(layers, flats, cuts, strict=True):
            for fragment in layer.partition.fragments:
                cut[fragment.cut, fragment.columns] = flat[fragment.local]
        if any(cut.numel() for cut in cuts):
            joined = torch.cat([cut.view(-1) for cut in cuts])
            dist.all_reduce(joined)
            cuts = [part.view_as(cut)
                    for part, cut in zip(joined.split([cut.numel() for cut in cuts]), cuts, strict=True)]
        results = []
        with _matmul_precision(layers[0].param.dtype):
            for layer, flat, cut in zip(layers, flats, cuts, strict=True):
                result = torch.zeros_like(flat)
                source, target = layer.partition.whole_rows(flat), layer.partition.whole_rows(result)
                for rows in row_chunks(source.shape[0], layer.target.n):
                    target[rows] = apply(layer.rotation, source[rows])
                if cut.numel():
                    rotated = apply(layer.rotation, cut)
                    for fragment in layer.partition.fragments:
                        result[fragment.local] = rotated[fragment.cut, fragment.columns]
                results.append(result)
        return results


def row_chunks(rows: int, n: int) -> Iterator[slice]:
    """Slices of at most CHUNK elements of n columns."""
    step = max(1, CHUNK // n)
    return (slice(begin, min(begin + step, rows)) for begin in range(0, rows, step))


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


def decay_decoupled(c: Tensor, gradient: Tensor, lr: float, decay: float, frozen: Tensor | None) -> None:
    """Loshchilov and Hutter's decay, as AdamW and Lion have it: C <- (1 - lr * decay) C on free entries, in place."""
    factor = 1.0 - lr * decay
    c.mul_(factor if frozen is None else torch.where(frozen, 1.0, factor))


def decay_coupled(c: Tensor, gradient: Tensor, lr: float, decay: float, frozen: Tensor | None) -> None:
    """The L2 penalty, as Adam, SGD and Adagrad have it: gradient <- gradient + decay * C on free entries, in place."""
    gradient.add_(c if frozen is None else c.masked_fill(frozen, 0.0), alpha=decay)


_DECAY = {"decoupled": decay_decoupled, "coupled": decay_coupled}
#: Optimizers that act entry by entry, so that a zero gradient moves nothing but by weight decay; and their decay.
ENTRYWISE = {
    "AdamW": "decoupled", "Adam": "by flag", "FusedAdam": "by flag", "DeepSpeedCPUAdam": "by flag", "SGD": "coupled",
    "Adagrad": "coupled", "DeepSpeedCPUAdagrad": "coupled", "FusedLion": "decoupled", "DeepSpeedCPULion": "decoupled",
}


def _weight_decay_kind(optimizer: torch.optim.Optimizer) -> str:
    """'decoupled' or 'coupled'; UnsupportedSetting, by name, for an optimizer that does not act entry by entry."""
    name = type(optimizer).__name__
    if name not in ENTRYWISE:
        raise UnsupportedSetting(
            f"the optimizer {name} is not known to act entry by entry, so frozen coefficients could move: use one of "
            f"{', '.join(sorted(ENTRYWISE))}"
        )
    if ENTRYWISE[name] != "by flag":
        return ENTRYWISE[name]
    group = optimizer.param_groups[0]
    flag = next((v for v in (getattr(optimizer, "adam_w_mode", None), getattr(optimizer, "adamw_mode", None),
                             group.get("decoupled_weight_decay")) if v is not None), False)
    return "decoupled" if flag else "coupled"


# ---------------------------------------------------------------- small things


def _steps(state: dict[str, Any]) -> int:
    step = state.get("step", 0)
    return int(step.item()) if torch.is_tensor(step) else int(step)


def _raise_together(problem: str) -> None:
    problems: list[str] = [problem]
    if dist.is_initialized() and dist.get_world_size() > 1:
        problems = [""] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
    first = next((text for text in problems if text), None)
    if first:
        raise ValueError(first)


@contextmanager
def _matmul_precision(weights: torch.dtype) -> Iterator[None]:
    """TF32 products where weights are 16-bit anyway (its error is below their rounding), full fp32 where they are not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest" if weights == torch.float32 else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Clock:
    """Seconds spent in marked blocks since last asked; on a GPU by events, so that nothing waits for the device."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if torch.cuda.is_available():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
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
