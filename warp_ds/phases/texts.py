"""Samples as token ids, before a model is loaded: what does not fit is named with its rows, on every rank or none."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from warp_ds.cluster import consensus, processes
from warp_ds.data import cache
from warp_ds.data.datasets import read_samples
from warp_ds.data.formats import encode_prompt
from warp_ds.data.inspect import first_samples
from warp_ds.data.lengths import encode_dataset, fitting, too_long
from warp_ds.data.sample import Sample, as_samples
from warp_ds.data.stored import StoredSamples, store
from warp_ds.data.tokens import tokens_from, tokens_on_disk
from warp_ds.errors import DataError
from warp_ds.models.context import context_length
from warp_ds.models.source import check_ids, check_largest
from warp_ds.phases.behaviours import sets_apart
from warp_ds.zero.model import load_tokenizer

logger = logging.getLogger(__name__)


def read_texts(name: str, **options: Any) -> StoredSamples:
    """`data.datasets.read_samples` with its options, read by rank 0 and memory-mapped by all; where machines do not
    share the cache, read by one rank of each. Collective.

    Raises DataError, also where the machines have other texts under this name.
    """
    said = json.dumps([os.path.abspath(name), name, sorted(options.items())], default=str)
    work = f"reading-{hashlib.sha256(said.encode()).hexdigest()[:32]}"

    def read() -> StoredSamples:
        def hold(samples: Iterator[Sample]) -> StoredSamples:
            return store(f"{work}-{next(part)}", samples)

        part = count()
        return store(work, read_samples(name, hold=hold, **options))

    what, directory = f"reading {name}", None
    with consensus.long_step(what):
        if processes.rank() == 0:
            directory = read().directory.name
    known = str(processes.broadcast_object(directory))
    for mine in _turns():
        with consensus.long_step(what):
            if mine and cache.place_of(known) is None and read().directory.name != known:
                raise DataError(
                    f"{name} holds other texts on {socket.gethostname()} than on rank 0's machine: give all the same files"
                )
    with consensus.on_every_rank_or_none(what):
        samples = StoredSamples(cache.root() / known)
    return samples


def task_texts(arguments: Any) -> StoredSamples:
    """The task's samples, in order, as UtilityDataArguments name them. Collective; raises as ``read_texts``."""
    return read_texts(arguments.utility_data, **task_options(arguments))


def safety_texts(arguments: Any) -> StoredSamples:
    """The samples of what must stay, in order, as SafetyDataArguments name them. Collective; raises as ``read_texts``."""
    options = {"split": arguments.safety_split, "samples": arguments.safety_samples, "refusal_file": arguments.refusal_file}
    return read_texts(arguments.safety_data, **options, **_columns(arguments))


def behaviour_texts(arguments: Any) -> list[StoredSamples]:
    """The samples of each behaviour that has a mask of its own; --safety_samples is of all together. As ``safety_texts``."""
    with consensus.on_every_rank_or_none("reading --keep_shares"):
        apart = sets_apart(arguments)
    return [safety_texts(replace(arguments, safety_data=name, safety_samples=count)) for name, count in apart]


def task_options(arguments: Any) -> dict[str, Any]:
    """How the task is read, for ``read_texts`` and ``data.datasets.load_samples``."""
    return {"split": arguments.utility_split, "samples": arguments.utility_samples, **_columns(arguments)}


def _columns(arguments: Any) -> dict[str, Any]:
    return {
        "prompt_column": arguments.prompt_column,
        "response_column": arguments.response_column,
        "config": arguments.data_config,
        "streaming": arguments.streaming,
    }


def _turns() -> tuple[bool, bool]:
    """Whether this rank looks now for what rank 0 has made, and makes it where its machine does not see that: first one rank of
    each machine, then, where ranks do not count from 0 there, any."""
    return processes.local_rank() == 0, True


def tokenise(samples: Any, arguments: Any, prompt_only: bool = False) -> Any:
    """Samples as tokens of the tokenizer of --model_name, made once as `read_texts` does; shows the first two. Collective.

    Raises DataError.
    """
    config, tokenizer = load_tokenizer(arguments)
    texts = samples if isinstance(samples, StoredSamples) else as_samples(samples)
    options = {"max_length": arguments.max_length, "prompt_only": prompt_only, "train_on": arguments.train_on}

    def on_disk() -> Path:
        return tokens_on_disk(texts, tokenizer, arguments.num_proc, **options)

    for mine in (processes.rank() == 0, *_turns()):
        with consensus.long_step("tokenising"):
            directory = on_disk() if mine else None
    with consensus.on_every_rank_or_none("reading the tokens"):
        tokens = tokens_from(directory or on_disk())
        if len(tokens) != len(texts):
            held = f"tokens of {len(tokens)} of {len(texts)} samples"
            raise DataError(f"{directory or on_disk()} is damaged ({held}): remove it, and it is made again")
        encoded = fitting(tokens, texts, arguments.max_length, prompt_only=prompt_only, long_samples=arguments.long_samples)
        largest = tokens.data.column("largest").to_numpy()
        rows = encoded["row"][:] if "row" in encoded.column_names else range(len(encoded))
        check_largest(((row, int(largest[row])) for row in rows), config)
    for line in first_samples(encoded.select(range(min(2, len(encoded)))), tokenizer):
        logger.info("%s", line)
    return encoded


def _check_scored(samples: Any, config: Any, tokenizer: Any, arguments: Any) -> None:
    check_ids(
        encode_dataset(
            samples,
            tokenizer,
            arguments.max_length,
            context_length(config),
            train_on=arguments.train_on,
            long_samples=arguments.long_samples,
        ),
        config,
    )


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
                    _check_scored(samples, config, tokenizer, arguments)
            except DataError as error:
                wrong.append(f"{name}: {error}")
        if wrong:
            raise DataError("; ".join(wrong))


def _prompt(name: str, row: int, prompt: Sample, tokenizer: Any) -> list[int]:
    try:
        return encode_prompt(prompt, tokenizer)
    except DataError as error:
        raise DataError(f"{name}, row {row}: {error}") from error
