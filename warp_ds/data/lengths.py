"""A data set as tokens; samples that are too long are refused, cut or dropped, counted and named by row."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from warp_ds.data.sample import Sample, as_samples
from warp_ds.data.table import few
from warp_ds.data.tokens import text_rows, tokens_of
from warp_ds.errors import DataError

logger = logging.getLogger(__name__)


def check_length(max_length: int, model_context: int | None) -> None:
    """Raises `DataError` if `max_length` tokens are no length that the model can read."""
    if max_length < 2:
        raise DataError(f"--max_length {max_length} is too short: a prompt token and a response token need 2")
    if model_context is not None and max_length > model_context:
        raise DataError(
            f"--max_length {max_length} exceeds the model's context of {model_context} tokens "
            f"(max_position_embeddings): use --max_length {model_context} or less"
        )


def encode_dataset(
    samples: Iterable[Sample | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    model_context: int | None = None,
    *,
    prompt_only: bool = False,
    train_on: str = "assistant",
    long_samples: str = "error",
) -> Dataset:
    """The samples as tokens, in order, in memory: `fitting` of what data/tokens.py makes."""
    check_length(max_length, model_context)
    rows = as_samples(samples)
    tokens = tokens_of(text_rows(rows), tokenizer, max_length, prompt_only=prompt_only, train_on=train_on)
    return fitting(tokens, rows, max_length, prompt_only=prompt_only, long_samples=long_samples)


def fitting(
    tokens: Dataset, samples: Sequence[Any], max_length: int, *, prompt_only: bool = False, long_samples: str = "error"
) -> Dataset:
    """What of the tokenised samples is used, and how: `tokens` are of `tokens_of`, `samples` what they are of, for a message.

    Columns of the result: `input_ids`, `attention_mask`, `labels`, and `row`, which each was, where samples were dropped.
    What begins to be trained within `max_length` tokens and ends beyond was cut there, with a warning that names the rows.
    `long_samples` says what becomes of the others: 'error' raises one `DataError` that names them all; 'truncate' takes
    the beginning of their prompts away; 'drop' drops them, and those that would be cut.
    """
    before, whole = (tokens.data.column(name).to_numpy() for name in ("before", "whole"))
    tokens = tokens.remove_columns(["before", "whole", "largest"])
    length = whole if prompt_only else before
    refused = length > max_length - (not prompt_only)
    wrong = {int(row): int(length[row]) for row in numpy.flatnonzero(refused)}
    cut = {int(row): int(whole[row]) for row in numpy.flatnonzero((whole > max_length) & ~refused)}
    if long_samples == "drop" and (wrong or cut):
        return _without(tokens, {**wrong, **cut}, max_length)
    if wrong and long_samples == "error":
        raise DataError(_refusal(wrong, samples, max_length, prompt_only))
    _say_cut(wrong, cut, len(tokens), max_length)
    return tokens.remove_columns("row")


def _without(encoded: Dataset, dropped: Mapping[int, int], max_length: int) -> Dataset:
    if len(dropped) == len(encoded):
        raise DataError(f"every one of {len(encoded)} samples is longer than --max_length {max_length}: raise it")
    logger.warning(
        "%d of %d samples are longer than --max_length %d and are dropped (%s)",
        len(dropped),
        len(encoded),
        max_length,
        _named(dropped),
    )
    return encoded.select([row for row in range(len(encoded)) if row not in dropped], new_fingerprint=f"drop{len(dropped)}")


def _refusal(wrong: dict[int, int], samples: Sequence[Any], max_length: int, prompt_only: bool) -> str:
    least = max(wrong.values()) + (not prompt_only)
    return (
        f"{too_long(wrong, len(samples))} {'do not fit' if prompt_only else 'leave no room for a response'} in "
        f"--max_length {max_length}: raise --max_length to {least} or more, or leave these rows out (--long_samples drop, or "
        f"truncate). The first begins: {Sample.of(samples[next(iter(wrong))]).prompt[:80]!r}"
    )


def _say_cut(wrong: Mapping[int, int], cut: Mapping[int, int], of: int, max_length: int) -> None:
    if wrong:
        logger.warning(
            "%d of %d prompts lose their beginning at --max_length %d (%s)", len(wrong), of, max_length, _named(wrong)
        )
    if cut:
        logger.warning(
            "%d of %d responses are cut at --max_length %d, and their end is not learned (rows %s): the longest "
            "sample has %d tokens",
            len(cut),
            of,
            max_length,
            few(list(cut)),
            max(cut.values()),
        )


def too_long(lengths: dict[int, int], of: int) -> str:
    """'2 of 9 prompts (row 3: 512 tokens, row 5: 730 tokens)': rows and their tokens, the first few."""
    return f"{len(lengths)} of {of} prompts ({_named(lengths)})"


def _named(lengths: Mapping[int, int]) -> str:
    return few([f"row {row}: {tokens} tokens" for row, tokens in sorted(lengths.items())])
