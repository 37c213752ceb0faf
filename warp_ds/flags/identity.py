"""Which settings decide a run's result, and their one spelling."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from warp_ds.flags import arguments as phases
from warp_ds.flags import comparison
from warp_ds.flags.flag import Nature, dataclass_fields, nature
from warp_ds.flags.groups import RunArguments

#: By these a run knows what a flag names, whatever its path: ``start_run``'s fingerprints.
BY_CONTENT = ("model", "judge", "data", "files", "text")


@cache
def natures() -> dict[str, Nature]:
    """Every flag's nature, by its name, which is one in all phases."""
    by_flag: dict[str, Nature] = {}
    for module in (phases, comparison):
        for kind in vars(module).values():
            if dataclasses.is_dataclass(kind):
                by_flag.update({name: nature(f) for name, f in dataclass_fields(kind).items()})
    return by_flag


def reading(*kinds: str) -> list[str]:
    """The flags that name a 'model', say, or 'data' (``Nature.reads``)."""
    return [name for name, nature in natures().items() if nature.reads in kinds]


def identity_settings(arguments: RunArguments) -> dict[str, Any]:
    """The flags that decide what a run computes, in one spelling each."""
    return in_one_spelling(dataclasses.asdict(arguments))


def in_one_spelling(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As ``identity_settings``, of flags that a run has written down."""
    known = natures()
    return {
        name: _plain(known.get(name, Nature()).reads, value)
        for name, value in settings.items()
        if known.get(name, Nature()).identity
    }


def _plain(reads: str, value: Any) -> Any:
    if reads in ("basis", "masks"):
        return "none" if value == "none" else "by content"  # given, or the newest: the fingerprint says which
    if reads in BY_CONTENT and value and all(Path(part).expanduser().exists() for part in _paths(str(value))):
        return "by content"
    if reads == "directory" and value:
        return str(Path(value).expanduser().resolve())
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 3.0 epochs are 3


def _paths(value: str) -> list[str]:
    """The paths of one flag: itself where that exists, else what commas part."""
    return [value] if Path(value).expanduser().exists() else value.split(",")
