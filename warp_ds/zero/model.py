"""Loads a model for phases 1 and 2: ZeRO-3 partitioned parameters, no engine, no optimizer."""

from __future__ import annotations

import gc
import logging
from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from warp_ds.cluster.consensus import on_every_rank_or_none, on_rank_0
from warp_ds.data import template
from warp_ds.data.lengths import check_length
from warp_ds.errors import ConfigError
from warp_ds.flags.groups import RunArguments
from warp_ds.models.context import context_length
from warp_ds.models.source import check_model_dir, local_model_dir, read_config, read_tokenizer, snapshot
from warp_ds.store.checkpoint_index import CheckpointError
from warp_ds.zero.load import load_sharded

logger = logging.getLogger(__name__)


def resolve_model_dir(name: str, flag: str = "--model_name") -> Path:
    """The local directory of a model: ``name`` itself, or its snapshot in the hub's cache, fetched where needed.

    Every rank calls it. Raises ConfigError, naming ``flag``, for a missing or gated model, with what to do offline.
    """
    directory = local_model_dir(name, flag)
    if directory is None:
        on_rank_0(lambda: str(snapshot(name, flag)), f"fetching {name}")
    with on_every_rank_or_none(f"finding {name}"):
        directory = directory or snapshot(name, flag)
        if flag != "--judge_model":  # a judge may be a classifier, and is loaded whole on every rank
            check_model_dir(directory, flag)
    return directory


def load_tokenizer(arguments: RunArguments) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model's configuration and tokenizer, without its weights; --template_date is what its template writes from now on.

    Every rank calls it. Raises ConfigError for what is missing, broken, or too short for ``--max_length``.
    """
    directory = resolve_model_dir(arguments.model_name)
    with on_every_rank_or_none(f"reading the configuration of {arguments.model_name}"):
        config = read_config(directory)
        tokenizer = read_tokenizer(directory, config)
        check_length(arguments.max_length, context_length(config))
        template.fix_date(arguments.template_date)
        if template.writes_date(tokenizer):
            _say_date(arguments.model_name, arguments.template_date)
    return config, tokenizer


@cache
def _say_date(name: str, date: str) -> None:
    """Once a process."""
    logger.info("the chat template of %s writes today's date: here it is %s on every day (--template_date)", name, date)


def load_model(
    arguments: RunArguments, ds_config: dict[str, Any], attention: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model with ZeRO-3 partitioned parameters in evaluation mode, and its tokenizer. ``attention``: how it is computed.

    Every rank calls it, after ``init_distributed``. Raises ConfigError for a model that is missing, broken or too
    short for ``--max_length``, before any weight is read.
    """
    directory = resolve_model_dir(arguments.model_name)
    _, tokenizer = load_tokenizer(arguments)
    gc.collect()  # engines that have ended are cycles: none may stay while the next model comes
    try:
        model = load_sharded(
            directory,
            ds_config=ds_config,
            dtype=arguments.torch_dtype,
            device=arguments.resolved_device,
            attn_implementation=attention,
            experts_in_rows=True,
        )
    except CheckpointError as error:
        raise ConfigError(f"--model_name: {error}") from error
    model.eval()
    return model, tokenizer
