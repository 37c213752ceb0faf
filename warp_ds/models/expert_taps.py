"""A look at what each expert of a mixture is given, and makes of it.

transformers 5 runs a block's stacked experts by a function that it looks up by name (``ALL_EXPERTS_FUNCTIONS``). One is
registered there that runs expert after expert and shows each one's tokens; no forward is patched. Known to hold for
transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

TAPPED = "warp_ds_tapped"
"""The name under which it is registered."""


class Tap(Protocol):
    """What looks on while a block's experts run. ``places`` [t]: which of the block's tokens, flat, an expert is given."""

    def given(self, hidden: Tensor) -> None:
        """The block's tokens [T, H], before they are dealt to experts."""

    def dealt(self, x: Tensor, places: Tensor) -> None:
        """In its place where experts are given tokens times their routing weights: all that they are given [t, H]."""

    def up(self, expert: int, places: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """x [t, H] and what the expert's gate and up projections make of it; returns what is used in its place."""

    def down(self, expert: int, places: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """x [t, I] and what the expert's down projection makes of it; returns what is used in its place."""


_taps: dict[int, Tap] = {}
_before: list[str | None] = []


@contextmanager
def tapped(model: nn.Module, taps: Mapping[str, Tap]) -> Iterator[None]:
    """Within, the experts modules named by ``taps`` run expert after expert, also those without tokens, and show them."""
    modules = {model.get_submodule(name): tap for name, tap in taps.items()}
    configs: dict[int, Any] = {id(module.config): module.config for module in modules if hasattr(module, "config")}
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
    # Of the parameter itself, whose rows are outputs: ``expert_rows`` shows it to the module's code in another shape.
    weight, biased = module._parameters[name], getattr(module, "has_bias", False)
    return F.linear(x, weight[expert], getattr(module, f"{name}_bias")[expert] if biased else None)


def run_weighted(self: Any, hidden_states: Tensor) -> Tensor | None:
    """What experts make of tokens [E T, H] that were multiplied by their routing weights, 0 where they are routed elsewhere:
    Llama 4's. None while nobody looks on."""
    if id(self) not in _taps:
        return None
    tap, of_experts = _taps[id(self)], hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
    places = [(of != 0).any(dim=-1).nonzero().squeeze(1) for of in of_experts]
    dealt = [of[at] for of, at in zip(of_experts, places, strict=True)]
    tap.dealt(torch.cat(dealt), torch.cat(places))
    out = []
    for expert, (x, at) in enumerate(zip(dealt, places, strict=True)):
        gate, up = tap.up(expert, at, x, _linear(self, "gate_up_proj", expert, x)).chunk(2, dim=-1)
        x = up * self.act_fn(gate)
        y = tap.down(expert, at, x, _linear(self, "down_proj", expert, x))
        out.append(torch.zeros_like(of_experts[expert]).index_add(0, at, y))
    return torch.cat(out)
