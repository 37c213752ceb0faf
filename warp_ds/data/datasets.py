"""Samples from the hub or from this machine's disks, and what is wrong with those that cannot be read.

Texts are taken as they are written: no value is re-typed, and what is no text is refused by row and column.
"""

from __future__ import annotations

import heapq
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warp_ds.data.cells import REFUSAL_FILE, texts_of
from warp_ds.data.prompt_sets import named
from warp_ds.data.readers import CHUNK, READERS, json_values, read_file, read_text, suffix_of, table_of
from warp_ds.data.sample import Sample
from warp_ds.data.shapes import RESPONSE_COLUMNS, Layout, Wanted, listed, samples_of
from warp_ds.data.sources import read_source, sources_of
from warp_ds.data.table import Table, few
from warp_ds.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)

Hold = Callable[[Iterator[Sample]], Sequence[Sample]]
REFUSAL_COLUMNS = (*RESPONSE_COLUMNS, "refusal", "text")
KNOWN = {
    "LibrAI/do-not-answer": Layout("question", "ChatGPT_response", keep=lambda row: float(row["ChatGPT_harmful"]) == 0),
    "openai/gsm8k": Layout("question", "answer", config="main"),
}


def load_samples(
    name_or_path: str | os.PathLike[str], *, samples: int = 0, seed: int = 42, shuffle: bool = False, **options: Any
) -> list[Sample]:
    """`read_samples`, with its options, in memory; `shuffle` permutes by `seed` before samples are taken."""
    if not shuffle:
        return list(read_samples(name_or_path, samples=samples, **options))
    _check_count(samples)
    samples_read = list(read_samples(name_or_path, **options))
    random.Random(seed).shuffle(samples_read)
    return samples_read[:samples] if samples else samples_read


def read_samples(
    name_or_path: str | os.PathLike[str],
    *,
    split: str = "train",
    samples: int = 0,
    prompt_column: str | None = None,
    response_column: str | None = None,
    refusal_file: str | os.PathLike[str] | None = None,
    config: str | None = None,
    streaming: bool = False,
    hold: Hold = list,
) -> Iterator[Sample]:
    """The first `samples` (0: all) of a source, or of several with weights (`sources_of`), each with an answer or a text.

    What a source is, says data/sources.py; which shapes its rows may have, data/shapes.py. Columns that are not given
    are guessed by name. A source without responses takes the lines of `refusal_file`, in turn. Of one source no rows are
    read beyond those that are taken; several are counted, and kept by `hold` until they are mixed. Raises `DataError`,
    with the row and the column, for a hole, an empty text, or what is no text.
    """
    _check_count(samples)
    wanted = Wanted(prompt_column, response_column, refusals=refusal_file is not None)
    return _answered(_from_all(os.fspath(name_or_path), split, config, wanted, samples, streaming, hold), refusal_file)


def _answered(samples: Iterable[Sample], refusal_file: str | os.PathLike[str] | None) -> Iterator[Sample]:
    """The samples, with refusals in turn where they have no answer."""
    refusals: list[str] = []
    for number, sample in enumerate(samples):
        if refusal_file is not None and not sample.answered and sample.text is None:
            refusals = refusals or _refusals(refusal_file)
            answer = {"role": "assistant", "content": refusals[number % len(refusals)]}
            sample = replace(sample, messages=[*sample.messages, answer])
        yield sample


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
    streaming: bool = False,
) -> list[Sample]:
    """The prompts alone of a source that need not have responses, for evaluation. Raises `DataError`."""
    _check_count(samples)
    wanted = Wanted(prompt_column, prompts=True)
    samples_read = _from_all(os.fspath(name_or_path), split, config, wanted, samples, streaming)
    return [sample.asked() for sample in samples_read]


def _check_count(samples: int) -> None:
    if samples < 0:
        raise DataError(f"{samples} samples asked for: give a positive number, or 0 for all")


