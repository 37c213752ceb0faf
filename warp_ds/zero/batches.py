"""Micro-batches of a tokenised data set, the same number on every rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from warp_ds.cluster.dealing import in_turn
from warp_ds.data.collate import EMPTY, empty_sample, pad_batch, pad_token
from warp_ds.data.formats import IGNORE


@dataclass
class Batch:
    """A padded micro-batch on the device."""

    samples: list[int]
    """Which sample of the data set each row is; EMPTY for none."""
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    counted: Tensor
    """bool [B, L]: the tokens that count; never padding, never EMPTY."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @cached_property
    def _places(self) -> Tensor:
        return self.counted.flatten().nonzero().squeeze(1)

    def take(self, x: Tensor) -> Tensor:
        """The tokens that count [t, n] of x [B, L, n]: a copy, or x itself where all do.

        Raises ValueError for any other shape, as of a layer that sees some of the tokens, or in another order.
        """
        if x.shape[:-1] != self.counted.shape:
            raise ValueError(f"a layer's input is {tuple(x.shape)}, but the batch is {tuple(self.counted.shape)} tokens")
        x = x.reshape(-1, x.shape[-1])
        # Several times faster than x[counted] on a CPU.
        return x if len(self._places) == len(x) else x.index_select(0, self._places)


def sample_sums(x: Tensor) -> Tensor:
    """fp32 [B]: for each sample of x [B, ...] a sum that is finite where every entry is.

    NaN and infinities survive additions. Finite entries whose sum passes 3e38 have squares that do too, and Σ with them.
    """
    return x.reshape(x.shape[0], -1).sum(dim=1, dtype=torch.float32)


class Samples:
    """A tokenised data set, the tokens of it that count, and how it is padded."""

    def __init__(self, dataset: Any, tokenizer: Any, device: torch.device | str, token_scope: str = "all"):
        """``dataset``: rows of input_ids and labels. ``token_scope``: 'response' counts those alone, others all."""
        eos = tokenizer.eos_token_id
        self.device = device
        self.pad = pad_token(tokenizer)
        self.empty = empty_sample(int(eos))
        self.places = [row.get("row", place) for place, row in enumerate(dataset)]
        """Which row of the data set each sample was, for messages."""
        self.rows: list[Any] = [
            {"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"]), "labels": row["labels"]}
            for row in dataset
        ]
        self.response = token_scope == "response"

    def __len__(self) -> int:
        return len(self.rows)

    def counts(self, index: int) -> int:
        """Tokens of a sample that count."""
        labels = self.rows[index]["labels"]
        return sum(label != IGNORE for label in labels) if self.response else len(labels)

    def responses(self, index: int) -> int:
        """Tokens of a sample that the loss sees: a label on the first token has nothing before it."""
        return sum(label != IGNORE for label in self.rows[index]["labels"][1:])

    def length(self, indices: Iterable[int]) -> int:
        """Tokens of these samples, whether they count or not."""
        return sum(len(self.rows[i]["input_ids"]) for i in indices)

    @property
    def tokens(self) -> int:
        """Tokens that count, of all samples."""
        return sum(self.counts(i) for i in range(len(self)))

    def batch(self, indices: Sequence[int]) -> Batch:
        """The given samples (EMPTY allowed) as one padded micro-batch."""
        padded = pad_batch([self.empty if i == EMPTY else self.rows[i] for i in indices], self.pad)
        there = torch.tensor([i != EMPTY for i in indices]).unsqueeze(1)
        counted = (padded["labels"] != IGNORE if self.response else padded["attention_mask"].bool()) & there
        tensors = (padded["input_ids"], padded["attention_mask"], padded["labels"], counted)
        return Batch(list(indices), *(t.to(self.device) for t in tensors))

    def deal(self, batch_size: int, world_size: int, rank: int) -> list[list[int]]:
        """This rank's micro-batches of the whole set, longest samples together: as many on every rank."""
        order = sorted(range(len(self)), key=lambda i: (-len(self.rows[i]["input_ids"]), i))
        order += [EMPTY] * (-len(order) % batch_size)
        batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        return in_turn(batches, world_size, rank, [EMPTY] * batch_size)
