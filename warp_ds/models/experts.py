"""Mixtures of experts: each expert's projections as layers, and a look at what each expert is given.

transformers 5 keeps a block's experts in two stacked parameters, ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I], and
runs them by a function that it looks up by name (``ALL_EXPERTS_FUNCTIONS``). One is registered there that runs expert after
expert and shows each one's tokens; no forward is patched. Known to hold for transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from warp_ds.errors import ConfigError
from warp_ds.store.layers import TargetLayer

TAPPED = "warp_ds_tapped"
"""The name under which it is registered."""


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

    Raises ConfigError, naming the module, for experts that are held or run in another way.
    """
    for path, module in inner.items():
        if path.rsplit(".", 1)[-1] not in ("experts", "block_sparse_moe"):
            continue
        name, held = f"{prefix}.{path}", {key: shape_of(p) for key, p in module.named_parameters(recurse=False)}
        up = "gate_up_proj" if "gate_up_proj" in held else "up_proj"
        if not held and any(child.startswith(f"{path}.experts") for child in inner):
            continue
        if not hasattr(module, "is_transposed") or not {up, "down_proj"} <= held.keys():
            raise ConfigError(f"{name}, a {type(module).__name__}, holds its experts in a way that is not known: {_OTHERS}")
        if module.is_transposed or not module.is_concatenated:
            raise ConfigError(
                f"{name}, a {type(module).__name__}, stores W transposed or its gates and ups by turns, so that no rank has "
                f"whole rows of an expert: {_OTHERS}"
            )
        count, hidden, inner_size = held["down_proj"]
        gated = bool(module.has_gate)
        if held[up] != (count, (2 if gated else 1) * inner_size, hidden):
            raise ConfigError(f"{name}.{up} is {list(held[up])} beside a down_proj of {list(held['down_proj'])}: {_OTHERS}")
        return Experts(name, index, count, hidden, inner_size, up, gated)
    return None


_OTHERS = "what works on this model is attention, --layer_type attn_q,attn_k,attn_v,attn_o"


def shape_of(parameter: Any) -> tuple[int, ...]:
    """Of the whole parameter, partitioned or not."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


# What each expert is given ----------------------------------------------------------------------------------------


class Tap(Protocol):
    """What looks on while a block's experts run. ``places`` [t]: which of the block's tokens, flat, an expert is given."""

    def given(self, hidden: Tensor) -> None:
        """The block's tokens [T, H], before they are dealt to experts."""

    def up(self, expert: int, places: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """x [t, H] and what the expert's gate and up projections make of it; returns what is used in its place."""

    def down(self, expert: int, places: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """x [t, I] and what the expert's down projection makes of it; returns what is used in its place."""


_taps: dict[int, Tap] = {}
_before: list[str | None] = []


@contextmanager
def tapped(model: nn.Module, taps: dict[str, Tap]) -> Iterator[None]:
    """Within, the experts modules named by ``taps`` run expert after expert, also those without tokens, and show them."""
    modules = {model.get_submodule(name): tap for name, tap in taps.items()}
    configs: dict[int, Any] = {id(module.config): module.config for module in modules}
    before = {key: config._experts_implementation for key, config in configs.items()}
    ALL_EXPERTS_FUNCTIONS.register(TAPPED, _run)
    _taps.update({id(module): tap for module, tap in modules.items()})
    _before.append(next(iter(before.values()), None))
    for config in configs.values():
        config._experts_implementation = TAPPED
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
        _before.pop()
        for module in modules:
            del _taps[id(module)]


def _run(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts implementation: expert after expert, as transformers' own eager forward."""
    if id(self) not in _taps:
        own = type(self).forward.__wrapped__
        return ALL_EXPERTS_FUNCTIONS.get_interface(_before[-1] or "eager", own)(self, hidden_states, top_k_index, top_k_weights)
    tap, out = _taps[id(self)], torch.zeros_like(hidden_states)
    tap.given(hidden_states)
    first = "gate_up_proj" if self.has_gate else "up_proj"
    for expert in range(self.num_experts):
        places, choice = (top_k_index == expert).nonzero(as_tuple=True)
        x = hidden_states[places]
        y = tap.up(expert, places, x, _linear(self, first, expert, x))
        x = self._apply_gate(y) if self.has_gate else self.act_fn(y)
        y = tap.down(expert, places, x, _linear(self, "down_proj", expert, x))
        if self.has_post_expert_norm:
            y = self.post_expert_norm(y)
        out.index_add_(0, places, (y * top_k_weights[places, choice, None]).to(out.dtype))
    return out


def _linear(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    return F.linear(x, getattr(module, name)[expert], getattr(module, f"{name}_bias")[expert] if module.has_bias else None)


def by_module(layers: Sequence[TargetLayer]) -> dict[str, list[TargetLayer]]:
    """The layers that are experts' projections, by their modules' names."""
    found: dict[str, list[TargetLayer]] = {}
    for layer in layers:
        if layer.expert is not None:
            found.setdefault(layer.module, []).append(layer)
    return found
