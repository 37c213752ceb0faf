"""Whether a model keeps sequences apart that stand in one row, and by which attention."""

from __future__ import annotations

import inspect
from typing import Any

from warp_ds.errors import ConfigError
from warp_ds.models.classes import model_class
from warp_ds.models.context import text_config

_KEPT_APART = {"full_attention", "sliding_attention"}
"""Kinds of layers (`layer_types`) that see no token of another sequence where position ids begin anew."""
_CARRYING = ("mamba_", "ssm_", "conv_", "linear_", "lru_")
"""How the settings begin of layers that carry a state, or a convolution's inputs, from token to token."""
_POSITIONS_UNSEEN = {"afmoe", "biogpt", "doge", "falcon", "gpt_oss", "granitemoehybrid", "opt", "xglm"}
"""Types whose code in transformers 5.23 makes its attention masks without the position ids: SDPA would see all of the row."""


def check_packable(config: Any, name: str) -> None:
    """ConfigError for a model of this configuration whose layers would mix sequences that are packed into one row."""
    text = text_config(config)
    kind = text.model_type
    layers = set(getattr(text, "layer_types", None) or ())
    why = ""
    if layers - _KEPT_APART:
        why = f"its layers of type {', '.join(sorted(layers - _KEPT_APART))} would see tokens of other samples"
    elif not layers and any(key.startswith(_CARRYING) for key in text.to_dict()):
        why = "its recurrent or convolutional layers would see tokens of other samples"
    elif kind in _POSITIONS_UNSEEN or not _takes_position_ids(config):
        why = "its attention masks follow no position ids, which keep samples apart"
    if why:
        raise ConfigError(f"--packing cannot be used with {name}, a model of type {kind}: {why}; leave --packing out")


def _takes_position_ids(config: Any) -> bool:
    return "position_ids" in inspect.signature(model_class(config).forward).parameters


def packed_attention(device: str, dtype: str) -> str | None:
    """The attention to load a model with whose rows are packed: variable-length flash attention where there is one.

    None is transformers' own choice (SDPA), which masks other sequences by block.
    """
    from transformers.utils import is_flash_attn_2_available

    return "flash_attention_2" if device == "cuda" and dtype != "float32" and is_flash_attn_2_available() else None
