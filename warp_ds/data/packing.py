"""Packed batches: several samples in a row, kept apart by position ids that begin anew with each.

A packed global batch holds the samples of the padded one. They are spread evenly over rows, the rows are dealt to the ranks
in turn; the number of micro-batches is the same for every rank and every global batch of the run.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from warp_ds.data.collate import GlobalBatchSampler, WithEmpty
from warp_ds.data.formats import IGNORE

Row = tuple[int, ...]
"""The samples, by index, that stand in one row."""


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of at most `capacity` tokens: each sample, longest first, goes where it leaves the least room.

    Johnson's best-fit decreasing (1973): about 11/9 of the fewest rows at most. Raises ValueError for a longer sample.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left in each row, and its number; sorted
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[sample] > capacity:
            raise ValueError(f"sample {sample} has {lengths[sample]} tokens, more than the {capacity} of a row")
        place = bisect_left(rooms, (lengths[sample], -1))
        room, row = rooms.pop(place) if place < len(rooms) else (capacity, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(sample)
        insort(rooms, (room - lengths[sample], row))
    return rows


def spread(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Exactly `count` rows of nearly equal length, longest first: each sample, longest first, goes to the shortest row.

    Graham's longest-processing-time rule (1969): the longest row is at most 4/3 of the best.
    """
    heap: list[tuple[int, int]] = [(0, row) for row in range(count)]
    rows: list[list[int]] = [[] for _ in range(count)]
    for sample in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length, row = heap[0]
        rows[row].append(sample)
        heapq.heapreplace(heap, (length + lengths[sample], row))
    return [rows[row] for _, row in sorted(heap, key=lambda item: (-item[0], item[1]))]


def even_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """As few rows of at most `capacity` tokens as best-fit finds, of even length where they can be: less padding."""
    rows = best_fit(lengths, capacity)
    even = spread(lengths, len(rows))
    return even if all(sum(lengths[i] for i in row) <= capacity for row in even) else rows


@torch.no_grad()
def seen_of_another(model: Any, first: Sequence[int], second: Sequence[int], device: Any) -> float:
    """How much the logits of `second` change, in their standard deviations, when what stands before it in its row does.

    0 within rounding where a model keeps samples apart. `first` and `second` are token ids.
    """
    changes = []
    for before in (first, first[::-1]):
        row = [{"input_ids": list(ids), "labels": list(ids)} for ids in (before, second)]
        batch = {key: value.to(device) for key, value in pack_batch([row], 0, None).items() if key != "labels"}
        changes.append(model(**batch, use_cache=False).logits[0, len(first) :].float())
    change = (changes[0] - changes[1]).abs().max()
    return float(change / changes[0].std()) if change else 0.0


class PackedBatchSampler(GlobalBatchSampler):
    """As `GlobalBatchSampler`, of micro-batches of `rows` rows, each a tuple of samples; a row without one is ().

    `lengths` are the samples' tokens, `capacity` the tokens that a row may have, `epochs` the number of epochs that will be
    asked for: the number of micro-batches must do for all of them.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        global_batch_size: int,
        rows: int,
        capacity: int,
        world_size: int = 1,
        shuffle: bool = False,
        seed: int = 42,
        epochs: int = 1,
    ) -> None:
        super().__init__(len(lengths), global_batch_size, rows, world_size, shuffle, seed)
        self.lengths, self.capacity = lengths, capacity
        most = 1
        for epoch in range(epochs if shuffle else 1):
            self.set_epoch(epoch)
            most = max([most, *(len(best_fit(self._lengths(batch), capacity)) for batch in self.global_batches())])
        self.set_epoch(0)
        self._accumulation_steps = -(-most // (rows * world_size))

    @property
    def accumulation_steps(self) -> int:
        return self._accumulation_steps

    @property
    def shape(self) -> str:
        return f"up to {self.batch_size} rows of at most {self.capacity} tokens"

    def _lengths(self, batch: Sequence[int]) -> list[int]:
        return [self.lengths[i] for i in batch]

    def micro_batches(self, batch: list[int]) -> Iterator[list[Any]]:
        count = self.accumulation_steps * self.world_size
        lengths = self._lengths(batch)
        divisions = [spread(lengths, count * rows) for rows in range(self.batch_size, 0, -1)]
        fitting = [rows for rows in divisions if max(sum(lengths[i] for i in row) for row in rows) <= self.capacity]
        rows = min(fitting, key=lambda rows: self._area(rows, lengths, count)) if fitting else best_fit(lengths, self.capacity)
        rows = sorted(rows, key=lambda row: -sum(lengths[i] for i in row))
        rows += [[] for _ in range(-len(rows) % count)]
        per = len(rows) // count
        for first in range(0, len(rows), per):
            micro: list[Row] = [tuple(batch[i] for i in row) for row in rows[first : first + per]]
            yield micro + [()] * (self.batch_size - per)

    def _area(self, rows: list[list[int]], lengths: Sequence[int], count: int) -> int:
        """Tokens with the padding: as many rows as there are in a micro-batch, each as long as its first."""
        per = len(rows) // count
        return sum(per * sum(lengths[i] for i in row) for row in rows[::per])


class Packed(WithEmpty):
    """A map-style data set whose item is the samples of a row."""

    def __getitem__(self, row: Row) -> list[Any]:  # type: ignore[override]
        return [super(Packed, self).__getitem__(i) for i in row]


def pack_batch(
    rows: Sequence[Sequence[Any]], pad_token_id: int, empty: Any, trained_only: bool = False
) -> dict[str, torch.Tensor]:
    """Rows of samples as LongTensors `input_ids`, `position_ids` and `labels`, each [rows with samples, tokens].

    Positions begin at 0 with each sample and with the padding, so that each is a sequence of its own. No sample's first token
    has a label: what stands before it is another's. There is no attention mask, which would hide where sequences begin.

    `trained_only` has the model make logits before trained tokens alone: `logits_to_keep` (bool, [rows, tokens]) says where,
    `shift_labels` and `labels` [n] are what comes next there.
    """
    filled = [row for row in rows if row] or [[empty]]
    length = max(sum(len(sample["input_ids"]) for sample in row) for row in filled)
    fill = {"input_ids": pad_token_id, "position_ids": 0, "labels": IGNORE}
    batch = {key: torch.full((len(filled), length), value, dtype=torch.long) for key, value in fill.items()}
    for i, row in enumerate(filled):
        at = 0
        for sample in row:
            there = slice(at, at := at + len(sample["input_ids"]))
            batch["input_ids"][i, there] = torch.as_tensor(sample["input_ids"])
            batch["position_ids"][i, there] = torch.arange(there.stop - there.start)
            batch["labels"][i, there] = torch.as_tensor(sample["labels"])
            batch["labels"][i, there.start] = IGNORE
        batch["position_ids"][i, at:] = torch.arange(length - at)
    if trained_only:
        following = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORE)[:, 1:]
        batch["logits_to_keep"] = following != IGNORE
        batch["logits_to_keep"][0, 0] = True  # where nothing is trained, the loss is still made of something
        batch["labels"] = batch["shift_labels"] = following[batch["logits_to_keep"]]
    return batch
