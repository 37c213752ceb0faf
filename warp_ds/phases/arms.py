"""The arms of a comparison: one line of settings each, composed with '+'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from warp_ds.errors import ConfigError
from warp_ds.flags.controls import FIXED


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
    output: str = "identity"
    """Basis of the outputs: identity (none), activation or gradient."""
    left: bool = False
    """Whether what is free stays out of the frozen columns' left singular directions too."""
    safety_share: float = 0.0
    """Safety samples mixed into the task, as a share of the task's samples."""
    start: str | None = None
    """How the start model is changed first: 'sn-tune' or 'rsn-tune'."""
    harmful_share: float = 0.0
    """Harmful samples of --harmful_mix mixed into the task, as a share of the task's samples."""
    objective: str | None = None
    """What training minimises in place of the task's loss: 'der', 'safegrad' or 'constrained'."""
    average: bool = False
    """Whether what comes out is the average of the weights over the steps."""
    merge: str | None = None
    """What is done to the weights afterwards: 'resta', 'safedelta', 'safelora' or 'wsr'."""
    adapter: bool = False
    """Whether a LoRA adapter trains in place of the weights; its masks are of whole columns or rows."""
    method: str | None = None
    """Of an adapter, what keeps it safe during training: 'guardspace', 'salora' or 'asft'."""
    grows: str | None = None
    """How its masks grow during training: 'refresh' or 'schedule'."""
    patch: bool = False
    """Whether a few refusals are trained at the very end."""
    strengths: tuple[tuple[str, float], ...] = ()
    """(part, number after its '@'); of other parts the flags decide."""

    def strength(self, part: str, default: float) -> float:
        """The number after the '@' of ``part``, or ``default``."""
        return dict(self.strengths).get(part, default)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("before", trains=None),
        Arm("full"),
        Arm("layers", trains="target"),
        Arm("original", trains="target", basis="identity"),
        Arm("column", trains="target", basis="activation", unit="column"),
        Arm("rotated", trains="target", basis="activation"),
        Arm("output-row", trains="target", basis="activation", output="activation", unit="row"),
        Arm("both", trains="target", basis="activation", output="activation"),
        Arm("osft", trains="target", basis="weight", unit="column", score="singular_value", left=True),
        Arm("random-mask", trains="target", basis="activation", score="random"),
        Arm("random-basis", trains="target", basis="random"),
        Arm("safeinstr", safety_share=0.1),
        Arm("resta", merge="resta"),
        Arm("safedelta", merge="safedelta"),
        Arm("sn-tune", start="sn-tune"),
        Arm("rsn-tune", start="rsn-tune"),
        Arm("lora", trains="target", adapter=True),
        Arm("safelora", merge="safelora"),
        Arm("wsr", merge="wsr"),
        Arm("guardspace", method="guardspace"),
        Arm("salora", method="salora"),
        Arm("asft", method="asft"),
        Arm("der", objective="der"),
        Arm("safegrad", objective="safegrad"),
        Arm("constrained", objective="constrained"),
        Arm("ema", average=True),
        Arm("refresh", grows="refresh"),
        Arm("schedule", grows="schedule"),
        Arm("patch", patch=True),
        Arm("harmful", harmful_share=0.1),
    )
}
STRENGTHS = {
    "resta": "resta@0.5",
    "safedelta": "safedelta@10",
    "safelora": "safelora@0.35",
    "asft": "asft@1",
    "der": "der@0.5",
    "ema": "ema@0.9",
    "refresh": "refresh@100",
    "patch": "patch@1e-4",
    "harmful": "harmful@0.1",
    "safeinstr": "safeinstr@0.5",
}
"""The parts that take a number, and how one is written."""
EXCLUSIVE = ("basis", "start", "safety_share", "harmful_share", "objective", "average", "merge", "method", "grows", "patch")
"""Settings that one part of an arm may make."""


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
    an adapter trains, kept out of the masked columns or rows.

    A part takes its strength after '@': safedelta@10, ema@0.9, patch@1e-4 (its learning rate).
    """
    pieces = [part.partition("@") for part in name.split("+")]
    parts = [part for part, _, _ in pieces]
    unknown = [part for part in parts if part not in ARMS]
    if unknown:
        raise ConfigError(
            f"--arms {', '.join(unknown)}: choose from {', '.join(ARMS)}, and compositions such as safeinstr+rotated"
        )
    strengths = tuple((part, _strength(name, part, value)) for part, mark, value in pieces if mark)
    arms = [ARMS[part] for part in parts]
    if len(parts) > 1 and "before" in parts:
        raise ConfigError(f"--arms {name}: before is the start model, and cannot be composed")
    if "layers" in parts and ("full" in parts or any(arm.basis for arm in arms)):
        raise ConfigError(f"--arms {name}: layers trains the target layers without a mask: leave it or the other part out")
    made: dict[str, Any] = {}
    for setting in EXCLUSIVE:
        given = [getattr(arm, setting) for arm in arms if getattr(arm, setting)]
        if len(given) > 1:
            raise ConfigError(f"--arms {name}: two of its parts set the {setting}: they exclude each other")
        made |= {setting: given[0]} if given else {}
    shares = {"harmful": "harmful_share", "safeinstr": "safety_share"}
    made |= {shares[part]: number for part, number in strengths if part in shares}
    adapter = "lora" in parts
    if adapter and ({"full", "layers"} & set(parts) or any(_by_entry(arm) for arm in arms)):
        raise ConfigError(
            f"--arms {name}: an adapter trains alone, and its masks are of whole columns or rows: lora+column, lora+original, "
            "lora+output-row"
        )
    _check_held(name, made, adapter, any(arm.basis for arm in arms))
    if "grows" in made and (adapter or not any(arm.basis for arm in arms) or any(arm.left for arm in arms)):
        raise ConfigError(f"--arms {name}: {made['grows']} is of a mask of weights, and not osft's: rotated+{made['grows']}")
    masked = next((arm for arm in arms if arm.basis), next((arm for arm in arms if arm.trains != "all"), ARMS["full"]))
    made |= {"adapter": True, "unit": "row" if masked.unit == "row" else "column", "left": False} if adapter else {}
    trains = "all" if "full" in parts else masked.trains
    return replace(masked, **made, name=name, trains=trains, strengths=strengths)


def _check_held(name: str, made: dict[str, Any], adapter: bool, masked: bool) -> None:
    """ConfigError where what is to hold an adapter has none, or two things would."""
    method = made.get("method")
    if method and not adapter:
        raise ConfigError(f"--arms {name}: {method} is of an adapter: lora+{method}")
    if method in FIXED and masked:
        raise ConfigError(f"--arms {name}: {method} and masks each hold an adapter in their own way: leave one out")
    if made.get("merge") == "wsr" and (not adapter or method or masked):
        raise ConfigError(
            f"--arms {name}: wsr masks what a plain adapter has learned, by the masks of rotated: lora+wsr, without another "
            "mask or method"
        )


def _by_entry(arm: Arm) -> bool:
    return bool(arm.basis) and arm.unit == "entry" and arm.basis != "identity"


def _strength(name: str, part: str, value: str) -> float:
    try:
        if part not in STRENGTHS:
            raise ValueError(f"only {', '.join(STRENGTHS)} take a strength")
        number = float(value)
        if part == "refresh" and (number < 1 or number != int(number)):
            raise ValueError(f"{value} is no number of optimizer steps")
        if not 0.0 <= number < math.inf or (part == "ema" and number >= 1.0):
            raise ValueError(f"{value} is no strength: it is finite, not below 0, and of ema below 1")
        return number
    except ValueError as error:
        example = STRENGTHS.get(part, STRENGTHS["resta"])
        raise ConfigError(f"--arms {name}: {error}; a strength is written {example}") from error


def refuse_placement(arms: Sequence[Arm], placement: str) -> None:
    """ConfigError for a --basis_placement under which one of the arms could not train."""
    mixing = [arm.name for arm in arms if arm.output != "identity"]
    if mixing and placement not in ("auto", "owner"):
        raise ConfigError(
            f"--arms {', '.join(mixing)}: a basis of the outputs mixes the rows of a weight, which --basis_placement "
            f"{placement} cannot do: give owner or auto, or leave these arms out"
        )


def with_harm(arms: Sequence[Arm], ratios: Sequence[float]) -> list[Arm]:
    """Each arm that trains, at each of the harmful ratios (0: as it is); what does not train, once."""
    made = []
    for arm in arms:
        for ratio in ratios if arm.trains else [0.0]:
            if ratio and arm.harmful_share:
                raise ConfigError(f"--arms {arm.name} has a harmful mix of its own: leave it or --harmful_ratio out")
            made.append(compose(f"{arm.name}+harmful@{ratio:g}") if ratio else arm)
    return made
