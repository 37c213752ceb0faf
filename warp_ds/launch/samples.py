"""``warp-ds data``: samples as the model will see them, without loading it."""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass
from typing import Any

from warp_ds.data.datasets import load_samples
from warp_ds.data.inspect import examine
from warp_ds.errors import WarpError
from warp_ds.flags.arguments import ColumnArguments, RunArguments, flag
from warp_ds.flags.parsing import parse_arguments
from warp_ds.zero.model import load_tokenizer


@dataclass
class DataArguments(ColumnArguments, RunArguments):
    """What of a phase's flags decides how its samples are read."""

    split: str = flag("train", "split of a hub data set, or of a directory that has several")
    samples: int = flag(0, "how many of them, in order; 0 = all")
    refusal_file: str | None = flag(None, "refusals, one a line, for prompts without responses")


def show_samples(given: argparse.Namespace) -> int:
    """Prints what ``examine`` finds; 2 for wrong input."""
    logging.basicConfig(format="%(message)s", level=logging.INFO, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        for line in examined(given.sources, parsed(given)):
            print(line)
    except WarpError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parsed(given: argparse.Namespace) -> Any:
    """The flags of a phase that stand on the command line."""
    return parse_arguments(DataArguments, ["--model_name", given.model_name, *given.rest])


def examined(sources: str, a: Any) -> list[str]:
    """Lines that show the samples of ``sources`` and what would become of them. Raises DataError, ConfigError."""
    samples = load_samples(
        sources,
        split=a.split,
        samples=a.samples,
        prompt_column=a.prompt_column,
        response_column=a.response_column,
        refusal_file=a.refusal_file,
        config=a.data_config,
    )
    _, tokenizer = load_tokenizer(a)
    return examine(samples, tokenizer, a.max_length, a.train_on)
