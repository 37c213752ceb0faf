"""Phase 3, training on the task with frozen rotated coefficients; and phase 0, safety tuning, the same without a mask.

The loop is transformers' Trainer. What is added: global batches that are the same on any world size, the masked step,
checkpoints by the clock, and an export that is an ordinary Hugging Face model directory.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from warp_ds.artifacts import (
    MaskStore,
    find_artifact,
    fingerprint_model,
    fingerprint_rows,
    read_json,
    write_json,
)
from warp_ds.cluster import preemption
from warp_ds.config import ConfigError, RunArguments, SafetyTuningArguments, TrainArguments, TrainingFlags
from warp_ds.data.collate import GlobalBatchSampler, WithEmpty, empty_sample, pad_batch
from warp_ds.data.datasets import load_pairs
from warp_ds.data.formats import encode_dataset
from warp_ds.evaluation.generate import pad_token
from warp_ds.phases.run import start_run
from warp_ds.phases.state import Progress
from warp_ds.phases.targets import check_targets, find_targets
from warp_ds.protection import WarpCallback
from warp_ds.zero import runtime, universal
from warp_ds.zero.deepspeed_internals import end_engine
from warp_ds.zero.model import check_ids, context_length, load_model, resolve_model_dir
from warp_ds.zero.save import save_sharded

logger = logging.getLogger(__name__)


def run_training(arguments: TrainArguments, passed: dict[str, Any] | None = None) -> Path:
    """Phase 3; returns the run directory, whose model/ is the trained model. Collective.

    ``passed`` are further TrainingArguments. Raises ConfigError, DataError or ArtifactError before any work where
    model, data, basis and masks do not fit together.
    """
    model_dir = resolve_model_dir(arguments.model_name)
    with runtime.on_every_rank_or_none("checking the inputs"):
        pairs = load_pairs(
            arguments.utility_data, split=arguments.utility_split, samples=arguments.utility_samples,
            prompt_column=arguments.prompt_column, response_column=arguments.response_column,
        )
        inputs = {"model": fingerprint_model(model_dir), "data": fingerprint_rows(pairs)}
        masks_dir, basis_dir = _find_masks(arguments, inputs["model"])
        if masks_dir is not None:
            inputs["masks"] = MaskStore(masks_dir).fingerprint()
        else:
            check_targets(model_dir, arguments.target_layers, arguments.layer_type)
    with start_run("phase3", arguments, inputs, passed) as run:
        if run.done:
            return run.directory
        checkpoint = find_checkpoint(run.directory, arguments)
        model, tokenizer = load_model(arguments, runtime.zero3_config(arguments))
        samples = encode_dataset(pairs, tokenizer, arguments.max_length, context_length(model.config))
        check_ids(samples, model.config)
        layers = MaskStore(masks_dir).layers if masks_dir is not None else find_targets(
            model, arguments.target_layers, arguments.layer_type)
        choose_trained(model, [layer.name for layer in layers] if arguments.train_scope == "warp" else None)
        callbacks: list[TrainerCallback] = []
        if masks_dir is not None:
            callbacks.append(WarpCallback(basis_dir, masks_dir, str(model_dir), arguments.basis_placement))
        trainer = fit(model, tokenizer, samples, arguments, run.directory, checkpoint, callbacks, passed)
        export(trainer, tokenizer, run.directory / "model", _model_card(arguments, masks_dir))
        run.finish()
        end_engine(trainer.deepspeed)
        return run.directory


def run_safety_tuning(arguments: SafetyTuningArguments, passed: dict[str, Any] | None = None) -> Path:
    """Phase 0: every parameter trains on the safety set; returns the run directory. Collective."""
    model_dir = resolve_model_dir(arguments.model_name)
    with runtime.on_every_rank_or_none("checking the inputs"):
        pairs = load_pairs(
            arguments.safety_data, split=arguments.safety_split, samples=arguments.safety_samples,
            prompt_column=arguments.prompt_column, response_column=arguments.response_column,
            refusal_file=arguments.refusal_file,
        )
        inputs = {"model": fingerprint_model(model_dir), "data": fingerprint_rows(pairs)}
    with start_run("phase0", arguments, inputs, passed) as run:
        if run.done:
            return run.directory
        checkpoint = find_checkpoint(run.directory, arguments)
        model, tokenizer = load_model(arguments, runtime.zero3_config(arguments))
        samples = encode_dataset(pairs, tokenizer, arguments.max_length, context_length(model.config))
        check_ids(samples, model.config)
        trainer = fit(model, tokenizer, samples, arguments, run.directory, checkpoint, [], passed)
        export(trainer, tokenizer, run.directory / "model",
               f"# Safety-tuned {arguments.model_name}\n\nTrained by warp_ds phase 0 on {arguments.safety_data}.\n")
        run.finish()
        end_engine(trainer.deepspeed)
        return run.directory


def _find_masks(arguments: TrainArguments, model_fingerprint: str) -> tuple[Path | None, Path | None]:
    """Directories of masks and basis, checked against each other and the model; (None, None) for no mask."""
    if arguments.masks_dir == "none":
        return None, None
    masks_dir = find_artifact(arguments.masks_dir, "masks", arguments.output_dir)
    masks = MaskStore(masks_dir)
    basis = masks.find_basis(arguments.basis_dir)
    if basis is not None:
        basis.check(masks.layers, model_fingerprint, arguments.model_name)
    masks.check(basis, model_fingerprint, arguments.model_name)
    return masks_dir, None if basis is None else basis.directory


def choose_trained(model: nn.Module, layers: Sequence[str] | None) -> None:
    """Lets only the weights of ``layers`` train; None lets every parameter train."""
    if layers is not None:
        wanted = {f"{name}.weight" for name in layers}
        for name, param in model.named_parameters():
            param.requires_grad_(name in wanted)


def find_checkpoint(directory: Path, arguments: TrainingFlags) -> Path | None:
    """The last whole checkpoint of the run in ``directory``, converted where another number of ranks wrote it. Collective.

    Raises ConfigError where that cannot be done.
    """
    found = runtime.on_rank_0(lambda: newest_whole_checkpoint(directory / "trainer"), "looking for a checkpoint")
    if found is None:
        return None
    checkpoint = Path(found)
    wrote = runtime.on_rank_0(lambda: read_json(checkpoint / WholeCheckpoints.MARK).get("world_size"), "reading a checkpoint")
    if wrote in (None, runtime.world_size()):
        return checkpoint
    return universal.convert(checkpoint, runtime.zero3_config(arguments, for_trainer=True), wrote)


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Any,
    arguments: TrainingFlags,
    directory: Path,
    checkpoint: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    passed: dict[str, Any] | None = None,
) -> GlobalBatchTrainer:
    """Trains ``model`` (ZeRO-3 partitioned) on ``samples`` (input_ids, labels), going on from ``checkpoint``
    (``find_checkpoint``). AdamW over all trained parameters, one mean over the response tokens of each global batch.

    Raises Preempted, with a checkpoint saved, where a rank was asked to leave.
    """
    sampler = GlobalBatchSampler(
        len(samples), arguments.global_batch_size, arguments.batch_size, runtime.world_size(), shuffle=True,
        seed=arguments.seed,
    )
    options: dict[str, Any] = {
        "logging_steps": 10, "save_strategy": "no", "report_to": "none", "disable_tqdm": runtime.rank() != 0,
        **(passed or {}),
    }
    training = TrainingArguments(
        output_dir=str(directory / "trainer"),
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=sampler.accumulation_steps,
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        **_checkpointing(arguments.gradient_checkpointing),
        bf16=arguments.dtype == "bfloat16",
        fp16=arguments.dtype == "float16",
        use_cpu=arguments.resolved_device == "cpu",
        seed=arguments.seed,
        deepspeed=_trainer_config(arguments, converted=checkpoint is not None and universal.is_converted(checkpoint)),
        remove_unused_columns=False,
        ddp_timeout=arguments.timeout,
        **options,
    )
    metrics = MetricsFile(directory / "metrics.jsonl")
    whole = WholeCheckpoints(arguments.save_minutes)
    trainer = GlobalBatchTrainer(
        model=model, args=training, train_dataset=samples, tokenizer=tokenizer, sampler=sampler,
        callbacks=[*callbacks, metrics, whole],
    )
    for callback in callbacks:
        if isinstance(callback, WarpCallback):
            callback.before_reporters(trainer)
    if runtime.rank() > 0:
        trainer.remove_callback(PrinterCallback)  # rank 0's lines are enough
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
        runtime.on_rank_0(lambda: metrics.keep_until(checkpoint.name), "trimming the metrics")
        if universal.is_converted(checkpoint):
            trainer.callback_handler.callbacks.insert(0, CompleteConverted(trainer, checkpoint))  # before the WarpCallback
    logger.info("training: %d samples, %d steps of %d samples (%d ranks x %d micro-batches of %d)", len(samples),
                math.ceil(arguments.epochs * sampler.steps), arguments.global_batch_size, runtime.world_size(),
                sampler.accumulation_steps, arguments.batch_size)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if whole.stopped_by is not None:
        raise preemption.Preempted(whole.stopped_by)
    runtime.on_rank_0(lambda: universal.remove_converted(directory / "trainer"), "removing a converted checkpoint")
    return trainer


def export(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, directory: Path, model_card: str) -> None:
    """Writes the trained model as an ordinary Hugging Face directory. Collective."""
    save_sharded(trainer.model_wrapped, directory, tokenizer=tokenizer, model_card=model_card)


def _trainer_config(arguments: RunArguments, converted: bool) -> dict[str, Any]:
    """The DeepSpeed configuration with what Trainer fills in left to it; ``converted``: it loads a universal checkpoint."""
    config = runtime.zero3_config(arguments, for_trainer=True)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if config.setdefault(key, "auto") != "auto":
            raise ConfigError(f"the DeepSpeed configuration sets {key}: leave it out or 'auto'; --batch_size and "
                              "--global_batch_size decide it")
    config.setdefault("gradient_clipping", "auto")
    config.setdefault("zero_allow_untested_optimizer", True)
    if converted:
        config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}
    return config


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Trainer's flags for gradient checkpointing, by the name that this transformers has."""
    name = "activation_checkpointing"
    if not any(f.name == name for f in dataclasses.fields(TrainingArguments)):
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


