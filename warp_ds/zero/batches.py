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
from warp_ds.data.packing import even_rows, pack_batch
from warp_ds.errors import ConfigError


@dataclass
class Batch:
    """A micro-batch on the device: of one sample a row, padded, or of several (packed)."""

    samples: list[int]
    """Its samples, by their place in the data set: of each row, where it is padded, and EMPTY for none."""
    input_ids: Tensor
    attention: Tensor
    """[B, L], what keeps attention to a sample: a mask that is 0 for padding, or of packed rows the position ids."""
    labels: Tensor
    counted: Tensor
    """bool [B, L]: the tokens that count; never padding, never EMPTY."""
    sequence: Tensor | None = None
    """Of packed rows, [B, L]: which of ``samples`` each token is of; their number for padding."""

    @property
    def context(self) -> dict[str, Tensor]:
        """What a model is told beside the tokens."""
        return {"attention_mask" if self.sequence is None else "position_ids": self.attention}

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids, **self.context}

    @cached_property
    def _places(self) -> Tensor:
        places = self.counted.flatten().nonzero().squeeze(1)
        return places if self.sequence is None else places[self.sequence.flatten()[places].argsort(stable=True)]

    def of_samples(self, values: Tensor) -> Tensor:
        """[B, L] from [samples]: each token's sample's; 0 for padding of packed rows."""
        if self.sequence is None:
            return values.unsqueeze(1).expand(self.labels.shape)
        return torch.cat([values, values.new_zeros(1)])[self.sequence]

    def shaped(self, x: Tensor) -> Tensor:
        """x [B, L, n], also of a layer that is given the tokens in one row, [B L, n].

        Raises ConfigError for any other shape, as of a layer that sees some of the tokens, or in another order.
        """
        if x.dim() == 2 and x.shape[0] == self.counted.numel():
            x = x.view(*self.counted.shape, x.shape[-1])
        if x.shape[:-1] != self.counted.shape:
            raise ConfigError(
                f"a layer's input is {tuple(x.shape)}, but the batch is {tuple(self.counted.shape)} tokens: it does not see "
                "every token once, in order; choose other layers with --layer_type or --target_layers"
            )
        return x

    def sums(self, x: Tensor) -> Tensor:
        """fp32 [samples]: ``sample_sums`` of x [B, L, n], packed or not."""
        x = self.shaped(x)
        if self.sequence is None:
            return sample_sums(x)
        of_tokens = x.sum(dim=-1, dtype=torch.float32).flatten()
        summed = of_tokens.new_zeros(len(self.samples) + 1).index_add_(0, self.sequence.flatten(), of_tokens)
        return summed[: len(self.samples)]

    def take(self, x: Tensor) -> Tensor:
        """The tokens that count [t, n] of x [B, L, n], sample by sample: a copy, or x itself where all do. Raises as
        ``shaped``."""
        x = self.shaped(x).reshape(-1, x.shape[-1])
        # Several times faster than x[counted] on a CPU.
        whole = self.sequence is None and len(self._places) == len(x)
        return x if whole else x.index_select(0, self._places)

    def take_at(self, x: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """Of x [t, n], what a layer saw of the tokens ``places`` [t] alone: those that count, and their numbers among all that
        count, in the order of ``take``."""
        order = torch.full((self.counted.numel(),), -1, dtype=torch.long, device=x.device)
        order[self._places] = torch.arange(len(self._places), device=x.device)
        numbers, chosen = order[places].sort(stable=True)
        counting = numbers >= 0
        return x.index_select(0, chosen[counting]), numbers[counting]

    def sums_at(self, x: Tensor, places: Tensor) -> Tensor:
        """``sums`` of x [t, n], what a layer saw of the tokens ``places`` [t] alone."""
        rows = self.labels.new_tensor(range(len(self.labels))).unsqueeze(1).expand(self.labels.shape)
        of_tokens = (rows if self.sequence is None else self.sequence).flatten()[places]
        found = torch.zeros(len(self.samples) + 1, dtype=torch.float32, device=x.device)
        return found.index_add_(0, of_tokens, x.sum(dim=-1, dtype=torch.float32))[: len(self.samples)]


def sample_sums(x: Tensor) -> Tensor:
    """fp32 [B]: for each sample of x [B, ...] a sum that is finite where every entry is.

    NaN and infinities survive additions. Finite entries whose sum passes 3e38 have squares that do too, and Σ with them.
    """
    return x.reshape(x.shape[0], -1).sum(dim=1, dtype=torch.float32)


class Samples:
    """A tokenised data set, the tokens of it that count, and how it is padded or packed."""

    def __init__(
        self, dataset: Any, tokenizer: Any, device: torch.device | str, token_scope: str = "all", capacity: int | None = None
    ):
        """``dataset``: rows of input_ids and labels. ``token_scope``: 'response' counts those alone, others all.
        ``capacity``: tokens that a packed row may have; None pads samples, each in a row of its own."""
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
        self.capacity = None if capacity is None else max([capacity, *(len(row["input_ids"]) for row in self.rows)])

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

    def packed(self, indices: Iterable[int]) -> list[list[int]]:
        """The rows that hold these samples: one in each, or as many as fit; EMPTY is left out."""
        there = [i for i in indices if i != EMPTY]
        if self.capacity is None:
            return [[i] for i in there]
        return [[there[k] for k in row] for row in even_rows([self.length([i]) for i in there], self.capacity)]

    def area(self, indices: Iterable[int]) -> int:
        """Tokens of these samples' micro-batch, with its padding."""
        rows = self.packed(indices)
        return len(rows) * max(map(self.length, rows), default=0)

    def few(self) -> list[Batch]:
        """Small micro-batches, the same on every rank: of the first two samples, and of the last one."""
        return [self.batch(range(min(2, len(self)))), self.batch([len(self) - 1])]

    def batch(self, indices: Sequence[int]) -> Batch:
        """The given samples (EMPTY allowed) as one micro-batch."""
        if self.capacity is not None:
            return self._packed_batch(indices)
        padded = pad_batch([self.empty if i == EMPTY else self.rows[i] for i in indices], self.pad)
        there = torch.tensor([i != EMPTY for i in indices]).unsqueeze(1)
        counted = (padded["labels"] != IGNORE if self.response else padded["attention_mask"].bool()) & there
        tensors = (padded["input_ids"], padded["attention_mask"], padded["labels"], counted)
        return Batch(list(indices), *(t.to(self.device) for t in tensors))

    def _packed_batch(self, indices: Sequence[int]) -> Batch:
        rows = self.packed(indices)
        batch = pack_batch([[self.rows[i] for i in row] for row in rows], self.pad, self.empty)
        samples = [i for i in indices if i != EMPTY]
        sequence = torch.full_like(batch["labels"], len(samples))
        counted = torch.zeros_like(batch["labels"], dtype=torch.bool)
        number = {i: k for k, i in enumerate(samples)}
        for r, row in enumerate(rows):
            at = 0
            for i in row:
                there = slice(at, at := at + self.length([i]))
                sequence[r, there] = number[i]
                counted[r, there] = torch.as_tensor(self.rows[i]["labels"]) != IGNORE if self.response else True
        tensors = (batch["input_ids"], batch["position_ids"], batch["labels"], counted, sequence)
        return Batch(samples, *(t.to(self.device) for t in tensors))

    def deal(self, batch_size: int, world_size: int, rank: int) -> list[list[int]]:
        """This rank's micro-batches of the whole set, of ``batch_size`` rows, longest together: as many on every rank."""
        if self.capacity is not None:
            rows = sorted(self.packed(range(len(self))), key=lambda row: -self.length(row))
            together = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
            return in_turn([[i for row in part for i in row] for part in together], world_size, rank, [EMPTY])
        order = sorted(range(len(self)), key=lambda i: (-len(self.rows[i]["input_ids"]), i))
        order += [EMPTY] * (-len(order) % batch_size)
        batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
        return in_turn(batches, world_size, rank, [EMPTY] * batch_size)
