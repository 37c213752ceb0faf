"""Texts as token ids, before a model is loaded: what does not fit is named with its rows, on every rank or none."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from warp_ds.cluster import consensus
from warp_ds.data.datasets import DataError
from warp_ds.data.formats import encode_dataset, encode_prompt, too_long
from warp_ds.flags.groups import RunArguments
from warp_ds.models.context import context_length
from warp_ds.zero.model import check_ids, load_tokenizer

logger = logging.getLogger(__name__)
Pairs = Sequence[Mapping[str, str]]
"""Rows of prompt and response."""


def tokenise(pairs: Any, arguments: RunArguments, prompt_only: bool = False) -> Any:
    """``encode_dataset`` of a data set with the tokenizer of --model_name. Collective. Raises DataError."""
    config, tokenizer = load_tokenizer(arguments)
    with consensus.on_every_rank_or_none("tokenising"):
        samples = encode_dataset(pairs, tokenizer, arguments.max_length, context_length(config), prompt_only=prompt_only)
        check_ids(samples, config)
    return samples


def check_lengths(
    arguments: RunArguments, generated: Mapping[str, Sequence[str]], scored: Mapping[str, Pairs], max_new_tokens: int
) -> None:
    """One DataError that names all prompts too long to be answered (``generated``) or to be trained or scored on (``scored``).

    Both by the name of their set. A prompt and --max_new_tokens must fit in the model's context; a pair's prompt must leave
    room in --max_length. Collective.
    """
    config, tokenizer = load_tokenizer(arguments)
    context, wrong = context_length(config), []
    with consensus.on_every_rank_or_none("tokenising"):
        for name, prompts in generated.items():
            encoded = [_encoded(name, row, prompt, tokenizer) for row, prompt in enumerate(prompts)]
            lengths = {row: len(ids) for row, ids in enumerate(encoded)}
            beyond = {row: n for row, n in lengths.items() if context is not None and n + max_new_tokens > context}
            if beyond:
                room = (context or 0) - max(beyond.values())
                cure = f"lower it to {room} or less, or leave these rows out" if room > 0 else "leave these rows out"
                wrong.append(
                    f"{name}: {too_long(beyond, len(prompts))} with --max_new_tokens {max_new_tokens} exceed the "
                    f"model's context of {context} tokens: {cure}"
                )
            try:
                check_ids([{"input_ids": ids} for ids in encoded], config)
            except DataError as error:
                wrong.append(f"{name}: {error}")
        for name, pairs in scored.items():
            try:
                if pairs:
                    rows = [{"prompt": row["prompt"], "response": row["response"]} for row in pairs]
                    check_ids(encode_dataset(Dataset.from_list(rows), tokenizer, arguments.max_length, context), config)
            except DataError as error:
                wrong.append(f"{name}: {error}")
        if wrong:
            raise DataError("; ".join(wrong))


def _encoded(name: str, row: int, prompt: str, tokenizer: Any) -> list[int]:
    try:
        return encode_prompt(prompt, tokenizer)
    except DataError as error:
        raise DataError(f"{name}, row {row}: {error}") from error
