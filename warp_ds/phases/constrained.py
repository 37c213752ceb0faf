"""Token-wise constrained fine-tuning: the task's own tokens, held to the start model's probabilities (method/objectives.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from warp_ds.cluster import consensus, processes
from warp_ds.data.collate import EMPTY
from warp_ds.data.formats import IGNORE
from warp_ds.errors import UnsupportedSetting
from warp_ds.method.objectives import constrained_loss, token_strengths
from warp_ds.store.files import write_tensors
from warp_ds.zero.batches import Samples

FILE = "logprobs.safetensors"


class Constrained(TrainerCallback):
    """The mean over a step's response tokens of ``constrained_loss``, in place of the task's loss.

    The start model's log-probabilities of those tokens are made before the first step and kept in ``directory``, fp32, one
    number a token, in the order of the samples; a batch's rows find theirs by their own tokens.
    """

    def __init__(self, samples: Sequence[Any], tokenizer: Any, batch_size: int, directory: Path):
        """``samples``: the task's, tokenised."""
        self.samples, self.tokenizer, self.batch_size, self.path = samples, tokenizer, batch_size, directory / FILE
        self.trainer: Any = None
        self.start: dict[bytes, Tensor] = {}

    def attach(self, trainer: Trainer) -> None:
        """``UnsupportedSetting`` where the trainer takes a mean of each micro-batch, not of the step."""
        if not trainer.model_accepts_loss_kwargs:
            raise UnsupportedSetting(
                f"--objective constrained needs one mean over a step for its loss, which {type(trainer.model).__name__} has not"
            )
        self.trainer = trainer
        trainer.add_callback(self)

    @torch.no_grad()
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Collective."""
        samples = Samples(self.samples, self.tokenizer, args.device, "response")
        if not consensus.on_rank_0(self.path.is_file, "looking for the start model's probabilities"):
            parts: dict[int, Tensor] = {}
            for part in processes.all_gather_object(self._measured(samples)):
                parts |= part
            every = torch.cat([parts[index] for index in range(len(samples))])
            consensus.on_rank_0(
                lambda: write_tensors(self.path, {"logprobs": every}), "writing the start model's probabilities"
            )
        with consensus.on_every_rank_or_none("reading the start model's probabilities"):
            counts = [samples.responses(index) for index in range(len(samples))]
            pieces = load_file(self.path)["logprobs"].split(counts)
        self.start = {_key(row["input_ids"], row["labels"]): piece for row, piece in zip(samples.rows, pieces, strict=True)}

    def _measured(self, samples: Samples) -> dict[int, Tensor]:
        """Sample -> its response tokens' log-probabilities, of this rank's samples."""
        model, measured = self.trainer.model_wrapped, {}
        model.eval()
        mine = samples.deal(self.batch_size, processes.world_size(), processes.rank())
        for indices in tqdm(mine, desc="start model's probabilities", disable=processes.rank() != 0):
            batch = samples.batch(indices)
            logits = model(**batch.inputs, use_cache=False).logits
            for row, index in enumerate(indices):
                if index != EMPTY:
                    measured[index] = _logprobs(logits[row], batch.labels[row]).cpu()
        model.train()
        return measured

    def loss(self, model: Any, inputs: dict[str, Tensor], tokens: Any) -> tuple[Tensor, Any]:
        """This rank's part of the loss, for a mean over ranks, and the model's outputs; ``tokens``: of the whole step."""
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        # In every rank's graph, also where it has no sample: ZeRO-3's backward passes must run through the same modules.
        total = outputs.logits[:1, :1, :1].float().sum() * 0.0
        for row, (ids, mask, labels) in enumerate(
            zip(inputs["input_ids"], inputs["attention_mask"], inputs["labels"], strict=True)
        ):
            length = int(mask.sum())
            if not (labels[1:] != IGNORE).any():
                continue
            start = self.start[_key(ids[:length].tolist(), labels[:length].tolist())].to(total.device)
            beta = token_strengths(_positions(labels))
            total = total + constrained_loss(_logprobs(outputs.logits[row], labels), start, beta).sum()
        return total * processes.world_size() / tokens, outputs


def _key(ids: Sequence[int], labels: Sequence[int]) -> bytes:
    """What tells a sample: its tokens, and which of them are trained."""
    return torch.tensor([list(ids), list(labels)], dtype=torch.int64).numpy().tobytes()


def _positions(labels: Tensor) -> Tensor:
    """Of each response token that the loss sees its place in its answer, from 1; an answer is a run of labels."""
    seen = labels[1:] != IGNORE
    count = seen.long().cumsum(0)
    before = torch.where(seen, 0, count).cummax(0).values
    return (count - before)[seen]


def _logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """log π of the response tokens of a row, [t] fp32, from its logits [L, V]."""
    seen = labels[1:] != IGNORE
    chosen = logits[:-1][seen].float().log_softmax(-1)
    return chosen.gather(1, labels[1:][seen].unsqueeze(1)).squeeze(1)
