"""The published controls of one training: what --objective and --ema_decay ask for, made ready beside the Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from warp_ds.cluster import consensus
from warp_ds.data.datasets import load_samples
from warp_ds.data.sample import Sample
from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import TrainArguments
from warp_ds.phases import checkpoints, start_model
from warp_ds.phases.averaging import WeightAverage
from warp_ds.phases.constrained import Constrained
from warp_ds.phases.growing import Growing
from warp_ds.phases.replay import Replay
from warp_ds.phases.safegrad import SafeGrad
from warp_ds.phases.start_model import FOLDER, HeldToStart
from warp_ds.phases.texts import tokenise
from warp_ds.protection import WarpCallback
from warp_ds.store.fingerprints import fingerprint_rows


@dataclass
class Controls:
    """Of one training."""

    arguments: TrainArguments
    replayed: Sequence[Sample]
    growing: Growing | None

    @classmethod
    def read(cls, arguments: TrainArguments, passed: Mapping[str, Any]) -> Controls:
        """What --replay_data names. Raises ConfigError for what does not go together, DataError."""
        if arguments.ema_decay and passed.get("load_best_model_at_end"):
            raise ConfigError("--ema_decay averages up to the last step: leave --load_best_model_at_end out")
        if arguments.objective == "constrained" and passed.get("label_smoothing_factor"):
            raise ConfigError(
                "--objective constrained has a loss of its own, without smoothing: leave --label_smoothing_factor out"
            )
        columns: dict[str, Any] = {"prompt_column": arguments.prompt_column, "response_column": arguments.response_column}
        path = arguments.replay_data
        streaming = arguments.streaming
        replayed = [] if path is None else load_samples(path, samples=0, streaming=streaming, **columns)
        return cls(arguments, replayed, Growing.read(arguments, passed))

    def fingerprints(self) -> dict[str, str]:
        replayed = {"replayed data": fingerprint_rows(list(self.replayed))} if self.replayed else {}
        return replayed if self.growing is None else {**replayed, "refreshed data": self.growing.fingerprint}

    def protecting(self, warp: WarpCallback, run: Path, checkpoint: Path | None) -> list[TrainerCallback]:
        """``warp``, with the masks in force where ``run`` goes on from ``checkpoint``, and what lets them grow. Collective."""
        if self.growing is None:
            return [warp]
        growing = self.growing
        with consensus.on_every_rank_or_none("looking for the masks in force"):
            warp.masks_dir = growing.masks_of(run, checkpoint)
        growing.begin(warp)
        return [warp, growing]

    def check_start(self, run: Path, checkpoint: Path | None) -> None:
        """ArtifactError, before any work, where ``run`` goes on from ``checkpoint`` and what it has kept of the start model is
        not there. Collective."""
        if self.arguments.objective != "task" and checkpoint is not None:
            consensus.on_rank_0(
                lambda: start_model.check_kept(run / FOLDER, checkpoint), "looking for the start model's logits"
            )

    def end(self, run: Path) -> None:
        """Removes what a finished run has kept of the start model. Collective."""
        consensus.on_rank_0(lambda: start_model.remove_kept(run / FOLDER), "removing the start model's logits")

    def averages(self, trainer: Path, checkpoint: Path | None) -> list[TrainerCallback]:
        """``checkpoint``: what the run whose ``trainer/`` this is goes on from, converted or not. Collective."""
        if not self.arguments.ema_decay:
            return []
        if checkpoint is None:
            return [WeightAverage(self.arguments.ema_decay)]
        own = trainer / f"checkpoint-{checkpoint.name.rsplit('-', 1)[1]}"
        wrote = consensus.on_rank_0(lambda: checkpoints.world_size_of(own), "reading a checkpoint")
        return [WeightAverage(self.arguments.ema_decay, own, wrote)]

    def objective(self, task: Any, tokenizer: Any, directory: Path, accumulation: int) -> HeldToStart | None:
        """What is minimised beside the task's loss, or in its place; ``task``: its tokenised samples; ``directory``: the
        run's. Collective."""
        if self.arguments.objective == "constrained":
            return Constrained(list(task), tokenizer, self.arguments.batch_size, directory / FOLDER)
        if not self.replayed:
            return None
        samples = tokenise(self.replayed, self.arguments)
        if self.arguments.objective == "safegrad":
            return SafeGrad(list(samples), self.arguments, tokenizer, directory / FOLDER)
        return Replay(list(samples), self.arguments, tokenizer, directory / FOLDER, accumulation)