class GlobalBatchTrainer(Trainer):
    """A Trainer whose global batches hold the same samples on any world size: none repeated, none dropped."""

    def __init__(self, *args: Any, sampler: GlobalBatchSampler, tokenizer: PreTrainedTokenizerBase, **kwargs: Any):
        self.sampler, self.tokenizer = sampler, tokenizer
        super().__init__(*args, **{**kwargs, "processing_class": tokenizer})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer does, without its advice to use zero_to_fp32: the model is exported by ``export``."""
        trainer_log = logging.getLogger("transformers.trainer")

        def other(record: logging.LogRecord) -> bool:
            return "zero_to_fp32" not in record.getMessage()

        trainer_log.addFilter(other)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            trainer_log.removeFilter(other)

    def get_train_dataloader(self) -> DataLoader:
        pad, eos = pad_token(self.tokenizer), int(self.tokenizer.eos_token_id)
        return self.accelerator.prepare(DataLoader(
            WithEmpty(self.train_dataset, empty_sample(eos), self.sampler),
            batch_sampler=self.sampler,
            collate_fn=lambda rows: pad_batch(rows, pad),
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        ))


class CompleteConverted(TrainerCallback):
    """Completes what Trainer has loaded from a converted checkpoint, before the first step."""

    def __init__(self, trainer: Trainer, checkpoint: Path):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        engine: Any = self.trainer.deepspeed
        universal.complete(engine.module, engine.optimizer, self.checkpoint)


class MetricsFile(TrainerCallback):
    """metrics.jsonl: one line a logged step, written by rank 0."""

    def __init__(self, path: Path):
        self.path = path
        self._progress: Progress | None = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._progress is None:
            self._progress = Progress(self.path.parent, state.max_steps, "steps")
        self._progress.at(state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
               logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    def keep_until(self, checkpoint: str) -> None:
        """Drops the lines of steps after ``checkpoint``, which will be made again, and summaries of runs that stopped."""
        step = int(checkpoint.rsplit("-", 1)[1])
        if self.path.is_file():
            lines = [line for line in self.path.read_text().splitlines() if _whole_until(step, line)]
            aside = self.path.with_suffix(".tmp")
            aside.write_text("".join(f"{line}\n" for line in lines))
            aside.replace(self.path)


def _whole_until(step: int, line: str) -> bool:
    try:
        logged = json.loads(line)
    except json.JSONDecodeError:
        return False  # the process was killed while it wrote
    return bool(logged["step"] <= step) and "train_runtime" not in logged


class WholeCheckpoints(TrainerCallback):
    """Saves every ``minutes``, and where a rank is asked to leave; marks a checkpoint once it is whole, so that a killed
    save is never resumed from."""

    MARK = "whole.json"

    def __init__(self, minutes: float):
        self.minutes = minutes
        self.stopped_by: str | None = None
        """The signal that ended training, with a checkpoint; after the last step too, as writing the model takes long."""
        self._last = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                       **kwargs: Any) -> None:
        self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl,
                    **kwargs: Any) -> TrainerControl:
        # Clocks differ between ranks, and a save is collective: rank 0's clock decides. A signal may reach any rank.
        due = self.minutes > 0 and runtime.rank() == 0 and time.monotonic() - self._last > 60 * self.minutes
        flags = torch.tensor([float(due), float(preemption.asked())], device=runtime.collective_device())
        save, leave = runtime.all_reduce_sum(flags).bool().tolist()
        if leave:
            self.stopped_by = runtime.broadcast_object(preemption.reason())
            # The losses since the last line would be lost with the process.
            control.should_training_stop = control.should_log = True
        control.should_save = control.should_save or save or leave
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last = time.monotonic()
        runtime.barrier()
        if state.is_world_process_zero:
            root = Path(args.output_dir or ".")
            directory = root / f"checkpoint-{state.global_step}"
            write_json(directory / self.MARK, {"step": state.global_step, "world_size": runtime.world_size()})
            for older in root.glob("checkpoint-*"):
                # One whole checkpoint is kept unless the user asked for more.
                if older != directory and args.save_total_limit is None:
                    shutil.rmtree(older, ignore_errors=True)
            universal.remove_converted(root)


def newest_whole_checkpoint(directory: Path) -> str | None:
    """Path of the newest checkpoint that was written to its end; what was not takes space, and is removed."""
    for path in directory.glob("checkpoint-*"):
        if not (path / WholeCheckpoints.MARK).is_file():
            shutil.rmtree(path, ignore_errors=True)
    found = [p.parent for p in directory.glob(f"checkpoint-*/{WholeCheckpoints.MARK}")]
    return str(max(found, key=lambda p: int(p.name.rsplit("-", 1)[1]))) if found else None


def _model_card(arguments: TrainArguments, masks_dir: Path | None) -> str:
    protection = "without a mask"
    if masks_dir is not None:
        metadata = MaskStore(masks_dir).metadata
        protection = (f"with {metadata.frozen} of {metadata.entries} rotated coefficients frozen (keep_ratio "
                      f"{metadata.keep_ratio}, scope {metadata.scope}, basis {metadata.basis}; masks {masks_dir})")
    return (
        f"# {Path(arguments.model_name).name}, fine-tuned on {arguments.utility_data}\n\n"
        f"Trained by [warp_ds](https://openreview.net/forum?id=kPLzOfPfA2l) phase 3 {protection}.\n\n"
        f"- base model: `{arguments.model_name}`\n- train_scope: {arguments.train_scope}\n"
        f"- epochs: {arguments.epochs}, global batch {arguments.global_batch_size}, learning rate "
        f"{arguments.learning_rate}, seed {arguments.seed}\n"
    )
