"""FAULT=raise, hang or die: what rank 1 does at step 4. FAULT=slow:SECONDS: every step takes that much longer."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from warp_ds.cluster import processes
from warp_ds.phases.trainer import MetricsFile


def arm() -> None:
    on_step_end, fault = MetricsFile.on_step_end, os.environ.get("FAULT", "")

    def faulty(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        if fault.startswith("slow:"):
            time.sleep(float(fault[5:]))
        if state.global_step == 4 and processes.rank() == 1:
            if fault == "raise":
                raise ArithmeticError("the fault that rank 1 was given")
            if fault == "hang":
                time.sleep(100_000)
            if fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)

    MetricsFile.on_step_end = faulty  # type: ignore[method-assign]
