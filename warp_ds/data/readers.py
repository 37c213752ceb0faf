"""Reads local files of rows (csv, tsv, json, jsonl, parquet, arrow; gzipped ones too) with every value as it is written.

Python's own csv and json modules and pyarrow rather than the loaders of `datasets`, which re-type what they read: `007`
becomes 7, `NA` a hole, and a date in a JSON string a timestamp.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warp_ds.errors import DataError
from warp_ds.store.files import parse_json

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


@dataclass(frozen=True)
class Table:
    """Rows of named columns."""

    source: str
    columns: Sequence[str]
    """In the order in which they first appear."""
    rows: Sequence[Mapping[str, Any]]
    """A text is a `str`, a hole None or absent; anything else is as its format has it."""
    lines: Sequence[int] | None = None
    """The line of the file at which each row begins, from 1; None where rows have none."""
    where: Callable[[int], str] | None = None
    """Where each row stands, in words, of a table of several files."""

    def __len__(self) -> int:
        return len(self.rows)

    def column(self, name: str) -> list[Any]:
        """The values of one column, None where a row has none."""
        return [row.get(name) for row in self.rows]

    def place(self, row: int) -> str:
        """'row 3 (line 5)': rows count from 0, lines from 1."""
        if self.where is not None:
            return f"row {row} ({self.where(row)})"
        return f"row {row}" + ("" if self.lines is None else f" (line {self.lines[row]})")

    def places(self, rows: Sequence[int], most: int = 5) -> str:
        """'(rows 3, 7), lines 5, 9': the first few of ``rows``."""

        def first(numbers: Sequence[int]) -> str:
            return ", ".join(map(str, numbers[:most])) + (", …" if len(numbers) > most else "")

        if self.where is not None:
            return f"(rows {first(rows)}), {'; '.join(self.where(row) for row in rows[:most])}"
        return f"(rows {first(rows)})" + ("" if self.lines is None else f", lines {first([self.lines[row] for row in rows])}")


def read_file(path: Path, source: str) -> Table:
    """The rows of a local file, by its extension (a key of READERS). Raises `DataError`, naming ``source``."""
    table = READERS[suffix_of(path)](path, source)
    if not table.rows:
        raise DataError(f"{source} has no rows: give a file with at least one sample")
    return table


def suffix_of(path: Path) -> str:
    """The extension that says how a file is read, in small letters: '.jsonl' of 'a.JSONL.gz'."""
    path = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return path.suffix.lower()


def read_bytes(path: Path, source: str) -> bytes:
    """A file's bytes, unpacked where its name ends in .gz. Raises `DataError`."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{source} cannot be unpacked as gzip: {error}: it is cut or no gzip file") from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}") from error


def read_text(path: Path, source: str) -> str:
    """A UTF-8 file's text, without a byte-order mark and with its line ends as they are.

    Raises `DataError` with the line of the first byte that is no UTF-8, and the encoding where that is certain.
    """
    data = read_bytes(path, source)
    marked = next((name for mark, name in BYTE_ORDER_MARKS if data.startswith(mark)), None)
    if marked is not None:
        raise DataError(
            f"{source}, line 1 (row 0): the file is {marked} (it begins with that byte-order mark), not UTF-8: "
            f"{_convert(marked, path)}"
        )
    if b"\0" in data[:4096]:
        raise DataError(
            f"{source}, line {data[: data.index(0)].count(10) + 1} (row 0): there are NUL bytes, as in UTF-16 "
            f"without a byte-order mark: {_convert('UTF-16LE', path)}, or give a text file"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + (3 if data.startswith(codecs.BOM_UTF8) else 0)
        line = data[:at].count(b"\n") + 1
        begins = data[:at].rpartition(b"\n")[2][-40:].decode("utf-8", "replace")
        row = max(0, line - 1 - (suffix_of(path) in (".csv", ".tsv")))
        raise DataError(
            f"{source}, line {line} (row {row} where each row is a line): byte "
            f"0x{data[at]:02x} after {begins!r} is no UTF-8. Where the file is Windows-1252 or Latin-1 (Excel's plain "
            f"'CSV'), {_convert('WINDOWS-1252', path)}"
        ) from error


def _convert(encoding: str, path: Path) -> str:
    return f"convert it with iconv -f {encoding} -t UTF-8 {path.name} > {path.stem}.utf8{path.suffix}"


# ---------------------------------------------------------------- csv


def read_csv(path: Path, source: str) -> Table:
    """A comma-separated file (.tsv: by tabs) with a header line, quoted as in RFC 4180; an empty cell is an empty text."""
    tabs = suffix_of(path) == ".tsv"
    text = read_text(path, source)
    limit = csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter="\t" if tabs else ",")
    records: list[tuple[int, list[str]]] = []
    line = 1
    try:
        for record in reader:
            if record:  # nothing on the line
                records.append((line, record))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{source}, {_csv_row(records)} (line {line}) cannot be read as csv with at least one sample: {error}: "
            'a quote inside a quoted cell is doubled ("")'
        ) from error
    finally:
        csv.field_size_limit(limit)
    if not records:
        raise DataError(f"{source} is empty: give a csv file with a header and at least one sample")
    header = records.pop(0)[1]
    if not records:
        raise DataError(f"{source} has a header ({', '.join(header)}) and no rows: give a csv file with at least one sample")
    doubled = sorted({name for name in header if header.count(name) > 1})
    if doubled:
        raise DataError(f"{source} has more than one column {doubled[0]!r}: give each its own name")
    for row, (line, record) in enumerate(records):
        if len(record) != len(header):
            raise DataError(
                f"{source}, row {row} (line {line}) has {len(record)} cells, but the header has {len(header)} "
                f"({', '.join(header)}): put cells that hold a {'tab' if tabs else 'comma'}, a quote or a line "
                "break in double quotes"
            )
    rows = [dict(zip(header, record, strict=True)) for _, record in records]
    return Table(source, header, rows, [line for line, _ in records])


