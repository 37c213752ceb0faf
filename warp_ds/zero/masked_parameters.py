"""Which parameters of a model the masks are of: its weights, or the A or B of its adapters; and in what coordinates each is
masked."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from warp_ds.errors import ArtifactError, UnsupportedSetting
from warp_ds.method.mask import pack_bits, unpack_bits
from warp_ds.method.rotation import Rotation
from warp_ds.method.two_sided import TwoSided
from warp_ds.models.lora import LoraPair, is_adapted, lora_pairs, refuse_parts
from warp_ds.store.bases import BasisStore
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore
from warp_ds.zero.partition import RowPartition

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskedParameter:
    """A weight W [m, n], all of a parameter or some rows of one, whose rotated coefficients are masked."""

    target: TargetLayer
    """With the parameter's own rows and columns."""
    param: nn.Parameter

    @property
    def adapter_b(self) -> nn.Parameter | None:
        """B of the adapter whose A or B ``param`` is."""
        return None

    def mixes_rows(self, basis: BasisStore | None) -> bool:
        """Whether its rotation takes the whole layer, C = Vᵀ W U."""
        return basis is not None and basis.two_sided

    def held(self, basis: BasisStore | None) -> tuple[str, int]:
        """The key of its basis, and the bytes that its rotation takes."""
        # The identity rotates layers of any width; a stored basis fits one.
        return ("identity", 0) if basis is None else basis.held(self.target.name)

    def held_left(self, basis: BasisStore) -> int:
        """Of ``held``, the bytes of V."""
        return basis.held_left(self.target.name)

    def shared(self, basis: BasisStore) -> str:
        """What layers with one U have in common."""
        return basis.metadata.layers[self.target.name]["file"]

    def rotation(self, basis: BasisStore | None, device: torch.device) -> Rotation:
        """Its complete basis on ``device``, and made there: on the core that launchers give a rank, the n³ operations would
        take minutes at n = 14,336 (by arithmetic), for each basis of a model."""
        if basis is None:
            return Rotation(None, self.target.n)
        name = self.target.name
        try:
            return basis.rotation(name, device=device).polished()
        except RuntimeError as error:  # of torch, or an ALLOC_FAILED of the libraries below it
            if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
                raise
            logger.warning("%s: its basis is completed on the CPU, which takes long: there is no GPU memory for it", name)
        return basis.rotation(name).to(device).polished()

    def frozen(self, masks: MaskStore, basis: BasisStore | None, partition: RowPartition) -> tuple[Tensor, list[Tensor], int]:
        """Packed bits of this rank's whole rows and of each cut one, and how many entries are frozen on all ranks."""
        name, rows = self.target.name, partition.rows
        cut = [masks.packed(name, row, row + 1) for row in partition.cut_rows]
        return masks.packed(name, rows.start, rows.stop), cut, int(masks.metadata.layers[name]["frozen"])


@dataclass(frozen=True)
class _OfAdapter(MaskedParameter):
    pair: LoraPair
    chosen: Tensor
    """Which directions of its basis it stays out of, bool."""

    @property
    def adapter_b(self) -> nn.Parameter:
        return self.pair.b

    @property
    def count(self) -> int:
        return int(self.chosen.sum())

    def _kept_out_of(self, basis: BasisStore, outputs: bool, device: torch.device) -> Rotation:
        """[the chosen columns, their complement]: it takes less room than the whole basis, and the free coordinates are nearly
        those that a LoRA without masks trains in."""
        size, entry = len(self.chosen), basis.metadata.layers[self.target.name]
        if not self.count:
            # The identity as a reflector that reflects nothing: one without tensors could not be sharded.
            return Rotation(torch.eye(size, 1, device=device), size)
        r = int(basis.metadata.bases[entry["output" if outputs else "file"]]["rank"])
        if bool(self.chosen[r:].any()):  # of the complement that the stored columns stand for
            columns = (basis.output_columns if outputs else basis.columns)(self.target.name)[0]
            whole = Rotation(columns, size).rotate(torch.eye(size))
            return Rotation(whole[:, self.chosen].to(device), size)
        return Rotation(basis.chosen(self.target.name, self.chosen[:r], outputs).to(device), size)


class AdapterInputs(_OfAdapter):
    """A [r, n], which stays out of whole columns of a layer's basis: A U_F = 0, so that W' U_F = W U_F whatever B is."""

    def mixes_rows(self, basis: BasisStore | None) -> bool:
        return False

    def held(self, basis: BasisStore | None) -> tuple[str, int]:
        if basis is None:
            return "identity", 0
        return self.target.name, Rotation.held_bytes(self.target.n, max(1, self.count))

    def rotation(self, basis: BasisStore | None, device: torch.device) -> Rotation:
        return Rotation(None, self.target.n) if basis is None else self._kept_out_of(basis, False, device)

    def frozen(self, masks: MaskStore, basis: BasisStore | None, partition: RowPartition) -> tuple[Tensor, list[Tensor], int]:
        first = self.chosen if basis is None else torch.arange(self.target.n) < self.count  # U_F comes first
        row = pack_bits(first[None])
        return row.expand(len(partition.rows), -1), [row] * len(partition.cut_rows), self.target.m * self.count


