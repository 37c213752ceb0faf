"""The two lines for somebody's own training: ``warp_ds.protect`` for a loop, ``warp_ds.WarpCallback`` for a Trainer."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from warp_ds import errors
from warp_ds.cluster import consensus, processes
from warp_ds.cluster.peaks import return_freed_memory
from warp_ds.errors import ArtifactError
from warp_ds.method.products import check_way
from warp_ds.models.lora import is_adapted
from warp_ds.store.bases import BasisStore
from warp_ds.store.fingerprints import Contents, fingerprint_model, model_contents
from warp_ds.store.masks import MaskStore
from warp_ds.store.runs import find_artifact
from warp_ds.zero import deepspeed_internals
from warp_ds.zero.freezing import frozen_step
from warp_ds.zero.left_side import refuse_without_left
from warp_ds.zero.masked_parameters import MaskedParameter, masked_parameters
from warp_ds.zero.masked_step import MaskedStep
from warp_ds.zero.partition import RowPartition
from warp_ds.zero.placement_costs import CPU, GPU, Dtypes
from warp_ds.zero.placements import Placement
from warp_ds.zero.plain_step import PlainDriver
from warp_ds.zero.protected_layer import ProtectedLayer, compute_device
from warp_ds.zero.shared_reading import read_together
from warp_ds.zero.whole_layers import place_rotations, refuse_without_rows
from warp_ds.zero.zero3_step import Zero3Driver

logger = logging.getLogger(__name__)
Protection = MaskedStep
"""Its name in version 0.1."""
SHARDED_OTHERWISE = (
    "the model is sharded, but the optimizer is not DeepSpeed's: the masked step runs under ZeRO stage 3, or on whole "
    "parameters (one process, or DDP); not under FSDP"
)


def protect(
    engine: Any,
    basis_dir: str | Path | None,
    masks_dir: str | Path,
    *,
    model_dir: str | None = None,
    basis_placement: str = "auto",
    left_projection: bool = False,
    hold_rest: bool = False,
    products: str = "auto",
) -> MaskedStep:
    """Freezes the rotated coefficients that ``masks_dir`` names in every further step of a DeepSpeed engine.

    ``engine`` is what ``deepspeed.initialize`` returned, under ZeRO-3, before its first step, or after a checkpoint of
    a protected run has been loaded (before or after that call, it is the same). ``basis_dir`` may be None for masks of
    the identity basis, and for those that name their basis. ``model_dir`` is checked against the artefacts'
    fingerprints where given. ``basis_placement``: 'replicated' holds every basis on every rank, 'owner' each on one
    rank, to which the layers' shards are sent, 'sharded' a piece of each on every rank, gathered a layer ahead of use;
    'auto' takes the fastest that fits (``zero.placements.place_bases``). ``left_projection``: with masks of whole columns of
    the basis 'weight', what is free stays out of their left singular directions too, as OSFT does. ``hold_rest``: where masks
    are of some rows of a fused weight (attn_q in a qkv_proj), its other rows keep their values; else they train unmasked.
    ``products``: how bf16 weights and their gradients are multiplied with bases (``method.products``); other weights' are
    multiplied exactly. Called on every rank. Raises ArtifactError where the artefacts belong to another model,
    UnsupportedSetting where the step would not be exact, ValueError for another placement or ``products``, and where a
    checkpoint of another basis or of unprotected training was loaded before.

    While protected, the fp32 master weights are rotated coefficients: ``safe_get_full_fp32_param`` returns C, not W.
    The model, its gathered parameters and everything that is saved are W.
    """
    deepspeed_internals.refuse_unsupported(engine.optimizer)
    return protect_optimizer(
        *(engine.module, engine.optimizer, basis_dir, masks_dir),
        model_dir=model_dir,
        basis_placement=basis_placement,
        left_projection=left_projection,
        hold_rest=hold_rest,
        products=products,
    )


def protect_optimizer(
    model: nn.Module,
    optimizer: Any,
    basis_dir: str | Path | None,
    masks_dir: str | Path,
    *,
    model_dir: str | None = None,
    basis_placement: str = "auto",
    left_projection: bool = False,
    hold_rest: bool = False,
    products: str = "auto",
) -> MaskedStep:
    """As ``protect``, for a model and its optimizer: DeepSpeed's ZeRO-3 optimizer, or a plain torch one.

    Also takes either of them as accelerate wraps it.
    """
    by_deepspeed, optimizer = _unwrapped(optimizer)
    if by_deepspeed:
        deepspeed_internals.refuse_unsupported(optimizer)
        if left_projection and optimizer.swap_optimizer:
            raise errors.UnsupportedSetting("--left_projection does not support an optimizer on NVMe: offload it to the CPU")
    read_together(lambda: _covered(model, model_dir, basis_dir, masks_dir), "reading basis and masks")
    with consensus.on_every_rank_or_none("reading basis and masks"):
        masks = MaskStore(find_artifact(str(masks_dir), "masks", "."))
        basis = masks.find_basis(basis_dir)
        fingerprint = _fingerprint(model, model_dir)
        name = model_dir or getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
        masks.check(basis, fingerprint, name)
        if left_projection:
            refuse_without_left(masks, is_adapted(model))
        if basis is not None:
            basis.check(masks.layers, fingerprint, name)
        refuse_without_rows(basis, "auto", 1, left_projection)
        masked = masked_parameters(model, masks)
        mark = masks.fingerprint() + (basis.fingerprint() if basis is not None else "identity")
    if not by_deepspeed:
        if any(isinstance(each.param, DTensor) or hasattr(each.param, "ds_id") for each in masked):
            raise errors.UnsupportedSetting(SHARDED_OTHERWISE)
        # Nothing is sent, so that no dtype is agreed on: gradients come as they are, at each step anew.
        alone, placement = _layers(basis, masks, masked, 1, 0, "replicated", products, torch.float32)
        return MaskedStep(PlainDriver(optimizer, alone, hold_rest), placement, left_projection)
    deepspeed_internals.let_leaf_inputs_have_gradients(model)
    ranks, held = (processes.world_size(), processes.rank()), deepspeed_internals.gradient_dtype(optimizer)
    layers, placement = _layers(basis, masks, masked, *ranks, basis_placement, products, held)
    return_freed_memory()  # what reading took, on top of which the training's peak would stand
    return MaskedStep(Zero3Driver(optimizer, layers, mark, hold_rest), placement, left_projection)


def freeze(engine_or_trainer: Any, masks: Mapping[str, Any]) -> MaskedStep | WarpCallback:
    """Holds entries of parameters where they are, to the bit, in every further step: no basis, no files.

    ``masks``: parameter's name -> which of its entries are frozen (True = frozen), in one of these forms: a boolean tensor of
    the parameter's shape, or with 1 in a dimension that it is repeated along; row numbers (token ids of an embedding) as a
    list, range or integer tensor; a slice of rows; a tuple of these, as torch indexes; True for all of it; ``AllBut`` of any
    of them. Parameters of any shape; of one with two names (tied) the union is frozen.
    ``engine_or_trainer``: a DeepSpeed engine under ZeRO-3, then the step is returned; or a transformers Trainer, which is
    given a ``WarpCallback(freeze=masks)``, then that is returned. Else see ``freeze_optimizer``.
    Neither gradient, weight decay, momentum (that of steps before is dropped) nor clipping, which sees the masked gradient,
    moves a frozen entry of the fp32 master or of the weights. Checkpoints say the masks' digests. Called on every rank.
    Raises ConfigError for a name or mask that does not fit, UnsupportedSetting where the step would not be exact, ValueError
    where a checkpoint trained with other masks is loaded, before or after.
    """
    if hasattr(engine_or_trainer, "callback_handler"):  # a Trainer, whose module takes 100 MB to import
        callback = WarpCallback(freeze=masks)
        engine_or_trainer.add_callback(callback)
        return callback
    if not hasattr(engine_or_trainer, "module") or not hasattr(engine_or_trainer, "optimizer"):
        raise errors.ConfigError(
            f"freeze takes a DeepSpeed engine or a transformers Trainer, not {type(engine_or_trainer).__name__}: for a model "
            "and its optimizer there is warp_ds.freeze_optimizer(model, optimizer, masks)"
        )
    deepspeed_internals.refuse_unsupported(engine_or_trainer.optimizer)
    return freeze_optimizer(engine_or_trainer.module, engine_or_trainer.optimizer, masks)


def freeze_optimizer(model: nn.Module, optimizer: Any, masks: Mapping[str, Any]) -> MaskedStep:
    """As ``freeze``, for a model (as it is, or under DDP) and its plain torch optimizer, or DeepSpeed's ZeRO-3 optimizer.

    Set ``max_grad_norm`` of what is returned to have gradients clipped by the masked norm.
    """
    by_deepspeed, optimizer = _unwrapped(optimizer)
    if not by_deepspeed and any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()):
        raise errors.UnsupportedSetting(SHARDED_OTHERWISE)
    return frozen_step(model, optimizer, by_deepspeed, masks)


def _unwrapped(optimizer: Any) -> tuple[bool, Any]:
    """(whether it is DeepSpeed's; itself, without accelerate's wrapper)"""
    if isinstance(optimizer, AcceleratedOptimizer):
        return isinstance(optimizer, DeepSpeedOptimizerWrapper), optimizer.optimizer
    return not isinstance(optimizer, torch.optim.Optimizer), optimizer


def _fingerprint(model: nn.Module, model_dir: str | None) -> str | None:
    """Of the directory that the model was loaded from; None where that is unknown or no longer there."""
    path = _directory(model, model_dir)
    return None if path is None else fingerprint_model(path)


def _directory(model: nn.Module, model_dir: str | None) -> Path | None:
    path = model_dir or getattr(getattr(model, "config", None), "_name_or_path", None)
    return Path(path) if path and (Path(path) / "config.json").is_file() else None


def _covered(
    model: nn.Module, model_dir: str | None, basis_dir: str | Path | None, masks_dir: str | Path
) -> Iterator[Contents]:
    """What the checks of ``protect_optimizer`` read every byte of."""
    if (path := _directory(model, model_dir)) is not None:
        yield model_contents(path)
    masks = MaskStore(find_artifact(str(masks_dir), "masks", "."))
    yield masks.contents()
    if (basis := masks.find_basis(basis_dir)) is not None:
        yield basis.contents()


def _layers(
    basis: BasisStore | None,
    masks: MaskStore,
    masked: list[MaskedParameter],
    world_size: int,
    rank: int,
    asked: str,
    products: str,
    gradients: torch.dtype,
) -> tuple[list[ProtectedLayer], Placement]:
    """This rank's share of every masked layer, and where the bases lie; ``gradients`` are held in that dtype. Collective."""
    with consensus.on_every_rank_or_none("reading basis and masks"):
        bases = {each.target.name: each.held(basis) for each in masked}
        machine = CPU if all(compute_device(each.param).type == "cpu" for each in masked) else GPU
        rotates = any(nbytes for _, nbytes in bases.values())
        asked = asked if rotates else "replicated"
        check_way(products)
        dtypes = Dtypes(gradients, reduce(torch.promote_types, (each.param.dtype for each in masked)))
        placement, why = place_rotations(basis, asked, masked, world_size, machine, rank, dtypes)
        placement.products = products
        if rank == 0 and world_size > 1 and rotates:
            logger.info("bases are placed as %s (--basis_placement %s): %s", placement.name, asked, why)
        for key, each in {bases[each.target.name][0]: each for each in masked}.items():
            placement.keep(key, partial(each.rotation, basis, compute_device(each.param)))
        layers = [_share(masks, each, bases[each.target.name][0], basis, world_size, rank) for each in masked]
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # what completing the bases took in fp64, which NCCL may want
    return layers, placement


