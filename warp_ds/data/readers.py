"""Reads local files of rows (csv, tsv, json, jsonl, parquet, arrow; gzipped ones too) with every value as it is written, some
rows at a time.

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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

from warp_ds.data.table import Number, Table, joined, kind_of, regrouped
from warp_ds.errors import DataError
from warp_ds.store.files import parse_json

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


CHUNK = 10_000
"""Rows that are read at a time."""


def read_chunks(path: Path, source: str, size: int = CHUNK) -> Iterator[Table]:
    """The rows of a local file, by its extension (a key of READERS), at most `size` at a time and no further than is asked for.

    Raises `DataError`, naming ``source``.
    """
    some = False
    for table in regrouped(READERS[suffix_of(path)](path, source, size), size):
        some = True
        yield table
    if not some:
        raise DataError(f"{source} has no rows: give a file with at least one sample")


def read_file(path: Path, source: str) -> Table:
    """As `read_chunks`, all rows in memory."""
    return joined(list(read_chunks(path, source)))


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


@contextmanager
def opened(path: Path, source: str, newline: str) -> Iterator[TextIO]:
    """As `read_text`, a line at a time: a block in which what cannot be read is a `DataError`.

    Bytes that are no UTF-8 are for `checked` to find: those of lines that nobody asks for are nobody's concern.
    """
    unpack: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with unpack(path, "rb") as file:
            head = file.read(4096)
        if b"\0" in head or any(head.startswith(mark) for mark, _ in BYTE_ORDER_MARKS):
            read_text(path, source)
        with io.TextIOWrapper(unpack(path, "rb"), encoding="utf-8-sig", errors="surrogateescape", newline=newline) as text:
            yield text
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{source} cannot be unpacked as gzip: {error}: it is cut or no gzip file") from error
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror}") from error


def checked(text: str, path: Path, source: str) -> str:
    """A line of an `opened` file; `DataError` where it is no UTF-8."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            read_text(path, source)  # which says where
            raise
    return text


# ---------------------------------------------------------------- csv


def read_csv(path: Path, source: str, size: int) -> Iterator[Table]:
    """A comma-separated file (.tsv: by tabs) with a header line, quoted as in RFC 4180; an empty cell is an empty text."""
    tabs = suffix_of(path) == ".tsv"
    with opened(path, source, "") as text:
        lines = (checked(line, path, source) for line in text)
        records = _records(csv.reader(lines, strict=True, delimiter="\t" if tabs else ","), source)
        header = next(records, (0, []))[1]
        if not header:
            raise DataError(f"{source} is empty: give a csv file with a header and at least one sample")
        doubled = sorted({name for name in header if header.count(name) > 1})
        if doubled:
            raise DataError(f"{source} has more than one column {doubled[0]!r}: give each its own name")
        row = 0
        while chunk := list(islice(records, size)):
            for line, record in chunk:
                if len(record) != len(header):
                    raise DataError(
                        f"{source}, row {row} (line {line}) has {len(record)} cells, but the header has {len(header)} "
                        f"({', '.join(header)}): put cells that hold a {'tab' if tabs else 'comma'}, a quote or a line "
                        "break in double quotes"
                    )
                row += 1
            rows = [dict(zip(header, record, strict=True)) for _, record in chunk]
            yield Table(source, header, rows, [line for line, _ in chunk], flat=True)
        if not row:
            raise DataError(
                f"{source} has a header ({', '.join(header)}) and no rows: give a csv file with at least one sample"
            )


