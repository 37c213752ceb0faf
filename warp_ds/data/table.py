"""Rows as they are read, where each stands, and what is settled of a source by its first rows."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

from warp_ds.errors import DataError


class Settled:
    """How a source's rows are read, which all its chunks share, and what was said of it."""

    def __init__(self) -> None:
        self._choices: dict[str, Any] = {}
        self._said: set[str] = set()

    def say(self, log: Callable[[str], None], text: str) -> None:
        """Logs a text once."""
        if text not in self._said:
            self._said.add(text)
            log(text)

    def same(self, what: str, choice: Any, rows: Table) -> None:
        """`DataError` where the rows before were read in another way."""
        before = self._choices.setdefault(what, choice)
        if before != choice:
            raise DataError(
                f"{rows.source}: {what} is {_word(before)} in the rows before {rows.place(0)}, and {_word(choice)} from there "
                "on: give rows of one shape, or name the columns"
            )


def _word(choice: Any) -> str:
    return "none" if choice is None else repr(choice)


@dataclass(frozen=True)
class Table:
    """Rows of named columns: all of a source, or a chunk."""

    source: str
    columns: Sequence[str]
    """In the order in which they first appear."""
    rows: Sequence[Mapping[str, Any]]
    """A text is a `str`, a hole None or absent; anything else is as its format has it."""
    lines: Sequence[int] | None = None
    """The line of the file at which each row begins, from 1; None where rows have none."""
    where: Callable[[int], str] | None = None
    """Where each row stands, in words, of a table of several files."""
    numbers: Sequence[int] | None = None
    """Which row of its source each is; None where they count from 0."""
    flat: bool = False
    """Its format knows texts alone (csv, tsv): lists are written as JSON."""
    settled: Settled = field(default_factory=Settled, compare=False)

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """The values of one column, None where a row has none."""
        return [row.get(name) for row in self.rows]

    def number(self, row: int) -> int:
        """Of its source, from 0."""
        return row if self.numbers is None else self.numbers[row]

    def place(self, row: int) -> str:
        """'row 3 (line 5)': rows count from 0, lines from 1."""
        if self.where is not None:
            return f"row {self.number(row)} ({self.where(row)})"
        return f"row {self.number(row)}" + ("" if self.lines is None else f" (line {self.lines[row]})")

    def places(self, rows: Sequence[int], most: int = 5) -> str:
        """'(rows 3, 7), lines 5, 9': the first few of ``rows``."""

        def first(numbers: Sequence[int]) -> str:
            return ", ".join(map(str, numbers[:most])) + (", …" if len(numbers) > most else "")

        numbers = [self.number(row) for row in rows]
        if self.where is not None:
            return f"(rows {first(numbers)}), {'; '.join(self.where(row) for row in rows[:most])}"
        return f"(rows {first(numbers)})" + (
            "" if self.lines is None else f", lines {first([self.lines[row] for row in rows])}"
        )

    def only(self, rows: Sequence[int]) -> Table:
        """These rows of it."""
        where, numbers = self.where, [self.number(row) for row in rows]
        return replace(
            self,
            rows=[self.rows[row] for row in rows],
            lines=None if self.lines is None else [self.lines[row] for row in rows],
            where=None if where is None else lambda row: where(rows[row]),
            numbers=numbers,
        )


def joined(tables: Sequence[Table], where: bool = False) -> Table:
    """One table of several; `where`: they are of several files, which are named."""
    if len(tables) == 1 and not where:
        return tables[0]
    columns = list(dict.fromkeys(name for table in tables for name in table.columns))
    rows = [row for table in tables for row in table.rows]
    if not where:
        lines = [line for table in tables for line in table.lines or ()]
        return Table(tables[0].source, columns, rows, lines if len(lines) == len(rows) else None, flat=tables[0].flat)
    ends = list(accumulate(map(len, tables)))

    def stands(row: int) -> str:
        number = bisect_right(ends, row)
        table = tables[number]
        return f"{table.source}, {table.place(row - ends[number] + len(table))}"

    return Table(tables[0].source, columns, rows, where=stands, flat=any(table.flat for table in tables))


def regrouped(tables: Iterable[Table], size: int, where: bool = False) -> Iterator[Table]:
    """The same rows in tables of at least `size` each, but the last, and no table is asked for before it is needed."""
    held: list[Table] = []
    for table in tables:
        held.append(table)
        if sum(map(len, held)) >= size:
            yield joined(held, where)
            held = []
    if sum(map(len, held)):
        yield joined(held, where)


# ---------------------------------------------------------------- values


class Number(str):
    """A JSON number, as it is written."""


def few(items: Sequence[Any], most: int = 10) -> str:
    """'a, b, … 3 more': the first few."""
    return ", ".join(map(str, items[:most])) + (f", … {len(items) - most} more" if len(items) > most else "")


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, Number):
        return f"the number {value}"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if value is None:
        return "missing"
    words = {"str": "a text", "dict": "an object", "list": "a list", "bytes": "bytes"}
    kind = type(value).__name__
    name = words.get(kind, f"a value of type {kind}")
    shown = str(value)
    return f"{name} ({shown[:60]}{'…' if len(shown) > 60 else ''})"
