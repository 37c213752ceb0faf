"""Entries of parameters that are frozen where they are, without a basis: ``warp_ds.freeze``, on the masked step's own path."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from warp_ds.cluster import consensus, processes
from warp_ds.errors import ConfigError, UnsupportedSetting
from warp_ds.method.entries import frozen_entries
from warp_ds.method.mask import pack_bits
from warp_ds.method.rotation import Rotation
from warp_ds.store.layers import TargetLayer
from warp_ds.zero import deepspeed_internals
from warp_ds.zero.masked_step import MaskedStep
from warp_ds.zero.partition import RowPartition
from warp_ds.zero.placement_costs import Cost
from warp_ds.zero.placements import EXACT_ENDS, Apply, Ends, Placement, Rotated, Source
from warp_ds.zero.plain_step import PlainDriver
from warp_ds.zero.protected_layer import ProtectedLayer, compute_device, row_chunks
from warp_ds.zero.zero3_step import Zero3Driver


class Unrotated(Placement):
    """No basis: C is W, so nothing is brought together and nothing is sent."""

    name = "unrotated"
    rotates = False

    def kept(self) -> float:
        return 0.0

    def holds(self) -> float:
        return 0.0

    def cost(self) -> Cost:
        return Cost(0.0, 0.0, 0.0)

    def keep(self, key: str, make: Callable[[], Rotation]) -> None:
        """Nothing to keep."""

    def apply(
        self, layers: Sequence[ProtectedLayer], source: Source, apply: Apply, fast: bool, ends: Ends = EXACT_ENDS
    ) -> Rotated:
        for layer in layers:
            yield layer, source(layer).to(layer.device, torch.float32, copy=True)


@dataclass
class Frozen:
    """One parameter and which of its entries are frozen."""

    name: str
    """As the model names it first, wrappers' prefixes left out."""
    param: nn.Parameter
    shape: tuple[int, ...]
    entries: Tensor
    """bool [*shape]; True = frozen."""

    @property
    def matrix(self) -> tuple[int, int]:
        """(m, n) that the parameter is seen as: its last dimension is n."""
        n = self.shape[-1] if self.shape else 1
        return self.entries.numel() // n, n

    def packed(self, first: int, end: int) -> Tensor:
        """Bits of the rows first to end of the matrix, uint8 [end - first, ceil(n / 8)], on the host."""
        m, n = self.matrix
        lead = self.shape[1:-1]
        if len(self.shape) > 1 and not lead:
            return pack_bits(self.entries[first:end]).cpu()
        return pack_bits(self.entries.reshape(m, n)[first:end]).cpu()

    def digest(self) -> tuple[str, int]:
        """(SHA-256 of shape and bits, how many entries are frozen)"""
        sha = hashlib.sha256(str(self.shape).encode())
        m, n = self.matrix
        for rows in row_chunks(m, n):
            bits = self.packed(rows.start, min(rows.stop, m))
            sha.update(bits.numpy().tobytes())
        return sha.hexdigest(), int(self.entries.count_nonzero())

    def layer(self, count: int, world_size: int, rank: int) -> ProtectedLayer:
        """This rank's share, with the bits of that alone."""
        m, n = self.matrix
        partition = RowPartition(m, n, world_size, rank)
        device = compute_device(self.param)
        cut = [self.packed(row, row + 1) for row in partition.cut_rows]
        whole = self.packed(partition.rows.start, partition.rows.stop)
        target = TargetLayer(self.name, 0, "frozen", m, n)
        cuts = torch.cat(cut) if cut else whole.new_zeros(0, whole.shape[1])
        return ProtectedLayer(target, self.param, "", partition, whole.to(device), cuts, count, device)


