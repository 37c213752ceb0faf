"""A job that is to end soon saves and goes on later: preempted, at its time limit, requeued from outside.

The warning signal (USR2, as the templates ask for with --signal; NCCL uses USR1) or TERM sets a flag and nothing else: a
rank may be inside a collective, and a save is one too. At the next safe place ``leave_if_asked`` lets all ranks agree,
the phase saves, and ``Preempted`` takes them out together. Then rank 0 requeues its own job, once.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Mapping
from types import FrameType

import torch

from warp_ds import errors
from warp_ds.cluster import processes, slurm

logger = logging.getLogger(__name__)

STOPPED = 75
"""Exit status of a job that saved and was not requeued (EX_TEMPFAIL): start the same command again."""
_asked: str | None = None


class Preempted(Exception):
    """All ranks have saved what they had and leave the phase. The message names the signal."""


def watch() -> None:
    """Takes USR2 and TERM from now on; called in a rank's main thread."""
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, _ask)


def unwatch() -> None:
    """The signals end the process again, as they do by default."""
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _ask(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = signal.Signals(number).name


def asked() -> bool:
    """Whether this rank has had a signal. Others may not have had it yet: see ``agreed``."""
    return _asked is not None


def agreed() -> bool:
    """Whether any rank was asked to leave. Collective; the same on every rank."""
    flag = torch.tensor([float(asked())], device=processes.collective_device())
    return bool(processes.all_reduce_sum(flag).item())


def reason() -> str:
    """The signal, on a rank that had it."""
    return _asked or "a signal to another rank"


def leave_if_asked(save: Callable[[], None] | None = None) -> None:
    """A safe place to leave: raises Preempted on every rank, after ``save``, where any rank was asked to. Collective."""
    if agreed():
        if save is not None:
            save()
        raise Preempted(processes.broadcast_object(reason()))


def too_many_restarts(max_requeues: int) -> str | None:
    """Why this job may not run once more, by Slurm's own count of restarts."""
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts <= max_requeues:
        return None
    return (
        f"job {slurm.job_id()} was restarted {restarts} times, which is more than --max_requeues {max_requeues}: see "
        "its log for what ends it each time; start the same command again to go on from the last good state"
    )


def being_cancelled(job: Mapping[str, str]) -> bool:
    """Whether ``scancel`` ends this job, by ``scontrol show job``: requeued now, it would rise again.

    While its processes save, a cancelled job is COMPLETING, as one is that has reached its time limit or that a partition's
    PreemptMode=CANCEL ends; those two say so in Reason and PreemptTime.
    """
    return job["JobState"] == "CANCELLED" or (
        job["JobState"] == "COMPLETING" and job.get("Reason") != "TimeLimit" and job.get("PreemptTime", "None") == "None"
    )


def requeue(max_requeues: int) -> str | None:
    """Puts this Slurm job back into the queue, unless Slurm does so already; why it was not done, or None. On one rank.

    Slurm ends the job's processes at once: everything must be saved, and the run directory released.
    """
    job = slurm.job_id()
    if job is None:
        return "this is no Slurm job: start the same command again to go on"
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts >= max_requeues:
        return (
            f"job {job} was requeued {restarts} times already (--max_requeues {max_requeues}): start the same command "
            "again to go on"
        )
    error = ""
    for attempt in range(5):
        try:
            fields = slurm.job_fields(job)
            state, here = fields["JobState"], int(fields.get("Restarts", restarts))
            if here == restarts and being_cancelled(fields):
                return f"job {job} was cancelled: start the same command again to go on"
            if here > restarts or state in ("PENDING", "REQUEUED", "PREEMPTED"):
                return None  # by somebody else, or by Slurm: a second time would cost another restart
            slurm.requeue(job)
            return None
        except (errors.SlurmError, KeyError, ValueError) as caught:
            error = str(caught)
            if "requeue" in error.lower() and ("disabled" in error.lower() or "not permitted" in error.lower()):
                break
            if attempt < 4:
                time.sleep(2**attempt)
    return f"Slurm did not requeue job {job} ({error}): start the same command again to go on"
