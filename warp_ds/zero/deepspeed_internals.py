"""Every private name of DeepSpeed that the masked step uses, in one place. Checked on deepspeed 0.19.8.

``tests/test_deepspeed_internals.py`` fails loudly when one of them changes. All of them are of
``runtime/zero/stage3.py``, ``DeepSpeedZeroOptimizer_Stage3`` ("the ZeRO-3 optimizer"), unless said otherwise.
"""

from __future__ import annotations

import copyreg
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from deepspeed.utils import safe_set_local_grad, z3_leaf_module
from torch import Tensor, nn
from transformers.trainer_pt_utils import safe_globals

from warp_ds.errors import ConfigError, UnsupportedSetting

#: The steps of ``DeepSpeedZeroOptimizer_Stage3.step`` that the masked step stands between.
HOOKED = (
    "_get_norm_groups",  # after the overflow check, before the gradient norm
    "_optimizer_step",  # one sub-group: gradients unscaled and clipped, master and states resident
    "_reassign_or_swap_out_partitioned_parameters",  # one sub-group: master cast into the 16-bit partitions
    "state_dict",
    "load_state_dict",
    "_restore_from_bit16_weights",  # masters made anew from the 16-bit partitions (a load without optimizer states)
    "reset_swap_buffers",  # masters made anew from swap files (a checkpoint of an optimizer on NVMe)
)
OPTIMIZER_STATE, MASTERS = "optimizer_state_dict", "fp32_flat_groups"


def end_engine(engine: Any) -> None:
    """Ends a ZeRO-3 engine and frees its weights at once; the next garbage collection frees the rest, if nothing of the
    caller's refers to it.

    ``engine.destroy()`` leaves two references to the module: in the list that every forward pushes its modules on
    (parameter_offload.py) and in a cache without a limit over all engines (partitioned_param_coordinator.py).
    """
    module = engine.module
    engine.destroy()
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [other for other in stack if other is not module]
    params_to_release_cache().cache_clear()
    for param in module.parameters():
        for tensor in (param, param.ds_tensor):
            tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)


def params_to_release_cache() -> Any:
    """The cached function inside ``PartitionedParameterCoordinator.__params_to_release``, under its profiling decorator."""
    outer = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release  # type: ignore[attr-defined]
    return inspect.getclosurevars(outer).nonlocals["func"]


@contextmanager
def without_engine_hooks(optimizer: Any) -> Iterator[None]:
    """A block in which an engine's hooks neither fetch nor release parameters: all of them are partitioned at its start, and
    whoever runs the model inside gathers what it needs (``fetch.gathered``). Collective."""
    offload = optimizer.parameter_offload
    offload.partition_all_parameters()
    offload.destroy()  # no more than its module hooks
    offload.forward_hooks, offload.backward_hooks = [], []
    try:
        yield
    finally:
        params_to_release_cache().cache_clear()  # by the steps of a trace that is recorded anew
        offload.setup_zero_stage3_hooks()
        parameter_offload.FWD_MODULE_STACK.pop()  # the module, which is there already


def refuse_unsupported(optimizer: Any) -> None:
    """UnsupportedSetting, by name, unless ``optimizer`` is a ZeRO-3 optimizer whose step can be masked exactly."""
    name = type(optimizer).__name__
    if name != "DeepSpeedZeroOptimizer_Stage3":
        if isinstance(optimizer, torch.optim.Optimizer):
            name = "DeepSpeed without ZeRO"
        known = {
            "DeepSpeedZeroOptimizer": "ZeRO stage 1 or 2",
            "BF16_Optimizer": "bf16 without ZeRO-3",
            "FP16_Optimizer": "16-bit training without ZeRO",
            "FP16_UnfusedOptimizer": "16-bit training without ZeRO",
            "MiCS_Optimizer": "MiCS (mics_shard_size)",
            "SuperOffloadOptimizer_Stage3": "SuperOffload",
        }
        raise UnsupportedSetting(
            f"the masked step runs on ZeRO stage 3, not on {known.get(name, name)}: set zero_optimization.stage to 3 "
            "(and leave mics_shard_size out)"
        )
    if any(hook in vars(optimizer) for hook in HOOKED):
        raise UnsupportedSetting("this optimizer is protected already: release the first protection before a second one")
    refused = {
        "ZenFlow (zero_optimization.zenflow)": getattr(optimizer, "zenflow", False),
        "Muon": getattr(optimizer, "use_muon", False),
        "hpZ (zero_hpz_partition_size)": getattr(optimizer, "zero_hpz_partition_size", 1) > 1,
        "ZeRO++ quantized weights or gradients (zero_quantized_weights, zero_quantized_gradients)": _quantized(optimizer),
        "NVMe parameter offload (offload_param.device = nvme; use cpu, or nvme for the optimizer alone)": any(
            flat is None for flat in optimizer.fp16_partitioned_groups_flat
        ),
        "model parallelism (mpu, tensor_parallel)": getattr(optimizer, "model_parallel_group", None) is not None,
        # Its GradScaler unscales within a sub-group's step, after clipping and coupled decay have seen the gradient.
        "torch_autocast with float16 (with bfloat16 it does)": (
            getattr(optimizer, "torch_autocast_gradscaler", None) is not None
        ),
    }
    for setting, on in refused.items():
        if on:
            raise UnsupportedSetting(f"the masked step does not support {setting}: turn it off")
    for master, low in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_partitioned_groups_flat, strict=True):
        if str(master.dtype) != "torch.float32":
            raise UnsupportedSetting(
                "the masked step keeps rotated coefficients in fp32 master weights: turn off "
                "bf16_master_weights_and_grads / fp16_master_weights_and_grads"
            )
        if master.numel() and master.data_ptr() == low.data_ptr():
            raise UnsupportedSetting(
                "the masked step needs master weights of their own, but torch_autocast shares "
                "them with the model: use the bf16 or fp16 section instead"
            )


