"""From a table's rows to samples: which of the known shapes the columns have, and what each row becomes.

Shapes, in the order in which they are looked for: conversations, preference pairs, prompt and response, bare text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from warp_ds.data.cells import Place, cells, check_characters, refuse_rows, texts
from warp_ds.data.sample import Message, Sample
from warp_ds.data.table import Table, kind_of
from warp_ds.data.turns import CONVERSATION_COLUMNS, NotText, dialogue_of, parsed, roles_of, tools_of, turns_of
from warp_ds.errors import DataError

log = logging.getLogger(__name__)

PROMPT_COLUMNS = ("prompt", "question", "instruction", "input")
RESPONSE_COLUMNS = ("response", "answer", "output", "completion")
SYSTEM_COLUMNS = ("system", "system_prompt")
CHOSEN = "chosen"
NOT_TEXT = ("image", "images", "audio", "audios", "video", "videos")
PROMPT_PARTS = (
    *PROMPT_COLUMNS,
    *CONVERSATION_COLUMNS,
    *SYSTEM_COLUMNS,
    "inputs",
    "query",
    "context",
    "contexts",
    "passage",
    "passages",
    "document",
    "documents",
    "article",
    "paragraph",
    "background",
    "story",
    "evidence",
    "choices",
    "options",
    "history",
    "tools",
    "functions",
    *NOT_TEXT,
    "premise",
    "hypothesis",
)
"""Columns that look like a part of the prompt, or like another prompt: where one is not used, that is said."""


@dataclass(frozen=True)
class Layout:
    """Where a known hub data set keeps its pairs; `keep` picks the rows whose `response` can be taught."""

    prompt: str
    response: str
    config: str | None = None
    keep: Callable[[dict[str, Any]], bool] | None = None


@dataclass(frozen=True)
class Wanted:
    """What a reader asks of a source."""

    prompt_column: str | None = None
    response_column: str | None = None
    layout: Layout | None = None
    refusals: bool = False
    """Answers come from elsewhere where the source has none."""
    prompts: bool = False
    """The prompts alone are wanted: some rows may have an answer and others none."""

    @property
    def guessed(self) -> bool:
        return self.prompt_column is None and self.layout is None


def samples_of(rows: Table, wanted: Wanted) -> list[Sample]:
    """A sample of every row, in order. Raises `DataError`, by row and column, for what is missing, empty or no text."""
    shape = _conversation_column(rows, wanted)
    has_prompt = any(name in rows.columns for name in PROMPT_COLUMNS)
    bare = not wanted.prompts and wanted.guessed and not has_prompt and _has(rows, "text", RESPONSE_COLUMNS, wanted)
    rows.settled.same("the column of conversations or bare texts", shape or ("text" if bare else None), rows)
    if shape is not None:
        return _numbered(_conversations(rows, shape, wanted), rows)
    if bare:
        return [Sample(text=text, row=rows.number(row)) for row, text in enumerate(texts(rows, "text"))]
    return _pairs(rows, wanted)


def _numbered(samples: list[Sample], rows: Table) -> list[Sample]:
    """Samples whose `row` is of their table, with that of their source."""
    return samples if rows.numbers is None else [replace(sample, row=rows.number(sample.row)) for sample in samples]


def _has(rows: Table, column: str, others: Sequence[str], wanted: Wanted) -> bool:
    """Whether `column` is the one to read: it is there, none of the `others` is, and no flag names another."""
    return column in rows.columns and wanted.response_column is None and not any(name in rows.columns for name in others)


# ---------------------------------------------------------------- conversations


def _conversation_column(rows: Table, wanted: Wanted) -> str | None:
    """The column that holds whole conversations, where the rows have no other prompt."""
    column = wanted.prompt_column
    if column is None and wanted.response_column is None and not any(name in rows.columns for name in PROMPT_COLUMNS):
        column = next((name for name in CONVERSATION_COLUMNS if name in rows.columns), None)
        if column is None and wanted.guessed and _has(rows, CHOSEN, RESPONSE_COLUMNS, wanted):
            column = CHOSEN
    return column if column in (*CONVERSATION_COLUMNS, CHOSEN) and column in rows.columns else None


def _conversations(rows: Table, column: str, wanted: Wanted) -> list[Sample]:
    bare = "text" in rows.columns and any(value is None for value in rows.column(column))
    extras = _Extras(rows, [column, *RESPONSE_COLUMNS, *(["text"] if bare else [])], True)
    if column == CHOSEN:
        _say_preferred(rows)
    conversations = []
    for row, value in enumerate(rows.column(column)):
        if value is None and bare and isinstance(rows.rows[row].get("text"), str):
            conversations.append(Sample(text=rows.rows[row]["text"], row=row))
            continue
        with Place(rows, row, column):
            turns, skipped = _whole(value)
            conversations.append(_checked(extras.around(Sample(turns, untrained=skipped, row=row)), wanted))
    return _written(conversations, column, rows)


def _whole(value: Any) -> tuple[list[Message], frozenset[int]]:
    """The turns of a conversation's cell."""
    if isinstance(value, str):
        dialogue = dialogue_of(value)
        if dialogue is not None:
            return dialogue, frozenset()
        value = parsed(value) if value.lstrip().startswith("[") else value
    if value is None:
        return [], frozenset()
    turns = turns_of(value)
    if turns is None:
        raise NotText(f"is {kind_of(value)}, not a list of turns (role and content, or from and value)")
    return turns


