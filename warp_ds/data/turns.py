"""One prompt and one response from conversations: what holds a single user turn is read, anything else refused by name.

The forms are TRL's (`role`, `content`) and ShareGPT's (`from`, `value`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from warp_ds.data.readers import kind_of

CONVERSATION_COLUMNS = ("messages", "conversations", "conversation")
ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
}


class NotText(ValueError):
    """A value that is no text; the message says what it is, and what to do."""


def text_of(value: Any, role: str) -> str | None:
    """The text of a cell of the prompts (`role` 'user') or responses ('assistant'); None for a hole. Raises `NotText`.

    A list of one turn of that role is read as its text.
    """
    if value is None or type(value) is str:
        return value
    turns = turns_of(value)
    if turns is None:
        raise NotText(f"is {kind_of(value)}, not a text: give one text a row, in quotes where it is a number")
    if [who for who, _ in turns] != [role]:
        raise NotText(
            f"is a conversation of the turns {_named(turns)}: one {role} turn is read there, no system prompt, no "
            "earlier turns and no tools; give the prompt and the response as texts"
        )
    return turns[0][1]


def pair_of(value: Any, with_response: bool) -> tuple[str, str | None]:
    """Prompt and response of a conversation of one user turn and its answer. Raises `NotText`.

    Without `with_response` the answer may be missing.
    """
    turns = turns_of(value)
    if turns is None:
        raise NotText(f"is {kind_of(value)}, not a list of turns (role and content, or from and value)")
    roles = [who for who, _ in turns]
    if roles != ["user", "assistant"] and (with_response or roles != ["user"]):
        raise NotText(
            f"is a conversation of the turns {_named(turns)}: one user turn and its answer are read, no system "
            "prompt, no further turns and no tools; take one pair a row out of it"
        )
    return turns[0][1], turns[1][1] if len(turns) > 1 else None


def turns_of(value: Any) -> list[tuple[str, str]] | None:
    """(role, text) of each turn; None where `value` is no list of turns. `NotText` for a turn that is more than text."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return None
    found = []
    for number, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            return None
        keys = next((keys for keys in (("role", "content"), ("from", "value")) if all(key in turn for key in keys)), None)
        if keys is None:
            return None
        more = sorted(
            key
            for key, item in turn.items()
            if key not in (*keys, *_HARMLESS)
            and item not in (None, [], {}, "")
            or key in _TRAINED
            and item is not None
            and str(item).lower() not in ("1", "1.0", "true")
        )
        if more:
            raise NotText(
                f"is a conversation whose turn {number} has {', '.join(map(repr, more))} beside its text: those are "
                "not read; give the prompt and the response as texts"
            )
        found.append((ROLES.get(str(turn[keys[0]]).lower(), str(turn[keys[0]])), _content(turn[keys[1]], number)))
    return found


_TRAINED = ("weight", "train")
"""How a turn says that it is not, or less, to be trained on: read only where it says the opposite."""
_HARMLESS = ("id", "name", "weight", "train", "index", "language", "markdown")


def _content(content: Any, number: int) -> str:
    """The text of a turn; a list of one text part is its text."""
    if type(content) is str:
        return content
    if isinstance(content, Sequence) and len(content) == 1 and isinstance(content[0], Mapping):
        part = content[0]
        if part.get("type", "text") == "text" and type(part.get("text")) is str:
            return str(part["text"])
    raise NotText(f"is a conversation whose turn {number} is {kind_of(content)}, not a text")


def _named(turns: Sequence[tuple[str, str]]) -> str:
    roles = [who for who, _ in turns]
    return ", ".join(roles[:6]) + (f", … ({len(roles)})" if len(roles) > 6 else "")
