"""Where the rows of a matrix lie in ZeRO-3's flat partitions: pure arithmetic, no process group.

DeepSpeed (runtime/zero/partition_parameters.py, ``_partition_param``) cuts the flattened parameter into world_size
pieces of ceil(numel / world_size) elements; the last ones may be shorter or empty, and are padded at their end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class RowPartition:
    """One rank's piece of a parameter of m rows and n columns."""

    m: int
    n: int
    world_size: int
    rank: int

    @property
    def length(self) -> int:
        """Elements that every rank stores, padding included."""
        return -(-self.m * self.n // self.world_size)

    @property
    def start(self) -> int:
        return min(self.rank * self.length, self.m * self.n)

    @property
    def stop(self) -> int:
        """End of the real elements: ``stop - start`` of the ``length`` stored ones are no padding."""
        return min((self.rank + 1) * self.length, self.m * self.n)

    @property
    def rows(self) -> range:
        """The rows that lie whole in this piece."""
        first = -(-self.start // self.n)
        return range(first, max(first, self.stop // self.n))

    @cached_property
    def cut_rows(self) -> list[int]:
        """The rows that lie on several ranks, the same list on every rank, ascending."""
        cuts = {k * self.length for k in range(1, self.world_size)}
        return sorted({cut // self.n for cut in cuts if cut < self.m * self.n and cut % self.n})

    @cached_property
    def whole(self) -> slice:
        """The whole rows' elements, as a slice of the local piece."""
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

    def whole_rows(self, local: Tensor) -> Tensor:
        """View [len(rows), n] of the whole rows in the flat local piece ``local`` [length]."""
        return local[self.whole].view(len(self.rows), self.n)


@dataclass(frozen=True)
class Fragment:
    """A part of a cut row on one rank."""

    cut: int
    """Which of ``RowPartition.cut_rows``."""
    columns: slice
    """Which of the row's columns."""
    local: slice
    """Where they lie in the local piece."""
