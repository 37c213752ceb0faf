"""Masks that grow while a protected run trains: what is frozen stays so to the bit, and more is frozen where it is."""

from __future__ import annotations

import torch
from torch import Tensor

from warp_ds.cluster import consensus
from warp_ds.errors import ArtifactError, UnsupportedSetting
from warp_ds.store.masks import MaskStore
from warp_ds.zero import deepspeed_internals
from warp_ds.zero.masked_step import MaskedStep
from warp_ds.zero.protected_layer import ProtectedLayer
from warp_ds.zero.zero3_step import Zero3Driver


def refuse_growing(step: MaskedStep) -> Zero3Driver:
    """The step's driver. UnsupportedSetting where its masks cannot grow: what else is made of them would not follow."""
    driver = step.driver
    if not isinstance(driver, Zero3Driver) or driver.zero.swap_optimizer:
        raise UnsupportedSetting("masks grow under ZeRO stage 3, and not with an optimizer on NVMe: offload it to the CPU")
    if step.left is not None or any(layer.adapter_b is not None for layer in step.layers):
        raise UnsupportedSetting(
            "masks of an adapter, and those with a left projection, stay as they are from the first step on"
        )
    return driver


@torch.no_grad()
def freeze_more(step: MaskedStep, masks: MaskStore) -> None:
    """From here on ``step`` freezes what ``masks`` say, each coefficient at the value that it has. Collective.

    The moments of all frozen coefficients are 0 after it: those of training before would go on to move them. Checkpoints name
    the new masks. ArtifactError, and nothing is changed, where something that is frozen would be free.
    """
    driver = refuse_growing(step)
    with consensus.on_every_rank_or_none("freezing more"):
        bits = [_share(masks, layer) for layer in step.layers]
        for layer, (whole, cut) in zip(step.layers, bits, strict=True):
            if bool((layer.whole_frozen & ~whole).any()) or bool((layer.cut_frozen & ~cut).any()):
                raise ArtifactError(
                    f"the masks in {masks.directory} leave coefficients of {layer.target.name} free that are frozen: what was "
                    "promised stays frozen"
                )
    for layer, (whole, cut) in zip(step.layers, bits, strict=True):
        layer.whole_frozen, layer.cut_frozen = whole, cut
        layer.frozen_count = int(masks.metadata.layers[layer.target.name]["frozen"])
    for unit, layers in driver.units.items():
        with deepspeed_internals.resident(driver.zero, unit, weights=True):
            for layer in layers:
                driver.clear_moments(layer)
    driver.fingerprint = masks.fingerprint() + (masks.metadata.basis_fingerprint or "identity")
    step.count_frozen()


def _share(masks: MaskStore, layer: ProtectedLayer) -> tuple[Tensor, Tensor]:
    """Packed bits of this rank's whole rows, and of all cut ones."""
    name, partition = layer.target.name, layer.partition
    whole = masks.packed(name, partition.rows.start, partition.rows.stop).contiguous().to(layer.whole_frozen.device)
    cut = [masks.packed(name, row, row + 1) for row in partition.cut_rows]
    return whole, torch.cat(cut) if cut else layer.cut_frozen
