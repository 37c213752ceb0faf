"""What a LoraConfig says (adapter_config.json, PEFT 0.21): whether W' is W + s B A, of which layers, with which r and alpha.

Read without PEFT, as PEFT reads it: a pair of the weights' file that PEFT leaves out is no part of the adapter.
"""

from __future__ import annotations

import math
import re
from typing import Any

#: What changes nothing of what W' = W + s B A means, or is read here.
_UNDERSTOOD = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "ensure_weight_tying"),
    *("megatron_core", "qalora_group_size", "runtime_config", "modules_to_save", "lora_bias", "trainable_token_indices"),
}
#: Starts that leave the base weights as they are; PiSSA, OLoRA, CorDA, LoftQ and others change them.
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
#: Why what is not plain LoRA is none of ours, and what to do.
_REFUSED = {
    "use_dora": "use_dora: DoRA scales whole rows of W + s B A, so that W moves in every direction",
    "target_parameters": (
        "target_parameters: a LoRA on parameters themselves, such as stacked experts, is not read: merge it with PEFT, or "
        "train one on linear layers (target_modules)"
    ),
}


def not_plain(config: dict[str, Any]) -> str:
    """Why W' is not W + s B A; empty where it is."""
    if config.get("peft_type") != "LORA":
        return f"peft_type is {config.get('peft_type')!r}"
    for name, why in _REFUSED.items():
        if config.get(name):
            return why
    for name, value in config.items():
        if name not in _UNDERSTOOD and value not in (None, False, "none", {}, []):
            return f"{name} is {value!r}"
    if config.get("init_lora_weights", True) not in _STARTS:
        return f"init_lora_weights is {config['init_lora_weights']!r}, which changes the base weights too"
    if not _is_scale(config.get("lora_alpha")):
        return f"lora_alpha is {config.get('lora_alpha')!r}"
    if not _is_rank(config.get("r", 8)):
        return f"r is {config['r']!r}, no rank"
    if config.get("use_rslora") not in (None, False, True):
        return f"use_rslora is {config['use_rslora']!r}, neither true nor false"
    return _problem_of_pattern(config, "alpha_pattern", _is_scale) or _problem_of_pattern(config, "rank_pattern", _is_rank)


def of_layer(config: dict[str, Any], patterns: str, default: str, layer: str) -> Any:
    """``config[default]``, or what the first of ``config[patterns]`` that matches the name of a layer says."""
    found = config.get(patterns) or {}
    return next((value for key, value in found.items() if re.match(rf"(.*\.)?({key})$", layer)), config.get(default))


def why_not_loaded(config: dict[str, Any], layer: str, r: int) -> str:
    """Why PEFT would not load a pair of rank ``r`` for the module called ``layer``; empty where it would."""
    said = of_layer(config, "rank_pattern", "r", layer)
    if said is not None and said != r:
        return f"its rank is {r}, and {said} by adapter_config.json"
    try:
        if config.get("exclude_modules") and _names(config["exclude_modules"], layer):
            return "exclude_modules names it"
        if any(re.match(rf"(^|.*\.){name}($|\..*)", layer) for name in config.get("modules_to_save") or ()):
            return "modules_to_save names it"
        if not _is_target(config, layer):
            return "target_modules does not name it"
        return "" if _is_transformed(config, layer) else "layers_to_transform does not name its layer"
    except (re.error, TypeError) as error:
        return f"target_modules, exclude_modules or layers_to_transform cannot be read ({error})"


def _is_target(config: dict[str, Any], layer: str) -> bool:
    targets: Any = config.get("target_modules")
    return not layer.endswith("lm_head") if targets == "all-linear" else _names(targets, layer)


def _names(modules: Any, layer: str) -> bool:
    """A pattern of the whole name, or a list of its ends."""
    if isinstance(modules, str):
        return re.fullmatch(modules, layer) is not None
    return any(layer == name or layer.endswith(f".{name}") for name in modules or ())


def _is_transformed(config: dict[str, Any], layer: str) -> bool:
    indices, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    targets: Any = config.get("target_modules")
    if indices is None or indices == [] or isinstance(targets, str) or layer in targets:
        return True  # nor is a module asked for its layer that is named in full
    expressions = [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    if patterns:
        patterns = [patterns] if isinstance(patterns, str) else patterns
        expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
    found = next((match for expression in expressions if (match := re.match(expression, layer))), None)
    return found is not None and int(found["idx"]) in ([indices] if isinstance(indices, int) else indices)


def _is_scale(alpha: Any) -> bool:
    return isinstance(alpha, int | float) and not isinstance(alpha, bool) and math.isfinite(alpha)


def _is_rank(r: Any) -> bool:
    return isinstance(r, int) and not isinstance(r, bool) and r > 0


def _problem_of_pattern(config: dict[str, Any], which: str, is_right: Any) -> str:
    """Why alpha_pattern (rank_pattern) gives none to a layer that it names; empty where it does."""
    patterns = config.get(which) or {}
    if not isinstance(patterns, dict):
        return f"{which} is {patterns!r}, no mapping of names to numbers"
    for name, value in patterns.items():
        if not is_right(value):
            return f"{which} has {value!r} for {name!r}"
        try:
            re.compile(name)
        except re.error as error:
            return f"{which} has {name!r}, which is no pattern ({error})"
    return ""