def _checked(sample: Sample, wanted: Wanted) -> Sample:
    """A conversation that can be trained on, or with `prompts` answered; turns after its last answer are left to `_written`."""
    roles = [turn["role"] for turn in sample.messages]
    if roles and "user" not in roles:
        raise NotText(f"is a conversation of the turns {roles_of(sample.messages)}: a user's turn is wanted")
    answers = {i for i, role in enumerate(roles) if role == "assistant"}
    if roles and not answers and not wanted.prompts and not wanted.refusals:
        raise NotText(f"is a conversation of the turns {roles_of(sample.messages)}: an assistant's turn to train is wanted")
    if answers and answers <= sample.untrained and not wanted.prompts:
        raise NotText("is a conversation that marks every answer as not to be trained on ('weight' or 'train'): leave it out")
    return sample


def _written(samples: list[Sample], column: str, rows: Table) -> list[Sample]:
    """The samples; DataError, with the rows, for turns without content and for what no file can hold."""
    blank = [
        any(
            not (turn["content"].strip() or turn.get("tool_calls"))
            for turn in sample.messages
            if turn["role"] in ("user", "assistant")
        )
        for sample in samples
    ]
    missing = [sample.text is None and not sample.messages for sample in samples]
    refuse_rows(rows, column, missing, blank)
    for sample in samples:
        check_characters(json.dumps(sample.as_row(), ensure_ascii=False), column, rows, sample.row)
    return samples


# ---------------------------------------------------------------- prompt and response


