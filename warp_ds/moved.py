"""Names of version 0.1 that scripts import by: each old module looks them up where they are now, and says so."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable


def names_from(old: str, *homes: str) -> Callable[[str], object]:
    """A module's ``__getattr__`` that takes names from ``homes``, the first that has one, with a DeprecationWarning."""

    def look_up(name: str) -> object:
        having = [] if name.startswith("__") else [m for m in map(importlib.import_module, homes) if hasattr(m, name)]
        if not having:
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        value = getattr(having[0], name)
        made_in = getattr(value, "__module__", None)
        home = made_in if made_in in homes else having[0].__name__
        warnings.warn(f"{old}.{name} is {home}.{name} now", DeprecationWarning, stacklevel=2)
        return value

    return look_up