def _csv_row(records: Sequence[Any]) -> str:
    return f"row {len(records) - 1}" if records else "the header"


# ---------------------------------------------------------------- json


def read_json_lines(path: Path, source: str) -> Table:
    """One JSON object a line; blank lines are passed over."""
    return table_of(_values_of_lines(path, source), path, source)


def read_json(path: Path, source: str) -> Table:
    """A list of objects; or, as many call it, one object a line."""
    return table_of(json_values(path, source), path, source)


def json_values(path: Path, source: str) -> list[tuple[int | None, Any]]:
    """(line, value) of each line of a jsonl file, or of each item of a json list. Raises `DataError`."""
    if suffix_of(path) in (".jsonl", ".ndjson"):
        return _values_of_lines(path, source)
    try:
        value = _parse(read_text(path, source))
    except ValueError as error:
        if "Extra data" in str(error):
            return _values_of_lines(path, source)
        raise DataError(f"{source} cannot be read as json with at least one sample: {_reason(error, whole=True)}") from error
    return _items(value, source)


def _values_of_lines(path: Path, source: str) -> list[tuple[int | None, Any]]:
    # Not splitlines: a JSON text may hold U+2028 and its like as they are.
    lines = [(number, line) for number, line in enumerate(read_text(path, source).split("\n"), 1) if line.strip()]
    if not lines:
        raise DataError(f"{source} is empty: give a jsonl file with at least one sample")
    values: list[tuple[int | None, Any]] = []
    for row, (number, line) in enumerate(lines):
        try:
            values.append((number, _parse(line)))
        except ValueError as error:
            raise DataError(
                f"{source} cannot be read as json, one object a line: row {row} (line {number}): {_reason(error)}, "
                f"in {line[:60]!r}"
            ) from error
    return _items(values[0][1], source) if len(values) == 1 and isinstance(values[0][1], list) else values


def _items(value: Any, source: str) -> list[tuple[int | None, Any]]:
    if value == []:
        raise DataError(f"{source} is an empty list: give a file with at least one sample")
    return [(None, item) for item in (value if isinstance(value, list) else [value])]


def table_of(values: Sequence[tuple[int | None, Any]], path: Path, source: str) -> Table:
    """The table of (line, object); DataError for what is no object."""
    rows: list[dict[str, Any]] = []
    for row, (line, value) in enumerate(values):
        if not isinstance(value, dict):
            where = f"{source}, row {row}" + ("" if line is None else f" (line {line})")
            raise DataError(
                f'{where} is {kind_of(value)}, not an object with named columns such as {{"prompt": "…", "response": "…"}}'
            )
        rows.append(value)
    inside = [name for name, item in rows[0].items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(rows) == 1 and len(inside) == 1 and not any(key in rows[0][inside[0]][0] for key in ("role", "from")):
        # What pandas, the hub's viewer and many an API write: the rows are one level down.
        raise DataError(
            f"{source} is one object, whose {inside[0]!r} holds a list of {len(rows[0][inside[0]])} objects: give "
            f"that list alone (jq .{inside[0]} {path.name} > rows.json)"
        )
    lines = [line for line, _ in values if line is not None]
    columns = list(dict.fromkeys(name for of_row in rows for name in of_row))
    return Table(source, columns, rows, lines if len(lines) == len(rows) else None)


def _parse(text: str) -> Any:
    """JSON with numbers as they are written, and no key twice; ValueError."""
    return parse_json(text, parse_int=Number, parse_float=Number, parse_constant=Number)


class Number(str):
    """A JSON number, as it is written."""


def _reason(error: ValueError, whole: bool = False) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg} (line {error.lineno}, column {error.colno})" if whole else f"{error.msg} (column {error.colno})"


# ---------------------------------------------------------------- parquet and arrow


def read_parquet(path: Path, source: str) -> Table:
    """A parquet file."""
    import pyarrow.parquet

    return _arrow_table(lambda data: pyarrow.parquet.read_table(data), path, source)


def read_arrow(path: Path, source: str) -> Table:
    """An arrow file, of either kind (stream, as `datasets` writes, or random access)."""
    import pyarrow

    def read(data: Any) -> Any:
        try:
            return pyarrow.ipc.open_file(data).read_all()
        except pyarrow.ArrowInvalid:
            data.seek(0)
            return pyarrow.ipc.open_stream(data).read_all()

    return _arrow_table(read, path, source)


def _arrow_table(read: Callable[[Any], Any], path: Path, source: str) -> Table:
    import pyarrow

    kind = suffix_of(path)[1:]
    try:
        table = read(io.BytesIO(read_bytes(path, source)) if path.suffix.lower() == ".gz" else pyarrow.memory_map(str(path)))
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{source} cannot be read as {kind} with at least one sample: {str(error).splitlines()[0]}") from error
    names = table.column_names
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise DataError(f"{source} has more than one column {doubled[0]!r}: give each its own name")
    try:
        return Table(source, names, [without_holes(row) for row in table.to_pylist()])
    except UnicodeDecodeError as error:
        raise DataError(f"{source} holds text that is not UTF-8: {error}") from error


def without_holes(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of typed columns without the holes that one type for all puts into every object of a list."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items() if item is not None}
        return [filled(item) for item in value] if isinstance(value, list) else value

    return {name: filled(value) for name, value in row.items()}


# ---------------------------------------------------------------- values


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


Reader = Callable[[Path, str], Table]
READERS: dict[str, Reader] = {
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".ndjson": read_json_lines,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
    ".arrow": read_arrow,
}
"""By extension, before which .gz is passed over."""
