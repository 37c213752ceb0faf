"""A Trainer under ZeRO-3 that goes on on another number of ranks than its checkpoint was written by."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from warp_ds.cluster import consensus, processes
from warp_ds.errors import ConfigError
from warp_ds.zero import universal
from warp_ds.zero.deepspeed_internals import refuse_pickles

logger = logging.getLogger(__name__)


class CompleteConverted(TrainerCallback):
    """Completes what Trainer has loaded from a converted checkpoint, before the first step."""

    def __init__(self, trainer: Trainer, checkpoint: Path):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        engine: Any = self.trainer.deepspeed
        universal.complete(engine.module, engine.optimizer, self.checkpoint)


class _OnceConverted(CompleteConverted):
    """The same for somebody's own Trainer, which keeps neither the setting nor the converted files for longer than it needs."""

    def __init__(self, trainer: Trainer, checkpoint: Path, config: dict[str, Any]):
        super().__init__(trainer, checkpoint)
        self.config = config
        self.before = config.get("checkpoint")
        config["checkpoint"] = {**(self.before or {}), "load_universal": True}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.before is None:
            del self.config["checkpoint"]
        else:
            self.config["checkpoint"] = self.before
        super().on_train_begin(args, state, control, **kwargs)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._remove()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._remove()
        self.trainer.remove_callback(self)

    def _remove(self) -> None:
        consensus.on_rank_0(lambda: universal.remove_converted(self.checkpoint.parent), "removing a converted checkpoint")


def resume_any_world(trainer: Trainer, checkpoint: str | Path | None = None) -> str | None:
    """What ``trainer.train(resume_from_checkpoint=...)`` is to be given to go on with ``checkpoint`` on any number of ranks.

    ``checkpoint``: a Trainer's ``checkpoint-N``; None: the newest in its output_dir, and None is returned where there is none.
    Written by as many ranks as these, or not by DeepSpeed's ZeRO-3, it is returned as it is. Else it is converted once to
    ``universal-N`` beside it (DeepSpeed's universal checkpoint, by one process beside rank 0; twice its size on the disk
    meanwhile), the trainer is set to load that, and what DeepSpeed leaves out (each parameter group's hyperparameters, a step
    count for each sub-group, rotated coefficients of ``protect``) is added before the first step; it is removed after the next
    save. Masters and moments are those saved, to the bit. The data go on at the same sample where the global batch (micro-batch
    x ranks x accumulation) is the same; random states of dropout are not carried over.
    Call it on every rank, after the trainer was made. Raises ConfigError, on every rank and before any work, where it cannot
    be converted (an optimizer other than Adam, or on NVMe), holds pickled objects, or the disk has no room.
    """
    folder = Path(trainer.args.output_dir or ".")  # which rank 0 may be the first to make
    newest = consensus.on_rank_0(
        lambda: get_last_checkpoint(str(folder)) if folder.is_dir() else None, "looking for a checkpoint"
    )
    given = newest if checkpoint is None else str(checkpoint)
    if given is None:
        return None
    path = Path(given)
    wrote = consensus.on_rank_0(lambda: universal.world_size_of(path), "reading a checkpoint")
    plugin = trainer.accelerator.state.deepspeed_plugin
    if wrote in (0, processes.world_size()) or plugin is None:
        return given
    if trainer.args.load_best_model_at_end:
        raise ConfigError(
            f"load_best_model_at_end: {path} was written by {wrote} ranks, and these are {processes.world_size()}, which could "
            f"not load the best one of them: turn it off, or start again on {wrote} ranks"
        )
    config = plugin.deepspeed_config
    consensus.on_rank_0(lambda: refuse_pickles(path), "checking the checkpoint")
    converted = universal.convert(path, config, wrote)
    # Before any WarpCallback, which takes up what was completed.
    trainer.callback_handler.callbacks.insert(0, _OnceConverted(trainer, converted, config))
    return str(converted)


def convert_checkpoint(checkpoint: Path, world_size: int) -> Path:
    """``checkpoint`` made ready for ``world_size`` ranks, without any: what ``resume_any_world`` then finds done."""
    wrote = universal.world_size_of(checkpoint)
    if not wrote:
        raise ConfigError(
            f"{checkpoint} holds no optimizer states of DeepSpeed's ZeRO-3: give a Trainer's checkpoint-N directory"
        )
    if wrote == world_size:
        return checkpoint
    refuse_pickles(checkpoint)
    return universal.convert(checkpoint, {}, wrote)
