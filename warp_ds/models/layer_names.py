"""What ``--layer_type`` and ``--target_layers`` name."""

from __future__ import annotations

from warp_ds.errors import ConfigError

LAYER_TYPES = ("ffn_down", "ffn_up", "ffn_gate", "attn_q", "attn_k", "attn_v", "attn_o")


def parse_layer_types(text: str) -> list[str]:
    """'ffn_down,attn_q' -> ['ffn_down', 'attn_q'], in the order of LAYER_TYPES; ConfigError for an unknown one."""
    given = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in given if part not in LAYER_TYPES]
    if unknown or not given:
        raise ConfigError(f"--layer_type {text!r}: choose from {', '.join(LAYER_TYPES)}")
    return [kind for kind in LAYER_TYPES if kind in given]


def parse_target_layers(text: str, depth: int) -> range:
    """The blocks that ``--target_layers`` names in a model of ``depth`` blocks, as a range.

    Thirds of 32 are 0-10, 11-21, 22-31, as in the original. ConfigError for anything outside the model.
    """
    cut = -(-depth // 3)
    named = {
        "all": range(depth),
        "early": range(0, cut),
        "middle": range(cut, min(2 * cut, depth)),
        "late": range(min(2 * cut, depth), depth),
        "last": range(depth - 1, depth),
    }
    if text in named:
        blocks = named[text]
    else:
        first, _, last = text.partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()) or text.endswith("-"):
            raise ConfigError(f"--target_layers {text!r}: use {', '.join(named)}, a number or a range such as 0-5")
        blocks = range(int(first), int(last or first) + 1)
    if not blocks or blocks.stop > depth:
        raise ConfigError(f"--target_layers {text!r} names no layers of this model: it has 0-{depth - 1}")
    return blocks