def _quantized(optimizer: Any) -> bool:
    return (
        any(hasattr(p.ds_tensor, "ds_quant_scale") for group in optimizer.fp16_groups for p in group)
        or getattr(optimizer.parameter_offload, "zero_quantized_weights", False)
        or getattr(optimizer, "all2all_process_group", None) is not None
    )


def locate(optimizer: Any, param: nn.Parameter) -> tuple[int, int, int]:
    """Sub-group, offset in its flat buffers and length (padding included) of ``param``'s local partition."""
    sub_group, offset, length = optimizer.grad_position[optimizer.get_param_id(param)]
    return int(sub_group), int(offset), int(length)


def master(optimizer: Any, sub_group: int) -> Tensor:
    """The flat fp32 master weights of a sub-group on this rank (resident inside the hooked steps)."""
    return optimizer.fp32_partitioned_groups_flat[sub_group]


def master_gradient(optimizer: Any, sub_group: int) -> Tensor:
    """The fp32 gradient of ``master`` (inside the hooked steps; under CPU offload always)."""
    gradient = master(optimizer, sub_group).grad
    assert gradient is not None, "DeepSpeed has prepared no fp32 gradient for this sub-group"
    return gradient


def shard(param: Any) -> Tensor:
    """The flat 16-bit (or fp32) partition that forward and backward are gathered from, padding included."""
    return param.ds_tensor.data.view(-1)


def any_nonzero(param: Any) -> bool:
    """Whether this rank's partition of ``param`` holds anything but 0, its padding left out."""
    mine = shard(param)
    first = dist.get_rank(group=param.ds_process_group) * mine.numel()
    return bool(mine[: max(0, min(mine.numel(), param.ds_numel - first))].any())


def refuse_swapped_or_quantized(model: nn.Module) -> None:
    """UnsupportedSetting where a trained parameter's partition is no plain tensor in memory, so that ``shard`` is not it."""
    for partition in (getattr(param, "ds_tensor", None) for param in model.parameters() if param.requires_grad):
        swapped = getattr(partition, "final_location", None) == OffloadDeviceEnum.nvme
        if swapped or hasattr(partition, "ds_quant_scale"):
            setting = "parameters on NVMe (offload_param.device = nvme)" if swapped else "zero_quantized_weights"
            raise UnsupportedSetting(f"--ema_decay averages the partitions in memory, and does not support {setting}")


def gather_persistent(optimizer: Any) -> None:
    """Gathers the small parameters that stay whole on every rank anew, after their partitions were written. Collective.

    Inside of a load none are whole: DeepSpeed gathers them at its end.
    """
    whole = [p for p in optimizer.persistent_parameters if p.ds_status == ZeroParamStatus.AVAILABLE]
    if whole:
        whole[0].partition(whole)
        whole[0].all_gather(whole)


def sub_group_count(optimizer: Any) -> int:
    return len(optimizer.fp32_partitioned_groups_flat)


@contextmanager
def resident(optimizer: Any, sub_group: int, weights: bool = False, gradients: bool = False) -> Iterator[None]:
    """A block in which ``master(optimizer, sub_group)`` and its ``.grad`` are in memory, also those kept on NVMe.

    What is named is written back to NVMe afterwards. Outside of ``step``, where DeepSpeed sees to that itself.
    """
    swapped = optimizer._swappable_optimizer_subgroup(sub_group)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(sub_group)
    yield
    if swapped:
        optimizer._writeback_swap_state(sub_group, write_opt_state=weights, write_gradients=gradients)


