"""What every launch/*.py does: flags, process group, one phase, and errors that say cause and cure."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

from warp_ds.artifacts import ArtifactError
from warp_ds.config import ConfigError, RunArguments, parse_arguments, parse_training
from warp_ds.phases.run import log_to_terminal
from warp_ds.zero import runtime

logger = logging.getLogger(__name__)
A = TypeVar("A", bound=RunArguments)


def launch(kind: type[A], phase: Callable[..., Any], training: bool = False, argv: list[str] | None = None) -> None:
    """Runs ``phase(arguments)`` on every rank; exit status 2 for wrong input, 1 for a failure.

    ``training``: further TrainingArguments flags are accepted and passed on as ``phase(arguments, passed)``.
    """
    passed: dict[str, Any] = {}
    try:
        if training:
            arguments, passed = parse_training(kind, argv)
        else:
            arguments = parse_arguments(kind, argv)
        apply_debug(arguments)
        runtime.init_distributed(arguments.resolved_device, arguments.timeout)
        log_to_terminal(logging.DEBUG if arguments.debug else logging.INFO)
        with runtime.on_every_rank_or_none("checking the flags"):
            arguments.check()
        phase(arguments, passed) if training else phase(arguments)
    except (ConfigError, ArtifactError, runtime.OtherRankError, ValueError) as error:
        _fail(error, 2, isinstance(error, (ConfigError, ArtifactError)) or _is_data_error(error))
    except Exception as error:  # noqa: BLE001
        _fail(error, 1, False)
    runtime.shutdown()


def apply_debug(arguments: RunArguments) -> None:
    """--debug: 5 samples, the last layer."""
    if not arguments.debug:
        return
    for name in ("safety_samples", "utility_samples", "harmful_samples", "harmless_samples"):
        if hasattr(arguments, name):
            setattr(arguments, name, 5)
    if hasattr(arguments, "target_layers"):
        arguments.target_layers = "last"


def _is_data_error(error: BaseException) -> bool:
    from warp_ds.data.datasets import DataError

    return isinstance(error, DataError)


def _fail(error: BaseException, status: int, expected: bool) -> None:
    """Ends this rank at once: a tidy exit would wait for ranks that may wait for this one."""
    text = f"error: {error}" if expected else "".join(traceback.format_exception(error))
    logger.error("rank %d failed: %s", runtime.rank(), text)
    if not (expected and runtime.rank() > 0):
        print(text if expected else f"rank {runtime.rank()}: {text}", file=sys.stderr, flush=True)
    logging.shutdown()
    sys.stdout.flush()
    os._exit(status)
