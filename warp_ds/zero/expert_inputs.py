"""What a mixture's experts are given, for phase 1's covariances: which tokens make which basis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from warp_ds.models.experts import by_expert
from warp_ds.store.layers import TargetLayer

if TYPE_CHECKING:
    from warp_ds.zero.collect import InputHooks


def of_expert(layer: TargetLayer, expert_basis: str) -> bool:
    """Whether an expert's own tokens are seen: its down projection's are; gates and ups share the block's, unless each expert
    is to have its basis (``expert_basis``: block or expert)."""
    return layer.expert is not None and (expert_basis == "expert" or layer.type.startswith("experts_down"))


@dataclass
class ExpertInputs:
    """Shows ``hooks`` what a block's experts are given."""

    hooks: InputHooks
    shared: list[TargetLayer]
    """Those that see the block's tokens."""
    ups: dict[int, list[TargetLayer]]
    """Expert -> those that see what it is given; ``downs``: what its down projection is given."""
    downs: dict[int, list[TargetLayer]]

    @classmethod
    def of(cls, hooks: InputHooks, layers: list[TargetLayer]) -> ExpertInputs:
        own = [layer for layer in layers if of_expert(layer, hooks.expert_basis)]
        shared = [layer for layer in layers if not of_expert(layer, hooks.expert_basis)]
        return cls(hooks, shared, by_expert(own, down=False), by_expert(own, down=True))

    def given(self, hidden: Tensor) -> None:
        for layer in self.shared:
            self.hooks.take(layer, hidden.detach())

    def dealt(self, x: Tensor, places: Tensor) -> None:
        if self.shared:
            self.hooks.take_routed(self.shared, x.detach(), places)

    def up(self, expert: int, places: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if layers := self.ups.get(expert):
            self.hooks.take_routed(layers, x.detach(), places)
        return y

    def down(self, expert: int, places: Tensor, x: Tensor, y: Tensor) -> Tensor:
        if layers := self.downs.get(expert):
            self.hooks.take_routed(layers, x.detach(), places)
        return y
