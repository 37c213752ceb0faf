"""A flag, said once: its default, its help, and what follows from its nature elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

DEBUG_SAMPLES = 5
"""Of everything that is counted in samples, under --debug."""


@dataclass(frozen=True)
class Nature:
    """What the rest of the program knows about a flag."""

    reads: str = ""
    """What its value names: 'model', 'judge' (a model of any kind), 'data', 'files' (of data, comma-separated), 'text',
    'basis', 'masks' or 'directory'. Of all but the last a run knows the contents, whatever their path."""
    identity: bool = True
    """Whether it changes what a run computes: two runs that differ in others alone may go on with one another."""
    debug: Any = None
    """Its value under --debug, where it has any."""
    alias: str = ""
    """Another name of it."""
    own: bool = False
    """Of one run alone: a comparison does not hand it on to its phases."""


def flag(
    default: Any,
    help: str,
    *,
    choices: Iterable[str] | None = None,
    reads: str = "",
    identity: bool = True,
    debug: Any = None,
    own: bool = False,
    alias: str = "",
) -> Any:
    """A dataclass field with the help text of its command-line flag, and its nature."""
    shown = {"help": help} if choices is None else {"help": help, "choices": list(choices)}
    metadata = {**shown, "nature": Nature(reads, identity, debug, alias, own)}
    if alias:
        metadata["aliases"] = [f"--{alias}"]  # as HfArgumentParser knows them
    if isinstance(default, list):
        return field(default_factory=list, metadata=metadata)
    return field(default=default, metadata=metadata)


def samples(default: int, help: str, alias: str = "") -> Any:
    """A number of samples; 0 is all of them."""
    return flag(default, help, debug=DEBUG_SAMPLES, alias=alias)


def again(group: type, name: str, default: Any, help: str | None = None) -> Any:
    """The flag of another group with another default, or another help text."""
    before = dataclass_fields(group)[name]
    return field(default=default, metadata={**before.metadata, **({} if help is None else {"help": help})})


def nature(field: dataclasses.Field[Any]) -> Nature:
    told: Nature = field.metadata.get("nature", Nature())
    return told


def dataclass_fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    """The flags of a dataclass, or of an instance, by name."""
    return {f.name: f for f in dataclasses.fields(kind) if f.init}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The value that a field has where none is given."""
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def aliases(kind: Any) -> dict[str, str]:
    """Other name of a flag -> its name."""
    return {alias: name for name, f in dataclass_fields(kind).items() if (alias := nature(f).alias)}


def handed_on(arguments: Any, kind: type) -> dict[str, Any]:
    """The flags of ``arguments`` that ``kind`` has by the same name, without those of one run alone."""
    theirs = dataclass_fields(kind)
    return {
        name: getattr(arguments, name)
        for name, f in dataclass_fields(arguments).items()
        if name in theirs and not nature(f).own
    }


def apply_debug(arguments: Any) -> None:
    """--debug: 5 samples of everything, the last layer."""
    for name, its in dataclass_fields(arguments).items() if arguments.debug else ():
        if nature(its).debug is not None and getattr(arguments, name) not in (None, ""):
            setattr(arguments, name, nature(its).debug)
