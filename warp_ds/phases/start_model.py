"""What an objective holds a training to: the start model's logits, made before the first step and kept until the run ends."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from warp_ds.cluster import consensus, processes
from warp_ds.data.collate import EMPTY
from warp_ds.data.formats import IGNORE
from warp_ds.errors import ArtifactError, UnsupportedSetting
from warp_ds.store.files import begin_directory, read_json, remove_directory, write_json
from warp_ds.store.sealed import contents, difference
from warp_ds.zero.batches import Samples

Plain = Callable[[Any, dict[str, Tensor]], tuple[Tensor, Any]]
FOLDER = "start_logits"
"""In the run's directory."""
_BEGUN, _WHOLE = "begun.json", "whole.json"
"""Written before anything else of it, and after all of it."""


class HeldToStart(TrainerCallback):
    """An objective over samples of which it keeps something of the start model's logits, in ``directory``."""

    objective: ClassVar[str]
    """Its name, of --objective."""

    def __init__(self, samples: Sequence[Any], tokenizer: Any, batch_size: int, directory: Path):
        """``samples``: tokenised. ``batch_size``: rows of a micro-batch, a rank."""
        self.samples, self.tokenizer, self.batch_size, self.directory = samples, tokenizer, batch_size, directory
        self.trainer: Any = None

    def attach(self, trainer: Trainer) -> None:
        """``UnsupportedSetting`` where the trainer takes a mean of each micro-batch, not of the step."""
        if not trainer.model_accepts_loss_kwargs:
            raise UnsupportedSetting(
                f"--objective {self.objective} needs a loss that is one mean over a step, which "
                f"{type(trainer.model).__name__} has not"
            )
        self.trainer = trainer
        trainer.callback_handler.callbacks.insert(0, self)  # before those that write logs, which it may add to

    @torch.no_grad()
    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Collective."""
        samples = Samples(self.samples, self.tokenizer, args.device, "response")
        if not consensus.on_rank_0(self._is_made, "looking for the start model's logits"):
            self._make(samples)
        with consensus.on_every_rank_or_none("reading the start model's logits"):
            self.open(samples)

    def _is_made(self) -> bool:
        """Whether all of it is there; else an empty directory is. Rank 0 alone calls it."""
        if not _lost(self.directory):
            return True
        remove_kept(self.directory)
        begin_directory(self.directory, _BEGUN)
        return False

    def _make(self, samples: Samples) -> None:
        """The model is the start model still. Collective."""
        model = self.trainer.model_wrapped
        model.eval()
        mine = samples.deal(self.batch_size, processes.world_size(), processes.rank())
        for indices in tqdm(mine, desc="start model's logits", disable=processes.rank() != 0):
            batch = samples.batch(indices)
            logits = model(**batch.inputs, use_cache=False).logits
            with consensus.on_every_rank_or_none("keeping the start model's logits"):
                for row, index in enumerate(indices):
                    if index != EMPTY:
                        self.keep(index, predicting(logits[row], batch.labels[row]), answers(batch.labels[row]))
        model.train()
        self.keep_rest(samples)
        processes.barrier()
        seal = {"samples": len(samples)}
        consensus.on_rank_0(
            lambda: write_json(self.directory / _WHOLE, {**seal, "files": contents(self.directory, _WHOLE)}),
            "marking the start model's logits",
        )

    def loss(self, plain: Plain, model: Any, inputs: dict[str, Tensor], tokens: Any) -> tuple[Tensor, Any]:
        """What a micro-batch minimises, for a mean over ranks, and the model's outputs. ``plain``: the task's own loss, of
        ``model`` and ``inputs``; ``tokens``: response tokens of the whole step."""
        return plain(model, inputs)

    @abstractmethod
    def keep(self, index: int, logits: Tensor, labels: Tensor) -> None:
        """Of a sample, the start model's ``logits`` [t, V] that predict its ``labels`` [t]."""

    def keep_rest(self, samples: Samples) -> None:
        """What is kept of all samples together. Collective."""

    def open(self, samples: Samples) -> None:
        """Before the first step, once all is kept."""


def check_kept(directory: Path, checkpoint: Path) -> None:
    """ArtifactError where ``directory`` is not whole, for a run that goes on from ``checkpoint``: made now it would be of the
    weights that were trained since. Rank 0 alone calls it."""
    if problem := _lost(directory):
        raise ArtifactError(
            f"{directory}, the start model's logits that this run is held to, cannot be used: {problem}. The weights of "
            f"{checkpoint.name} are no start model's, so they cannot be made again: put them back, or start anew with --resume "
            "never"
        )


def remove_kept(directory: Path) -> None:
    """Removes what a run has kept, or was keeping, there. Rank 0 alone calls it."""
    if (directory / _BEGUN).is_file() and not directory.is_symlink():
        remove_directory(directory)


def _lost(directory: Path) -> str:
    """What is not as it was made, in words; '' where all is."""
    if not (directory / _WHOLE).is_file():
        return "it is missing, or was never finished"
    said = read_json(directory / _WHOLE)
    return difference(directory, _WHOLE, said.get("files") if isinstance(said, dict) else None)


def predicting(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits [t, V] that predict the labels [L] of a row [L, V]."""
    return logits[:-1][labels[1:] != IGNORE]


def answers(labels: Tensor) -> Tensor:
    """The labels [t] that the loss sees, of a row [L]."""
    return labels[1:][labels[1:] != IGNORE]
