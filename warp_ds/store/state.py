"""What a run says about itself: state.jsonl, a line for all that happened to it, and progress.json, how far it is."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from warp_ds.cluster import slurm
from warp_ds.errors import DirectoryGoneError
from warp_ds.secrets import redact
from warp_ds.store.files import append_line, write_json

logger = logging.getLogger(__name__)
STATE, PROGRESS = "state.jsonl", "progress.json"


class Progress:
    """How far a phase is, for ``launch/submit.py --status``: rank 0 writes it, every ``seconds`` at most."""

    def __init__(self, directory: Path, total: float, unit: str, seconds: float = 2.0):
        self.path, self.total, self.unit, self.seconds = directory / PROGRESS, total, unit, seconds
        self._shown = -1e9

    def at(self, done: float) -> None:
        """``done`` of the total are finished."""
        from warp_ds.cluster import processes  # torch, which readers of a run's state need not wait for

        if processes.rank() == 0 and (time.monotonic() - self._shown > self.seconds or done >= self.total):
            self._shown = time.monotonic()
            try:
                write_json(self.path, {"done": done, "total": self.total, "unit": self.unit})
            except OSError as error:
                logger.warning("the progress could not be written: %s", error)


def note(directory: Path, event: str, **more: Any) -> None:
    """Appends a line to the run's state; a full disk must not end the run that would say so."""
    line = {
        "at": now(),
        "event": event,
        "job": slurm.job_id(),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **more,
    }
    try:
        append_line(directory / STATE, json.dumps(redact(line)), private=True)
    except (OSError, DirectoryGoneError) as error:
        logger.warning("the run's state could not be written: %s", error)


def now() -> str:
    return datetime.now().isoformat(timespec="seconds")
