"""Reads (prompt, response) pairs from the hub or from a local file, and says clearly what is wrong with them.

Texts are taken as they are written: no value is re-typed, and what is no text is refused by row and column.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from warp_ds.data.readers import READERS, Table, json_values, read_file, read_text, table_of
from warp_ds.data.turns import CONVERSATION_COLUMNS, NotText, pair_of, text_of
from warp_ds.errors import DataError

log = logging.getLogger(__name__)

PROMPT_COLUMNS = ("prompt", "question", "instruction", "input")
RESPONSE_COLUMNS = ("response", "answer", "output", "completion")
REFUSAL_COLUMNS = (*RESPONSE_COLUMNS, "refusal", "text")
PROMPT_PARTS = (
    *PROMPT_COLUMNS,
    *CONVERSATION_COLUMNS,
    "inputs",
    "query",
    "context",
    "contexts",
    "system",
    "system_prompt",
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
    "image",
    "images",
    "audio",
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


KNOWN = {
    "LibrAI/do-not-answer": Layout("question", "ChatGPT_response", keep=lambda row: row["ChatGPT_harmful"] == 0),
    "openai/gsm8k": Layout("question", "answer", config="main"),
}


def load_pairs(
    name_or_path: str | os.PathLike[str],
    *,
    split: str = "train",
    samples: int = 0,
    prompt_column: str | None = None,
    response_column: str | None = None,
    refusal_file: str | os.PathLike[str] | None = None,
    seed: int = 42,
    shuffle: bool = False,
) -> Dataset:
    """A `Dataset` of two string columns, `prompt` and `response`: the first `samples` rows (0: all) of the source.

    `name_or_path` is a data set on the hub (or in its cache, with HF_HUB_OFFLINE=1) or a local json, jsonl, csv or
    parquet file; a local file has no splits. Columns that are not given are guessed by name: an `instruction` with an
    `input` is Alpaca's (both, with a blank line between), and a list of turns is read where it is one user turn and its
    answer. A source without responses takes the lines of `refusal_file`, in turn. `shuffle` permutes the source by
    `seed` before rows are taken. Raises `DataError`, with the row and the column, for a hole, an empty text, or what is
    no text.
    """
    if samples < 0:
        raise DataError(f"{samples} samples asked for: give a positive number, or 0 for all")
    source = os.fspath(name_or_path)
    layout = KNOWN.get(source)
    rows = _read(source, split, layout)
    found = _turns(rows, prompt_column, response_column, with_response=refusal_file is None)
    if found is None:
        prompt = _pick("--prompt_column", prompt_column, layout.prompt if layout else None, PROMPT_COLUMNS, rows)
        response = _response_column(rows, response_column, layout, refusal_file)
        if response == prompt:
            raise DataError(
                f"{source}: the column {prompt!r} would be both prompt and response: name the other one with "
                "--prompt_column or --response_column"
            )
        if layout and layout.keep and response == layout.response:
            rows = Table(source, rows.columns, [row for row in rows.rows if layout.keep(dict(row))])
            if len(rows) == 0:
                raise DataError(f"{source} ({split}): no row is left, since every response is marked as harmful")
        bad = [row for row, label in enumerate(rows.column("label")) if label is False]
        if bad and response is not None:
            raise DataError(
                f"{source}: 'label' is false in {len(bad)} rows {rows.places(bad)}, whose responses are marked as "
                "bad ones: leave those rows out"
            )
        prompts = _prompts(rows, prompt, guessed=prompt_column is None and layout is None, response=response)
        responses = None if response is None else _texts(rows, response, "assistant")
    else:
        prompts, responses = found
    if responses is None:
        assert refusal_file is not None
        refusals = _refusals(refusal_file)
        responses = [refusals[i % len(refusals)] for i in range(len(prompts))]

    pairs = Dataset.from_dict({"prompt": prompts, "response": responses})
    if shuffle:
        pairs = pairs.shuffle(seed=seed)
    if samples > len(pairs):
        log.info("%s: %d samples asked for, %d there: all are used", source, samples, len(pairs))
    elif samples:
        pairs = pairs.select(range(samples))
    return pairs


def load_prompts(
    name_or_path: str | os.PathLike[str], *, split: str = "train", samples: int = 0, prompt_column: str | None = None
) -> list[str]:
    """The prompts alone of a source that need not have responses, for evaluation. Raises `DataError`."""
    if samples < 0:
        raise DataError(f"{samples} samples asked for: give a positive number, or 0 for all")
    source = os.fspath(name_or_path)
    layout = KNOWN.get(source)
    rows = _read(source, split, layout)
    found = _turns(rows, prompt_column, None, with_response=False, alone=True)
    if found is None:
        column = _pick("--prompt_column", prompt_column, layout.prompt if layout else None, PROMPT_COLUMNS, rows)
        prompts = _prompts(rows, column, guessed=prompt_column is None and layout is None)
    else:
        prompts = found[0]
    return prompts[:samples] if samples else prompts


# ---------------------------------------------------------------- sources


def _read(source: str, split: str, layout: Layout | None) -> Table:
    path = local_file(source)
    if path is not None:
        return read_file(path, source)
    try:
        data = datasets.load_dataset(source, layout.config if layout else None, split=split)
    except Exception as error:
        offline = "HF_HUB_OFFLINE is set, so only the local cache was searched; " if _offline() else ""
        raise DataError(
            f"no data set {source!r} (split {split!r}): {offline}give the path of a local "
            f"{', '.join(READERS)} file, or fetch the data set into the cache where there is internet. "
            f"Cause: {_cause(error)}"
        ) from error
    if len(data) == 0:
        raise DataError(f"{source} ({split}) has no rows: give a data set or file with at least one sample")
    return Table(source, list(data.column_names), data.to_list())


def local_file(source: str) -> Path | None:
    """The file that `source` names; None for a data set of the hub. DataError for a file that is missing or unreadable."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in READERS:
            raise DataError(
                f"{source}: cannot read {path.suffix or 'a file without extension'}; use one of {', '.join(READERS)}"
            )
        if path.stat().st_size == 0:
            raise DataError(f"{source} is empty: give a file with at least one sample")
        return path
    if path.suffix.lower() in READERS or source.startswith(("/", "./", "../", "~")) and not path.is_dir():
        raise DataError(f"no such file: {source}")
    return None


