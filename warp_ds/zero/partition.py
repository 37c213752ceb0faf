"""Where the rows of a matrix lie in ZeRO-3's flat partitions: pure arithmetic, no process group.

DeepSpeed (runtime/zero/partition_parameters.py, ``_partition_param``) cuts the flattened parameter into world_size
pieces of ceil(numel / world_size) elements; the last ones may be shorter or empty, and are padded at their end. A matrix
that is some rows of a parameter is cut where the parameter is: a rank's share of it is one flat range of the matrix, longer
on some ranks than on others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from warp_ds.store.layers import Ranges


@dataclass(frozen=True)
class RowPartition:
    """One rank's share of a matrix of m rows and n columns: of a whole parameter, or of the rows of one that ``ranges`` name.

    The rank's *piece* is what it stores of the parameter [length]; its *share* is what of the matrix lies in it, flat and
    without padding [stop - start].
    """

    m: int
    n: int
    world_size: int
    rank: int
    ranges: Ranges = ()
    """Rows of the parameter that the matrix consists of, in order; () for all."""
    height: int = 0
    """Rows of the parameter, where there are ``ranges``."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return (self.height or self.m) * self.n

    @property
    def length(self) -> int:
        """Elements of the parameter that every rank stores, padding included."""
        return -(-self.numel // self.world_size)

    def cut(self, rank: int) -> int:
        """How many of the matrix's elements lie before the piece of ``rank``."""
        at = min(rank * self.length, self.numel)
        if not self.ranges:
            return at
        return sum(min(max(at - first * self.n, 0), (end - first) * self.n) for first, end in self.ranges)

    @cached_property
    def start(self) -> int:
        return self.cut(self.rank)

    @cached_property
    def stop(self) -> int:
        """End of the share in the flat matrix."""
        return self.cut(self.rank + 1)

    @property
    def shares(self) -> list[int]:
        """Elements of every rank's share."""
        return [self.cut(rank + 1) - self.cut(rank) for rank in range(self.world_size)]

    @cached_property
    def own(self) -> list[slice]:
        """Where the share lies in the local piece, in order."""
        if not self.ranges:
            return [slice(0, self.stop - self.start)]
        piece = self.rank * self.length
        ends = [(max(first * self.n - piece, 0), min(end * self.n - piece, self.length)) for first, end in self.ranges]
        return [slice(begin, end) for begin, end in ends if begin < end]

    @property
    def padding(self) -> slice:
        """What of the local piece is no part of the parameter."""
        return slice(max(0, min(self.length, self.numel - self.rank * self.length)), self.length)

    def take(self, piece: Tensor) -> Tensor:
        """The share in the flat local ``piece`` [length]: a view of it where it lies together, else a copy."""
        parts = [piece[part] for part in self.own]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else piece[:0]

    def put(self, piece: Tensor, share: Tensor) -> None:
        """Writes the share into the flat local ``piece``, which it may be a view of."""
        for part, values in zip(self.own, share.split([part.stop - part.start for part in self.own]), strict=True):
            if piece[part].data_ptr() != values.data_ptr() or piece.dtype != values.dtype or piece.device != values.device:
                piece[part].copy_(values)

    @property
    def rows(self) -> range:
        """The matrix's rows that lie whole in this share."""
        first = -(-self.start // self.n)
        return range(first, max(first, self.stop // self.n))

    @cached_property
    def cut_rows(self) -> list[int]:
        """The rows that lie on several ranks, the same list on every rank, ascending."""
        cuts = {self.cut(rank) for rank in range(1, self.world_size)}
        return sorted({cut // self.n for cut in cuts if cut < self.m * self.n and cut % self.n})

    @cached_property
    def whole(self) -> slice:
        """The whole rows' elements, as a slice of the share."""
        begin = min(self.rows.start * self.n, self.stop) - self.start
        return slice(begin, begin + len(self.rows) * self.n)

    @cached_property
    def fragments(self) -> list[Fragment]:
        """This rank's parts of cut rows."""
        fragments = []
        for index, row in enumerate(self.cut_rows):
            begin, end = max(row * self.n, self.start), min((row + 1) * self.n, self.stop)
            if begin < end:
                local = slice(begin - self.start, end - self.start)
                fragments.append(Fragment(index, slice(begin - row * self.n, end - row * self.n), local))
        return fragments

    def whole_rows(self, share: Tensor) -> Tensor:
        """View [len(rows), n] of the whole rows in the flat share."""
        return share[self.whole].view(len(self.rows), self.n)


def between(parts: Iterable[slice], total: int) -> Iterator[slice]:
    """What of range(total) lies in none of the slices."""
    at = 0
    for part in sorted(parts, key=lambda part: (part.start, part.stop)):
        if at < part.start:
            yield slice(at, part.start)
        at = max(at, part.stop)
    if at < total:
        yield slice(at, total)


@dataclass(frozen=True)
class Fragment:
    """A part of a cut row on one rank."""

    cut: int
    """Which of ``RowPartition.cut_rows``."""
    columns: slice
    """Which of the row's columns."""
    local: slice
    """Where they lie in the share."""