def gradient_dtype(optimizer: Any) -> torch.dtype:
    """Of what ``get_gradient`` gives and ``set_gradient`` keeps: the sums of backward passes, data_types.grad_accum_dtype or
    by default the model's; of an offloaded optimizer's fp32 copies of them."""
    return torch.float32 if optimizer.offload_optimizer else optimizer.gradient_accumulation_dtype


def get_gradient(optimizer: Any, param: nn.Parameter) -> Tensor:
    """The local gradient shard as it is held, flat, padding included; to be read; the sub-group is resident.

    ``safe_get_local_grad``, which makes it fp32, without that.
    """
    sub_group, offset, length = locate(optimizer, param)
    if optimizer._swappable_optimizer_subgroup(sub_group):
        return master_gradient(optimizer, sub_group).narrow(0, offset, length)
    gradient, _ = optimizer._get_fp32_grad_state_partition(param=param, release_swap_buffers=True)
    return gradient.to(get_accelerator().current_device_name()).flatten()


def set_gradient(optimizer: Any, param: nn.Parameter, value: Tensor) -> None:
    """Writes the local gradient shard, rounded to ``gradient_dtype``, and its norm where DeepSpeed keeps that apart; the
    sub-group is resident."""
    sub_group, offset, length = locate(optimizer, param)
    if optimizer._swappable_optimizer_subgroup(sub_group):
        master_gradient(optimizer, sub_group).narrow(0, offset, length).copy_(value)
        optimizer.norm_for_param_grads[optimizer.get_param_id(param)] = optimizer._constant_buffered_norm2(value)
    else:
        safe_set_local_grad(param, value)


def accumulated(optimizer: Any, param: Any) -> Tensor:
    """What the backward passes of a step have summed up so far of ``param``'s local gradient, flat, padding included."""
    partition: Tensor = optimizer._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[param.ds_id]
    return partition


def refuse_swapped_gradients(optimizer: Any, what: str = "--objective safegrad") -> None:
    """UnsupportedSetting where gradients cannot be read between backward and step."""
    if type(optimizer).__name__ != "DeepSpeedZeroOptimizer_Stage3" or optimizer.swap_optimizer:
        raise UnsupportedSetting(
            f"{what} reads gradients before the optimizer does: it runs under ZeRO stage 3, and not with an "
            "optimizer on NVMe (offload_optimizer.device = nvme); use cpu"
        )


def stepping(optimizer: Any, sub_group: int) -> tuple[torch.optim.Optimizer, dict[str, Any]]:
    """The optimizer that steps a sub-group, and the hyperparameters it reads: under partial offload (ratio < 1) a
    second optimizer steps the sub-groups that stay on the device."""
    on_device = optimizer.offload_optimizer and optimizer.subgroup_to_device[sub_group] != "cpu"
    steps = optimizer.backup_optimizer if on_device else optimizer.optimizer
    return steps, steps.param_groups[optimizer.sub_group_to_group_id[sub_group]]


def forgotten_by_checkpoints(optimizer: Any) -> bool:
    """Whether moments are left behind by DeepSpeed's checkpoints: those on NVMe, and partial offload's on the device."""
    return optimizer.swap_optimizer or (
        optimizer.offload_optimizer and any(device != "cpu" for device in optimizer.subgroup_to_device.values())
    )


def state_index(optimizer: Any, sub_group: int) -> int:
    """Index of a sub-group's state in the base optimizer's state_dict (``_set_fp32_optimizer_param_groups``)."""
    ids = [optimizer.sub_group_to_group_id[i] for i in range(sub_group_count(optimizer))]
    order = sorted(range(len(ids)), key=lambda i: (ids[i], i))
    return order.index(sub_group)


def repair_universal(base: torch.optim.Optimizer, groups: Sequence[dict[str, Any]] | None) -> None:
    """Mends the base optimizer after DeepSpeed has loaded a universal checkpoint into it; nothing else changes.

    ``load_hp_checkpoint_state_from_checkpoint_dir_stage3`` gives every parameter group the hyperparameters of the first,
    and every sub-group the same ``step`` tensor, which then counts once per sub-group. ``groups`` are those saved, in
    order; None leaves them as they are. Raises ValueError where their number is another.
    """
    if groups is not None:
        if len(groups) != len(base.param_groups):
            raise ValueError(
                f"the checkpoint has {len(groups)} parameter groups, this run {len(base.param_groups)}: make the "
                "same ones, or load without optimizer states"
            )
        for group, saved in zip(base.param_groups, groups, strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
    seen: set[int] = set()
    for state in base.state.values():
        step = state.get("step")
        if torch.is_tensor(step):
            if id(step) in seen:
                state["step"] = step.clone()
            seen.add(id(state["step"]))


# Python 3.11.0 to 3.11.3 (Debian 12 has 3.11.2) pickle a member of an Enum as a call of getattr, which no careful reader of
# a checkpoint may make; others by its value. So do all from here on.
copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))  # type: ignore[arg-type]


