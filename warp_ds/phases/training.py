"""Phase 3, training on the task with frozen rotated coefficients; and phase 0, safety tuning, the same without a mask.

The loop is transformers' Trainer. What is added: global batches that are the same on any world size, the masked step,
checkpoints by the clock, and an export that is an ordinary Hugging Face model directory.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from warp_ds.cluster import consensus, preemption, processes
from warp_ds.data.collate import GlobalBatchSampler
from warp_ds.errors import ConfigError
from warp_ds.flags import training_arguments
from warp_ds.flags.arguments import AuditArguments, SafetyTuningArguments, TrainArguments
from warp_ds.flags.groups import TrainingFlags
from warp_ds.models.flops import active_parameters, device_peak
from warp_ds.models.lora import refuse_parts
from warp_ds.models.source import WithProcessor
from warp_ds.models.targets import beside_text, check_targets, find_targets, targets_of
from warp_ds.phases import adapters, checkpoints
from warp_ds.phases.controls import Controls
from warp_ds.phases.growing import Growing
from warp_ds.phases.lora_methods import LoraMethod, bases_of
from warp_ds.phases.packing import SamplesApart, attention_of, check_packing, make_sampler
from warp_ds.phases.publish import fetch_shared, published
from warp_ds.phases.run import start_run
from warp_ds.phases.speed import Speed
from warp_ds.phases.start_model import HeldToStart
from warp_ds.phases.texts import safety_texts, task_texts, tokenise
from warp_ds.phases.trainer import EarlyStopping, GlobalBatchTrainer, MetricsFile, WholeCheckpoints
from warp_ds.phases.trainer_arguments import check_training, run_facts, trainer_arguments
from warp_ds.phases.watching import Watched
from warp_ds.protection import WarpCallback
from warp_ds.report import card
from warp_ds.resuming import CompleteConverted
from warp_ds.store.bases import BasisStore
from warp_ds.store.fingerprints import Contents, fingerprint_rows
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import find_artifact, run_config
from warp_ds.zero import settings, universal
from warp_ds.zero.deepspeed_internals import end_engine, nothing_unpickled
from warp_ds.zero.left_side import refuse_without_left
from warp_ds.zero.masked_parameters import refuse_entries
from warp_ds.zero.model import load_model, resolve_model_dir
from warp_ds.zero.save import save_sharded
from warp_ds.zero.shared_reading import model_fingerprint, read_together
from warp_ds.zero.whole_layers import refuse_without_rows

logger = logging.getLogger(__name__)


@published
def run_training(arguments: TrainArguments, passed: dict[str, Any] | None = None) -> Path:
    """Phase 3; returns the run directory, whose model/ is the trained model. Collective.

    ``passed`` are further TrainingArguments. Raises ConfigError, DataError or ArtifactError before any work where
    model, data, basis and masks do not fit together.
    """
    passed = check_training(arguments, passed)
    model_dir = resolve_model_dir(arguments.model_name)
    fingerprint = model_fingerprint(model_dir)
    fetch_shared(arguments)
    read_together(lambda: artefacts(arguments), "reading basis and masks")
    with consensus.on_every_rank_or_none("checking the inputs"):
        check_packing(arguments, model_dir)
    pairs = task_texts(arguments)
    with consensus.on_every_rank_or_none("checking the inputs"):
        adapters.check_peft(arguments)
        watched = Watched.read(arguments, passed)
        controls = Controls.read(arguments, passed)
        inputs = {"model": fingerprint, "data": fingerprint_rows(pairs), **watched.fingerprints(arguments, passed)}
        inputs |= controls.fingerprints()
        masks_dir, basis_dir = find_masks(arguments, inputs["model"])
        inputs |= _checked_masks(arguments, model_dir, masks_dir)
        basis = None if basis_dir is None else BasisStore(basis_dir)
        of_inputs = arguments.adapter != "none" and masks_dir is not None and MaskStore(masks_dir).metadata.unit == "column"
        placed = arguments.basis_placement, processes.world_size(), arguments.left_projection
        refuse_without_rows(basis, *placed, of_inputs)
    method = _method(arguments, fingerprint, model_dir, masks_dir)
    inputs |= method.fingerprints()
    with start_run("phase3", arguments, inputs, passed) as run:
        if run.done:
            return run.directory
        samples, watched = tokenise(pairs, arguments), watched.tokenised(arguments)
        checkpoint = find_checkpoint(run.directory, arguments, passed)
        controls.check_start(run.directory, checkpoint)
        model, tokenizer = load_model(arguments, settings.zero3_config(arguments), attention_of(arguments))
        model, beside = _what_trains(model, masks_dir, arguments, method, run.directory)
        callbacks = beside + controls.averages(run.directory / "trainer", checkpoint)
        if masks_dir is not None:
            placed = arguments.basis_placement, arguments.left_projection, arguments.train_scope == "warp"
            warp = WarpCallback(basis_dir, masks_dir, str(model_dir), *placed, products=arguments.products)
            callbacks = controls.protecting(warp, run.directory, checkpoint) + callbacks
        trainer = fit(
            *(model, tokenizer, samples, arguments, run.directory, checkpoint, callbacks, passed),
            watched=watched,
            facts=run_facts(arguments, inputs, phase="phase3", **_masks_facts(masks_dir)),
            objective=partial(controls.objective, samples, tokenizer, run.directory),
        )
        write_result(
            trainer, tokenizer, arguments, run.directory, _model_card(arguments, masks_dir, trainer.speed, method.said)
        )
        run.finish(training=trainer.outcome())
        controls.end(run.directory)
        end_engine(trainer.deepspeed)
        return run.directory


def _checked_masks(arguments: TrainArguments, model_dir: Path, masks_dir: Path | None) -> dict[str, str]:
    """The masks' fingerprint, as an input of the run. Raises ConfigError where what is asked for does not go with them."""
    adapted = arguments.adapter != "none"
    if masks_dir is None:
        if arguments.left_projection:
            raise ConfigError("--left_projection is of masks: leave it, or --masks_dir none, out")
        check_targets(model_dir, arguments.target_layers, arguments.layer_type, arguments.train_scope == "warp" and not adapted)
        return {}
    masks = MaskStore(masks_dir)
    if adapted:
        refuse_entries(masks)
        chosen = None
        if arguments.lora_layers:
            chosen = {layer.module for layer in targets_of(model_dir, arguments.target_layers, arguments.lora_layers)}
        with_adapter = [layer for layer in masks.layers if chosen is None or layer.module in chosen]
        refuse_parts(with_adapter, f"the masks in {masks_dir} cannot hold its adapter")
    if arguments.left_projection:
        refuse_without_left(masks, adapted)
    return {"masks": masks.fingerprint()}


