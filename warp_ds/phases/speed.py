"""How fast a training is and what it has cost: tokens, padding, operations and seconds, of the whole job.

Counted on every rank, added up where the Trainer logs and saves, and kept in checkpoints, so that a run counts on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from warp_ds.cluster import processes
from warp_ds.data.collate import count_tokens
from warp_ds.models.flops import training_flops

logger = logging.getLogger(__name__)


def log_rate(what: str, tokens: int, begun: float) -> None:
    """Says how fast ``tokens`` of the whole job went through the model since ``begun`` (time.monotonic)."""
    seconds = max(time.monotonic() - begun, 1e-9)
    rate, ranks = tokens / seconds, processes.world_size()
    logger.info("%s: %d tokens in %.1f s, %.0f tokens/s (%.0f a rank)", what, tokens, seconds, rate, rate / ranks)


@dataclass
class Totals:
    """Of the whole job, from the run's first step on."""

    tokens: int = 0
    """Trained on or read as context; padding is none."""
    slots: int = 0
    """Places in the batches, padding among them."""
    seconds: float = 0.0
    """Rank 0's, in training steps: without evaluations and saving."""

    @property
    def padding(self) -> float:
        """Share of the places that held no token."""
        return 1 - self.tokens / self.slots if self.slots else 0.0

    def minus(self, other: Totals) -> Totals:
        return Totals(self.tokens - other.tokens, self.slots - other.slots, self.seconds - other.seconds)


class Speed(TrainerCallback, ExportableState):
    """Adds its numbers to the lines that the Trainer logs. Must come before the reporters, and after the masked step."""

    def __init__(self, parameters: int, peak: float | None = None):
        """``parameters``: N of ``models.flops``; ``peak``: operations a second of one rank's device, where it is known."""
        self.parameters, self.peak = parameters, peak
        self.totals = Totals()
        self._logged, self._launched = Totals(), Totals()
        self._counts: Tensor | None = None
        self._at = self._begun = time.monotonic()
        self._steps = self._logged_step = self._first_step = 0

    def count(self, batch: Mapping[str, Any]) -> None:
        """Takes note of a micro-batch; nothing waits for the device."""
        counts = count_tokens(batch)
        self._counts = counts if self._counts is None else self._counts + counts

    def gather(self) -> float:
        """Adds up what all ranks have counted; returns the operations so far. Collective."""
        counts = torch.zeros(2, dtype=torch.int64) if self._counts is None else self._counts
        tokens, slots = processes.all_reduce_sum(counts.to(processes.collective_device())).tolist()
        self._counts = None
        self._tick()
        self.totals.tokens += tokens
        self.totals.slots += slots
        return self.flops

    @property
    def flops(self) -> float:
        return training_flops(self.parameters, self.totals.tokens)

    def _tick(self) -> None:
        now = time.monotonic()
        self.totals.seconds += now - self._at
        self._at = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block that is no training."""
        self._tick()
        try:
            yield
        finally:
            self._at = time.monotonic()

    # ------------------------------------------------------------ the Trainer's calls

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        states: Any = state.stateful_callbacks
        kept = states.get(type(self).__name__)
        if isinstance(kept, dict):  # of a checkpoint; older ones have none
            self.totals = _totals(kept.get("attributes"))
        states[type(self).__name__] = self.state()  # else the Trainer does not find where it is to be kept
        self._logged = self._launched = Totals(**asdict(self.totals))
        self._logged_step = self._first_step = state.global_step
        self._at = self._begun = time.monotonic()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": asdict(self.totals)}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or not {"loss", "train_runtime"} & set(logs):
            return  # of an evaluation
        last = "train_runtime" in logs
        since = self.totals.minus(self._launched if last else self._logged)
        figures: dict[str, float] = {"num_tokens": self.totals.tokens, **self._rates(since)}
        if not last:
            steps = state.global_step - self._logged_step
            if "rotate_seconds" in logs and since.seconds:
                figures["rotate_share"] = logs["rotate_seconds"] * steps / since.seconds
            a_step = (time.monotonic() - self._begun) / max(1, state.global_step - self._first_step)
            figures["seconds_left"] = round(a_step * max(0, state.max_steps - state.global_step), 3)
            figures["total_flos"] = self.flops
            self._logged, self._logged_step = Totals(**asdict(self.totals)), state.global_step
        logs.update(figures)
        if state.log_history:
            state.log_history[-1].update(figures)

    def _rates(self, since: Totals) -> dict[str, float]:
        ranks, a_second = processes.world_size(), since.tokens / since.seconds if since.seconds else 0.0
        figures = {
            "tokens_per_second": a_second,
            "tokens_per_second_per_rank": a_second / ranks,
            "padding_share": since.padding,
        }
        if self.peak:
            figures["mfu"] = training_flops(self.parameters, since.tokens) / since.seconds / (ranks * self.peak)
        return figures

    # ------------------------------------------------------------ afterwards

    def summary(self) -> dict[str, Any]:
        """Of the whole run: for finished.json."""
        return {
            "num_tokens": self.totals.tokens,
            "train_seconds": round(self.totals.seconds, 3),
            **self._rates(self.totals),
            "parameters": self.parameters,
            "total_flos": self.flops,
        }

    @property
    def cost(self) -> str:
        """For a model's card: a line of a markdown list."""
        return (
            f"- compute: {self.flops:.3g} FLOPs (6 N a token: {self.totals.tokens:,} tokens, N = {self.parameters:,} "
            "parameters that a token is multiplied with)"
        )


def _totals(kept: Any) -> Totals:
    """What a checkpoint says; from the start where that is nothing this program writes."""
    values: dict[str, Any] = kept if isinstance(kept, dict) else {}
    fine = values.keys() == asdict(Totals()).keys() and all(type(v) in (int, float) and v >= 0 for v in values.values())
    return Totals(**values) if fine else Totals()