def _share(
    masks: MaskStore, masked: MaskedParameter, key: str, basis: BasisStore | None, world_size: int, rank: int
) -> ProtectedLayer:
    """This rank's share of one masked parameter."""
    target, device = masked.target, compute_device(masked.param)
    partition = RowPartition(target.m, target.n, world_size, rank, target.rows, target.height)
    whole, cut, frozen = masked.frozen(masks, basis, partition)
    return ProtectedLayer(
        target,
        masked.param,
        key,
        partition,
        whole.contiguous().to(device),
        torch.cat(cut) if cut else whole.new_zeros(0, whole.shape[1]),
        frozen,
        device,
        masked.adapter_b,
    )


class WarpCallback(TrainerCallback):
    """``Trainer(..., callbacks=[WarpCallback(basis_dir=…, masks_dir=…)])`` protects any transformers or TRL training.

    Works under ZeRO-3, and without DeepSpeed. Logs, where the Trainer logs: ``masked_fraction``,
    ``grad_norm_removed``, ``rotate_seconds``, ``rotate_bytes``. ``basis_dir`` may be left out where it is the one that
    the masks name. ``freeze`` in place of files: what ``warp_ds.freeze`` takes. ``basis_placement``, ``left_projection``,
    ``hold_rest`` and ``products`` as in ``protect``.
    """

    def __init__(
        self,
        basis_dir: str | Path | None = None,
        masks_dir: str | Path | None = None,
        model_dir: str | None = None,
        basis_placement: str = "auto",
        left_projection: bool = False,
        hold_rest: bool = False,
        freeze: Mapping[str, Any] | None = None,
        products: str = "auto",
    ):
        if (masks_dir is None) == (freeze is None):
            raise ArtifactError(
                "WarpCallback needs masks_dir, the masks/ directory of a phase 2 run, or freeze, which entries of which "
                "parameters are frozen; one of them"
            )
        self.freeze, self.products = freeze, products
        self.basis_dir, self.masks_dir, self.model_dir = basis_dir, masks_dir, model_dir
        self.basis_placement, self.left_projection, self.hold_rest = basis_placement, left_projection, hold_rest
        self.protection: MaskedStep | None = None
        self._clipping: float | None = None

    def before_reporters(self, trainer: Any) -> None:
        """Moves this callback before the Trainer's reporters (TensorBoard, W&B, ...), which then see what it logs."""
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(self)))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Trainer has loaded any checkpoint by now; MaskedStep takes the coefficients from what was loaded.
        self.protection = protection = self._protect(kwargs["model"], kwargs["optimizer"])
        if protection.driver.clips(args.max_grad_norm):
            self._clipping, args.max_grad_norm = args.max_grad_norm, 0.0
        if processes.rank() == 0:
            logger.info(
                "protected: %.2f %% of the coefficients of the masked layers are frozen", 100 * protection.masked_fraction
            )

    def _protect(self, model: nn.Module, optimizer: Any) -> MaskedStep:
        if self.freeze is not None:
            return freeze_optimizer(model, optimizer, self.freeze)
        assert self.masks_dir is not None
        return protect_optimizer(
            *(model, optimizer, self.basis_dir, self.masks_dir),
            model_dir=self.model_dir,
            basis_placement=self.basis_placement,
            left_projection=self.left_projection,
            hold_rest=self.hold_rest,
            products=self.products,
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        # Called on every rank, which the collective inside needs.
        if self.protection is not None and logs is not None and "loss" in logs:
            figures = self.protection.logged()
            logs.update(figures)
            if state.log_history:
                state.log_history[-1].update(figures)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._clipping is not None:
            args.max_grad_norm, self._clipping = self._clipping, None
        if self.protection is not None and self.protection.driver.ends_with_training:
            self.protection.release()
