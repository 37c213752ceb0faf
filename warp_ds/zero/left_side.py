"""The other side of frozen columns: their left singular directions, out of which a step keeps the free coefficients.

With W = Σ s_j u_j v_jᵀ and U of its right singular vectors, the frozen columns of C = W U are s_j u_j, and the free ones are
orthogonal to them. OSFT (https://arxiv.org/abs/2504.07097) keeps it so: U_hᵀ ΔW = 0 besides ΔW V_h = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from warp_ds.errors import UnsupportedSetting
from warp_ds.method.mask import unpack_bits
from warp_ds.store.masks import MaskStore
from warp_ds.zero.protected_layer import ProtectedLayer

OverRanks = Callable[[Tensor], Tensor]
"""Sums a tensor over the ranks that hold pieces of a layer, in place, and returns it."""


class LeftProjection:
    """X <- X - U_h U_hᵀ X in the free columns of a local partition X: of gradients, and of C after a step.

    This rank holds its rows of U_h [m, k], fp32, made of the frozen columns of C, which never change; a projection sums one
    [k, n] over ranks.
    """

    def __init__(
        self, layers: Sequence[ProtectedLayer], coefficients: Callable[[ProtectedLayer], Tensor], over_ranks: OverRanks
    ):
        """``layers`` have masks of whole columns, ``coefficients`` are their C. Collective."""
        self.over_ranks = over_ranks
        self.columns = {layer: _frozen_columns(layer, over_ranks) for layer in layers}
        self.rows = {layer: self._directions(layer, coefficients(layer)) for layer in layers}

    def _directions(self, layer: ProtectedLayer, c: Tensor) -> tuple[Tensor, Tensor]:
        """U_h of this rank's whole rows and of all rows that are cut between ranks, orthonormal over all rows."""
        frozen = self.columns[layer]
        partition = layer.partition
        whole = partition.whole_rows(c)[:, frozen].to(layer.device, torch.float64)
        cut = torch.zeros(len(partition.cut_rows), layer.target.n, dtype=torch.float64, device=layer.device)
        for fragment in partition.fragments:
            cut[fragment.cut, fragment.columns] = c[fragment.local].to(layer.device, torch.float64)
        cut = self.over_ranks(cut)[:, frozen]
        gram = self.over_ranks(whole.T @ whole) + cut.T @ cut
        # W may have fewer than k directions: those of no size are none.
        values, vectors = torch.linalg.eigh(gram)
        kept = values > values.max().clamp(min=1e-300) * 1e-12
        turn = vectors[:, kept] / values[kept].sqrt()
        return (whole @ turn).float(), (cut @ turn).float()

    @torch.no_grad()
    def project(self, layer: ProtectedLayer, flat: Tensor) -> None:
        """In place, of the layer's flat local partition. Collective."""
        whole, cut = self.rows[layer]
        rows = layer.partition.whole_rows(flat)
        inner = whole.T @ rows.to(whole.device, torch.float32)
        for fragment in layer.partition.fragments:
            piece = flat[fragment.local].to(cut.device, torch.float32)
            inner[:, fragment.columns] += torch.outer(cut[fragment.cut], piece)
        inner = self.over_ranks(inner)
        inner[:, self.columns[layer]] = 0.0
        rows -= (whole @ inner).to(flat.device)
        for fragment in layer.partition.fragments:
            flat[fragment.local] -= (cut[fragment.cut] @ inner[:, fragment.columns]).to(flat.device)


def _frozen_columns(layer: ProtectedLayer, over_ranks: OverRanks) -> Tensor:
    """Which columns are frozen, bool [n], the same on every rank: one may hold no whole row."""
    n = layer.target.n
    counts = torch.zeros(n, device=layer.device)
    if len(layer.partition.rows):
        counts += unpack_bits(layer.whole_frozen[:1].to(layer.device), n)[0]
    if len(layer.cut_frozen):
        counts += unpack_bits(layer.cut_frozen[:1].to(layer.device), n)[0]
    return over_ranks(counts) > 0


def refuse_without_left(masks: MaskStore, adapted: bool) -> None:
    """UnsupportedSetting for masks whose frozen columns have no left singular directions."""
    if adapted or (masks.metadata.basis, masks.metadata.unit) != ("weight", "column"):
        raise UnsupportedSetting(
            f"--left_projection is of weights and masks of whole columns of their right singular vectors, and those in "
            f"{masks.directory} are of the basis {masks.metadata.basis}, unit {masks.metadata.unit}"
            f"{', with an adapter' if adapted else ''}: make them with --basis weight in phase 1, --mask_unit column in phase 2"
        )
