"""Phase 3, training on the task with frozen rotated coefficients; and phase 0, safety tuning, the same without a mask.

The loop is transformers' Trainer. What is added: global batches that are the same on any world size, the masked step,
checkpoints by the clock, and an export that is an ordinary Hugging Face model directory.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
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
from transformers.integrations import TensorBoardCallback

from warp_ds.cluster import consensus, preemption, processes
from warp_ds.data.collate import GlobalBatchSampler, WithEmpty, empty_sample, pad_batch
from warp_ds.data.datasets import load_samples
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.evaluation.generate import pad_token
from warp_ds.flags import training_arguments
from warp_ds.flags.arguments import RunArguments, SafetyTuningArguments, TrainArguments, TrainingFlags
from warp_ds.models.targets import check_targets, find_targets
from warp_ds.phases import checkpoints
from warp_ds.phases.run import start_run
from warp_ds.phases.texts import tokenise
from warp_ds.protection import WarpCallback
from warp_ds.store.files import append_line, read_text, write_text
from warp_ds.store.fingerprints import Contents, fingerprint_rows
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import find_artifact
from warp_ds.store.sealed import odd_file
from warp_ds.store.state import Progress
from warp_ds.zero import settings, universal
from warp_ds.zero.deepspeed_internals import end_engine, is_built, nothing_unpickled, refuse_pickles, tag_of
from warp_ds.zero.model import load_model, resolve_model_dir
from warp_ds.zero.save import save_sharded
from warp_ds.zero.shared_reading import model_fingerprint, read_together

logger = logging.getLogger(__name__)


def run_training(arguments: TrainArguments, passed: dict[str, Any] | None = None) -> Path:
    """Phase 3; returns the run directory, whose model/ is the trained model. Collective.

    ``passed`` are further TrainingArguments. Raises ConfigError, DataError or ArtifactError before any work where
    model, data, basis and masks do not fit together.
    """
    check_training(arguments, passed)
    model_dir = resolve_model_dir(arguments.model_name)
    fingerprint = model_fingerprint(model_dir)
    read_together(lambda: _artefacts(arguments), "reading basis and masks")
    with consensus.on_every_rank_or_none("checking the inputs"):
        pairs = load_samples(
            arguments.utility_data,
            split=arguments.utility_split,
            samples=arguments.utility_samples,
            prompt_column=arguments.prompt_column,
            response_column=arguments.response_column,
            config=arguments.data_config,
        )
        inputs = {"model": fingerprint, "data": fingerprint_rows(pairs)}
        masks_dir, basis_dir = _find_masks(arguments, inputs["model"])
        if masks_dir is not None:
            inputs["masks"] = MaskStore(masks_dir).fingerprint()
        else:
            check_targets(model_dir, arguments.target_layers, arguments.layer_type)
    with start_run("phase3", arguments, inputs, passed) as run:
        if run.done:
            return run.directory
        samples = tokenise(pairs, arguments)
        checkpoint = find_checkpoint(run.directory, arguments)
        model, tokenizer = load_model(arguments, settings.zero3_config(arguments))
        layers = (
            MaskStore(masks_dir).layers
            if masks_dir is not None
            else find_targets(model, arguments.target_layers, arguments.layer_type)
        )
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
    check_training(arguments, passed)
    model_dir = resolve_model_dir(arguments.model_name)
    fingerprint = model_fingerprint(model_dir)
    with consensus.on_every_rank_or_none("checking the inputs"):
        pairs = load_samples(
            arguments.safety_data,
            split=arguments.safety_split,
            samples=arguments.safety_samples,
            prompt_column=arguments.prompt_column,
            response_column=arguments.response_column,
            config=arguments.data_config,
            refusal_file=arguments.refusal_file,
        )
        inputs = {"model": fingerprint, "data": fingerprint_rows(pairs)}
    with start_run("phase0", arguments, inputs, passed) as run:
        if run.done:
            return run.directory
        samples = tokenise(pairs, arguments)
        checkpoint = find_checkpoint(run.directory, arguments)
        model, tokenizer = load_model(arguments, settings.zero3_config(arguments))
        trainer = fit(model, tokenizer, samples, arguments, run.directory, checkpoint, [], passed)
        export(
            trainer,
            tokenizer,
            run.directory / "model",
            f"# Safety-tuned {arguments.model_name}\n\nTrained by warp_ds phase 0 on {arguments.safety_data}.\n",
        )
        run.finish()
        end_engine(trainer.deepspeed)
        return run.directory


def _artefacts(arguments: TrainArguments) -> Iterator[Contents]:
    """What ``_find_masks`` reads every byte of."""
    if arguments.masks_dir != "none":
        masks = MaskStore(find_artifact(arguments.masks_dir, "masks", arguments.output_dir))
        yield masks.contents()
        if (basis := masks.find_basis(arguments.basis_dir)) is not None:
            yield basis.contents()


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
    found = consensus.on_rank_0(lambda: checkpoints.newest_whole(directory / "trainer"), "looking for a checkpoint")
    if found is None:
        if (directory / "trainer").is_dir():
            logger.warning("%s holds no whole checkpoint: its training begins at the first step", directory)
        return None
    checkpoint = Path(found)
    wrote = consensus.on_rank_0(lambda: checkpoints.world_size_of(checkpoint), "reading a checkpoint")
    consensus.on_rank_0(lambda: check_checkpoint(checkpoint), "checking the checkpoint")
    if wrote == processes.world_size():
        return checkpoint
    converted = universal.convert(checkpoint, settings.zero3_config(arguments, for_trainer=True), wrote)
    consensus.on_rank_0(lambda: check_checkpoint(converted), "checking the converted checkpoint")
    return converted


def check_checkpoint(checkpoint: Path) -> None:
    """ConfigError or ArtifactError, naming the file, where something of ``checkpoint`` would be run, would be waited for,
    lies outside of it, or is not as this program left it."""
    if odd := odd_file(checkpoint):
        raise ArtifactError(f"{odd}: remove {checkpoint}, or start anew with --resume never")
    refuse_pickles(checkpoint)
    tag_of(checkpoint, "latest_universal" if universal.is_converted(checkpoint) else "latest")
    checkpoints.check_trainer_state(checkpoint)
    if not universal.is_converted(checkpoint):  # that is looked at by what made it
        checkpoints.check_as_left(checkpoint)


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
        len(samples),
        arguments.global_batch_size,
        arguments.batch_size,
        processes.world_size(),
        shuffle=True,
        seed=arguments.seed,
    )
    passed = {**training_arguments.DEFAULTS, **(passed or {})}
    keep = passed.pop("save_total_limit", None)
    training = trainer_arguments(
        arguments,
        passed,
        directory,
        sampler.accumulation_steps,
        converted=checkpoint is not None and universal.is_converted(checkpoint),
    )
    metrics = MetricsFile(directory / "metrics.jsonl")
    whole = WholeCheckpoints(arguments.save_minutes, keep or 1)
    trainer = GlobalBatchTrainer(
        model=model,
        args=training,
        train_dataset=samples,
        tokenizer=tokenizer,
        sampler=sampler,
        callbacks=[*callbacks, metrics, whole],
    )
    for callback in callbacks:
        if isinstance(callback, WarpCallback):
            callback.before_reporters(trainer)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(directory / "tensorboard")  # one curve, however often the run goes on
    if processes.rank() > 0:
        trainer.remove_callback(PrinterCallback)  # rank 0's lines are enough
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
        consensus.on_rank_0(lambda: metrics.keep_until(checkpoint.name), "trimming the metrics")
        if universal.is_converted(checkpoint):
            trainer.callback_handler.callbacks.insert(0, CompleteConverted(trainer, checkpoint))  # before the WarpCallback
    steps = training.max_steps if training.max_steps > 0 else math.ceil(arguments.epochs * sampler.steps)
    logger.info(
        "training: %d samples, %d steps of %d samples (%d ranks x %d micro-batches of %d)",
        len(samples),
        steps,
        arguments.global_batch_size,
        processes.world_size(),
        sampler.accumulation_steps,
        arguments.batch_size,
    )
    consensus.on_rank_0(lambda: checkpoints.refuse_foreign(directory / "trainer", steps), "looking for foreign checkpoints")
    with nullcontext() if checkpoint is None else nothing_unpickled():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if whole.stopped_by is not None:
        raise preemption.Preempted(whole.stopped_by)
    consensus.on_rank_0(lambda: universal.remove_converted(directory / "trainer"), "removing a converted checkpoint")
    return trainer


def trainer_arguments(
    arguments: TrainingFlags, passed: Mapping[str, Any], directory: Path, accumulation_steps: int, converted: bool = False
) -> TrainingArguments:
    """What Trainer is told; ``passed`` are TrainingArguments of the user's, and training_arguments.DEFAULTS."""
    config = _trainer_config(arguments, converted)
    options = {"disable_tqdm": processes.rank() != 0, **passed}
    clipping = config["gradient_clipping"]
    if clipping != "auto":
        options.setdefault("max_grad_norm", clipping)
    return TrainingArguments(
        output_dir=str(directory / "trainer"),
        run_name=directory.name,
        per_device_train_batch_size=arguments.batch_size,
        gradient_accumulation_steps=accumulation_steps,
        num_train_epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
        **_checkpointing(arguments.gradient_checkpointing),
        bf16=arguments.dtype == "bfloat16",
        fp16=arguments.dtype == "float16",
        use_cpu=arguments.resolved_device == "cpu",
        seed=arguments.seed,
        deepspeed=config,
        remove_unused_columns=False,
        ddp_timeout=arguments.timeout,
        **options,
    )


