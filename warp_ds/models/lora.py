"""LoRA layers of PEFT in a live model: W' = W + s B A (Hu et al., 2021, https://arxiv.org/abs/2106.09685, equation 3).

PEFT is never imported here before the model at hand has been made with it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from warp_ds.errors import UnsupportedSetting
from warp_ds.store.layers import TargetLayer

KNOWN = "plain LoRA on linear layers (peft.LoraConfig without DoRA or another variant, unquantised, one active adapter)"


@dataclass(frozen=True)
class LoraPair:
    """The adapter of one linear layer W [m, n]."""

    a: nn.Parameter
    """A [r, n]"""
    b: nn.Parameter
    """B [m, r]"""
    scaling: float
    """s: alpha / r, or alpha / √r of rsLoRA"""


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has put an adapter of any kind into ``model``, whatever has wrapped it since."""
    if "peft" not in sys.modules:
        return False
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, PeftModel | BaseTunerLayer) for module in model.modules())


def without_adapter(model: Any) -> Any:
    """The transformers model that PEFT has wrapped; ``model`` itself where it has not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def refuse_parts(layers: Iterable[TargetLayer], what: str) -> None:
    """UnsupportedSetting, naming the first, for layers that are some rows of a weight, whose adapter is of all of its rows."""
    for layer in layers:
        if layer.rows:
            raise UnsupportedSetting(
                f"{what}: {layer.name} is some rows of {layer.parameter}, and an adapter reads one input for all of them: name "
                "layers with a weight of their own"
            )


def lora_pairs(model: nn.Module, layers: Iterable[TargetLayer]) -> dict[str, LoraPair]:
    """The adapter of each of ``layers`` that has one, by the layer's name.

    Raises UnsupportedSetting, naming the layer, for another adapter than plain LoRA, a merged or switched off one, and for
    a layer whose own weight trains besides.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    modules = dict(model.named_modules(remove_duplicate=False))
    pairs = {}
    for layer in layers:
        names = [name for name in modules if name == layer.module or name.endswith(f".{layer.module}")]
        module: Any = modules[min(names, key=len)] if names else None
        if isinstance(module, BaseTunerLayer):
            pairs[layer.name] = _pair(module, layer)
        elif module is not None and any(p.requires_grad for p in module.parameters()):
            raise UnsupportedSetting(
                f"{layer.name} itself trains beside the adapter ({type(module).__name__}; modules_to_save?): leave it out "
                "there, or make masks without it"
            )
    return pairs


def _pair(module: Any, layer: TargetLayer) -> LoraPair:
    from peft.tuners.lora.layer import Linear

    def refuse(what: str) -> UnsupportedSetting:
        return UnsupportedSetting(f"{layer.name} has {what}; rotated coefficients are frozen for {KNOWN}")

    if type(module) is not Linear:
        raise refuse(f"an adapter of the kind {type(module).__module__}.{type(module).__name__}")
    if type(module.get_base_layer()) is not nn.Linear:
        raise refuse(f"an adapter on a {type(module.get_base_layer()).__name__}")
    names = module.active_adapters
    if len(names) != 1 or names[0] not in module.lora_A or module.merged or module.disable_adapters:
        raise refuse(f"the adapters {sorted(module.lora_A)}, of which {list(names)} are active or merged")
    name = names[0]
    if variant := module.lora_variant.get(name):
        raise refuse(f"a variant of LoRA, {type(variant).__name__.removesuffix('LinearVariant')}")
    a, b = (side.get_parameter("weight") for side in (module.lora_A[name], module.lora_B[name]))
    if module.get_base_layer().weight.requires_grad:
        raise refuse("a weight that trains beside its adapter")
    if not a.requires_grad or not b.requires_grad:
        raise refuse("an adapter that does not train (requires_grad is off: loaded without is_trainable=True?)")
    return LoraPair(a, b, float(module.scaling[name]))
