"""Mixtures of experts: each expert's projections as layers.

transformers 5 keeps a block's experts in two stacked parameters, ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I]; some
families transposed, which ``expert_rows`` holds as these. Known to hold for transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from warp_ds.errors import ConfigError
from warp_ds.models.expert_rows import STACKED, WEIGHTED, InRows, is_transposed, turning
from warp_ds.store.layers import TargetLayer


@dataclass(frozen=True)
class Experts:
    """A block's stacked experts."""

    name: str
    """The module's, in the model."""
    layer: int
    count: int
    hidden: int
    """H: what an expert is given, and gives."""
    inner: int
    """I: what its down projection is given."""
    up: str
    """The parameter [E, 2I, H], gates before ups, or [E, I, H] where there is no gate."""
    gated: bool

    def layers(self, kind: str) -> list[TargetLayer]:
        """Each expert's layer of a type (experts_down, experts_up, experts_gate); none where it has no gate."""
        h, i, sides = self.hidden, self.inner, 2 if self.gated else 1
        if kind == "experts_gate" and not self.gated:
            return []
        parameter, m, n, height = ("down_proj", h, i, h) if kind == "experts_down" else (self.up, i, h, sides * i)
        begin = i if kind == "experts_up" and self.gated else 0
        return [
            TargetLayer(
                f"{self.name}.{parameter}[{kind}_{e:03d}]",
                self.layer,
                f"{kind}_{e:03d}",
                m,
                n,
                ((e * height + begin, e * height + begin + m),),
                self.count * height,
                f"{self.name}.{parameter}",
            )
            for e in range(self.count)
        ]


def find_experts(inner: dict[str, nn.Module], prefix: str, index: int) -> Experts | None:
    """The stacked experts among a block's modules; None where it has none.

    Raises UnknownExperts, naming the module, for experts that are held or run in another way.
    """
    for path, module in inner.items():
        if path.rsplit(".", 1)[-1] not in ("experts", "block_sparse_moe"):
            continue
        name, held = f"{prefix}.{path}", {key: shape_of(p) for key, p in module.named_parameters(recurse=False)}
        up = "gate_up_proj" if "gate_up_proj" in held else "up_proj"
        if not held and any(child.startswith(f"{path}.experts") for child in inner):
            continue
        known = hasattr(module, "is_transposed") or type(module).__name__ == WEIGHTED
        if not known or not {up, "down_proj"} <= held.keys():
            raise UnknownExperts(f"{name}, a {type(module).__name__}, holds its experts in a way that is not known")
        if is_transposed(module):
            _check_can_be_held(module, name)
            held |= {key: turning(module, key).held for key in STACKED}
        elif not getattr(module, "is_concatenated", True) and not isinstance(module, InRows):
            raise UnknownExperts(f"{name}, a {type(module).__name__}, stores gates and ups by turns, but not transposed")
        count, hidden, inner_size = held["down_proj"]
        gated = bool(getattr(module, "has_gate", True))
        if held[up] != (count, (2 if gated else 1) * inner_size, hidden):
            raise UnknownExperts(f"{name}.{up} is {list(held[up])} beside a down_proj of {list(held['down_proj'])}")
        return Experts(name, index, count, hidden, inner_size, up, gated)
    return None


class UnknownExperts(ConfigError):
    """Experts that are held in a way that is not known: what else of the model works is for others to add."""


def _check_can_be_held(module: nn.Module, name: str) -> None:
    """UnknownExperts for experts that are transposed in memory, or that ``hold_in_rows`` does not turn. On meta they are yet to
    be loaded."""
    here = [p for p in module.parameters(recurse=False) if not p.is_meta]
    if not set(STACKED) <= module._parameters.keys() or here:
        raise UnknownExperts(
            f"{name}, a {type(module).__name__}, holds W transposed in memory, so that no rank has whole rows of an expert: "
            f"load it with load_sharded(..., experts_in_rows=True), as the phases do where they can load in shards"
        )


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def by_expert(layers: Sequence[TargetLayer], down: bool) -> dict[int, list[TargetLayer]]:
    """Of experts' layers the down projections, or the gates and ups, by their expert."""
    found: dict[int, list[TargetLayer]] = {}
    for layer in layers:
        if layer.expert is not None and layer.type.startswith("experts_down") == down:
            found.setdefault(layer.expert, []).append(layer)
    return found


def by_module(layers: Sequence[TargetLayer]) -> dict[str, list[TargetLayer]]:
    """The layers that are experts' projections, by their modules' names."""
    found: dict[str, list[TargetLayer]] = {}
    for layer in layers:
        if layer.expert is not None:
            found.setdefault(layer.module, []).append(layer)
    return found