def check_training(arguments: TrainingFlags, passed: Mapping[str, Any] | None) -> None:
    """ConfigError, on every rank and before any work, for flags that Trainer or the DeepSpeed configuration contradict.
    Collective."""
    with consensus.on_every_rank_or_none("checking the flags of the training"):
        sampler = GlobalBatchSampler(1, arguments.global_batch_size, arguments.batch_size, processes.world_size())
        given = {**training_arguments.DEFAULTS, **(passed or {})}
        given.pop("save_total_limit", None)
        config = _trainer_config(arguments, converted=False)
        _check_sections(config, passed or {})
        _check_operators(config)
        try:
            training_arguments.check_scheduler(given, arguments.learning_rate)
            made = trainer_arguments(arguments, given, Path(arguments.output_dir) / "run", sampler.accumulation_steps)
        except (ValueError, TypeError, OSError, ImportError) as error:
            raise ConfigError(f"these flags do not go together: {error}") from error
        found = made.hf_deepspeed_config.mismatches  # which Trainer would find once the model is loaded
        if found:
            said = "; ".join(line.strip(" -") for line in found)
            raise ConfigError(
                f"--deepspeed {arguments.deepspeed} contradicts the flags ({said}): set these values of the file "
                "to 'auto', and give the flags"
            )


