"""Batches: padding, the EMPTY sample, and global batches that are the same on any world size.

A global batch of `global_batch_size` samples is cut into micro-batches of `micro_batch_size` slots, dealt to the ranks
in turn. Where the samples do not fill the slots, EMPTY fills them: a sample with nothing to learn, which adds neither
to the loss nor to its token count. So every rank runs the same number of micro-batches (no collective waits for one
that never comes), and no sample is repeated or dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from warp_ds.data.formats import IGNORE, Tokens

EMPTY = -1
"""The index of the EMPTY sample in a `GlobalBatchSampler`'s batches and in `WithEmpty`."""


def empty_sample(eos_token_id: int) -> Tokens:
    """One end-of-text token, seen by attention (an all-masked row gives nan in some kernels), without a label."""
    return {"input_ids": [eos_token_id], "attention_mask": [1], "labels": [IGNORE]}


def pad_token(tokenizer: Any) -> int:
    """The id that fills a batch: the tokenizer's own, else its end of text, which the attention mask hides all the same."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def pad_batch(samples: Sequence[Any], pad_token_id: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Pads samples to the longest: LongTensors `input_ids`, `attention_mask` and `labels`, each [batch, tokens].

    Samples without `labels` (prompts) give a batch whose labels are all -100.
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', not {side!r}")
    if not samples:
        raise ValueError("a batch needs at least one sample")
    length = max(len(sample["input_ids"]) for sample in samples)
    fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE}
    batch = {key: torch.full((len(samples), length), value, dtype=torch.long) for key, value in fill.items()}
    for i, sample in enumerate(samples):
        n = len(sample["input_ids"])
        where = slice(0, n) if side == "right" else slice(length - n, length)
        batch["input_ids"][i, where] = torch.as_tensor(sample["input_ids"], dtype=torch.long)
        batch["attention_mask"][i, where] = torch.as_tensor(sample.get("attention_mask", [1] * n), dtype=torch.long)
        if "labels" in sample:
            batch["labels"][i, where] = torch.as_tensor(sample["labels"], dtype=torch.long)
    return batch


def count_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """[tokens, places] of a batch as int64, on its device, padded or packed (`position_ids` that begin anew).

    A sequence without a label is no tokens: it is padding or EMPTY, or teaches nothing.
    """
    labelled = batch["labels"] != IGNORE
    if "logits_to_keep" in batch:  # the labels are those of the kept positions alone
        labelled = batch["logits_to_keep"].clone()
        labelled[batch["logits_to_keep"]] = batch["labels"] != IGNORE
    if "position_ids" in batch:
        sequence = (batch["position_ids"] == 0).flatten().cumsum(0)
        labels = torch.zeros(sequence.numel() + 1, dtype=torch.int64, device=sequence.device)
        tokens = (labels.scatter_add_(0, sequence, labelled.flatten().long())[sequence] > 0).sum()
    else:
        tokens = (batch["attention_mask"] * labelled.any(dim=-1, keepdim=True)).sum()
    return torch.stack([tokens, torch.full_like(tokens, labelled.numel())])


class WithEmpty(Dataset[Any]):
    """A map-style data set whose item `EMPTY` is the given EMPTY sample; all other items are the data set's own.

    Given the batch sampler, it passes `set_epoch` on: accelerate's data loader reaches the data set in every case, but
    not a batch sampler inside `BatchSamplerShard` inside `SkipBatchSampler` (a resume in mid-epoch).
    """

    def __init__(self, samples: Any, empty: Any, batch_sampler: GlobalBatchSampler | None = None) -> None:
        self.samples = samples
        self.empty = empty
        self.batch_sampler = batch_sampler

    def set_epoch(self, epoch: int) -> None:
        if self.batch_sampler is not None:
            self.batch_sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        if index == EMPTY:
            return self.empty
        if not 0 <= index < len(self.samples):
            raise IndexError(f"no sample {index} in a data set of {len(self.samples)}")
        return self.samples[index]


class GlobalBatchSampler(Sampler[list[Any]]):
    """Batch sampler of the whole job: micro-batch i of an epoch belongs to rank i % world_size.

    That is how `accelerate` deals batches (`split_batches=False`); `rank_batches` deals them without it. Every global
    batch is `accumulation_steps * world_size` micro-batches of exactly `micro_batch_size` slots; the k-th sample of a
    global batch is in the same place of the epoch on any world size. Samples fill micro-batches in order and EMPTY
    fills what is left. The last global batch of an epoch may be short of samples, never of slots.

    `len()` is the number of micro-batches of an epoch over all ranks, `len() / world_size / accumulation_steps` the
    number of optimizer steps. The order of an epoch is a function of (seed, epoch) alone, so a job resumes by
    `set_epoch` and skipping batches.
    """

    drop_last = False

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        micro_batch_size: int,
        world_size: int = 1,
        shuffle: bool = False,
        seed: int = 42,
    ) -> None:
        numbers = {
            "number of samples": num_samples,
            "global batch size": global_batch_size,
            "batch size": micro_batch_size,
            "world size": world_size,
        }
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"the {name} is {value}: it must be at least 1")
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.batch_size = micro_batch_size  # the name under which accelerate and transformers look for it
        self.world_size = world_size
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches that each rank runs per optimizer step."""
        return -(-self.global_batch_size // (self.batch_size * self.world_size))

    @property
    def steps(self) -> int:
        """Global batches (optimizer steps) per epoch."""
        return -(-self.num_samples // self.global_batch_size)

    @property
    def shape(self) -> str:
        """A micro-batch in words: how many samples."""
        return str(self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the coming epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.accumulation_steps * self.world_size

    def order(self) -> list[int]:
        """The sample indices of this epoch, in the order of the global batches."""
        if not self.shuffle:
            return list(range(self.num_samples))
        # One integer from the pair, so that (seed, epoch) and (seed + 1, epoch - 1) do not share an order.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        return list(torch.randperm(self.num_samples, generator=generator).tolist())

    def global_batches(self) -> Iterator[list[int]]:
        """The samples of each optimizer step of this epoch."""
        order = self.order()
        for start in range(0, self.num_samples, self.global_batch_size):
            yield order[start : start + self.global_batch_size]

    def micro_batches(self, batch: list[int]) -> Iterator[list[Any]]:
        """A global batch's micro-batches, over all ranks."""
        slots = self.accumulation_steps * self.world_size * self.batch_size
        batch = batch + [EMPTY] * (slots - len(batch))
        for first in range(0, slots, self.batch_size):
            yield batch[first : first + self.batch_size]

    def __iter__(self) -> Iterator[list[Any]]:
        for batch in self.global_batches():
            yield from self.micro_batches(batch)

    def rank_batches(self, rank: int) -> Iterator[list[Any]]:
        """This rank's micro-batches of the epoch, in order."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"no rank {rank} in a world of {self.world_size}")
        for i, batch in enumerate(self):
            if i % self.world_size == rank:
                yield batch