def _pairs(rows: Table, wanted: Wanted) -> list[Sample]:
    """Samples of a prompt's column and a response's; either may hold a text or turns."""
    layout = wanted.layout
    prompt = _pick("--prompt_column", wanted.prompt_column, layout.prompt if layout else None, PROMPT_COLUMNS, rows)
    response = None if wanted.prompts else _response_column(rows, wanted)
    rows.settled.same("the prompts' column", prompt, rows)
    rows.settled.same("the responses' column", response, rows)
    if response == prompt:
        raise DataError(
            f"{rows.source}: the column {prompt!r} would be both prompt and response: name the other one with "
            "--prompt_column or --response_column"
        )
    if layout and layout.keep and response == layout.response:
        rows = rows.only([number for number, row in enumerate(rows.rows) if layout.keep(dict(row))])
    bad = [row for row, label in enumerate(rows.column("label")) if str(label).lower() == "false"]
    if bad and response is not None:
        raise DataError(
            f"{rows.source}: 'label' is false in {len(bad)} rows {rows.places(bad)}, whose responses are marked as "
            "bad ones: leave those rows out"
        )
    used = [prompt, *([] if response is None else [response])]
    inputs = _alpaca_inputs(rows, prompt, wanted)
    extras = _Extras(rows, used + (["input"] if inputs else []), wanted.guessed)
    befores = cells(rows, prompt, "user")
    answers = None if response is None else cells(rows, response, "assistant")
    if response is not None and wanted.guessed:
        _say_other_responses(rows, response)
    pairs = []
    for row, before in enumerate(befores):
        if inputs and inputs[row].strip():
            # As Alpaca's own template does: an empty input adds nothing.
            before = [*before[:-1], {**before[-1], "content": f"{before[-1]['content']}\n\n{inputs[row]}"}]
        after = [] if answers is None else answers[row]
        # The whole conversation, as preference data often have it.
        if len(after) > len(before) and after[: len(before)] == before:
            after = after[len(before) :]
        with Place(rows, row, prompt):
            if before[-1]["role"] not in ("user", "tool"):
                raise NotText(
                    f"is a conversation of the turns {roles_of(before)}: the last turn before a response is a user's "
                    "or a tool's"
                )
        with Place(rows, row, response or ""):
            if after and (after[0]["role"], after[-1]["role"]) != ("assistant", "assistant"):
                raise NotText(
                    f"is a conversation of the turns {roles_of(after)}: a response begins and ends with an assistant's"
                )
        with Place(rows, row, prompt):
            pairs.append(extras.around(Sample([*before, *after], row=row)))
    return _numbered(pairs, rows)


def _response_column(rows: Table, wanted: Wanted) -> str | None:
    """The column of the responses; None where they come from elsewhere."""
    given, layout = wanted.response_column, wanted.layout
    named = given or (layout.response if layout else None)
    if named is None and not any(name in rows.columns for name in RESPONSE_COLUMNS):
        if CHOSEN in rows.columns:
            _say_preferred(rows)
            return CHOSEN
        if not wanted.refusals:
            raise DataError(
                f"{rows.source} has no response column (columns: {listed(rows.columns)}): name it with "
                "--response_column, or give refusals for its prompts with --refusal_file"
            )
        return None
    if named is not None and named not in rows.columns and given is None and wanted.refusals:
        return None  # a copy of a known data set that lacks its responses
    return _pick("--response_column", given, named, RESPONSE_COLUMNS, rows)


def _pick(flag: str, given: str | None, known: str | None, guesses: tuple[str, ...], rows: Table) -> str:
    """The column that the flag names, or where it is not given the one of a known data set, or the first guess there is."""
    columns, source = rows.columns, rows.source
    if given is not None and given not in columns:
        raise DataError(f"{source} has no column {given!r}, which {flag} names; its columns are {listed(columns)}")
    if given is not None:
        return given
    if known is not None:
        guesses = (known,)
    for guess in guesses:
        if guess in columns:
            return guess
    if any({who, what} <= set(columns) for who, what in (("role", "content"), ("from", "value"))):
        raise DataError(
            f"{source}: its rows are the turns of a conversation (columns {listed(columns)}): give a conversation a row, as "
            '{"messages": [{"role": "user", "content": "…"}, …]}'
        )
    hint = ""
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"):
        hint = " (are they separated by something else than a comma?)"
    raise DataError(
        f"{source} has none of the columns {', '.join(guesses)}; its columns are {listed(columns)}{hint}: name one with {flag}"
    )


def listed(columns: Sequence[str]) -> str:
    """Names of columns, in quotes where spaces would be lost."""
    return ", ".join(name if name and name == name.strip() else repr(name) for name in columns)


def _alpaca_inputs(rows: Table, prompt: str, wanted: Wanted) -> list[str] | None:
    """Alpaca's `input` of every row, where the prompt is its `instruction`."""
    if not wanted.guessed or prompt != "instruction" or "input" not in rows.columns:
        return None
    how = "the prompt is 'instruction' and, where it is not empty, 'input' after a blank line"
    rows.settled.say(log.info, f"{rows.source}: {how}")
    return texts(rows, "input", holes=True)