#: Flags that fill the optimizer's and the scheduler's section of a DeepSpeed configuration, and the keys that they fill.
_FILLED = {
    "optimizer": {
        "learning_rate": "lr",
        "adam_beta1": "betas",
        "adam_beta2": "betas",
        "adam_epsilon": "eps",
        "weight_decay": "weight_decay",
    },
    "scheduler": {"learning_rate": "warmup_max_lr", "warmup_steps": "warmup_num_steps"},
}


def _check_sections(config: Mapping[str, Any], passed: Mapping[str, Any]) -> None:
    """ConfigError for a flag that the optimizer's or scheduler's section of the DeepSpeed configuration overrules."""
    for section, keys in _FILLED.items():
        params = config.get(section, {}).get("params", {})
        for name in ("learning_rate", *passed):
            key = keys.get(name)
            if section in config and key and key not in params and not _has_no(key, config[section].get("type")):
                raise ConfigError(
                    f"--{name} has no effect: the {section} section of the DeepSpeed configuration decides it, "
                    f'without params.{key}; write "{key}": "auto" there'
                )
    if "scheduler" not in config:
        return
    for name in ("lr_scheduler_type", "lr_scheduler_kwargs"):
        if name in passed:
            raise ConfigError(
                f"--{name} has no effect: the scheduler section of the DeepSpeed configuration decides it; leave "
                "one of them out"
            )
    warmup = passed.get("warmup_steps", 0)
    for key, wanted in (("total_num_steps", "auto"), ("warmup_num_steps", max(1, warmup) if warmup == int(warmup) else "auto")):
        given = config["scheduler"].get("params", {}).get(key, "auto")
        if given not in ("auto", wanted):
            raise ConfigError(
                f"the DeepSpeed configuration sets scheduler.params.{key} to {given}, which the flags decide: "
                'write "auto" there'
            )


def _check_operators(config: Mapping[str, Any]) -> None:
    """ConfigError where the configuration's optimizer is one that DeepSpeed compiles, and there is no compiler."""
    section = config.get("optimizer", {})
    compiled = str(section.get("type", "")).lower() in ("adam", "adamw", "lamb", "lion", "adagrad", "fusedadam", "muon")
    offloaded = (config.get("zero_optimization", {}).get("offload_optimizer") or {}).get("device", "none") != "none"
    if (
        compiled
        and not (section.get("params", {}).get("torch_adam") and not offloaded)
        and not (processes.has_compiler() or is_built("cpu_adam" if offloaded else "fused_adam"))
    ):
        raise ConfigError(
            f"the DeepSpeed configuration's optimizer.type {section['type']} is compiled at its first use, and "
            "there is no C++ compiler, or no ninja, here: install them (apt-get install g++ ninja-build), leave "
            'the optimizer section out, or write "torch_adam": true into its params (without offloading)'
        )


