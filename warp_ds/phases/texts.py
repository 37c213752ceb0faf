"""Samples as token ids, before a model is loaded: what does not fit is named with its rows, on every rank or none."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from warp_ds.cluster import consensus
from warp_ds.data.formats import encode_prompt
from warp_ds.data.inspect import first_samples
from warp_ds.data.lengths import encode_dataset, too_long
from warp_ds.data.sample import Sample, as_samples
from warp_ds.errors import DataError
from warp_ds.models.context import context_length
from warp_ds.models.source import check_ids
from warp_ds.zero.model import load_tokenizer

logger = logging.getLogger(__name__)


def tokenise(samples: Any, arguments: Any, prompt_only: bool = False) -> Any:
    """``encode_dataset`` of samples with the tokenizer of --model_name; shows the first two. Collective. Raises DataError."""
    config, tokenizer = load_tokenizer(arguments)
    with consensus.on_every_rank_or_none("tokenising"):
        encoded = _encoded(samples, config, tokenizer, arguments, prompt_only=prompt_only)
    for line in first_samples(encoded.select(range(min(2, len(encoded)))), tokenizer):
        logger.info("%s", line)
    return encoded


def _encoded(samples: Any, config: Any, tokenizer: Any, arguments: Any, **options: Any) -> Any:
    encoded = encode_dataset(
        samples,
        tokenizer,
        arguments.max_length,
        context_length(config),
        train_on=arguments.train_on,
        long_samples=arguments.long_samples,
        **options,
    )
    check_ids(encoded, config)
    return encoded


def check_lengths(
    arguments: Any, generated: Mapping[str, Sequence[Any]], scored: Mapping[str, Sequence[Any]], max_new_tokens: int
) -> None:
    """One DataError that names all prompts too long to be answered (``generated``) or to be trained or scored on (``scored``).

    Both by the name of their set. A prompt and --max_new_tokens must fit in the model's context; what is scored must fit in
    --max_length as --long_samples says. Collective.
    """
    config, tokenizer = load_tokenizer(arguments)
    context, wrong = context_length(config), []
    with consensus.on_every_rank_or_none("tokenising"):
        for name, prompts in generated.items():
            encoded = [_prompt(name, row, prompt, tokenizer) for row, prompt in enumerate(as_samples(prompts))]
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
        for name, samples in scored.items():
            try:
                if samples:
                    _encoded(samples, config, tokenizer, arguments)
            except DataError as error:
                wrong.append(f"{name}: {error}")
        if wrong:
            raise DataError("; ".join(wrong))


def _prompt(name: str, row: int, prompt: Sample, tokenizer: Any) -> list[int]:
    try:
        return encode_prompt(prompt, tokenizer)
    except DataError as error:
        raise DataError(f"{name}, row {row}: {error}") from error
