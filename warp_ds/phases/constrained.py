"""Token-wise constrained fine-tuning: the task's own tokens, held to the start model's probabilities (method/objectives.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from warp_ds.cluster import consensus, processes
from warp_ds.data.formats import IGNORE
from warp_ds.method.objectives import constrained_loss, token_strengths
from warp_ds.phases.start_model import HeldToStart, Plain, answers, predicting
from warp_ds.store.files import write_tensors
from warp_ds.zero.batches import Samples

FILE = "logprobs.safetensors"


class Constrained(HeldToStart):
    """The mean over a step's response tokens of ``constrained_loss``, in place of the task's loss.

    Of the start model are kept its log-probabilities of those tokens, fp32, one number a token, in the order of the samples;
    a batch's rows find theirs by their own tokens.
    """

    objective = "constrained"

    def __init__(self, samples: Sequence[Any], tokenizer: Any, batch_size: int, directory: Path):
        """``samples``: the task's, tokenised."""
        super().__init__(samples, tokenizer, batch_size, directory)
        self.start: dict[bytes, Tensor] = {}
        self._found: dict[int, Tensor] = {}

    def keep(self, index: int, logits: Tensor, labels: Tensor) -> None:
        self._found[index] = _logprobs(logits, labels).cpu()

    def keep_rest(self, samples: Samples) -> None:
        parts: dict[int, Tensor] = {}
        for part in processes.all_gather_object(self._found):
            parts |= part
        every = torch.cat([parts[index] for index in range(len(samples))])
        self._found = {}
        consensus.on_rank_0(
            lambda: write_tensors(self.directory / FILE, {"logprobs": every}), "writing the start model's probabilities"
        )

    def open(self, samples: Samples) -> None:
        counts = [samples.responses(index) for index in range(len(samples))]
        pieces = load_file(self.directory / FILE)["logprobs"].split(counts)
        self.start = {_key(row["input_ids"], row["labels"]): piece for row, piece in zip(samples.rows, pieces, strict=True)}

    def loss(self, plain: Plain, model: Any, inputs: dict[str, Tensor], tokens: Any) -> tuple[Tensor, Any]:
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
            now = _logprobs(predicting(outputs.logits[row], labels), answers(labels))
            total = total + constrained_loss(now, start, token_strengths(_positions(labels))).sum()
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
    """log π of tokens [t] fp32, from the logits [t, V] that predict them."""
    return logits.float().log_softmax(-1).gather(1, labels.unsqueeze(1)).squeeze(1)