def _offline() -> bool:
    return bool(datasets.config.HF_HUB_OFFLINE)


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# ---------------------------------------------------------------- columns


def _pick(flag: str, given: str | None, known: str | None, guesses: tuple[str, ...], rows: Table) -> str:
    """The column that the flag names, or where it is not given the one of a known data set, or the first guess there is."""
    columns, source = rows.columns, rows.source
    if given is not None and given not in columns:
        raise DataError(f"{source} has no column {given!r}, which {flag} names; its columns are {_listed(columns)}")
    if given is not None:
        return given
    if known is not None:
        guesses = (known,)
    for guess in guesses:
        if guess in columns:
            return guess
    hint = ""
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"):
        hint = " (are they separated by something else than a comma?)"
    raise DataError(
        f"{source} has none of the columns {', '.join(guesses)}; its columns are {_listed(columns)}{hint}: name one with {flag}"
    )


def _response_column(
    rows: Table, given: str | None, layout: Layout | None, refusal_file: str | os.PathLike[str] | None
) -> str | None:
    """The column of the responses; None where `refusal_file` gives them."""
    wanted = given or (layout.response if layout else None)
    if wanted is None and not any(name in rows.columns for name in RESPONSE_COLUMNS):
        if refusal_file is None:
            raise DataError(
                f"{rows.source} has no response column (columns: {_listed(rows.columns)}): name it with "
                "--response_column, or give refusals for its prompts with --refusal_file"
            )
        return None
    if wanted is not None and wanted not in rows.columns and given is None and refusal_file is not None:
        return None  # a copy of a known data set that lacks its responses
    return _pick("--response_column", given, wanted, RESPONSE_COLUMNS, rows)


def _listed(columns: Sequence[str]) -> str:
    return ", ".join(name if name and name == name.strip() else repr(name) for name in columns)


# ---------------------------------------------------------------- texts


def _turns(
    rows: Table, prompt_column: str | None, response_column: str | None, with_response: bool, alone: bool = False
) -> tuple[list[str], list[str] | None] | None:
    """Prompts and responses of a column of conversations, where the rows hold no other prompt; None elsewhere.

    `alone`: the prompts alone are wanted, and some rows may have an answer and others none.
    """
    if prompt_column is None and response_column is None and not any(name in rows.columns for name in PROMPT_COLUMNS):
        prompt_column = next((name for name in CONVERSATION_COLUMNS if name in rows.columns), None)
    if prompt_column not in CONVERSATION_COLUMNS or prompt_column not in rows.columns:
        return None
    _say_unused(rows, [prompt_column, *RESPONSE_COLUMNS])
    pairs = []
    for row, value in enumerate(rows.column(prompt_column)):
        try:
            pairs.append(pair_of(value, with_response))
        except NotText as error:
            raise DataError(f"{rows.source}, {rows.place(row)}: column {prompt_column!r} {error}") from error
    prompts = _filled([prompt for prompt, _ in pairs], prompt_column, rows)
    responses = [response for _, response in pairs]
    if alone or not any(text is not None for text in responses):
        return prompts, None
    return prompts, _filled(responses, prompt_column, rows)


