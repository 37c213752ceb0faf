"""What --packing means for a run: whether the model allows it, its attention, and the shape of the rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pyarrow.compute
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from warp_ds.cluster import processes
from warp_ds.data.collate import GlobalBatchSampler
from warp_ds.data.packing import PackedBatchSampler, seen_of_another
from warp_ds.errors import ConfigError
from warp_ds.flags.groups import PackingFlags, TrainingFlags
from warp_ds.models.packable import check_packable, packed_attention
from warp_ds.models.source import read_config
from warp_ds.models.targets import find_blocks
from warp_ds.zero.fetch import FetchHooks, outside


def check_packing(arguments: PackingFlags, model_dir: Path) -> None:
    """ConfigError for --packing with a model whose layers would mix samples."""
    if arguments.packing:
        check_packable(read_config(model_dir), arguments.model_name)


def attention_of(arguments: PackingFlags) -> str | None:
    """The attention to load the model with; None is transformers' own choice."""
    return packed_attention(arguments.resolved_device, arguments.dtype) if arguments.packing else None


def row_shape(arguments: PackingFlags) -> tuple[int, int]:
    """Rows of a micro-batch, and the tokens that each may have.

    Block-wise attention costs the square of a row, so rows are as short as --max_length allows; flash attention costs the
    square of a sample, and takes all of them as one row.
    """
    tokens = arguments.tokens_per_batch or arguments.batch_size * arguments.max_length
    rows = 1 if attention_of(arguments) else tokens // arguments.max_length
    return rows, tokens // rows


def micro_batch(arguments: PackingFlags) -> tuple[int, int | None]:
    """Rows of a micro-batch of phases 1 and 2, and the tokens that each may have; None where samples are padded."""
    return row_shape(arguments) if arguments.packing else (arguments.batch_size, None)


def check_apart(arguments: PackingFlags, model: Any, rows: Any) -> None:
    """Tries on a model without an engine, for --packing, that a sample of ``rows`` sees nothing of another. Collective.

    ConfigError on every rank where one does.
    """
    if arguments.packing:
        blocks = list(find_blocks(model)[1])
        with FetchHooks(outside(model, blocks), blocks):
            _refuse_leaks(seen_of_another(model, *_two_beginnings(rows), arguments.resolved_device))


def _two_beginnings(rows: Any) -> tuple[Any, Any]:
    """The first tokens of the first sample and of the last."""
    return rows[0]["input_ids"][:16], rows[len(rows) - 1]["input_ids"][:16]


def _refuse_leaks(seen: float) -> None:
    # bf16 rounds a mixture of experts otherwise when other tokens come along; what leaks is of the logits' own size.
    leaks = torch.tensor([float(not seen < 0.05)], device=processes.collective_device())
    if processes.all_reduce_sum(leaks).item():
        raise ConfigError(
            f"--packing cannot be used with this model: samples of one row see each other (logits change by {seen:.2g} of "
            "their standard deviation); leave --packing out"
        )


class SamplesApart(TrainerCallback):
    """Tries on the model itself, before the first step, that a sample sees nothing of another in its row."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Collective. ConfigError on every rank where it does."""
        first, second = _two_beginnings(self.trainer.train_dataset)
        model: Any = self.trainer.model_wrapped
        training = model.training
        model.eval()
        seen = seen_of_another(model, first, second, args.device)
        model.train(training)
        _refuse_leaks(seen)


def sample_lengths(samples: Any) -> list[int]:
    """Tokens of each sample of a tokenised data set (input_ids)."""
    batches = samples.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    return [n for batch in batches for n in pyarrow.compute.list_value_length(batch["input_ids"]).to_pylist()]


def make_sampler(samples: Any, arguments: TrainingFlags, max_steps: int) -> GlobalBatchSampler:
    """Global batches of a tokenised data set, for --epochs or for ``max_steps`` where that is above 0."""
    world = processes.world_size()
    padded = GlobalBatchSampler(
        len(samples), arguments.global_batch_size, arguments.batch_size, world, shuffle=True, seed=arguments.seed
    )
    if not arguments.packing:
        return padded
    epochs = max_steps / padded.steps if max_steps > 0 else arguments.epochs
    return PackedBatchSampler(
        sample_lengths(samples),
        arguments.global_batch_size,
        *row_shape(arguments),
        world_size=world,
        shuffle=True,
        seed=arguments.seed,
        epochs=math.ceil(epochs),
    )
