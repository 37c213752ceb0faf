"""A phase on one rank: flags, process group, one phase, and errors that say cause and cure."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.errors import record

from warp_ds.cluster import consensus, preemption, processes, slurm
from warp_ds.cluster.slurm import task_environment
from warp_ds.errors import ConfigError, WarpError
from warp_ds.flags.flag import apply_debug
from warp_ds.flags.groups import RunArguments
from warp_ds.flags.parsing import parse_phase
from warp_ds.launch.inputs import check_inputs, on_one_machine
from warp_ds.launch.start_checks import start_checks
from warp_ds.phases.failures import explain, is_later
from warp_ds.phases.run import log_to_terminal
from warp_ds.registry import Phase
from warp_ds.secrets import redact
from warp_ds.store.state import note

logger = logging.getLogger(__name__)
SECONDS_FOR_RANK_0 = 20.0
"""Launchers end every rank once one has ended; some ranks take longer to import than others."""


def run(phase: Phase, argv: list[str]) -> NoReturn:
    """Runs a phase with the flags of ``argv``; exit status 2 for wrong input, 1 for a failure.

    A phase that is asked to leave has saved: its Slurm job is requeued (0), or the exit status is 75, and the same command
    goes on from there. Ends the process.
    """
    passed: dict[str, Any] = {}
    arguments: RunArguments | None = None
    try:
        processes.check_launch(os.environ)
        if phase.stoppable:
            preemption.watch()
        arguments, passed = parse_phase(phase, argv)
        apply_debug(arguments)
        arguments.check()
        if on_one_machine():  # elsewhere a rank that alone misses a file would leave the others waiting
            arguments.check_machine()
            check_inputs(arguments)
        processes.init_distributed(arguments.resolved_device, arguments.timeout)
        log_to_terminal(logging.DEBUG if arguments.debug else logging.INFO)
        with consensus.on_every_rank_or_none("checking this machine"):
            arguments.check_machine()
            restarts = preemption.too_many_restarts(arguments.max_requeues)
            if restarts:
                raise ConfigError(restarts)
        start_checks(arguments, phase.name)
        phase.function(arguments, *([passed] if phase.trains else []))
    except WarpError as error:
        _fail(error, status=error.exit_status, wrong_input=True)
    except preemption.Preempted as stop:
        assert arguments is not None
        _go_on_later(stop, arguments.max_requeues)
    except Exception as error:  # noqa: BLE001
        if arguments is not None:
            explain(error, arguments)
        _fail(error, status=1, wrong_input=is_later(error))
    processes.shutdown()
    # Gloo's threads sometimes abort an interpreter that ends while they do, and the finished job would count as failed.
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _go_on_later(stop: preemption.Preempted, max_requeues: int) -> None:
    """Requeues the Slurm job, or says what to do; ends every rank with the same status. The run is saved and released."""
    directory = Path(stop.__notes__[-1])  # a comparison's, rather than that of the phase in it

    def requeue() -> str | None:
        refused = preemption.requeue(max_requeues)
        note(directory, "requeued" if refused is None else "left", **({"reason": refused} if refused else {}))
        logger.info(refused or f"job {slurm.job_id()} is in the queue again, and will go on in {directory}")
        return refused

    refused = consensus.on_rank_0(requeue, "requeueing")
    processes.shutdown()
    sys.stdout.flush()
    os._exit(0 if refused is None else preemption.STOPPED)


def _fail(error: BaseException, status: int, wrong_input: bool) -> None:
    """Ends this rank at once: a tidy exit would wait for ranks that may wait for this one.

    Wrong input is one message, cause and cure, from the rank that found it; anything else is that rank's traceback. What
    is found before the ranks meet is found by every one of them: rank 0 says it.
    """
    rank = processes.rank()
    if not torch.distributed.is_initialized():
        try:
            rank = int(({**(task_environment(os.environ) or {}), **os.environ}).get("RANK", 0))
        except ValueError:
            rank = 0  # that is the error, and every rank's
        if wrong_input and rank > 0:
            time.sleep(SECONDS_FOR_RANK_0)
    text = redact(f"error: {error}" if wrong_input else "".join(traceback.format_exception(error)))
    if logging.getLogger("warp_ds").handlers:
        logger.error("rank %d failed: %s", rank, text)
    if not _on_terminal() and not (wrong_input and rank > 0):
        print(f"rank {rank}: {text}", file=sys.stderr, flush=True)
    _tell_torchrun(text)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)


def _tell_torchrun(text: str) -> None:
    """torchrun ends with a table of what failed, long after this rank's own line: the cause is in that table, too."""

    @record
    def fail() -> None:
        raise ConfigError(text) from None  # what is being handled may say a secret

    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        with suppress(ConfigError, OSError):
            fail()


def _on_terminal() -> bool:
    """Whether the log goes to the terminal already."""
    return any(type(handler) is logging.StreamHandler for handler in logging.getLogger("warp_ds").handlers)