def _prompts(rows: Table, column: str, guessed: bool, response: str | None = None) -> list[str]:
    """The prompts, with Alpaca's `input` where the columns were guessed; says what else looks like a part of them."""
    prompts = _texts(rows, column, "user")
    used = [column, *([] if response is None else [response])]
    if guessed and column == "instruction" and "input" in rows.columns:
        inputs = _texts(rows, "input", "user", holes=True)
        # As Alpaca's own template does: an empty input adds nothing.
        prompts = [f"{prompt}\n\n{more}" if more.strip() else prompt for prompt, more in zip(prompts, inputs, strict=True)]
        used.append("input")
        log.info("%s: the prompt is 'instruction' and, where it is not empty, 'input' after a blank line", rows.source)
    _say_unused(rows, used)
    if response is not None and guessed:
        others = [name for name in RESPONSE_COLUMNS if name in rows.columns and name != response]
        if others:
            log.warning("%s: the response is %r; %s not used", rows.source, response, _are(others))
    return prompts


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
        log.warning(
            "%s: %s not part of the prompt, which is %r: where it should be, write both into one column and name "
            "it with --prompt_column",
            rows.source,
            _are(unused),
            used[0],
        )


def _are(columns: Sequence[str]) -> str:
    return f"column{'s' * (len(columns) > 1)} {', '.join(map(repr, columns))} {'are' if len(columns) > 1 else 'is'}"


def _texts(rows: Table, column: str, role: str, holes: bool = False) -> list[str]:
    """The texts of one column. `DataError`, by row, for what is no text, and but for `holes` for empty and missing ones."""
    found = []
    for row, value in enumerate(rows.column(column)):
        try:
            found.append(text_of(value, role))
        except NotText as error:
            hint = "" if _is_file(rows) else " (the loader of `datasets` may have made it so: fetch the file and name it)"
            raise DataError(f"{rows.source}, {rows.place(row)}: column {column!r} {error}{hint}") from error
    if holes:
        found = [text or "" for text in found]
    return _filled(found, column, rows, empty=not holes)


def _is_file(rows: Table) -> bool:
    return rows.lines is not None or Path(rows.source.removeprefix(_REFUSAL_FILE)).expanduser().is_file()


def _filled(texts: Sequence[str | None], column: str, rows: Table, empty: bool = True) -> list[str]:
    """``texts``; DataError, with the rows, for missing ones, for blank ones (`empty`) and for what no file can hold."""
    for what, wrong in (
        ("missing", [row for row, text in enumerate(texts) if text is None]),
        ("empty", [row for row, text in enumerate(texts) if empty and text is not None and not text.strip()]),
    ):
        if wrong:
            hint = (
                " (the CSV reader of `datasets` takes NA, None and null for holes: fetch the file and name it)"
                if (what == "missing" and not _is_file(rows))
                else ""
            )
            raise DataError(
                f"{rows.source}: column {column!r} is {what} in {len(wrong)} of {len(texts)} rows "
                f"{rows.places(wrong)}: fill or remove them{hint}"
            )
    found = [text for text in texts if text is not None]
    for row, text in enumerate(found):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start : error.end]
            raise DataError(
                f"{rows.source}, {rows.place(row)}: column {column!r} holds half a surrogate pair ({half!r}), "
                "which is no character: write the character itself"
            ) from error
    return found


# ---------------------------------------------------------------- refusals


_REFUSAL_FILE = "--refusal_file "


def _refusals(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file; or the texts, or the column of REFUSAL_COLUMNS, of a file that READERS know."""
    file, name = Path(path).expanduser(), f"{_REFUSAL_FILE}{path}"
    if not file.is_file():
        raise DataError(f"{name} cannot be read: {'Is a directory' if file.is_dir() else 'No such file or directory'}")
    if file.suffix.lower() in (".json", ".jsonl"):
        # A text, or an object, each.
        items = [(line, {"text": value} if type(value) is str else value) for line, value in json_values(file, name)]
        found = _refusal_texts(table_of(items, file, name))
    elif file.suffix.lower() in READERS:
        found = _refusal_texts(read_file(file, name))
    else:
        found = [line.strip() for line in read_text(file, name).split("\n") if line.strip()]
    if not found:
        raise DataError(f"{name} is empty: give one refusal a line")
    return found


def _refusal_texts(rows: Table) -> list[str]:
    column = next((column for column in REFUSAL_COLUMNS if column in rows.columns), None)
    if column is None:
        raise DataError(
            f"{rows.source} has none of the columns {', '.join(REFUSAL_COLUMNS)}; its columns are {_listed(rows.columns)}"
        )
    # A file may hold texts and objects: then each row has one of the columns.
    merged = [{column: next((row[name] for name in REFUSAL_COLUMNS if name in row), None)} for row in rows.rows]
    return [text.strip() for text in _texts(Table(rows.source, [column], merged, rows.lines), column, "assistant")]