def _method(arguments: TrainArguments, fingerprint: str, model_dir: Path, masks_dir: Path | None) -> LoraMethod:
    """What holds an adapter. Raises ConfigError for layers that can have none. Collective."""
    method = LoraMethod.read(arguments, fingerprint)
    with consensus.on_every_rank_or_none("looking for the adapter's layers"):
        adapters.check_layers(model_dir, _held(masks_dir, method), arguments)
    return method


def _held(masks_dir: Path | None, method: LoraMethod) -> list[TargetLayer]:
    """The layers that masks or a method are made for."""
    if method.basis is not None:
        return method.basis.layers
    return [] if masks_dir is None else MaskStore(masks_dir).layers


def _what_trains(
    model: Any, masks_dir: Path | None, arguments: TrainArguments, method: LoraMethod, directory: Path
) -> tuple[Any, list[TrainerCallback]]:
    """The model with its target layers, its adapters on them, or all of it set to train; what acts beside it. Collective."""
    masked = [] if masks_dir is None else MaskStore(masks_dir).layers
    if arguments.adapter == "lora":
        layers = adapters.adapted_layers(model, _held(masks_dir, method), arguments)
        model = adapters.add_lora(model, layers, arguments, arguments.seed)
        return model, method.attach(model, layers, directory)
    layers = masked or find_targets(model, arguments.target_layers, arguments.layer_type)
    choose_trained(model, [layer.parameter for layer in layers] if arguments.train_scope == "warp" else None)
    return model, []


