"""Experts that are stored transposed, held in memory row by row.

gpt-oss, Llama 4 and Aria store W of their experts as [E, inputs, outputs], gpt-oss with gates and ups by turns. Row i of
C = W U needs row i of W, so such a parameter is held as [E, outputs, inputs], gates before ups. The module becomes one of a
subclass to whose code ``gate_up_proj`` and ``down_proj`` are views of that in the shapes that it expects: what it computes is
its own. Known to hold for transformers 5.23.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor, nn

from warp_ds.models.expert_taps import run_weighted

WEIGHTED = "Llama4TextExperts"
"""Experts that are given every token times its routing weight for them, and say nothing of how they are stored."""
STACKED = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class Turning:
    """How a stacked parameter of experts that is stored transposed is held."""

    stored: tuple[int, int, int]
    """[E, n, m]: experts, inputs, outputs."""
    by_turns: bool
    """Whether its outputs are stored as gate, up, gate, up, ...; held are all gates before all ups."""

    @property
    def held(self) -> tuple[int, int, int]:
        """[E, m, n]"""
        return self.stored[0], self.stored[2], self.stored[1]

    @property
    def matrix(self) -> int:
        """Elements of an expert."""
        return math.prod(self.stored[1:])

    def in_rows(self, stored: Tensor) -> Tensor:
        """[..., m, n] of what is stored [..., n, m]: a new tensor."""
        rows = stored.transpose(-1, -2)
        if self.by_turns:
            rows = rows.unflatten(-2, (-1, 2)).transpose(-3, -2).flatten(-3, -2)
        return rows.contiguous()

    def as_stored(self, rows: Tensor) -> Tensor:
        """[..., n, m] of what is held [..., m, n]: a new tensor."""
        if self.by_turns:
            rows = rows.unflatten(-2, (2, -1)).transpose(-3, -2).flatten(-3, -2)
        return rows.transpose(-1, -2).contiguous()


class InRows(nn.Module):
    """What a module of experts is besides its own class once its parameters are held row by row."""


def is_transposed(module: nn.Module) -> bool:
    """Whether a module is experts whose code and parameters are [E, inputs, outputs]."""
    if isinstance(module, InRows):
        return False
    return type(module).__name__ == WEIGHTED or getattr(module, "is_transposed", False) is True


def turning(module: nn.Module, name: str) -> Turning:
    """How a module's parameter is held, whether it is yet or not."""
    param: Any = module._parameters[name]
    experts, first, second = getattr(param, "ds_shape", param.shape)
    shape = (experts, second, first) if isinstance(module, InRows) else (experts, first, second)
    return Turning(shape, name == "gate_up_proj" and not getattr(module, "is_concatenated", True))


def turnings(model: nn.Module) -> dict[str, Turning]:
    """Of all parameters that are held row by row, by their names."""
    return {
        f"{path}.{name}": turning(module, name)
        for path, module in model.named_modules()
        if isinstance(module, InRows)
        for name in STACKED
    }


def hold_in_rows(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter, Turning]]:
    """Makes a model's experts that are stored transposed ones that are held row by row; their values, too, unless they are on
    meta. Returns (the parameter as it was, as it is now, how it is held) of each."""
    changed: list[tuple[nn.Parameter, nn.Parameter, Turning]] = []
    for module in model.modules():
        if not is_transposed(module) or not set(STACKED) <= module._parameters.keys():
            continue
        for name in STACKED:
            param, how = module._parameters[name], turning(module, name)
            assert param is not None
            held = nn.Parameter(how.in_rows(param.detach()), requires_grad=param.requires_grad)
            held.__dict__.update(param.__dict__)
            module._parameters[name] = held
            changed.append((param, held, how))
        own: Any = type(module)
        module.__class__ = _in_rows(own)
    return changed


@contextmanager
def own_classes(model: nn.Module) -> Iterator[None]:
    """Within, modules that hold experts row by row show their parameters, rather than views of them, and cannot run."""
    modules = [(module, type(module)) for module in model.modules() if isinstance(module, InRows)]
    for module, of in modules:
        module.__class__ = of.__bases__[1]
    try:
        yield
    finally:
        for module, of in modules:
            module.__class__ = of  # type: ignore[assignment]


@cache
def _in_rows(own: Any) -> type:
    """The class of modules of ``own`` that hold their parameters row by row."""

    def view(name: str) -> property:
        def as_stored(self: Any) -> Tensor:
            param: Tensor = self._parameters[name]
            return param.transpose(-1, -2) if param.dim() == 3 else param  # partitioned: of no shape

        return property(as_stored)

    def apply_gate(self: Any, gate_up: Tensor) -> Tensor:
        gates_first = self.is_concatenated
        return own._apply_gate(self, gate_up if gates_first else gate_up.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2))

    def bias(self: Any) -> Tensor:
        stored: Tensor = self._parameters["gate_up_proj_bias"]
        return stored if self.is_concatenated else stored.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        shown = run_weighted(self, hidden_states)
        return own.forward(self, hidden_states) if shown is None else shown

    more: dict[str, Any] = {name: view(name) for name in STACKED}
    if own.__name__ == WEIGHTED:
        more["forward"] = forward
    else:
        more |= {"_apply_gate": apply_gate, "gate_up_proj_bias": property(bias)}
    return type(own.__name__, (InRows, own), {"__module__": own.__module__, **more})
