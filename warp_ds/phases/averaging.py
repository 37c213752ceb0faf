"""The average of the weights over the steps of a training (arXiv 2508.12531), held in shards, kept in checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from warp_ds.cluster import consensus, processes
from warp_ds.method.objectives import move_average
from warp_ds.store.files import write_tensors
from warp_ds.zero import deepspeed_internals
from warp_ds.zero.deepspeed_internals import shard

PARTS = "average_rank_{:05d}.safetensors"


class WeightAverage(TrainerCallback):
    """Keeps ``move_average`` of this rank's shards, fp32, and makes them the model's weights at the end of training.

    What is averaged are the weights that forward and backward use; frozen coefficients, which are the same in all of them,
    are the same in the average, within rounding.
    """

    def __init__(self, decay: float, checkpoint: Path | None = None, wrote: int = 1):
        """``checkpoint``: what the run goes on from, written by ``wrote`` ranks."""
        self.decay, self.checkpoint, self.wrote = decay, checkpoint, wrote
        self.average: dict[str, Tensor] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        deepspeed_internals.refuse_swapped_or_quantized(kwargs["model"])
        self.average = {name: weights.float().clone() for name, weights, _ in _trained(kwargs["model"])}
        if self.checkpoint is not None:
            with consensus.on_every_rank_or_none("reading the average of the weights"):
                for name, _, entries in _trained(kwargs["model"]):
                    self._read(self.checkpoint, name, entries)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, weights, _ in _trained(kwargs["model"]):
            move_average(self.average[name], weights, self.decay)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        checkpoint = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
        with consensus.on_every_rank_or_none("saving the average of the weights"):
            write_tensors(checkpoint / PARTS.format(processes.rank()), self.average)

    @torch.no_grad()
    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for name, weights, _ in _trained(kwargs["model"]):
            weights.copy_(self.average[name])
        deepspeed_internals.gather_persistent(kwargs["optimizer"].optimizer)

    def _read(self, checkpoint: Path, name: str, entries: int) -> None:
        """This rank's piece of a parameter of ``entries`` from the pieces that other ranks, or as many, have written."""
        mine = self.average[name]
        first = processes.rank() * len(mine)
        length = -(-entries // self.wrote)
        for rank in range(first // length, min(self.wrote, -(-min(first + len(mine), entries) // length))):
            begin = max(first, rank * length)
            end = min(first + len(mine), (rank + 1) * length, entries)
            with safe_open(checkpoint / PARTS.format(rank), "pt") as file:
                mine[begin - first : end - first] = file.get_slice(name)[begin - rank * length : end - rank * length]


def _trained(model: Any) -> list[tuple[str, Tensor, int]]:
    """(name, flat local shard, entries of the whole) of each parameter that trains."""
    return [(name, shard(p), int(p.ds_numel)) for name, p in model.named_parameters() if p.requires_grad]