class AdapterOutputs(_OfAdapter):
    """B [m, r], which stays out of whole rows of C = Vᵀ W U: V_Fᵀ B = 0, so that V_Fᵀ W' = V_Fᵀ W whatever A is. Without an
    output basis V is the identity, and the rows are those of W."""

    def held(self, basis: BasisStore | None) -> tuple[str, int]:
        if basis is None or not basis.two_sided:
            return "identity", 0
        return self.target.name, self.held_left(basis)

    def held_left(self, basis: BasisStore) -> int:
        return Rotation.held_bytes(self.target.m, max(1, self.count))

    def shared(self, basis: BasisStore) -> str:
        return self.target.name

    def rotation(self, basis: BasisStore | None, device: torch.device) -> Rotation:
        right = Rotation(None, self.target.n)
        if basis is None or not basis.two_sided:
            return right
        return TwoSided(self._kept_out_of(basis, True, device), right)

    def frozen(self, masks: MaskStore, basis: BasisStore | None, partition: RowPartition) -> tuple[Tensor, list[Tensor], int]:
        m, n = self.target.shape
        first = torch.arange(m) < self.count if basis is not None and basis.two_sided else self.chosen  # V_F comes first
        packed = pack_bits(first[:, None].expand(m, n))
        rows = partition.rows
        return packed[rows.start : rows.stop], [packed[row : row + 1] for row in partition.cut_rows], self.count * n


def masked_parameters(model: nn.Module, masks: MaskStore) -> list[MaskedParameter]:
    """What of ``model`` the masks hold. ArtifactError where they belong to another model, UnsupportedSetting for masks that its
    adapters cannot keep."""
    if not is_adapted(model):
        params = _weights(model, masks.layers, masks.directory)
        return [MaskedParameter(layer, params[layer.name]) for layer in masks.layers]
    refuse_entries(masks)
    pairs = lora_pairs(model, masks.layers)
    if not pairs:
        raise ArtifactError(
            f"none of the layers in the masks of {masks.directory} has an adapter in this model (the first is "
            f"{masks.layers[0].name}): give the adapter these layers (target_modules), or make masks of those that it has"
        )
    # The W of a layer without an adapter is frozen, and nothing is added to it.
    return [_of_adapter(masks, layer, pairs[layer.name]) for layer in masks.layers if layer.name in pairs]


def _of_adapter(masks: MaskStore, layer: TargetLayer, pair: LoraPair) -> MaskedParameter:
    refuse_parts([layer], f"the masks in {masks.directory} cannot hold its adapter")
    (rows, columns), (outputs, rank) = (tuple(getattr(p, "ds_shape", p.shape)) for p in (pair.a, pair.b))
    if (outputs, columns) != layer.shape or rows != rank:
        raise ArtifactError(
            f"the masks in {masks.directory} have {layer.name} as {layer.shape}, but its adapter is of "
            f"{(outputs, columns)}: they belong to another model"
        )
    if masks.metadata.unit == "row":
        return AdapterOutputs(replace(layer, n=rank), pair.b, pair, masks.rows(layer.name))
    return AdapterInputs(replace(layer, m=rank), pair.a, pair, unpack_bits(masks.columns(layer.name), layer.n)[0])


def refuse_entries(masks: MaskStore) -> None:
    """UnsupportedSetting for masks that an adapter cannot keep."""
    if masks.metadata.unit not in ("column", "row"):
        raise UnsupportedSetting(
            f"the masks in {masks.directory} freeze single coefficients (unit {masks.metadata.unit}), which an adapter cannot "
            "keep with its rank: find masks of whole columns or rows, with --mask_unit column or row in phase 2"
        )


def _weights(model: nn.Module, layers: list[TargetLayer], source: Path) -> dict[str, nn.Parameter]:
    """The weight of each masked layer, by the layer's name; wrappers' prefixes are looked through."""
    by_name = {name: p for name, p in model.named_parameters(remove_duplicate=False)}
    parameters = {}
    for layer in layers:
        full = layer.parameter
        matches = [name for name in by_name if name == full or name.endswith(f".{full}")]
        if not matches:
            raise ArtifactError(
                f"the masks in {source} freeze {layer.name}, which this model does not have: they belong to another model"
            )
        param = by_name[min(matches, key=len)]
        shape = tuple(getattr(param, "ds_shape", param.shape))
        if not layer.fits(shape):
            raise ArtifactError(
                f"the masks in {source} have {layer.parameter} as {layer.whole_shape}, but this model has "
                f"{shape}: they belong to another model"
            )
        if not param.requires_grad:
            raise ArtifactError(
                f"{layer.name} does not train (requires_grad is off), so there is nothing to mask: let "
                "it train, or make masks without it"
            )
        parameters[layer.name] = param
    return parameters