def _from_all(
    text: str, split: str, config: str | None, wanted: Wanted, most: int, streaming: bool = False, hold: Hold = list
) -> Iterator[Sample]:
    """The first `most` (0: all) samples of every source in `text`, as many of each as its weight says, spread evenly over one
    another."""
    sources = sources_of(text)
    alone = len(sources) == 1 and sources[0][1] == 1
    parts = []
    for source, weight in sources:
        layout = KNOWN.get(source)
        size = min(CHUNK, max(most, 2)) if alone and most else CHUNK
        tables = read_source(source, split, layout.config if layout and config is None else config, size, streaming)
        column = None if named(source) else wanted.prompt_column  # a set known by name says itself
        samples = _of_source(tables, source, replace(wanted, layout=layout, prompt_column=column), most if alone else 0)
        if not alone:
            parts.append(_weighted(hold(samples), source, weight))
    taken = 0
    for sample in samples if alone else islice(_interleaved(parts), most or None):
        taken += 1
        yield sample
    if most > taken:
        log.info("%s: %d samples asked for, %d there: all are used", text, most, taken)


def _of_source(tables: Iterable[Table], source: str, wanted: Wanted, most: int) -> Iterator[Sample]:
    """The first `most` (0: all) samples of a source."""
    taken = 0
    cut: list[int] = []
    for table in tables:
        samples = samples_of(table, wanted)
        samples = samples[: most - taken] if most else samples
        taken += len(samples)
        yield from samples if wanted.prompts else (_without_tail(sample, wanted.refusals, cut) for sample in samples)
        if taken == most > 0:
            break
    if not taken:
        raise DataError(f"{source}: no row is left, since every response is marked as harmful")
    if cut:
        log.warning("%s: the turns after the last answer of %d rows (%s) are left out", source, len(cut), few(cut))


def _without_tail(sample: Sample, refusals: bool, cut: list[int]) -> Sample:
    """The sample up to its last answer that is trained, or a question that is to be refused; notes the row where it was cut."""
    answers = [i for i, turn in enumerate(sample.messages) if turn["role"] == "assistant"]
    last = max((i for i in answers if i not in sample.untrained), default=None)
    if last is None or last + 1 == len(sample.messages) or (refusals and not sample.answered):
        return sample
    cut.append(sample.row)
    return replace(sample, messages=sample.messages[: last + 1])


def _weighted(samples: Sequence[Sample], source: str, weight: float) -> tuple[Sequence[Sample], int]:
    """The samples, and how many times one of them is taken."""
    count = round(len(samples) * weight)
    if not count:
        raise DataError(f"{source}@{weight:g} takes none of its {len(samples)} samples: give a higher weight, or leave it out")
    return samples, count


def _interleaved(parts: Sequence[tuple[Sequence[Sample], int]]) -> Iterator[Sample]:
    """Every part's samples in turn, as many as are to be taken of it, each spread evenly over the whole."""

    def places(number: int, count: int) -> Iterator[tuple[float, int, int]]:
        return (((k + 0.5) / count, number, k) for k in range(count))

    every = heapq.merge(*(places(number, count) for number, (_, count) in enumerate(parts)))
    for row, (_, number, k) in enumerate(every):
        samples = parts[number][0]
        yield replace(samples[k % len(samples)], row=row)


# ---------------------------------------------------------------- refusals


def _refusals(path: str | os.PathLike[str]) -> list[str]:
    """The lines of a text file; or the texts, or the column of REFUSAL_COLUMNS, of a file that READERS know."""
    file, name = Path(path).expanduser(), f"{REFUSAL_FILE}{path}"
    if not file.is_file():
        raise DataError(f"{name} cannot be read: {'Is a directory' if file.is_dir() else 'No such file or directory'}")
    if suffix_of(file) in (".json", ".jsonl", ".ndjson"):
        # A text, or an object, each.
        items = [(line, {"text": value} if type(value) is str else value) for line, value in json_values(file, name)]
        texts = _refusal_texts(table_of(items, file, name))
    elif suffix_of(file) in READERS:
        texts = _refusal_texts(read_file(file, name))
    else:
        texts = [line.strip() for line in read_text(file, name).split("\n") if line.strip()]
    if not texts:
        raise DataError(f"{name} is empty: give one refusal a line")
    return texts


def _refusal_texts(rows: Table) -> list[str]:
    column = next((column for column in REFUSAL_COLUMNS if column in rows.columns), None)
    if column is None:
        raise DataError(
            f"{rows.source} has none of the columns {', '.join(REFUSAL_COLUMNS)}; its columns are {listed(rows.columns)}"
        )
    # A file may hold texts and objects: then each row has one of the columns.
    merged: Sequence[Any] = [{column: next((row[name] for name in REFUSAL_COLUMNS if name in row), None)} for row in rows.rows]
    return [text.strip() for text in texts_of(Table(rows.source, [column], merged, rows.lines), column)]
