"""A tensor as pieces of others: which elements of which stored tensors, one after the other, make it up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Origin = TypeVar("Origin")


@dataclass(frozen=True, slots=True)
class Piece(Generic[Origin]):
    """Elements [first, first + length) of the flat ``origin``, which are [begin, begin + length) of the flat tensor."""

    origin: Origin
    first: int
    begin: int
    length: int

    @property
    def end(self) -> int:
        return self.begin + self.length

    def within(self, start: int, stop: int) -> Piece[Origin]:
        """What of it lies in [start, stop) of the flat tensor; its length is 0 or less where nothing does."""
        begin = max(self.begin, start)
        return Piece(self.origin, self.first + begin - self.begin, begin, min(self.end, stop) - begin)


def joined(pieces: Iterable[Piece[Origin]]) -> Iterator[Piece[Origin]]:
    """The same in as few pieces as can be; given and returned in the tensor's order."""
    last: Piece[Origin] | None = None
    for piece in pieces:
        if last is not None and last.origin == piece.origin and last.first + last.length == piece.first:
            last = Piece(last.origin, last.first, last.begin, last.length + piece.length)
            continue
        if last is not None:
            yield last
        last = piece
    if last is not None:
        yield last
