"""The cells of a table's columns as texts or turns, and what is wrong with them, by row and column."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warp_ds.data.sample import Message
from warp_ds.data.table import Table, kind_of
from warp_ds.data.turns import NotText, turns_of
from warp_ds.errors import DataError

REFUSAL_FILE = "--refusal_file "
"""How a table's source begins that is a file of refusals."""


class Place:
    """Turns a `NotText` into a `DataError` that names source, row and column."""

    def __init__(self, rows: Table, row: int, column: str) -> None:
        self.rows, self.row, self.column = rows, row, column

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, NotText):
            hint = "" if _is_file(self.rows) else " (the loader of `datasets` may have made it so: fetch the file and name it)"
            raise DataError(f"{self.rows.source}, {self.rows.place(self.row)}: column {self.column!r} {error}{hint}") from error


def cells(rows: Table, column: str, role: str) -> list[list[Message]]:
    """The turns of one column, whose cells hold a text or a list of turns."""
    parsed: list[list[Message] | None] = []
    for row, value in enumerate(rows.column(column)):
        with Place(rows, row, column):
            parsed.append(_turns_or_text(value, role))
    refuse_rows(rows, column, [turns is None for turns in parsed], [turns is not None and _blank(turns) for turns in parsed])
    whole = [turns for turns in parsed if turns is not None]
    for row, turns in enumerate(whole):
        check_characters("".join(str(turn["content"]) for turn in turns), column, rows, row)
    return whole


def _turns_or_text(value: Any, role: str) -> list[Message] | None:
    """A cell's turns: a text is one turn of `role`; None for a hole."""
    if value is None:
        return None
    if type(value) is str:
        return [{"role": role, "content": value}]
    turns = turns_of(value)
    if turns is None:
        raise NotText(f"is {kind_of(value)}, not a text: give one text a row, in quotes where it is a number")
    if turns[1]:
        raise NotText("has turns that are marked as not to be trained on: give the whole conversation as 'messages'")
    return turns[0]


def _blank(turns: Sequence[Message]) -> bool:
    return any(not turn["content"].strip() and not turn.get("tool_calls") for turn in turns if turn["role"] != "tool")


def texts(rows: Table, column: str, holes: bool = False) -> list[str]:
    """The texts of one column. `DataError`, by row, for what is no text, and but for `holes` for empty and missing ones."""
    values = rows.column(column)
    for row, value in enumerate(values):
        with Place(rows, row, column):
            if value is not None and type(value) is not str:
                raise NotText(f"is {kind_of(value)}, not a text: give one text a row, in quotes where it is a number")
    if not holes:
        refuse_rows(
            rows, column, [value is None for value in values], [value is not None and not value.strip() for value in values]
        )
    for row, value in enumerate(values):
        check_characters(value or "", column, rows, row)
    return [value or "" for value in values]


def texts_of(rows: Table, column: str) -> list[str]:
    """The texts of one column, none missing or empty. Raises `DataError`, by row."""
    return [str(turns[-1]["content"]) for turns in cells(rows, column, "assistant")]


def _is_file(rows: Table) -> bool:
    return rows.lines is not None or Path(rows.source.removeprefix(REFUSAL_FILE)).expanduser().exists()


def refuse_rows(rows: Table, column: str, missing: Sequence[bool], empty: Sequence[bool]) -> None:
    """DataError, with the rows, where some are missing or empty."""
    for what, flags in (("missing", missing), ("empty", empty)):
        wrong = [row for row, flag in enumerate(flags) if flag]
        if wrong:
            hint = (
                " (the CSV reader of `datasets` takes NA, None and null for holes: fetch the file and name it)"
                if (what == "missing" and not _is_file(rows))
                else ""
            )
            of = rows.number(len(flags) - 1) + 1
            raise DataError(
                f"{rows.source}: column {column!r} is {what} in {len(wrong)} of {of} rows "
                f"{rows.places(wrong)}: fill or remove them{hint}"
            )


def check_characters(text: str, column: str, rows: Table, row: int) -> None:
    """DataError for half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start : error.end]
        raise DataError(
            f"{rows.source}, {rows.place(row)}: column {column!r} holds half a surrogate pair ({half!r}), "
            "which is no character: write the character itself"
        ) from error