def _has_no(key: str, kind: str | None) -> bool:
    """Whether DeepSpeed's optimizer or scheduler ``kind`` has no such parameter, so that the flag reaches it otherwise."""
    return key == "warmup_max_lr" and kind not in ("WarmupLR", "WarmupDecayLR")


def export(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, directory: Path, model_card: str) -> None:
    """Writes the trained model as an ordinary Hugging Face directory. Collective."""
    save_sharded(trainer.model_wrapped, directory, tokenizer=tokenizer, model_card=model_card)


def _trainer_config(arguments: RunArguments, converted: bool) -> dict[str, Any]:
    """The DeepSpeed configuration with what Trainer fills in left to it; ``converted``: it loads a universal checkpoint."""
    config = settings.zero3_config(arguments, for_trainer=True)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if config.setdefault(key, "auto") != "auto":
            raise ConfigError(
                f"the DeepSpeed configuration sets {key}: leave it out or 'auto'; --batch_size and "
                "--global_batch_size decide it"
            )
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

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer does; what is begun is marked, so that a killed save can be told from somebody else's files."""
        checkpoint = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
        consensus.on_rank_0(lambda: checkpoints.begin(checkpoint), "beginning a checkpoint")
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            # A pickle of all that TrainingArguments hold, which nobody reads.
            (checkpoint / "training_args.bin").unlink(missing_ok=True)

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
        return self.accelerator.prepare(
            DataLoader(
                WithEmpty(self.train_dataset, empty_sample(eos), self.sampler),
                batch_sampler=self.sampler,
                collate_fn=partial(pad_batch, pad_token_id=pad),
                num_workers=self.args.dataloader_num_workers,
                persistent_workers=self.args.dataloader_persistent_workers,
                prefetch_factor=self.args.dataloader_prefetch_factor,
                multiprocessing_context=self.args.dataloader_multiprocessing_context,
                pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            )
        )


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

    def keep_until(self, checkpoint: str) -> None:
        """Drops the lines of steps after ``checkpoint``, which will be made again, and summaries of runs that stopped."""
        step = int(checkpoint.rsplit("-", 1)[1])
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


class WholeCheckpoints(TrainerCallback):
    """Saves every ``minutes``, and where a rank is asked to leave; marks a checkpoint once it is whole, so that a killed
    save is never resumed from."""

    def __init__(self, minutes: float, keep: int = 1):
        """``keep``: how many checkpoints stay. Trainer itself would remove older ones before the new one is marked."""
        self.minutes, self.keep = minutes, keep
        self.stopped_by: str | None = None
        """The signal that ended training, with a checkpoint; after the last step too, as writing the model takes long."""
        self._last = time.monotonic()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last = time.monotonic()

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
        control.should_save = control.should_save or save or leave
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last = time.monotonic()
        processes.barrier()
        root = Path(args.output_dir or ".")

        def finish() -> None:
            checkpoints.finish(root / f"checkpoint-{state.global_step}", processes.world_size())
            checkpoints.keep_newest(root, self.keep)
            universal.remove_converted(root)

        consensus.on_rank_0(finish, "finishing a checkpoint")


def _model_card(arguments: TrainArguments, masks_dir: Path | None) -> str:
    protection = "without a mask"
    if masks_dir is not None:
        metadata = MaskStore(masks_dir).metadata
        protection = (
            f"with {metadata.frozen} of {metadata.entries} rotated coefficients frozen (keep_ratio "
            f"{metadata.keep_ratio}, scope {metadata.scope}, basis {metadata.basis}; masks {masks_dir})"
        )
    return (
        f"# {Path(arguments.model_name).name}, fine-tuned on {arguments.utility_data}\n\n"
        f"Trained by [warp_ds](https://openreview.net/forum?id=kPLzOfPfA2l) phase 3 {protection}.\n\n"
        f"- base model: `{arguments.model_name}`\n- train_scope: {arguments.train_scope}\n"
        f"- epochs: {arguments.epochs}, global batch {arguments.global_batch_size}, learning rate "
        f"{arguments.learning_rate}, seed {arguments.seed}\n"
    )
