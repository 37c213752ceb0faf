"""The Trainer of phases 0 and 3: global batches that are the same on any world size, metrics.jsonl, whole checkpoints."""

from __future__ import annotations

import json
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from warp_ds.cluster import consensus, preemption, processes
from warp_ds.data.collate import GlobalBatchSampler, WithEmpty, empty_sample, pad_batch, pad_token
from warp_ds.data.packing import Packed, PackedBatchSampler, pack_batch
from warp_ds.models.lora import is_adapted, without_adapter
from warp_ds.models.transformers_internals import keeps_logits
from warp_ds.phases import checkpoints
from warp_ds.phases.speed import Speed
from warp_ds.phases.start_model import HeldToStart
from warp_ds.phases.watching import Watched
from warp_ds.store.files import append_line, read_text, write_text
from warp_ds.store.state import Progress
from warp_ds.zero import universal
from warp_ds.zero.deepspeed_internals import nothing_unpickled

logger = logging.getLogger(__name__)


class GlobalBatchTrainer(Trainer):
    """A Trainer whose global batches hold the same samples on any world size: none repeated, none dropped."""

    def __init__(
        self,
        *args: Any,
        sampler: GlobalBatchSampler,
        tokenizer: PreTrainedTokenizerBase,
        speed: Speed,
        watched: Watched,
        **kwargs: Any,
    ):
        self.sampler, self.tokenizer, self.speed, self.watched = sampler, tokenizer, speed, watched
        self.objective: HeldToStart | None = None
        # Which Trainer asks for, and does not read: ``evaluate`` is below.
        super().__init__(*args, **{**kwargs, "processing_class": tokenizer, "eval_dataset": watched.samples or watched.prompts})
        self.callback_handler.callbacks.insert(0, speed)  # before the reporters, which then see its numbers

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """As Trainer does, of the task's samples; with ``objective``, and what it adds or has in its place."""
        if self.objective is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plain: Any = partial(super().compute_loss, return_outputs=True, num_items_in_batch=num_items_in_batch)
        loss, outputs = self.objective.loss(plain, model, inputs, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def floating_point_ops(self, inputs: Any) -> int:
        """Called for every micro-batch: counts it. What it costs is known where the ranks meet, in ``store_flos``."""
        self.speed.count(inputs)
        return 0

    def store_flos(self) -> None:
        """Adds up the counts of all ranks: called where the Trainer logs, saves and ends. Collective."""
        self.state.total_flos = self.speed.gather()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer does, unless nothing is left to do: it takes one step more of an epoch that a run has stopped in."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Trainer's own takes a mean of batches' means, which depends on the number of ranks. Collective."""
        begun = time.monotonic()
        with self.speed.paused():
            measured = self.watched.measure(self.model, self.tokenizer)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in measured.items()}
        metrics[f"{metric_key_prefix}_runtime"] = round(time.monotonic() - begun, 3)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def outcome(self) -> dict[str, Any]:
        """What the run was, for its finished.json: speed and cost, and which step's model came out."""
        best = {"best_step": self.state.best_global_step, "best_metric": self.state.best_metric}
        if self.args.load_best_model_at_end and not self.state.best_global_step:
            logger.warning("no evaluation had a metric to choose by: the model is that of the last step")
        return {**self.speed.summary(), **(best if self.args.load_best_model_at_end else {})}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer does; a save that was asked for stays, which --save_strategy best would drop where this is no new best."""
        asked = self.control.should_save
        return super()._determine_best_metric(metrics, trial) or asked

    def _load_best_model(self) -> None:
        """As Trainer does, with what makes loading a checkpoint safe; and not where a rank was asked to leave."""
        if any(isinstance(own, WholeCheckpoints) and own.stopped_by for own in self.callback_handler.callbacks):
            return
        best = Path(self.state.best_model_checkpoint or "")
        consensus.on_rank_0(lambda: checkpoints.check(best), "checking the best checkpoint")
        metric = self.args.metric_for_best_model
        logger.info("the best model is that of step %s (%s %.6g)", self.state.best_global_step, metric, self.state.best_metric)
        with nothing_unpickled():
            super()._load_best_model()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer does; what is begun is marked, so that a killed save can be told from somebody else's files."""
        checkpoint = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
        consensus.on_rank_0(lambda: checkpoints.begin(checkpoint), "beginning a checkpoint")
        with self.speed.paused():
            super()._save_checkpoint(model, trial)
        if self.args.should_save:
            # A pickle of all that TrainingArguments hold, which nobody reads.
            (checkpoint / "training_args.bin").unlink(missing_ok=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer does, without its advice to use zero_to_fp32: the model is exported by ``export``. Of an adapter nothing:
        Trainer would gather the whole model for it, and DeepSpeed's checkpoint holds A and B."""
        if _internal_call and self.model is not None and is_adapted(self.model):
            return
        trainer_log = logging.getLogger("transformers.trainer")

        def other(record: logging.LogRecord) -> bool:
            return "zero_to_fp32" not in record.getMessage()

        trainer_log.addFilter(other)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            trainer_log.removeFilter(other)

    def get_train_dataloader(self) -> DataLoader:
        pad, empty = pad_token(self.tokenizer), empty_sample(int(self.tokenizer.eos_token_id))
        packed = isinstance(self.sampler, PackedBatchSampler)
        # Label smoothing shifts labels itself, along whole rows.
        few = self.label_smoother is None and keeps_logits(without_adapter(self.model))
        collate = partial(pack_batch, empty=empty, trained_only=few) if packed else pad_batch
        return self.accelerator.prepare(
            DataLoader(
                (Packed if packed else WithEmpty)(self.train_dataset, empty, self.sampler),
                batch_sampler=self.sampler,
                collate_fn=partial(collate, pad_token_id=pad),
                num_workers=self.args.dataloader_num_workers,
                persistent_workers=self.args.dataloader_persistent_workers,
                prefetch_factor=self.args.dataloader_prefetch_factor,
                multiprocessing_context=self.args.dataloader_multiprocessing_context,
                pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            )
        )


class EarlyStopping(EarlyStoppingCallback):
    """As transformers', and a run that goes on remembers how long it has waited for a better metric."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        states: Any = state.stateful_callbacks
        kept = states.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = waited(kept)
        super().on_train_begin(args, state, control, **kwargs)
        control.should_training_stop = self.early_stopping_patience_counter >= self.early_stopping_patience


def waited(kept: Any) -> int:
    """Evaluations without a better metric, as ``EarlyStopping`` has it in a checkpoint."""
    attributes = kept.get("attributes") if isinstance(kept, dict) else None
    count = attributes.get("early_stopping_patience_counter") if isinstance(attributes, dict) else None
    return count if type(count) is int else 0


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one line a logged step, written by rank 0."""

    def __init__(self, path: Path):
        self.path = path
        self._progress: Progress | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._progress is None:
            self._progress = Progress(self.path.parent, state.max_steps, "steps")
        self._progress.at(state.global_step)
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            control.should_log = True  # else a run shorter than --logging_steps says no loss at all

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            append_line(self.path, json.dumps({"step": state.global_step, **logs}))

    def keep_until(self, step: int) -> None:
        """Drops the lines of steps after ``step``, which will be made again, and summaries of runs that stopped."""
        if self.path.is_file():
            text = read_text(self.path, errors="replace")
            lines = [line for line in text.split("\n") if _whole_until(step, line)]
            write_text(self.path, "".join(f"{line}\n" for line in lines))


def _whole_until(step: int, line: str) -> bool:
    try:
        logged = json.loads(line)
    except (ValueError, RecursionError):
        return False  # the process was killed while it wrote
    known = isinstance(logged, dict) and isinstance(logged.get("step"), int)
    return known and logged["step"] <= step and "train_runtime" not in logged


def _ends_epoch(state: TrainerState) -> bool:
    return state.global_step >= state.max_steps or float(state.epoch or 0).is_integer()


class WholeCheckpoints(TrainerCallback):
    """Saves every ``minutes``, and where a rank is asked to leave; marks a checkpoint once it is whole, so that a killed
    save is never resumed from."""

    def __init__(self, minutes: float, keep: int = 1):
        """``keep``: how many checkpoints stay. Trainer itself would remove older ones before the new one is marked."""
        self.minutes, self.keep = minutes, keep
        self.stopped_by: str | None = None
        """The signal that ended training, with a checkpoint; after the last step too, as writing the model takes long."""
        self._last = time.monotonic()
        self._owed = False
        """Whether a save waits for what comes with an epoch's end."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last = time.monotonic()
        if args.load_best_model_at_end and state.best_global_step:
            # Where the run is now: it may have been moved.
            best = Path(args.output_dir or ".") / f"checkpoint-{state.best_global_step}"
            consensus.on_rank_0(lambda: checkpoints.check(best), "looking for the best checkpoint so far")
            state.best_model_checkpoint = str(best)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        # Clocks differ between ranks, and a save is collective: rank 0's clock decides. A signal may reach any rank.
        due = self.minutes > 0 and processes.rank() == 0 and time.monotonic() - self._last > 60 * self.minutes
        flags = torch.tensor([float(due), float(preemption.asked())], device=processes.collective_device())
        save, leave = processes.all_reduce_sum(flags).bool().tolist()
        if leave:
            self.stopped_by = processes.broadcast_object(preemption.reason())
            # The losses since the last line would be lost with the process.
            control.should_training_stop = control.should_log = True
        # Else what the epoch's evaluation finds would not be in the checkpoint, or it would be written twice.
        self._owed = (save or leave) and _ends_epoch(state) and "epoch" in (args.eval_strategy, args.save_strategy)
        control.should_save = control.should_save or (save or leave) and not self._owed
        return control

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """After the last step of an epoch, or where training was left in the middle of one, saved: there nothing is due."""
        if self.stopped_by and not self._owed:
            control.should_evaluate = control.should_save = False
        control.should_save = control.should_save or self._owed
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last = time.monotonic()
        processes.barrier()
        root = Path(args.output_dir or ".")

        def finish() -> None:
            checkpoints.finish(root / f"checkpoint-{state.global_step}", processes.world_size())
            checkpoints.keep_newest(root, self.keep, state.best_global_step if args.load_best_model_at_end else None)
            universal.remove_converted(root)

        consensus.on_rank_0(finish, "finishing a checkpoint")