@published
def run_safety_tuning(arguments: SafetyTuningArguments, passed: dict[str, Any] | None = None) -> Path:
    """Phase 0: every parameter trains on the safety set; returns the run directory. Collective."""
    passed = check_training(arguments, passed)
    model_dir = resolve_model_dir(arguments.model_name)
    fingerprint = model_fingerprint(model_dir)
    with consensus.on_every_rank_or_none("checking the inputs"):
        check_packing(arguments, model_dir)
    pairs = safety_texts(arguments)
    with consensus.on_every_rank_or_none("checking the inputs"):
        adapters.check_peft(arguments)
        adapters.check_layers(model_dir, [], arguments)
        watched = Watched.read(arguments, passed)
        inputs = {"model": fingerprint, "data": fingerprint_rows(pairs), **watched.fingerprints(arguments, passed)}
    with start_run("phase0", arguments, inputs, passed) as run:
        if run.done:
            return run.directory
        samples, watched = tokenise(pairs, arguments), watched.tokenised(arguments)
        checkpoint = find_checkpoint(run.directory, arguments, passed)
        model, tokenizer = load_model(arguments, settings.zero3_config(arguments), attention_of(arguments))
        if arguments.adapter == "lora":
            model = adapters.add_lora(model, adapters.adapted_layers(model, [], arguments), arguments, arguments.seed)
        else:
            choose_trained(model, None)
        facts = run_facts(arguments, inputs, phase="phase0")
        trainer = fit(model, tokenizer, samples, arguments, run.directory, checkpoint, [], passed, watched=watched, facts=facts)
        model_card = card.new_card(
            f"Safety-tuned {card.plain(arguments.model_name)}",
            f"Trained by warp_ds phase 0 on {card.plain(arguments.safety_data)}.\n\n{_adapter_line(arguments)}"
            f"{trainer.speed.cost}\n",
            arguments.model_name,
            arguments.safety_data,
            adapter=arguments.adapter != "none",
        )
        write_result(trainer, tokenizer, arguments, run.directory, model_card)
        run.finish(training=trainer.outcome())
        end_engine(trainer.deepspeed)
        return run.directory


def artefacts(arguments: TrainArguments | AuditArguments) -> Iterator[Contents]:
    """What ``find_masks`` reads every byte of."""
    if arguments.masks_dir != "none":
        masks = MaskStore(find_artifact(arguments.masks_dir, "masks", arguments.output_dir))
        yield masks.contents()
        if (basis := masks.find_basis(arguments.basis_dir)) is not None:
            yield basis.contents()
    if isinstance(arguments, TrainArguments):
        yield from (basis.contents() for basis in bases_of(arguments).values())


def find_masks(arguments: TrainArguments | AuditArguments, model_fingerprint: str) -> tuple[Path | None, Path | None]:
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


def _masks_facts(masks_dir: Path | None) -> dict[str, Any]:
    """What trackers are told of the masks."""
    if masks_dir is None:
        return {}
    metadata = MaskStore(masks_dir).metadata
    return {name: getattr(metadata, name) for name in ("keep_ratio", "scope", "unit", "score", "basis", "frozen", "entries")}


def choose_trained(model: nn.Module, wanted: Sequence[str] | None) -> None:
    """Lets only the parameters of these names train; None: every parameter but those of what a model reads beside text, which
    text alone cannot train, and weight decay would still move."""
    others = beside_text(model) if wanted is None else set()
    for name, param in model.named_parameters():
        param.requires_grad_(name not in others if wanted is None else name in wanted)


