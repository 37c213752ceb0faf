"""Routers of mixtures of experts: W [E, H], by which a block says which experts a token is given to, as a layer.

Most are modules of their own kind, which return more than W x, or less: logits that are cut, capped or already chosen from.
What is multiplied, and what comes of it, is seen at the product itself, while the module's own forward runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from warp_ds.errors import ConfigError
from warp_ds.models.experts import Experts, shape_of
from warp_ds.models.layer_names import ROUTER
from warp_ds.store.layers import TargetLayer

#: Where transformers' blocks have it, beside the module of the experts: the module whose weight it is.
PATHS = (
    "gate",  # Mixtral, Qwen, OLMoE, DeepSeek, GLM 4.5, Ernie 4.5, MiniMax
    "router",  # gpt-oss, Llama 4, Granite, PhiMoE, Jamba, Aria
    "router.gate",  # AFMoE
    "router.proj",  # Gemma 4
    "router.classifier",  # LongCat
    "gate.wg",  # HunYuan
)

Seen = Callable[[Tensor, Tensor], None]
"""Is given x [..., H] and y = W x (with the bias, where there is one) [..., E]."""


def find_router(inner: dict[str, nn.Module], prefix: str, experts: Experts) -> TargetLayer:
    """The layer of a block that has ``experts``; ``inner``: the block's modules. ConfigError where it is at no known place."""
    holder = experts.name.removeprefix(f"{prefix}.").rpartition(".")[0]
    for path in PATHS:
        module = inner.get(f"{holder}.{path}".lstrip("."))
        weight = getattr(module, "weight", None)
        shape = shape_of(weight) if isinstance(weight, nn.Parameter) and weight.is_floating_point() else ()
        if len(shape) == 2 and shape[1] == experts.hidden:
            name = ".".join(part for part in (prefix, holder, path) if part)
            return TargetLayer(name, experts.layer, ROUTER, *shape)
    raise ConfigError(
        f"{prefix}.{holder}, a {type(inner[holder]).__name__}, has its router in a way that is not known: leave router out of "
        "--layer_type"
    )


def watch(module: nn.Module, seen: Seen) -> list[RemovableHandle]:
    """Shows the product of a router to ``seen``, whatever its module returns, until the handles are removed.

    x is what the module was given, where that is what is multiplied (perhaps in another dtype), so that layers that see the
    same input still do. ConfigError, in the pass, where the module's code makes no such product, or several.
    """
    running: list[_Watched] = []

    def begin(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        running.append(_Watched(shape_of(module.weight), inputs[0], seen))

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        made = running.pop()
        made.close()
        if output is not None and made.times != 1:  # None: the forward has failed
            raise ConfigError(
                f"a {type(module).__name__} multiplies what it is given by its weight {made.times} times in a pass, and not "
                "once: leave router out of --layer_type"
            )

    # Prepended: of several watchers the last to begin is the first to end, so that each gives back what it found.
    return [module.register_forward_pre_hook(begin), module.register_forward_hook(end, always_call=True, prepend=True)]


class _Watched:
    """Shows products with a weight of ``shape``, from now until it is closed. DeepSpeed has a linear function of its own in
    torch's place, which no mode of torch sees: so whichever is there is called."""

    def __init__(self, shape: tuple[int, ...], given: Tensor, seen: Seen):
        self.shape, self.given, self.seen, self.times = shape, given, seen, 0
        self._linear: Any = functional.linear
        functional.linear = self._shown  # type: ignore[assignment]

    def close(self) -> None:
        functional.linear = self._linear

    def _shown(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        y: Tensor = self._linear(input, weight, bias)
        if tuple(weight.shape) == self.shape:
            self.times += 1
            flat = input.detach().reshape(-1, input.shape[-1]).to(self.given.dtype)
            same = torch.equal(flat, self.given.detach().reshape(-1, self.given.shape[-1]))
            self.seen(self.given if same else input, y)
        return y