def frozen_step(model: nn.Module, optimizer: Any, by_deepspeed: bool, masks: Mapping[str, Any]) -> MaskedStep:
    """The masked step that holds the entries of ``masks`` (parameter -> one of ``method.entries.FORMS``). Collective.

    Raises ConfigError where a name or a mask does not fit the model, or ranks were given different ones;
    UnsupportedSetting where the step would not be exact; ValueError where a checkpoint of other masks was loaded before.
    """
    layers: list[ProtectedLayer] = []
    digests: dict[str, str] = {}
    ranks, rank = (processes.world_size(), processes.rank()) if by_deepspeed else (1, 0)
    with consensus.on_every_rank_or_none("reading the masks"):
        if by_deepspeed:
            deepspeed_internals.refuse_unsupported(optimizer)
        for frozen in frozen_parameters(model, masks):
            digests[frozen.name], count = frozen.digest()
            layers.append(frozen.layer(count, ranks, rank))
            frozen.entries = frozen.entries.new_zeros(0)
    _refuse_different(digests)
    targets = [layer.target for layer in layers]
    placement = Unrotated(targets, {target.name: ("", 0) for target in targets}, ranks, rank)
    if not by_deepspeed:
        return MaskedStep(PlainDriver(optimizer, layers, digests=digests), placement)
    deepspeed_internals.let_leaf_inputs_have_gradients(model)
    together = hashlib.sha256(repr(sorted(digests.items())).encode()).hexdigest()
    return MaskedStep(Zero3Driver(optimizer, layers, f"frozen entries {together}", digests=digests), placement)


def frozen_parameters(model: nn.Module, masks: Mapping[str, Any]) -> Iterator[Frozen]:
    """What is frozen of each parameter that ``masks`` name, one at a time; of one with several names (tied) the union."""
    if not masks:
        raise ConfigError("no mask is given: name at least one parameter and which of its entries are frozen")
    of_param: dict[nn.Parameter, list[str]] = {}
    by_name = dict(model.named_parameters(remove_duplicate=False))
    for given in masks:
        of_param.setdefault(by_name[_full_name(given, by_name)], []).append(given)
    first_names = {param: name for name, param in reversed(by_name.items())}
    for param, names in of_param.items():
        name, shape = first_names[param].removeprefix("module."), tuple(getattr(param, "ds_shape", param.shape))
        if not param.requires_grad:
            raise ConfigError(f"{name} does not train (requires_grad is off): all of it is frozen already; leave its mask out")
        if not hasattr(param, "ds_id") and not param.is_contiguous():
            raise UnsupportedSetting(f"{name} is not contiguous in memory, as freeze needs it: make it so before the optimizer")
        if 0 in shape:
            raise ConfigError(f"{name} has no entries (shape {shape}): leave its mask out")
        try:
            entries = frozen_entries(masks[names[0]], shape)
            for other in names[1:]:
                entries = entries | frozen_entries(masks[other], shape)
        except ConfigError as error:
            raise ConfigError(f"{' and '.join(names)}: {error}") from error
        yield Frozen(name, param, shape, entries)


def _full_name(given: str, by_name: Mapping[str, nn.Parameter]) -> str:
    """The model's name of a parameter given by that, or by its end, where wrappers stand before it."""
    if given in by_name:
        return given
    ends = [name for name in by_name if name.endswith(f".{given}")]
    if len({by_name[name] for name in ends}) == 1:
        return ends[0]
    last = given.rpartition(".")[0].rpartition(".")[2] or given
    near = ends or [name for name in by_name if last in name] or list(by_name)
    raise ConfigError(
        f"{'several parameters are' if ends else 'no parameter of this model is'} named {given!r}: there "
        f"{'are' if len(near) > 1 else 'is'} {', '.join(near[:4])}{', ...' if len(near) > 4 else ''}"
    )


def _refuse_different(digests: dict[str, str]) -> None:
    """ConfigError, on every rank, where ranks were given different masks. Collective."""
    everyone = processes.all_gather_object(digests)
    for rank, other in enumerate(everyone):
        names = [name for name in {**everyone[0], **other} if everyone[0].get(name) != other.get(name)]
        if names:
            raise ConfigError(f"rank {rank} was given another mask of {names[0]} than rank 0: give every rank the same")
