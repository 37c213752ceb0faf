"""Dark Experience Replay: safety samples beside the task's, held to the start model's logits (method/objectives.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from warp_ds.cluster import processes
from warp_ds.data.collate import EMPTY, GlobalBatchSampler, empty_sample, pad_batch, pad_token
from warp_ds.data.formats import IGNORE
from warp_ds.flags.controls import ControlFlags
from warp_ds.method.objectives import logit_distance
from warp_ds.phases.start_model import HeldToStart, Plain, answers, predicting
from warp_ds.store.files import write_tensors


class Replayed(HeldToStart):
    """Safety samples beside the task's, whose start model's logits z₀ are kept, one file a sample, in the model's dtype: exact.

    The samples of a step are a function of (seed, step), whatever the number of ranks.
    """

    def __init__(self, samples: Sequence[Any], arguments: Any, tokenizer: Any, directory: Path, micro_batch: int):
        """``samples``: tokenised. ``arguments``: of the training. ``micro_batch``: replayed samples a rank, at a time."""
        flags: ControlFlags = arguments
        super().__init__(samples, tokenizer, flags.batch_size, directory)
        count = replayed_samples(arguments)
        self.sampler = GlobalBatchSampler(
            len(samples), count, micro_batch, processes.world_size(), shuffle=True, seed=flags.seed
        )
        self.tokens = 1
        """Response tokens of a step's replayed samples, of all ranks."""

    def keep(self, index: int, logits: Tensor, labels: Tensor) -> None:
        write_tensors(self._file(index), {"logits": logits})

    def start_logits(self, index: int, device: torch.device) -> Tensor:
        """z₀ [t, V] of a sample."""
        return load_file(self._file(index))["logits"].to(device)

    def of_step(self, step: int) -> list[list[int]]:
        """This rank's micro-batches of replayed samples in a step."""
        self.sampler.set_epoch(step // self.sampler.steps)
        batch = list(self.sampler.global_batches())[step % self.sampler.steps]
        labels = (self.samples[i]["labels"][1:] for i in batch)
        self.tokens = max(1, sum(label != IGNORE for row in labels for label in row))
        return list(self.sampler.micro_batches(batch))[processes.rank() :: self.sampler.world_size]

    def _file(self, index: int) -> Path:
        return self.directory / f"sample_{index:06d}.safetensors"


def replayed_samples(arguments: Any) -> int:
    """Safety samples of a step, over all ranks."""
    return int(arguments.replay_batch_size or arguments.global_batch_size)


class Replay(Replayed):
    """Task loss + α mean ‖z - z₀‖²/V + β mean CE, both means over the response tokens of a step's replayed samples, which go
    through the model in the task's own batches."""

    objective = "der"

    def __init__(self, samples: Sequence[Any], arguments: Any, tokenizer: Any, directory: Path, accumulation: int):
        """``accumulation``: the training's micro-batches a step."""
        micro = -(-replayed_samples(arguments) // (accumulation * processes.world_size()))
        super().__init__(samples, arguments, tokenizer, directory, micro)
        self.alpha, self.beta = arguments.der_alpha, arguments.der_beta
        self.empty, self.pad = empty_sample(int(tokenizer.eos_token_id)), pad_token(tokenizer)
        self._step, self._micro = -1, 0
        self._batches: list[list[int]] = []

    def loss(self, plain: Plain, model: Any, inputs: dict[str, Tensor], tokens: Any) -> tuple[Tensor, Any]:
        rows = len(inputs["input_ids"])
        inputs, replayed = self._joined(inputs)
        loss, outputs = plain(model, inputs)
        return loss + self._of_replayed(outputs.logits, rows, replayed), outputs

    def _joined(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[int]]:
        """A micro-batch with its replayed samples below the task's rows, without labels; and which samples they are."""
        indices = self._next()
        if not indices:
            return inputs, indices
        rows = [
            {"input_ids": row[: int(mask.sum())], "labels": labels[: int(mask.sum())]}
            for row, mask, labels in zip(*(inputs[key].cpu() for key in ("input_ids", "attention_mask", "labels")), strict=True)
        ]
        below = [self.empty if i == EMPTY else {"input_ids": self.samples[i]["input_ids"]} for i in indices]
        device = inputs["input_ids"].device
        return {key: value.to(device) for key, value in pad_batch([*rows, *below], self.pad).items()}, indices

    def _of_replayed(self, logits: Tensor, rows: int, indices: list[int]) -> Tensor:
        """This rank's part of the replay's loss, for a mean over ranks; ``logits`` [B, L, V], replayed ones after ``rows``."""
        # In every rank's graph, replayed sample or not: ZeRO-3's backward passes must run through the same modules.
        total = logits[:1, :1, :1].float().sum() * 0.0
        for row, index in enumerate(indices, rows):
            if index == EMPTY:
                continue
            labels = torch.as_tensor(self.samples[index]["labels"], device=logits.device)
            mine = predicting(logits[row, : len(labels)], labels)
            total = total + self.alpha * logit_distance(mine, self.start_logits(index, logits.device)).sum()
            if self.beta:
                total = total + self.beta * functional.cross_entropy(mine.float(), answers(labels), reduction="sum")
        return total * processes.world_size() / self.tokens

    def _next(self) -> list[int]:
        """The replayed samples of this rank's coming micro-batch."""
        step = int(self.trainer.state.global_step)
        if step != self._step:
            self._step, self._micro, self._batches = step, 0, self.of_step(step)
        self._micro += 1
        return self._batches[self._micro - 1] if self._micro <= len(self._batches) else []
