"""Steps that all ranks finish, or none: what one rank finds is every rank's error."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

from warp_ds.cluster.processes import all_gather_object, all_reduce_sum, broadcast_object, collective_device, rank, world_size
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


@contextmanager
def long_step(what: str) -> Iterator[None]:
    """As ``on_every_rank_or_none``, for a block that may take some ranks hours and others nothing.

    Who is done meets the others every few seconds, so that nobody's --timeout runs out. The block must hold no collective.
    """
    with on_every_rank_or_none(what):
        if world_size() == 1:
            yield
            return
        done, failed = threading.Event(), list[Exception]()
        device = collective_device()
        waiting = threading.Thread(target=_meet_until, args=(done, device, failed), name="waiting", daemon=True)
        waiting.start()
        try:
            yield
        finally:
            done.set()
            if not isinstance(sys.exception(), KeyboardInterrupt | SystemExit):
                waiting.join()
        if failed:
            raise failed[0]


BEAT_SECONDS = 10.0


def _meet_until(done: threading.Event, device: torch.device, failed: list[Exception]) -> None:
    """Meets the other ranks until all are done; a thread of its own has a current GPU of its own."""
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        left = 1.0
        while left:
            left = all_reduce_sum(torch.tensor([float(not done.wait(BEAT_SECONDS))], device=device)).item()
    except Exception as error:  # noqa: BLE001
        failed.append(error)  # a rank is dead: said where the block ends