def _records(reader: Any, source: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each record that has any."""
    line, row = 1, -1
    while True:
        limit = csv.field_size_limit(sys.maxsize)
        try:
            record = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{source}, {f'row {row}' if row >= 0 else 'the header'} (line {line}) cannot be read as csv with at least one "
                f'sample: {error}: a quote inside a quoted cell is doubled ("")'
            ) from error
        finally:
            csv.field_size_limit(limit)
        if record is None:
            return
        if record:  # else nothing is on the line
            yield line, record
            row += 1
        line = reader.line_num + 1


# ---------------------------------------------------------------- json

_Value = tuple[int | None, Any]
"""The line of a JSON value, and it."""


def read_json_lines(path: Path, source: str, size: int) -> Iterator[Table]:
    """One JSON object a line; blank lines are passed over."""
    with opened(path, source, "\n") as text:
        yield from _tables(_values_of_lines(text, path, source), path, source, size)


def read_json(path: Path, source: str, size: int) -> Iterator[Table]:
    """A list of objects; or, as many call it, one object a line."""
    if _has_lines(path, source):
        yield from read_json_lines(path, source, size)
    else:
        yield from _tables(iter(json_values(path, source)), path, source, size)


def json_values(path: Path, source: str) -> list[_Value]:
    """Each line of a jsonl file, or each item of a json list. Raises `DataError`."""
    if suffix_of(path) in (".jsonl", ".ndjson") or _has_lines(path, source):
        with opened(path, source, "\n") as text:
            return list(_unwrapped(_values_of_lines(text, path, source), source))
    try:
        return _items(_parse(read_text(path, source)), source)
    except ValueError as error:
        cure = f"give a list of objects, or one object a line (jq -c . {path.name} > rows.jsonl)"
        raise DataError(
            f"{source} cannot be read as json with at least one sample: {_reason(error, whole=True)}: {cure}"
        ) from error


def _has_lines(path: Path, source: str) -> bool:
    """Whether the first line that is not blank is a JSON value by itself, and no list."""
    with opened(path, source, "\n") as text:
        first = next((line for line in text if line.strip()), "")
    if first.lstrip().startswith("["):
        return False
    try:
        _parse(first)
    except ValueError:
        return False
    return True


def _values_of_lines(lines: Iterable[str], path: Path, source: str) -> Iterator[_Value]:
    # Lines end with \\n alone: a JSON text may hold U+2028 and its like as they are.
    row = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, _parse(checked(line, path, source))
        except ValueError as error:
            raise DataError(
                f"{source} cannot be read as json, one object a line: row {row} (line {number}): {_reason(error)}, "
                f"in {line[:60].rstrip()!r}: write every object on one line (jq -c . {path.name})"
            ) from error
        row += 1
    if not row:
        raise DataError(f"{source} is empty: give a jsonl file with at least one sample")


def _unwrapped(values: Iterator[_Value], source: str) -> Iterator[_Value]:
    """The values; of one that is a list, its items."""
    first = list(islice(values, 1))
    if first and isinstance(first[0][1], list) and (after := list(islice(values, 1))) == []:
        return iter(_items(first[0][1], source))
    return chain(first, after if first and isinstance(first[0][1], list) else (), values)


def _items(value: Any, source: str) -> list[_Value]:
    if value == []:
        raise DataError(f"{source} is an empty list: give a file with at least one sample")
    return [(None, item) for item in (value if isinstance(value, list) else [value])]


def _tables(values: Iterator[_Value], path: Path, source: str, size: int) -> Iterator[Table]:
    values = _unwrapped(values, source)
    row = 0
    while chunk := list(islice(values, size)):
        yield table_of(chunk, path, source, row)
        row += len(chunk)


def table_of(values: Sequence[_Value], path: Path, source: str, start: int = 0) -> Table:
    """The table of (line, object), of which the first is row `start`; DataError for what is no object."""
    rows: list[dict[str, Any]] = []
    for row, (line, value) in enumerate(values, start):
        if not isinstance(value, dict):
            where = f"{source}, row {row}" + ("" if line is None else f" (line {line})")
            raise DataError(
                f'{where} is {kind_of(value)}, not an object with named columns such as {{"prompt": "…", "response": "…"}}'
            )
        rows.append(value)
    beside = ("tools", "functions", "messages", "conversations", "conversation")  # of a row are lists, too
    lists = [name for name, item in rows[0].items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    inside = [name for name in lists if name not in beside]
    if start + len(rows) == 1 and len(inside) == 1 and not any(key in rows[0][inside[0]][0] for key in ("role", "from")):
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


def _reason(error: ValueError, whole: bool = False) -> str:
    if not isinstance(error, json.JSONDecodeError):
        return str(error)
    return f"{error.msg} (line {error.lineno}, column {error.colno})" if whole else f"{error.msg} (column {error.colno})"


# ---------------------------------------------------------------- parquet and arrow


def read_parquet(path: Path, source: str, size: int) -> Iterator[Table]:
    """A parquet file."""

    def batches(data: Any) -> Iterator[Any]:
        import pyarrow.parquet

        yield from pyarrow.parquet.ParquetFile(data).iter_batches(batch_size=size)

    return _arrow_tables(batches, path, source, size)


def read_arrow(path: Path, source: str, size: int) -> Iterator[Table]:
    """An arrow file, of either kind (stream, as `datasets` writes, or random access)."""

    def batches(data: Any) -> Iterator[Any]:
        import pyarrow

        try:
            file = pyarrow.ipc.open_file(data)
        except pyarrow.ArrowInvalid:
            data.seek(0)
            yield from pyarrow.ipc.open_stream(data)
        else:
            yield from map(file.get_batch, range(file.num_record_batches))

    return _arrow_tables(batches, path, source, size)


def _arrow_tables(read: Callable[[Any], Iterator[Any]], path: Path, source: str, size: int) -> Iterator[Table]:
    import pyarrow

    try:
        data = io.BytesIO(read_bytes(path, source)) if path.suffix.lower() == ".gz" else pyarrow.memory_map(str(path))
        for batch in read(data):
            names = batch.schema.names
            doubled = sorted({name for name in names if names.count(name) > 1})
            if doubled:
                raise DataError(f"{source} has more than one column {doubled[0]!r}: give each its own name")
            for first in range(0, batch.num_rows, size):
                yield Table(source, names, [without_holes(row) for row in batch.slice(first, size).to_pylist()])
    except UnicodeDecodeError as error:
        raise DataError(f"{source} holds text that is not UTF-8: {error}") from error
    except (OSError, pyarrow.ArrowException) as error:
        kind = suffix_of(path)[1:]
        raise DataError(f"{source} cannot be read as {kind} with at least one sample: {str(error).splitlines()[0]}") from error


def without_holes(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of typed columns without the holes that one type for all puts into every object of a list."""

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: filled(item) for key, item in value.items() if item is not None}
        return [filled(item) for item in value] if isinstance(value, list) else value

    return {name: filled(value) for name, value in row.items()}


Reader = Callable[[Path, str, int], Iterator[Table]]
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
