"""``warp-ds data``: samples as the model will see them, without loading it."""

from __future__ import annotations

import argparse
import logging

from warp_ds.data import template
from warp_ds.data.datasets import load_samples
from warp_ds.data.inspect import examine
from warp_ds.data.lengths import check_length
from warp_ds.flags.jobs import DataArguments
from warp_ds.flags.parsing import parse_arguments
from warp_ds.models.context import context_length
from warp_ds.models.source import local_model_dir, read_config, read_tokenizer, snapshot


def show_samples(given: argparse.Namespace) -> int:
    """Prints what ``examine`` finds. Raises DataError, ConfigError."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for line in examined(given.sources, parse_arguments(DataArguments, ["--model_name", given.model_name, *given.rest])):
        print(line)
    return 0


def examined(sources: str, a: DataArguments) -> list[str]:
    """Lines that show the samples of ``sources`` and what would become of them. Raises DataError, ConfigError."""
    samples = load_samples(
        sources,
        split=a.split,
        samples=a.samples,
        prompt_column=a.prompt_column,
        response_column=a.response_column,
        refusal_file=a.refusal_file,
        config=a.data_config,
        streaming=a.streaming,
    )
    directory = local_model_dir(a.model_name) or snapshot(a.model_name, files=("*.json", "*.model", "*.txt", "*.jinja"))
    config = read_config(directory)
    tokenizer = read_tokenizer(directory, config)
    check_length(a.max_length, context_length(config))
    template.fix_date(a.template_date)
    return examine(samples, tokenizer, a.max_length, a.train_on)
