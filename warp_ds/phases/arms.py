"""The arms of a comparison: one line of settings each, composed with '+'."""

from __future__ import annotations

from dataclasses import dataclass, replace

from warp_ds.errors import ConfigError


@dataclass(frozen=True)
class Arm:
    """How one arm gets from the common start model to its own model."""

    name: str
    trains: str | None = "all"
    """'all' parameters, the 'target' layers, or None: nothing."""
    basis: str | None = None
    """Of the mask: activation, identity, weight or random; None: no mask."""
    unit: str = "entry"
    score: str = "importance"
    safety_share: float = 0.0
    """Safety samples mixed into the task, as a share of the task's samples."""
    start: str | None = None
    """How the start model is changed first: 'sn-tune' or 'rsn-tune'."""
    merge: str | None = None
    """What is done to the weights afterwards: 'resta', 'safedelta' or 'safelora'."""
    strength: float | None = None
    """Of the merge: alpha, s or the threshold; None: as --resta_alpha, --safedelta_s and --safelora_threshold say."""
    adapter: bool = False
    """Whether a LoRA adapter trains in place of the weights; its masks are of whole columns."""


ARMS = {
    arm.name: arm
    for arm in (
        Arm("before", trains=None),
        Arm("full"),
        Arm("layers", trains="target"),
        Arm("original", trains="target", basis="identity"),
        Arm("column", trains="target", basis="activation", unit="column"),
        Arm("rotated", trains="target", basis="activation"),
        Arm("osft", trains="target", basis="weight", unit="column", score="singular_value"),
        Arm("random-mask", trains="target", basis="activation", score="random"),
        Arm("random-basis", trains="target", basis="random"),
        Arm("safeinstr", safety_share=0.1),
        Arm("resta", merge="resta"),
        Arm("safedelta", merge="safedelta"),
        Arm("sn-tune", start="sn-tune"),
        Arm("rsn-tune", start="rsn-tune"),
        Arm("lora", trains="target", adapter=True),
        Arm("safelora", merge="safelora"),
    )
}


def parse_arms(text: str) -> list[Arm]:
    """'before,full,safeinstr+rotated' -> arms, in order; ConfigError for an unknown, repeated or contradictory one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--arms is empty: choose from {', '.join(ARMS)}, and compositions such as safeinstr+rotated")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"--arms names {', '.join(repeated)} twice")
    return [compose(name) for name in names]


def compose(name: str) -> Arm:
    """The arm of a name, or of several joined by '+'. Composed with 'full', a masked arm trains every parameter; with 'lora',
    an adapter trains, kept out of the masked columns.

    A merge takes its strength after '@': safedelta@10.
    """
    pieces = [part.partition("@") for part in name.split("+")]
    parts = [part for part, _, _ in pieces]
    unknown = [part for part in parts if part not in ARMS]
    if unknown:
        raise ConfigError(
            f"--arms {', '.join(unknown)}: choose from {', '.join(ARMS)}, and compositions such as safeinstr+rotated"
        )
    arms = [
        replace(ARMS[part], name=name, strength=_strength(name, ARMS[part], value) if mark else None)
        for part, mark, value in pieces
    ]
    if len(parts) == 1:
        return arms[0]
    if "before" in parts or "layers" in parts:
        raise ConfigError(f"--arms {name}: before and layers cannot be composed")
    for setting in ("basis", "start", "merge", "safety_share"):
        if sum(bool(getattr(arm, setting)) for arm in arms) > 1:
            raise ConfigError(f"--arms {name}: two of its parts set the {setting}: they exclude each other")
    adapter = "lora" in parts
    if adapter and ("full" in parts or any(arm.basis and arm.unit == "entry" and arm.basis != "identity" for arm in arms)):
        raise ConfigError(
            f"--arms {name}: an adapter trains alone, and its masks are of whole columns: lora+column, lora+original"
        )
    masked = next((arm for arm in arms if arm.basis), ARMS["lora" if adapter else "full"])
    return replace(
        masked,
        name=name,
        adapter=adapter,
        unit="column" if adapter else masked.unit,
        trains="all" if "full" in parts else masked.trains,
        safety_share=max(arm.safety_share for arm in arms),
        start=next((arm.start for arm in arms if arm.start), None),
        merge=next((arm.merge for arm in arms if arm.merge), None),
        strength=next((arm.strength for arm in arms if arm.merge), None),
    )


def _strength(name: str, arm: Arm, value: str) -> float:
    try:
        if arm.merge is None:
            raise ValueError("only resta, safedelta and safelora take a strength")
        return float(value)
    except ValueError as error:
        raise ConfigError(f"--arms {name}: {error}; a strength is written resta@0.5 or safedelta@10") from error