# ---------------------------------------------------------------- what stands around the turns


class _Extras:
    """Columns beside the turns: a system prompt, earlier exchanges, tools. Warns of what looks like one and is not used."""

    def __init__(self, rows: Table, used: Sequence[str], guessed: bool) -> None:
        def readable(name: str, test: Callable[[Any], bool]) -> list[Any] | None:
            values = rows.column(name)
            filled = [value for value in values if value not in (None, "", [])]
            if not guessed or not filled or name in used:
                return None
            good = all(map(test, filled))
            rows.settled.same(f"whether the column {name!r} is read", good, rows)
            return values if good else None

        self.system = next((values for name in SYSTEM_COLUMNS if (values := readable(name, _is_text))), None)
        self.history = readable("history", _is_exchanges)
        self.tools = readable("tools", _is_tools)
        if guessed:
            _refuse_pictures(rows)
        taken = [name for name in SYSTEM_COLUMNS if self.system is not None and name in rows.columns][:1]
        taken += ["history"] * (self.history is not None) + ["tools"] * (self.tools is not None)
        if taken:
            rows.settled.say(log.info, f"{rows.source}: {_are(taken)} read as a part of the prompt")
        _say_unused(rows, [*used, *taken])

    def around(self, sample: Sample) -> Sample:
        """The sample with its row's system prompt, earlier exchanges and tools. Raises `NotText`."""
        row, turns, untrained = sample.row, list(sample.messages), sample.untrained
        earlier: list[Message] = []
        if self.system is not None and self.system[row] not in (None, ""):
            if turns and turns[0]["role"] == "system":
                raise NotText("begins with a system prompt, and the row has another one in a column of its own: keep one")
            earlier.append({"role": "system", "content": self.system[row]})
        for question, reply in (self.history[row] or ()) if self.history is not None else ():
            earlier += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
        tools = tools_of(self.tools[row]) if self.tools is not None else []
        untrained = frozenset(i + len(earlier) for i in untrained)
        return replace(sample, messages=[*earlier, *turns], tools=tools, untrained=untrained) if earlier or tools else sample


def _is_text(value: Any) -> bool:
    return type(value) is str


def _is_tools(value: Any) -> bool:
    return isinstance(value, str) or isinstance(value, list) and all(isinstance(tool, dict) for tool in value)


def _is_exchanges(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(map(_is_text, pair)) for pair in value
    )


def _refuse_pictures(rows: Table) -> None:
    for name in (name for name in rows.columns if name.lower() in NOT_TEXT):
        seen = [row for row, value in enumerate(rows.column(name)) if value not in (None, "", [], {})]
        if seen:
            raise DataError(
                f"{rows.source}: column {name!r} has content in {len(seen)} rows {rows.places(seen)}, and texts alone are "
                "read: leave those rows out, or say with --prompt_column what to read without it"
            )


def _say_unused(rows: Table, used: Sequence[str]) -> None:
    """Warns of columns with content that look like a part of the prompt and are not used."""
    unused = [
        name
        for name in rows.columns
        if name.lower() in PROMPT_PARTS
        and name not in used
        and any(value not in (None, "", [], {}) for value in rows.column(name))
    ]
    if unused:
        rows.settled.say(
            log.warning,
            f"{rows.source}: {_are(unused)} not part of the prompt, which is {used[0]!r}: where it should be, write both into "
            "one column and name it with --prompt_column",
        )


def _say_preferred(rows: Table) -> None:
    rows.settled.say(log.info, f"{rows.source}: the preferred answers ('chosen') are trained; 'rejected' is not used")


def _say_other_responses(rows: Table, response: str) -> None:
    others = [name for name in RESPONSE_COLUMNS if name in rows.columns and name != response]
    if others:
        rows.settled.say(log.warning, f"{rows.source}: the response is {response!r}; {_are(others)} not used")


def _are(columns: Sequence[str]) -> str:
    return f"column{'s' * (len(columns) > 1)} {', '.join(map(repr, columns))} {'are' if len(columns) > 1 else 'is'}"
