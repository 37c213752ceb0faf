"""JSON from a file against declared types: what is missing, unknown or of another type is refused by name."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin

LARGEST_INT = 2**53
"""Beyond it other readers of JSON round."""


class SchemaError(ValueError):
    """A value is not what its type says; the message begins with where it stands."""


def check_fields(values: Any, declared: type, where: str = "") -> None:
    """``values`` has the fields of a dataclass or TypedDict, each of its type, and no others. Raises SchemaError.

    int is no bool and below 2^53; float takes an int, and no NaN or infinity; str holds no control character. A field with
    a default may not be missing either: what a file leaves out, its reader would guess.
    """
    if not isinstance(values, dict):
        raise SchemaError(f"{where or 'the whole'} is {_kind(values)}, not an object")
    hints = typing.get_type_hints(declared, include_extras=False)
    if dataclasses.is_dataclass(declared):
        required = {field.name for field in dataclasses.fields(declared)}
    else:
        required = set(declared.__required_keys__)  # type: ignore[attr-defined]
    for missing in sorted(required - values.keys()):
        raise SchemaError(f"{_at(where, missing)} is missing")
    for unknown in sorted(values.keys() - hints.keys()):
        raise SchemaError(f"{_at(where, unknown)!r} is unknown")
    for name, value in values.items():
        check_type(value, hints[name], _at(where, name))


def check_type(value: Any, hint: Any, where: str) -> None:
    """``value`` is of the type ``hint``. Raises SchemaError."""
    origin = get_origin(hint)
    if hint is Any:
        return
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if value is None and type(None) in options:
            return
        (other,) = [option for option in options if option is not type(None)]
        check_type(value, other, where)
    elif origin is list:
        if not isinstance(value, list):
            raise SchemaError(f"{where} is {_kind(value)}, not a list")
        for number, item in enumerate(value):
            check_type(item, get_args(hint)[0], f"{where}[{number}]")
    elif origin is dict:
        if not isinstance(value, Mapping):
            raise SchemaError(f"{where} is {_kind(value)}, not an object")
        for key, item in value.items():
            _check_text(key, f"a name in {where}")
            check_type(item, get_args(hint)[1], _at(where, key))
    elif typing.is_typeddict(hint) or dataclasses.is_dataclass(hint):
        check_fields(value, hint, where)
    elif hint is str:
        _check_text(value, where)
    elif hint is bool:
        if not isinstance(value, bool):
            raise SchemaError(f"{where} is {_kind(value)}, not true or false")
    else:
        _check_number(value, hint, where)


def _check_number(value: Any, hint: Any, where: str) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and abs(value) >= LARGEST_INT:
        raise SchemaError(f"{where} is too large a number")
    if hint is int and not whole:
        raise SchemaError(f"{where} is {_kind(value)}, not a whole number")
    if hint is float and not (whole or (isinstance(value, float) and math.isfinite(value))):
        raise SchemaError(f"{where} is {_kind(value)}, not a finite number")


def _check_text(value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise SchemaError(f"{where} is {_kind(value)}, not text")
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in value):
        raise SchemaError(f"{where} holds control characters ({ascii(value[:60])})")


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _kind(value: Any) -> str:
    """What a value is, short enough for one line."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, str):
        return f"text ({ascii(value[:40])})"
    return (
        {None: "null", True: "true", False: "false"}.get(value, repr(value)[:40])
        if value is None or isinstance(value, bool)
        else repr(value)[:40]
    )
