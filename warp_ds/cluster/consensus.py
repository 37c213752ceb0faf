"""Steps that all ranks finish, or none: what one rank finds is every rank's error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from warp_ds.cluster.processes import all_gather_object, broadcast_object, rank
from warp_ds.errors import OtherRankError

T = TypeVar("T")


@contextmanager
def on_every_rank_or_none(what: str) -> Iterator[None]:
    """A block that some ranks may fail: all leave it together, each with its own error or that of the first rank.

    The block must hold no collective.
    """
    error: BaseException | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001
        error = caught
    messages = all_gather_object(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [(r, m) for r, m in enumerate(messages) if m is not None]
    if failed:
        raise OtherRankError(f"{what} failed on rank {failed[0][0]}: {failed[0][1]}")


def on_rank_0(function: Callable[[], T], what: str) -> T:
    """Runs ``function`` on rank 0 alone; its result, or its failure, is every rank's."""
    result: T | None = None
    with on_every_rank_or_none(what):
        if rank() == 0:
            result = function()
    return broadcast_object(result)  # type: ignore[return-value]
