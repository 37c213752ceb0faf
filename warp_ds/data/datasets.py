"""Samples from the hub or from this machine's disks, and what is wrong with those that cannot be read.

Texts are taken as they are written: no value is re-typed, and what is no text is refused by row and column.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warp_ds.data.cells import REFUSAL_FILE, texts_of
from warp_ds.data.readers import READERS, Table, few, json_values, read_file, read_text, suffix_of, table_of
from warp_ds.data.sample import Sample
from warp_ds.data.shapes import RESPONSE_COLUMNS, Layout, Wanted, listed, samples_of
from warp_ds.data.sources import read_source, sources_of
from warp_ds.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

REFUSAL_COLUMNS = (*RESPONSE_COLUMNS, "refusal", "text")
KNOWN = {
    "LibrAI/do-not-answer": Layout("question", "ChatGPT_response", keep=lambda row: float(row["ChatGPT_harmful"]) == 0),
    "openai/gsm8k": Layout("question", "answer", config="main"),
}


def load_samples(
    name_or_path: str | os.PathLike[str],
    *,
    split: str = "train",
    samples: int = 0,
    prompt_column: str | None = None,
    response_column: str | None = None,
    refusal_file: str | os.PathLike[str] | None = None,
    config: str | None = None,
    seed: int = 42,
    shuffle: bool = False,
) -> list[Sample]:
    """The first `samples` (0: all) of a source, or of several with weights (`sources_of`), each with an answer or a text.

    What a source is, says data/sources.py; which shapes its rows may have, data/shapes.py. Columns that are not given
    are guessed by name. A source without responses takes the lines of `refusal_file`, in turn. `shuffle` permutes by
    `seed` before samples are taken. Raises `DataError`, with the row and the column, for a hole, an empty text, or what
    is no text.
    """
    _check_count(samples)
    wanted = Wanted(prompt_column, response_column, refusals=refusal_file is not None)
    found = _from_all(os.fspath(name_or_path), split, config, wanted)
    if refusal_file is not None and not all(sample.answered or sample.text is not None for sample in found):
        refusals = _refusals(refusal_file)
        found = [
            sample
            if sample.answered or sample.text is not None
            else replace(
                sample, messages=[*sample.messages, {"role": "assistant", "content": refusals[number % len(refusals)]}]
            )
            for number, sample in enumerate(found)
        ]
    if shuffle:
        random.Random(seed).shuffle(found)
    return _first(found, samples, os.fspath(name_or_path))


def load_pairs(name_or_path: str | os.PathLike[str], **options: Any) -> Dataset:
    """`load_samples` as a `Dataset` of two texts, `prompt` (several turns: role by role) and `response`."""
    from datasets import Dataset

    samples = load_samples(name_or_path, **options)
    return Dataset.from_list([{"prompt": sample.prompt, "response": sample.response} for sample in samples])


def load_prompts(
    name_or_path: str | os.PathLike[str],
    *,
    split: str = "train",
    samples: int = 0,
    prompt_column: str | None = None,
    config: str | None = None,
) -> list[Sample]:
    """The prompts alone of a source that need not have responses, for evaluation. Raises `DataError`."""
    _check_count(samples)
    wanted = Wanted(prompt_column, prompts=True)
    found = [sample.asked() for sample in _from_all(os.fspath(name_or_path), split, config, wanted)]
    return _first(found, samples, os.fspath(name_or_path))


def _check_count(samples: int) -> None:
    if samples < 0:
        raise DataError(f"{samples} samples asked for: give a positive number, or 0 for all")


def _first(found: list[Sample], samples: int, source: str) -> list[Sample]:
    if samples > len(found):
        log.info("%s: %d samples asked for, %d there: all are used", source, samples, len(found))
    return found[:samples] if samples else found


def _from_all(text: str, split: str, config: str | None, wanted: Wanted) -> list[Sample]:
    """The samples of every source in `text`, as many of each as its weight says, spread evenly over one another."""
    parts = []
    for source, weight in sources_of(text):
        layout = KNOWN.get(source)
        rows = read_source(source, split, layout.config if layout and config is None else config)
        found = samples_of(rows, replace(wanted, layout=layout))
        found = found if wanted.prompts else _without_tails(found, source, wanted.refusals)
        parts.append([found[i % len(found)] for i in range(round(len(found) * weight))])
    if len(parts) == 1:
        return parts[0]
    places = [((k + 0.5) / len(part), number, k) for number, part in enumerate(parts) for k in range(len(part))]
    mixed = [parts[number][k] for _, number, k in sorted(places)]
    return [replace(sample, row=row) for row, sample in enumerate(mixed)]


def _without_tails(samples: list[Sample], source: str, refusals: bool) -> list[Sample]:
    """The samples up to their last answer that is trained, or a question that is to be refused; says how many were cut."""
    found = []
    cut = []
    for sample in samples:
        answers = [i for i, turn in enumerate(sample.messages) if turn["role"] == "assistant"]
        last = max((i for i in answers if i not in sample.untrained), default=None)
        if last is not None and last + 1 < len(sample.messages) and not (refusals and not sample.answered):
            cut.append(sample.row)
            sample = replace(sample, messages=sample.messages[: last + 1])
        found.append(sample)
    if cut:
        log.warning("%s: the turns after the last answer of %d rows (%s) are left out", source, len(cut), few(cut))
    return found


# ---------------------------------------------------------------- refusals


def _refusals(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file; or the texts, or the column of REFUSAL_COLUMNS, of a file that READERS know."""
    file, name = Path(path).expanduser(), f"{REFUSAL_FILE}{path}"
    if not file.is_file():
        raise DataError(f"{name} cannot be read: {'Is a directory' if file.is_dir() else 'No such file or directory'}")
    if suffix_of(file) in (".json", ".jsonl", ".ndjson"):
        # A text, or an object, each.
        items = [(line, {"text": value} if type(value) is str else value) for line, value in json_values(file, name)]
        found = _refusal_texts(table_of(items, file, name))
    elif suffix_of(file) in READERS:
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
            f"{rows.source} has none of the columns {', '.join(REFUSAL_COLUMNS)}; its columns are {listed(rows.columns)}"
        )
    # A file may hold texts and objects: then each row has one of the columns.
    merged: Sequence[Any] = [{column: next((row[name] for name in REFUSAL_COLUMNS if name in row), None)} for row in rows.rows]
    return [text.strip() for text in texts_of(Table(rows.source, [column], merged, rows.lines), column)]
