"""Samples to token ids, in processes: what data/lengths.py then fits into --max_length."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from warp_ds.data import template
from warp_ds.data.cache import made
from warp_ds.data.formats import Tokens, encode_sample, prompt_tokens, window
from warp_ds.data.sample import Sample
from warp_ds.data.stored import StoredSamples, digest_of, mapped, write_samples
from warp_ds.errors import DataError

_INT32 = Value("int32")
FEATURES = Features(
    {
        "input_ids": List(_INT32),
        "attention_mask": List(Value("int8")),
        "labels": List(_INT32),
        "row": Value("int64"),
        "before": _INT32,
        "whole": _INT32,
        "largest": _INT32,
    }
)
"""`row` counts from 0; `before` are the tokens that stand before the first trained one, `whole` all of the uncut sample,
`largest` is the largest id."""
SAMPLES_PER_PROCESS = 2000
"""So many are worth a process of their own, which takes a second to start."""


def text_rows(samples: Iterable[Sample]) -> Dataset:
    """Samples as `tokens_of` takes them, in memory."""
    return Dataset.from_dict({"sample": [json.dumps(sample.as_row()) for sample in samples]})


def tokens_of(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    prompt_only: bool = False,
    train_on: str = "assistant",
    num_proc: int = 1,
    file: Path | None = None,
) -> Dataset:
    """Every sample of `rows` (StoredSamples.rows) as at most `max_length` tokens, in order: FEATURES.

    `prompt_only` is `--token_scope prompt`. In memory, or where `file` is given in it (with several processes in several,
    named after it). Raises `DataError` for a sample that the tokenizer's template cannot write, by row.
    """
    options: dict[str, Any] = {"tokenizer": tokenizer, "max_length": max_length, "prompt_only": prompt_only}
    try:
        return rows.map(
            _encoded,
            with_indices=True,
            batched=True,
            remove_columns=["sample"],
            features=FEATURES,
            desc="tokenising",
            fn_kwargs={**options, "train_on": train_on, "date": template.fixed_date()},
            num_proc=num_proc if num_proc > 1 else None,
            load_from_cache_file=False,
            keep_in_memory=file is None,
            cache_file_name=None if file is None else str(file),
            new_fingerprint="tokens",  # one by content would have to hash the tokenizer: `key` does
        )
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        raise DataError("a process that tokenised was killed (by want of memory?): give fewer with --num_proc") from error


def _encoded(
    batch: Mapping[str, Sequence[str]],
    numbers: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    prompt_only: bool,
    train_on: str,
    date: str,
) -> dict[str, list[Any]]:
    template.fix_date(date)  # of a process that was not forked from one that knows
    columns: dict[str, list[Any]] = {name: [] for name in FEATURES}
    for text, number in zip(batch["sample"], numbers, strict=True):
        sample = Sample.of(json.loads(text))
        try:
            tokens, before = (
                (prompt_tokens(sample, tokenizer), 0) if prompt_only else encode_sample(sample, tokenizer, train_on)
            )
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
        fitted = _fitted(tokens, before, max_length, prompt_only)
        largest = max(fitted["input_ids"], default=0)
        row = {"row": number, "before": before, "whole": len(tokens["input_ids"]), "largest": largest}
        for name, value in {**fitted, **row}.items():
            columns[name].append(value)
    return columns


def _fitted(tokens: Tokens, before: int, length: int, prompt_only: bool) -> Tokens:
    """At most `length` tokens, from the first on; where nothing trained would be left, without the prompt's beginning.

    Then half of the tokens, or what the answer leaves, are the prompt's. A prompt alone keeps its end.
    """
    whole = len(tokens["input_ids"])
    if whole <= length or before < length and not prompt_only:
        return window(tokens, 0, length)
    kept = length if prompt_only else max(length - (whole - before), length // 2)
    return window(tokens, (whole if prompt_only else before) - kept, length)


# ---------------------------------------------------------------- once for all ranks


def tokens_on_disk(
    samples: StoredSamples | Sequence[Sample], tokenizer: PreTrainedTokenizerBase, num_proc: int = 0, **options: Any
) -> Path:
    """The directory of `tokens_of` the samples (and its `options`), made where there is none. `num_proc` 0: what helps."""
    return made(key(samples, tokenizer, **options), lambda place: _write(samples, tokenizer, num_proc, options, place))


def tokens_from(directory: Path) -> Dataset:
    """What `tokens_on_disk` made, memory-mapped. Raises `DataError` where it is damaged."""
    files = sorted(directory.glob("tokens*.arrow"))
    if not files:
        raise DataError(f"{directory} is damaged (it holds no tokens): remove it, and it is made again")
    return mapped(files)


def _write(samples: Any, tokenizer: Any, num_proc: int, options: Mapping[str, Any], place: Path) -> None:
    texts = None
    if isinstance(samples, StoredSamples):
        rows = samples.rows
    else:
        texts = place / "texts.arrow"
        write_samples(samples, texts)
        rows = mapped([texts])
    processes = num_proc or min(len(os.sched_getaffinity(0)), len(rows) // SAMPLES_PER_PROCESS)
    tokens_of(rows, tokenizer, num_proc=max(1, min(processes, len(rows))), file=place / "tokens.arrow", **options)
    if texts is not None:
        texts.unlink()


def key(samples: StoredSamples | Sequence[Sample], tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """The name of the tokens: by content of the samples, the tokenizer and its template, the options, and the code."""
    content = [
        samples.digest if isinstance(samples, StoredSamples) else digest_of(samples),
        _tokenizer(tokenizer),
        sorted(options.items()),
        template.fixed_date() if template.writes_date(tokenizer) else None,
        _code(),
    ]
    return "tokens-" + hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:32]


def _tokenizer(tokenizer: Any) -> list[Any]:
    """What decides which ids a text becomes. datasets' hash of a fast tokenizer would change with its use."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = Hasher.hash(tokenizer) if backend is None else hashlib.sha256(backend.to_str().encode()).hexdigest()
    return [type(tokenizer).__name__, state, tokenizer.chat_template, tokenizer.special_tokens_map]


@cache
def _code() -> list[str]:
    """The versions of the libraries that tokenise, and what the modules of this one say."""
    own = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))
    return [own.hexdigest(), *(library.__version__ for library in (transformers, tokenizers, datasets))]
