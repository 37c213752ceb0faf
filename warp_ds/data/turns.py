"""Turns of conversations, in the forms in which people write them, as chat templates take them.

The forms are TRL's (`role`, `content`) and ShareGPT's (`from`, `value`). What a turn has beside its text is read by name, or
refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from warp_ds.data.sample import Message
from warp_ds.data.table import Number, kind_of

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
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALLS = ("function_call", "tool_call")
"""Roles of ShareGPT turns whose text is a tool call as JSON."""
_TRAINED = ("weight", "train")
"""How a turn says whether it is trained on."""
_HARMLESS = ("id", "name", "weight", "train", "index", "language", "markdown")
_KEPT = ("tool_calls", "tool_call_id", "reasoning_content", "thinking")
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class NotText(ValueError):
    """A value that is no text; the message says what it is, and what to do."""


def turns_of(value: Any) -> tuple[list[Message], frozenset[int]] | None:
    """The turns of a list, and those that it marks as not trained; None where `value` is no list of turns. Raises `NotText`."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        return None
    turns: list[Message] = []
    skipped = set()
    for number, turn in enumerate(value):
        if not isinstance(turn, Mapping):
            return None
        keys = next((keys for keys in (("role", "content"), ("from", "value")) if keys[0] in turn), None)
        if keys is None or keys[1] not in turn and not turn.get("tool_calls") and not turn.get("function_call"):
            return None
        try:
            message, trained = _turn(turn, *keys)
        except NotText as error:
            raise NotText(f"is a conversation whose turn {number} {error}") from error
        turns.append(message)
        if not trained:
            skipped.add(number)
    return turns, frozenset(skipped)


def _turn(turn: Mapping[str, Any], who: str, what: str) -> tuple[Message, bool]:
    """A turn, and whether it is trained on."""
    given = str(turn[who]).lower()
    role = ROLES.get(given)
    if role is None:
        raise NotText(f"is of the role {turn[who]!r}, which is not known: use system, user, assistant or tool")
    known = (who, what, *_HARMLESS, *_KEPT, "function_call")
    more = sorted(key for key, item in turn.items() if key not in known and item not in (None, [], {}, ""))
    trained = [_switch(turn[key], key) for key in _TRAINED if turn.get(key) is not None]
    if more:
        raise NotText(f"has {', '.join(map(repr, more))} beside its text: those are not read; take them out")
    message: Message = {"role": role}
    calls = _calls(turn, given, what)
    if calls:
        message["tool_calls"] = calls
    content = None if given in CALLS else turn.get(what)
    message["content"] = "" if content is None and calls else _content(content)
    for key in _KEPT[1:]:
        if turn.get(key) not in (None, ""):
            message[key] = turn[key] if isinstance(turn[key], str) else _refuse(key, turn[key])
    if role == "tool" and isinstance(turn.get("name"), str):
        message["name"] = turn["name"]
    return message, all(trained)


def _switch(value: Any, key: str) -> bool:
    text = str(value).lower()
    if text not in ("0", "0.0", "1", "1.0", "true", "false"):
        raise NotText(f"has {key!r} beside its text, which is {kind_of(value)}: a turn is trained (1) or not (0)")
    return text in ("1", "1.0", "true")


def _refuse(key: str, value: Any) -> str:
    raise NotText(f"has {key!r} beside its text, which is {kind_of(value)}, not a text")


def _content(content: Any) -> str:
    """The text of a turn; that of a list of text parts is theirs, one after another."""
    if type(content) is str:
        return content
    if isinstance(content, Sequence) and content and all(isinstance(part, Mapping) for part in content):
        for part in content:
            if part.get("type", "text") != "text":
                raise NotText(f"holds a part of the type {part['type']!r}: texts alone are read; leave such rows out")
        texts = [part.get("text") for part in content]
        if all(type(text) is str for text in texts):
            return "".join(map(str, texts))
    if content is None:
        raise NotText("has no content: fill it, or leave the row out")
    raise NotText(f"is {kind_of(content)}, not a text: give a text, or a list of parts of the type 'text'")


# ---------------------------------------------------------------- tools


def _calls(turn: Mapping[str, Any], given: str, what: str) -> list[dict[str, Any]]:
    """The tool calls of a turn, as templates take them: arguments are an object."""
    written: Any = turn.get("tool_calls") or ([turn["function_call"]] if turn.get("function_call") else [])
    if given in CALLS:
        written = turn.get(what)
    written = parsed(written) if isinstance(written, str) else written
    calls = []
    for call in [written] if isinstance(written, Mapping) else written or ():
        call = plain(call)
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise NotText(f"has a tool call that is {kind_of(call)}: an object with name and arguments is wanted")
        arguments = function.get("arguments", function.get("parameters", {}))
        if isinstance(arguments, str):
            arguments = plain(parsed(arguments) if arguments.strip() else {})
        identity = {"id": call["id"]} if call.get("id") else {}
        calls.append({**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return calls


def tools_of(value: Any) -> list[dict[str, Any]]:
    """Definitions of tools: a list of JSON schemas, as it is or written as a text. Raises `NotText`."""
    value = parsed(value) if isinstance(value, str) and value.strip() else value
    if value in (None, "", [], {}):
        return []
    plain_value = plain(value)
    if not isinstance(plain_value, list) or not all(isinstance(tool, dict) for tool in plain_value):
        raise NotText(f"is {kind_of(value)}, not a list of tools as JSON schemas")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in plain_value]
    if not all(isinstance(tool["function"], dict) and isinstance(tool["function"].get("name"), str) for tool in tools):
        raise NotText("has a tool without a name: give each as a JSON schema with name, description and parameters")
    return tools


def plain(value: Any) -> Any:
    """JSON with its numbers as numbers."""
    if isinstance(value, Number):
        return json.loads(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def parsed(text: str) -> Any:
    """A text's JSON. Raises `NotText`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise NotText(f"is the text {text[:60]!r}, which is no JSON ({error}): write it as json.dumps does") from error


# ---------------------------------------------------------------- texts that hold turns


def dialogue_of(text: str) -> list[Message] | None:
    """The turns of a text in the form of Anthropic's preference data ('\\n\\nHuman: …\\n\\nAssistant: …'); None for another."""
    if not text.startswith(_HUMAN) or _ASSISTANT not in text:
        return None
    turns: list[Message] = []
    for piece in text.replace(_ASSISTANT, f"{_HUMAN}\0").split(_HUMAN)[1:]:
        role = "assistant" if piece.startswith("\0") else "user"
        turns.append({"role": role, "content": piece.removeprefix("\0").strip()})
    return turns


def roles_of(turns: Sequence[Message]) -> str:
    """'system, user, assistant, … (9)': the first few roles."""
    roles = [str(turn["role"]) for turn in turns]
    return ", ".join(roles[:6]) + (f", … ({len(roles)})" if len(roles) > 6 else "")
