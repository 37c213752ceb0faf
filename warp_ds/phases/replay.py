"""Dark Experience Replay: safety samples beside the task's, held to the start model's logits (method/objectives.py)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from warp_ds.cluster import consensus, processes
from warp_ds.data.collate import EMPTY, GlobalBatchSampler, empty_sample, pad_batch, pad_token
from warp_ds.data.formats import IGNORE
from warp_ds.errors import UnsupportedSetting
from warp_ds.flags.controls import ControlFlags
from warp_ds.method.objectives import logit_distance
from warp_ds.store.files import write_json, write_tensors
from warp_ds.zero.batches import Samples

logger = logging.getLogger(__name__)


class Replay(TrainerCallback):
    """Task loss + α mean ‖z - z₀‖²/V + β mean CE, both means over the response tokens of a step's replayed samples.

    z₀ are the start model's logits, made before the first step and kept in ``directory``, one file a sample, in the
    model's dtype: exact, and what a run goes on with after the weights have moved. The samples of a step are a function of
    (seed, step), whatever the number of ranks, and go through the model in the task's own batches.
    """

    def __init__(self, samples: Sequence[Any], arguments: Any, tokenizer: Any, directory: Path, accumulation: int):
        """``samples``: tokenised. ``arguments``: of the training. ``accumulation``: its micro-batches a step."""
        flags: ControlFlags = arguments
        self.samples, self.directory, self.tokenizer = samples, directory, tokenizer
        self.alpha, self.beta, self.batch_size = flags.der_alpha, flags.der_beta, flags.batch_size
        count, world = flags.replay_batch_size or arguments.global_batch_size, processes.world_size()
        micro = -(-count // (accumulation * world))
        self.sampler = GlobalBatchSampler(len(samples), count, micro, world, shuffle=True, seed=flags.seed)
        self.empty, self.pad = empty_sample(int(tokenizer.eos_token_id)), pad_token(tokenizer)
        self.trainer: Any = None
        self._step, self._micro = -1, 0
        self._batches: list[list[int]] = []
        self._tokens = 1

    def attach(self, trainer: Trainer) -> None:
        """``UnsupportedSetting`` where the trainer takes a mean of each micro-batch, not of the step."""
        if not trainer.model_accepts_loss_kwargs:
            raise UnsupportedSetting(
                f"--objective der needs a loss that is one mean over a step, which {type(trainer.model).__name__} has not"
            )
        self.trainer = trainer
        trainer.add_callback(self)

    # ------------------------------------------------------------ the start model's logits

    @torch.no_grad()
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Collective."""
        mark = self.directory / "whole.json"
        if consensus.on_rank_0(mark.is_file, "looking for the start model's logits"):
            return
        model = self.trainer.model_wrapped
        samples = Samples(self.samples, self.tokenizer, args.device, "response")
        mine = samples.deal(self.batch_size, processes.world_size(), processes.rank())
        model.eval()
        for indices in tqdm(mine, desc="start model's logits", disable=processes.rank() != 0):
            batch = samples.batch(indices)
            logits = model(**batch.inputs, use_cache=False).logits
            with consensus.on_every_rank_or_none("writing the start model's logits"):
                for row, index in enumerate(indices):
                    if index != EMPTY:
                        write_tensors(self._file(index), {"logits": _predicting(logits[row], batch.labels[row])})
        model.train()
        processes.barrier()
        consensus.on_rank_0(lambda: write_json(mark, {"samples": len(samples)}), "marking the start model's logits")

    def _file(self, index: int) -> Path:
        return self.directory / f"sample_{index:06d}.safetensors"

    # ------------------------------------------------------------ a micro-batch

    def join(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[int]]:
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

    def loss(self, logits: Tensor, rows: int, indices: list[int]) -> Tensor:
        """This rank's part of the replay's loss, for a mean over ranks; ``logits`` [B, L, V], replayed ones after ``rows``."""
        # In every rank's graph, replayed sample or not: ZeRO-3's backward passes must run through the same modules.
        total = logits[:1, :1, :1].float().sum() * 0.0
        for row, index in enumerate(indices, rows):
            if index == EMPTY:
                continue
            labels = torch.as_tensor(self.samples[index]["labels"], device=logits.device)
            mine = _predicting(logits[row, : len(labels)], labels)
            start = load_file(self._file(index))["logits"].to(logits.device)
            total = total + self.alpha * logit_distance(mine, start).sum()
            if self.beta:
                answer = labels[1:][labels[1:] != IGNORE]
                total = total + self.beta * functional.cross_entropy(mine.float(), answer, reduction="sum")
        return total * processes.world_size() / self._tokens

    def _next(self) -> list[int]:
        """The replayed samples of this rank's coming micro-batch."""
        step = int(self.trainer.state.global_step)
        if step != self._step:
            self._step, self._micro = step, 0
            self.sampler.set_epoch(step // self.sampler.steps)
            batch = list(self.sampler.global_batches())[step % self.sampler.steps]
            every = list(self.sampler.micro_batches(batch))
            self._batches = every[processes.rank() :: self.sampler.world_size]
            labels = (self.samples[i]["labels"][1:] for i in batch)
            self._tokens = max(1, sum(label != IGNORE for row in labels for label in row))
        self._micro += 1
        return self._batches[self._micro - 1] if self._micro <= len(self._batches) else []


def _predicting(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits [t, V] that predict the labels [L] of a row [L, V]."""
    return logits[:-1][labels[1:] != IGNORE]
