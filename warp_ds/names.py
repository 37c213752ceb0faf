"""What a value that names something may be: a run's directory, a path, a word of a job script."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from warp_ds.registry import PHASES

LONGEST = 200
"""Bytes of a run's name: file systems take 255, and log files add to it."""
RESERVED = re.compile(rf"({'|'.join(PHASES)})_latest|\.+|.*\.(tmp|removed|part)")


def problem_of_name(name: str) -> str:
    """Why ``name`` cannot be a run's directory within another, in words; '' where it can."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        return "a run's name is one directory's name, without a slash"
    if name != name.strip() or name.startswith((".", "-", "~")):
        return "a run's name begins with a letter or a digit, and ends without a space"
    if RESERVED.fullmatch(name):
        return "that name is this program's own"
    if len(name.encode(errors="surrogateescape")) > LONGEST:
        return f"a run's name has at most {LONGEST} bytes"
    return ""


def control_character(value: Any) -> str:
    """The first character of a string, or of what a list or mapping holds, that is none to be read, as 'U+000A'; '' for none.

    Line ends and tabs, other control characters, those that turn the direction of a text, and lone surrogates.
    """
    if isinstance(value, str):
        for character in value:
            if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _DIRECTIONS:
                return f"U+{ord(character):04X}"
    elif isinstance(value, Mapping):
        return control_character([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple | set):
        return next((control for part in value if (control := control_character(part))), "")
    return ""


_DIRECTIONS = "".join(map(chr, (*range(0x202A, 0x202F), *range(0x2066, 0x206A))))


def printable(value: Any) -> Any:
    """``value`` with U+FFFD for what UTF-8 cannot hold and no reader sees (lone surrogates, control characters but line
    ends and tabs), in whatever strings lists and mappings hold."""
    if isinstance(value, str):
        return "".join("\ufffd" if unicodedata.category(c) in ("Cs", "Cc") and c not in "\n\t\r" else c for c in value)
    if isinstance(value, Mapping):
        return {printable(key): printable(part) for key, part in value.items()}
    return [printable(part) for part in value] if isinstance(value, list) else value
