"""What ``--layer_type`` and ``--target_layers`` name."""

from __future__ import annotations

from warp_ds.errors import ConfigError

LAYER_TYPES = ("ffn_down", "ffn_up", "ffn_gate", "attn_q", "attn_k", "attn_v", "attn_o")
EXPERT_TYPES = ("experts_down", "experts_up", "experts_gate")
"""Of a mixture's routed experts: as many layers a block as it has experts, experts_down_007 and so on."""
ROUTER = "router"
"""What says which experts a token is given to."""
KNOWN_TYPES = (*LAYER_TYPES, *EXPERT_TYPES, ROUTER)


def type_order(kind: str) -> tuple[int, str]:
    """What layer types are sorted by: as in KNOWN_TYPES, and experts by their number."""
    return next(i for i, known in enumerate(KNOWN_TYPES) if kind == known or kind.startswith(f"{known}_")), kind


def parse_layer_types(text: str) -> list[str]:
    """'ffn_down,attn_q' -> ['ffn_down', 'attn_q'], in the order of KNOWN_TYPES; ConfigError for an unknown one."""
    given = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in given if part not in KNOWN_TYPES]
    if unknown or not given:
        raise ConfigError(f"--layer_type {text!r}: choose from {', '.join(KNOWN_TYPES)}")
    return [kind for kind in KNOWN_TYPES if kind in given]


def parse_target_layers(text: str, depth: int) -> list[int]:
    """The blocks that ``--target_layers`` names in a model of ``depth`` blocks, ascending, each once.

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
    blocks: set[int] = set()
    for part in text.split(","):
        part = part.strip()
        chosen = named[part] if part in named else _range(part, text, list(named))
        if not chosen:
            why = f"of {depth} blocks none" if part in named else "the smaller number comes first"
            raise ConfigError(f"--target_layers {text!r}: {part} names no block: {why}")
        if chosen.stop > depth:
            raise ConfigError(f"--target_layers {text!r}: this model has no block {chosen.stop - 1}, only 0-{depth - 1}")
        blocks.update(chosen)
    return sorted(blocks)


def _range(part: str, text: str, named: list[str]) -> range:
    first, _, last = part.partition("-")
    if not first.isdecimal() or (last and not last.isdecimal()) or part.endswith("-"):
        raise ConfigError(
            f"--target_layers {text!r}: use {', '.join(named)}, a number, a range such as 0-5, or a list such as 0-5,12,20-31"
        )
    return range(int(first), int(last or first) + 1)


def in_ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5': as --target_layers takes them."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ",".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)
