"""A data set as tokens; samples that are too long are refused, cut or dropped, counted and named by row."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from warp_ds.data.formats import Tokens, encode_sample, prompt_tokens, window
from warp_ds.data.readers import few
from warp_ds.data.sample import Sample, as_samples
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
    """The samples as tokens, in order, with a progress bar.

    Columns of the result: `input_ids`, `attention_mask`, `labels`, and `row`, which each was, where samples were dropped.
    `prompt_only` is `--token_scope prompt`. What begins to
    be trained within `max_length` tokens and ends beyond is cut there, with a warning that names the rows. `long_samples`
    says what becomes of the others: 'error' raises one `DataError` that names them all; 'truncate' takes the beginning
    of their prompts away; 'drop' drops them, and those that would be cut.
    """
    check_length(max_length, model_context)
    found = as_samples(samples)
    lengths: list[tuple[int, int]] = []

    def one(_: Any, number: int) -> dict[str, Any]:
        try:
            if prompt_only:
                tokens, before = prompt_tokens(found[number], tokenizer), 0
            else:
                tokens, before = encode_sample(found[number], tokenizer, train_on)
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
        lengths.append((before, len(tokens["input_ids"])))
        return dict(_fitted(tokens, before, max_length, prompt_only))

    # Nothing is cached: a fingerprint of the closure would have to hash the tokenizer on every rank.
    encoded = Dataset.from_dict({"row": range(len(found))}).map(
        one, with_indices=True, remove_columns=["row"], desc="tokenising", load_from_cache_file=False, keep_in_memory=True
    )
    wrong = {row: whole if prompt_only else before for row, (before, whole) in enumerate(lengths)}
    wrong = {row: length for row, length in wrong.items() if length > max_length - (not prompt_only)}
    cut = {row: whole for row, (_, whole) in enumerate(lengths) if whole > max_length and row not in wrong}
    if long_samples == "drop":
        return _without(encoded, {**wrong, **cut}, max_length)
    if wrong and long_samples == "error":
        raise DataError(_refusal(wrong, found, max_length, prompt_only))
    _say_cut(wrong, cut, len(found), max_length)
    return encoded


def _fitted(tokens: Tokens, before: int, length: int, prompt_only: bool) -> Tokens:
    """At most `length` tokens, from the first on; where nothing trained would be left, without the prompt's beginning.

    Then half of the tokens, or what the answer leaves, are the prompt's. A prompt alone keeps its end.
    """
    whole = len(tokens["input_ids"])
    if whole <= length or before < length and not prompt_only:
        return window(tokens, 0, length)
    kept = length if prompt_only else max(length - (whole - before), length // 2)
    return window(tokens, (whole if prompt_only else before) - kept, length)


def _without(encoded: Dataset, dropped: Mapping[int, int], max_length: int) -> Dataset:
    if not dropped:
        return encoded
    if len(dropped) == len(encoded):
        raise DataError(f"every one of {len(encoded)} samples is longer than --max_length {max_length}: raise it")
    logger.warning(
        "%d of %d samples are longer than --max_length %d and are dropped (%s)",
        len(dropped),
        len(encoded),
        max_length,
        _named(dropped),
    )
    kept = [row for row in range(len(encoded)) if row not in dropped]
    return encoded.select(kept).add_column("row", kept)


def _refusal(wrong: dict[int, int], samples: Sequence[Sample], max_length: int, prompt_only: bool) -> str:
    least = max(wrong.values()) + (not prompt_only)
    return (
        f"{too_long(wrong, len(samples))} {'do not fit' if prompt_only else 'leave no room for a response'} in "
        f"--max_length {max_length}: raise --max_length to {least} or more, or leave these rows out (--long_samples drop, or "
        f"truncate). The first begins: {samples[next(iter(wrong))].prompt[:80]!r}"
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