def find_checkpoint(directory: Path, arguments: TrainingFlags, passed: Mapping[str, Any] | None = None) -> Path | None:
    """The last whole checkpoint of the run in ``directory``, converted where another number of ranks wrote it. Collective.

    Raises ConfigError where that cannot be done, or could not be done for the best one at the end.
    """
    newest = consensus.on_rank_0(lambda: checkpoints.newest_whole(directory / "trainer"), "looking for a checkpoint")
    if newest is None:
        if (directory / "trainer").is_dir():
            logger.warning("%s holds no whole checkpoint: its training begins at the first step", directory)
        return None
    checkpoint = Path(newest)
    wrote = consensus.on_rank_0(lambda: checkpoints.world_size_of(checkpoint), "reading a checkpoint")
    consensus.on_rank_0(lambda: checkpoints.check(checkpoint), "checking the checkpoint")
    if wrote == processes.world_size():
        return checkpoint
    if (passed or {}).get("load_best_model_at_end"):
        raise ConfigError(
            f"--load_best_model_at_end: {checkpoint} was written by {wrote} ranks, and these are {processes.world_size()}, "
            f"which could not load the best one of them: start again on {wrote} ranks, or anew with --resume never"
        )
    converted = universal.convert(checkpoint, settings.zero3_config(arguments, for_trainer=True), wrote)
    consensus.on_rank_0(lambda: checkpoints.check(converted), "checking the converted checkpoint")
    return converted


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Any,
    arguments: TrainingFlags,
    directory: Path,
    checkpoint: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    passed: Mapping[str, Any] | None = None,
    *,
    watched: Watched,
    facts: Mapping[str, Any],
    objective: Callable[[int], HeldToStart | None] = lambda accumulation: None,
) -> GlobalBatchTrainer:
    """Trains ``model`` (ZeRO-3 partitioned) on ``samples`` (input_ids, labels), going on from ``checkpoint``
    (``find_checkpoint``). AdamW over all trained parameters, one mean over the response tokens of each global batch.
    ``objective``: what is minimised beside it, or in its place, made for a number of micro-batches a step.

    Raises Preempted, with a checkpoint saved, where a rank was asked to leave.
    """
    passed = {**training_arguments.DEFAULTS, **(passed or {})}
    sampler = make_sampler(samples, arguments, int(passed.get("max_steps", 0)))
    keep = passed.pop("save_total_limit", None)
    converted = checkpoint is not None and universal.is_converted(checkpoint)
    training = trainer_arguments(arguments, passed, directory, sampler.accumulation_steps, converted, facts)
    metrics = MetricsFile(directory / "metrics.jsonl")
    whole = WholeCheckpoints(arguments.save_minutes, keep or 1)
    trainer = GlobalBatchTrainer(
        model=model,
        args=training,
        train_dataset=samples,
        tokenizer=tokenizer,
        sampler=sampler,
        speed=Speed(active_parameters(model), device_peak(arguments.torch_dtype)),
        watched=watched,
        callbacks=[*callbacks, metrics, whole, *_stopping(arguments)],
    )
    if (minimised := objective(sampler.accumulation_steps)) is not None:
        trainer.objective = minimised
        minimised.attach(trainer)
    if arguments.packing:
        trainer.add_callback(SamplesApart(trainer))
    _arrange_reporters(trainer, callbacks, directory)
    if checkpoint is not None and converted:
        trainer.callback_handler.callbacks.insert(0, CompleteConverted(trainer, checkpoint))  # before the WarpCallback
    _train(trainer, arguments, sampler, metrics, checkpoint)
    if whole.stopped_by is not None:
        raise preemption.Preempted(whole.stopped_by)
    consensus.on_rank_0(lambda: universal.remove_converted(directory / "trainer"), "removing a converted checkpoint")
    return trainer