def checkpoint_classes() -> list[Any]:
    """What a ZeRO-3 checkpoint's files hold besides tensors and plain values, for ``torch.serialization.safe_globals``."""
    return [LossScaler, DynamicLossScaler, ZeroStageEnum, torch.Size]


@contextmanager
def nothing_unpickled() -> Iterator[None]:
    """A block in which every ``torch.load`` of DeepSpeed and transformers has weights_only=True: a file of a checkpoint
    makes tensors, plain values and ``checkpoint_classes``, and runs nothing. ConfigError, naming file and class, for the rest.

    DeepSpeed asks for weights_only=False in all of its loads (checkpoint_engine, stage3.py, checkpoint/), by this name.
    """
    load = torch.load

    def load_weights_only(f: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            with torch.serialization.safe_globals(checkpoint_classes()):
                return load(f, *args, **{**kwargs, "weights_only": True})
        except (UnpicklingError, AttributeError, TypeError, KeyError, IndexError) as error:  # all of them of a forged stream
            raise ConfigError(_refusal(f, str(error))) from error

    torch.load = load_weights_only
    try:
        yield
    finally:
        torch.load = load


def refuse_pickles(directory: Path) -> None:
    """ConfigError, naming file and class, where a file that a resume from ``directory`` loads would make anything but
    tensors, plain values and ``checkpoint_classes``. Reads no tensor."""
    for path in sorted(path for end in ("pt", "pth", "bin", "pkl") for path in directory.rglob(f"*.{end}")):
        if path.name == "training_args.bin":
            continue  # nobody loads it
        try:
            with torch.serialization.safe_globals(checkpoint_classes()), safe_globals():
                unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception as error:  # noqa: BLE001
            raise ConfigError(_refusal(path, f"{type(error).__name__}: {error}")) from error
        if unsafe:
            raise ConfigError(_refusal(path, ", ".join(sorted(unsafe))))


def _refusal(path: Any, what: str) -> str:
    refused = what
    try:
        with torch.serialization.safe_globals(checkpoint_classes()), safe_globals():
            refused = ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))) or what
    except Exception:  # noqa: BLE001
        pass
    return (
        f"{path} is not loaded: it holds {' '.join(refused.split())[:200]}, and a checkpoint holds tensors and plain values "
        "alone. Was it written by this program? Remove the checkpoint, or start anew with --resume never"
    )


def tag_of(checkpoint: Path, file: str = "latest") -> str:
    """The directory within ``checkpoint`` that its ``latest`` file names; ConfigError where that is no plain name in it."""
    path = checkpoint / file
    try:
        with open(path, encoding="utf-8") as latest:
            tag = latest.read(4096).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}): remove the checkpoint, or start anew with --resume never"
        ) from error
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", tag) or not (checkpoint / tag).is_dir():
        raise ConfigError(
            f"{path} names {tag[:80]!r}, which is no directory of this checkpoint: remove the checkpoint, or "
            "start anew with --resume never"
        )
    return tag


def wrap(optimizer: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Calls of a method of this one ZeRO-3 optimizer become ``around(original, ...)``; returns what undoes it."""
    if name not in HOOKED:
        raise KeyError(name)
    setattr(optimizer, name, partial(around, getattr(optimizer, name)))
    return lambda: delattr(optimizer, name)


def is_built(operator: str) -> bool:
    """Whether DeepSpeed was installed with ``operator`` ('fused_adam', 'cpu_adam') compiled (DS_BUILD_OPS)."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get(operator))


def let_leaf_inputs_have_gradients(model: nn.Module) -> None:
    """DeepSpeed takes the gradients of what it calls leaf modules (mixtures of experts) once those of their inputs are there.
    Where no input would have one, as below the lowest trained layer, that were before the parameters' own."""

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        floats = [isinstance(x, Tensor) and x.is_floating_point() for x in inputs]
        if not torch.is_grad_enabled() or not any(floats) or any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return None
        return tuple(x.detach().requires_grad_(True) if own else x for x, own in zip(inputs, floats, strict=True))

    for module in model.modules():
        if z3_leaf_module(module):
            module.register_forward_pre_hook(hook, prepend=True)
