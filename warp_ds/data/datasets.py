"""Reads (prompt, response) pairs from the hub or from a local file, and says clearly what is wrong with them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

log = logging.getLogger(__name__)

PROMPT_COLUMNS = ("prompt", "question", "instruction", "input")
RESPONSE_COLUMNS = ("response", "answer", "output", "completion")
LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


class DataError(ValueError):
    """The data cannot be used; the message names the cause and the cure."""


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
    parquet file; a local file has no splits. Columns that are not given are guessed by name. A source without responses
    takes the lines of `refusal_file`, in turn. `shuffle` permutes the source by `seed` before rows are taken. Raises
    `DataError`.
    """
    if samples < 0:
        raise DataError(f"{samples} samples asked for: give a positive number, or 0 for all")
    source = os.fspath(name_or_path)
    layout = KNOWN.get(source)
    rows = _read(source, split, layout)
    columns = list(rows.column_names)
    if len(rows) == 0:
        raise DataError(f"{source} ({split}) has no rows: give a data set or file with at least one sample")

    prompt = _pick("--prompt_column", prompt_column, layout.prompt if layout else None, PROMPT_COLUMNS, columns, source)
    response: str | None = response_column or (layout.response if layout else None)
    if response is None and not any(name in columns for name in RESPONSE_COLUMNS):
        if refusal_file is None:
            raise DataError(
                f"{source} has no response column (columns: {', '.join(columns)}): name it with --response_column, or "
                f"give refusals for its prompts with --refusal_file"
            )
    elif response is not None and response not in columns and response_column is None and refusal_file is not None:
        response = None  # a copy of a known data set that lacks its responses
    else:
        response = _pick("--response_column", response_column, response, RESPONSE_COLUMNS, columns, source)

    if layout and layout.keep and response == layout.response:
        rows = rows.filter(layout.keep, load_from_cache_file=False, keep_in_memory=True)
        if len(rows) == 0:
            raise DataError(f"{source} ({split}): no row is left, since every response is marked as harmful")
    prompts = [_text(value) for value in rows[prompt]]
    if response is None:
        assert refusal_file is not None
        refusals = _refusals(refusal_file)
        responses = [refusals[i % len(refusals)] for i in range(len(prompts))]
    else:
        responses = [_text(value) for value in rows[response]]
    _check_filled(prompts, prompt, source)
    _check_filled(responses, response or "response", source)

    pairs = Dataset.from_dict({"prompt": prompts, "response": responses})
    if shuffle:
        pairs = pairs.shuffle(seed=seed)
    if samples > len(pairs):
        log.info("%s: %d samples asked for, %d there: all are used", source, samples, len(pairs))
    elif samples:
        pairs = pairs.select(range(samples))
    return pairs


def _read(source: str, split: str, layout: Layout | None) -> Dataset:
    path = local_file(source)
    if path is not None:
        loader = LOADERS[path.suffix.lower()]
        try:
            return datasets.load_dataset(loader, data_files=str(path), split="train")
        except Exception as error:
            raise DataError(f"{source} cannot be read as {loader} with at least one sample: {_cause(error)}") from error
    try:
        return datasets.load_dataset(source, layout.config if layout else None, split=split)
    except Exception as error:
        offline = "HF_HUB_OFFLINE is set, so only the local cache was searched; " if _offline() else ""
        raise DataError(
            f"no data set {source!r} (split {split!r}): {offline}give the path of a local "
            f"{', '.join(LOADERS)} file, or fetch the data set into the cache where there is internet. "
            f"Cause: {_cause(error)}"
        ) from error


def local_file(source: str) -> Path | None:
    """The file that `source` names; None for a data set of the hub. DataError for a file that is missing or unreadable."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix.lower() not in LOADERS:
            raise DataError(f"{source}: cannot read {path.suffix or 'a file without extension'}; use one of "
                            f"{', '.join(LOADERS)}")
        if path.stat().st_size == 0:
            raise DataError(f"{source} is empty: give a file with at least one sample")
        return path
    if path.suffix.lower() in LOADERS or source.startswith(("/", "./", "../", "~")) and not path.is_dir():
        raise DataError(f"no such file: {source}")
    return None


def _offline() -> bool:
    return bool(datasets.config.HF_HUB_OFFLINE)


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _pick(flag: str, given: str | None, known: str | None, guesses: tuple[str, ...], columns: list[str], source: str) -> str:
    """The column that the flag names, or where it is not given the one of a known data set, or the first guess there is."""
    if given is not None and given not in columns:
        raise DataError(f"{source} has no column {given!r}, which {flag} names; its columns are {', '.join(columns)}")
    if given is not None:
        return given
    if known is not None:
        guesses = (known,)
    for guess in guesses:
        if guess in columns:
            return guess
    raise DataError(f"{source} has none of the columns {', '.join(guesses)}; its columns are {', '.join(columns)}: "
                    f"name one with {flag}")


def _refusals(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file, or of a jsonl file of strings or objects with one of RESPONSE_COLUMNS."""
    try:
        lines = [line.strip() for line in Path(path).expanduser().read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise DataError(f"--refusal_file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--refusal_file {path} is not UTF-8 text: give one refusal a line") from error
    lines = [line for line in lines if line]
    if Path(path).suffix.lower() in (".jsonl", ".json"):
        lines = [_json_refusal(line, path) for line in lines]
    if not lines:
        raise DataError(f"--refusal_file {path} is empty: give one refusal a line")
    return lines


def _json_refusal(line: str, path: str | os.PathLike[str]) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"--refusal_file {path} is not jsonl: {error.msg} in {line[:60]!r}") from error
    if isinstance(value, dict):
        value = next((value[name] for name in (*RESPONSE_COLUMNS, "refusal", "text") if name in value), None)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"--refusal_file {path}: no refusal in {line[:60]!r}: a string, or an object with 'response'")
    return value.strip()


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _check_filled(texts: list[str], column: str, source: str) -> None:
    empty = [i for i, text in enumerate(texts) if not text.strip()]
    if empty:
        some = ", ".join(map(str, empty[:5])) + (", …" if len(empty) > 5 else "")
        raise DataError(f"{source}: column {column!r} is empty in {len(empty)} of {len(texts)} rows (rows {some}): "
                        f"fill or remove them")


def load_prompts(
    name_or_path: str | os.PathLike[str], *, split: str = "train", samples: int = 0, prompt_column: str | None = None
) -> list[str]:
    """The prompts alone of a source that need not have responses, for evaluation. Raises `DataError`."""
    source = os.fspath(name_or_path)
    layout = KNOWN.get(source)
    rows = _read(source, split, layout)
    if len(rows) == 0:
        raise DataError(f"{source} ({split}) has no rows: give a data set or file with at least one sample")
    column = _pick("--prompt_column", prompt_column, layout.prompt if layout else None, PROMPT_COLUMNS,
                   list(rows.column_names), source)
    prompts = [_text(value) for value in rows[column]]
    _check_filled(prompts, column, source)
    return prompts[:samples] if samples else prompts