def _train(
    trainer: GlobalBatchTrainer,
    arguments: TrainingFlags,
    sampler: GlobalBatchSampler,
    metrics: MetricsFile,
    checkpoint: Path | None,
) -> None:
    """The Trainer's loop, from ``checkpoint`` on. Collective."""
    training, directory = trainer.args, metrics.path.parent
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Growing):
            callback.speed = trainer.speed
    if checkpoint is not None:
        logger.info("going on from %s", checkpoint)
    step = -1 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
    # Also where there is none: a run that was killed before its first checkpoint has logged steps.
    consensus.on_rank_0(lambda: metrics.keep_until(step), "trimming the metrics")
    steps = training.max_steps if training.max_steps > 0 else math.ceil(arguments.epochs * sampler.steps)
    logger.info(
        "training: %d samples, %d steps of %d samples (%d ranks x %d micro-batches of %s)",
        *(sampler.num_samples, steps, arguments.global_batch_size),
        *(processes.world_size(), sampler.accumulation_steps, sampler.shape),
    )
    consensus.on_rank_0(lambda: checkpoints.refuse_foreign(directory / "trainer", steps), "looking for foreign checkpoints")
    with nullcontext() if checkpoint is None else nothing_unpickled():
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def _stopping(arguments: TrainingFlags) -> list[TrainerCallback]:
    return [EarlyStopping(arguments.early_stopping_patience)] if arguments.early_stopping_patience else []


def _arrange_reporters(trainer: Trainer, callbacks: Sequence[TrainerCallback], directory: Path) -> None:
    """Reports come after the masked step's numbers, into one curve, and on the terminal from rank 0 alone."""
    for callback in callbacks:
        if isinstance(callback, WarpCallback):
            callback.before_reporters(trainer)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(directory / "tensorboard")  # one curve, however often the run goes on
    if processes.rank() > 0:
        trainer.remove_callback(PrinterCallback)  # rank 0's lines are enough


def export(trainer: Trainer, tokenizer: PreTrainedTokenizerBase, directory: Path, model_card: str, start: Path) -> None:
    """Writes the trained model as an ordinary Hugging Face directory, with the processor of ``start``. Collective."""
    save_sharded(trainer.model_wrapped, directory, tokenizer=WithProcessor(tokenizer, start), model_card=model_card)


def write_result(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, arguments: TrainingFlags, directory: Path, model_card: str
) -> None:
    """What came out, in the run's directory: model/, or adapter/ and, where it is asked for, the merged model/. Collective."""
    if arguments.adapter == "none":
        export(trainer, tokenizer, directory / "model", model_card, resolve_model_dir(arguments.model_name))
        return
    base = str(run_config(directory)["inputs"]["model"])
    adapters.export_adapter(trainer.model, tokenizer, directory / "adapter", model_card, arguments.model_name, base)
    if arguments.merge_adapter:
        adapters.write_merged(resolve_model_dir(arguments.model_name), directory / "adapter", directory / "model")


def _adapter_line(arguments: TrainingFlags, method: str = "") -> str:
    if arguments.adapter == "none":
        return ""
    scale = "alpha / sqrt(r)" if arguments.lora_rslora else "alpha / r"
    return (
        f"- adapter: LoRA, r {arguments.lora_r}, alpha {arguments.lora_alpha} (scaled by {scale}), dropout "
        f"{arguments.lora_dropout:g}{method and f'; {method}'}\n"
    )


def _model_card(arguments: TrainArguments, masks_dir: Path | None, speed: Speed, method: str) -> str:
    protection = "without a mask"
    if masks_dir is not None:
        metadata = MaskStore(masks_dir).metadata
        protection = (
            f"with {metadata.frozen} of {metadata.entries} rotated coefficients frozen (keep_ratio "
            f"{metadata.keep_ratio}, unit {metadata.unit}, scope {metadata.scope}, basis {metadata.basis}; masks "
            f"{card.code(masks_dir)})"
        )
    return card.new_card(
        f"{card.plain(Path(arguments.model_name).name)}, fine-tuned on {card.plain(arguments.utility_data)}",
        f"Trained by [warp_ds](https://openreview.net/forum?id=kPLzOfPfA2l) phase 3 {protection}.\n\n"
        f"- base model: {card.code(arguments.model_name)}\n- train_scope: {arguments.train_scope}\n"
        f"{_adapter_line(arguments, method)}"
        f"- epochs: {arguments.epochs}, global batch {arguments.global_batch_size}, learning rate "
        f"{arguments.learning_rate}, seed {arguments.seed}\n{speed.cost}\n",
        arguments.model_name,
        arguments.utility_data,
        adapter=arguments.adapter != "none",
    )
