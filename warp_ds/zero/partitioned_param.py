"""ZeRO-3 parameters made by hand: the one place for the private DeepSpeed calls that build them.

``deepspeed.zero.Init`` partitions a parameter by allocating it whole, broadcasting it and cutting it up. Here the
same attributes are set without the whole: DeepSpeed's own conversion sees an expanded one-element tensor, and
``ds_tensor`` (the rank's piece) is allocated alone (runtime/zero/partition_parameters.py, ``_partition_param``).
Known to hold for DeepSpeed 0.19; on other versions ``check_layout`` compares a probe with DeepSpeed's own.
"""

from __future__ import annotations

import ctypes
import mmap
from enum import Enum
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus, free_param
from torch import nn

from warp_ds.zero.partition import RowPartition

KNOWN_VERSION = "0.19."


def why_not_by_hand(ds_config: dict[str, Any]) -> str | None:
    """The setting of a DeepSpeed config that needs DeepSpeed's own partitioning, in words; None where there is none."""
    zero = ds_config.get("zero_optimization", {})
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        return "offload_param to nvme keeps partitions in swap files"
    if (zero.get("zero_hpz_partition_size") or 1) not in (1, "auto"):
        return "zero_hpz_partition_size keeps a second partition"
    if zero.get("zero_quantized_weights") is True or zero.get("zero_quantized_nontrainable_weights") is True:
        return "zero_quantized_weights quantises partitions"
    if (zero.get("mics_shard_size") or -1) not in (-1, "auto"):
        return "mics_shard_size partitions over a part of the ranks"
    if "weight_quantization" in ds_config.get("compression_training", {}) or "weight_quantization" in ds_config:
        return "weight_quantization quantises parameters as they are made"
    if ((ds_config.get("tensor_parallel") or {}).get("autotp_size") or 1) != 1:
        return "tensor_parallel cuts parameters before ZeRO does"
    return None


class Partitioner:
    """Makes partitioned parameters as ``deepspeed.zero.Init`` with the same config would leave them.

    Args:
        ds_config: DeepSpeed's config, stage 3; "auto" values are skipped. None: stage 3 with its defaults.
        dtype: of the parameters.

    torch.distributed must be initialised. Raises RuntimeError where this DeepSpeed partitions in another way.
    """

    def __init__(self, ds_config: dict[str, Any] | None, dtype: torch.dtype) -> None:
        zero = {k: v for k, v in (ds_config or {}).get("zero_optimization", {}).items() if v != "auto"}
        self.init = deepspeed.zero.Init(
            config_dict_or_path={
                # Init reads no batch size, but DeepSpeed refuses a config without one.
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {**zero, "stage": 3},
                "bf16": {"enabled": dtype == torch.bfloat16},
                "fp16": {"enabled": dtype == torch.float16},
            }
        )
        if self.init.mem_efficient_linear:
            # As on entering Init: the stock linear's backward would keep every gathered weight alive.
            self.init._enable_mem_efficient_linear()
        if not deepspeed.__version__.startswith(KNOWN_VERSION):
            check_layout(self)

    @property
    def device(self) -> torch.device:
        """Where gathered parameters live on this rank."""
        return self.init.local_device

    def empty(self, like: nn.Parameter) -> nn.Parameter:
        """A partitioned parameter of ``like``'s shape and dtype (``like`` may be on meta); no collective.

        Its ``ds_tensor`` [ceil(numel / world size)] is not yet filled, except for its padding, which is 0.
        """
        whole = torch.empty(1, dtype=like.dtype, device=self.device).expand(like.shape)
        param: Any = nn.Parameter(whole, requires_grad=like.requires_grad)
        param.__dict__.update(like.__dict__)
        init = self.init
        init._convert_to_deepspeed_param(param)
        place = RowPartition(param.ds_numel, 1, init._partition_world_size(param), init._partition_rank(param))
        device = self.device if param.ds_persist else init.remote_device
        piece: Any = torch.empty(place.length, dtype=like.dtype, device=device)
        if device == OffloadDeviceEnum.cpu and init.pin_memory:
            piece = get_accelerator().pin_memory(piece)
        elif piece.device.type == "cpu":
            prefer_huge_pages(piece)
        piece[place.stop - place.start :].zero_()
        piece.ds_numel = place.length
        piece.status = PartitionedParamStatus.AVAILABLE
        piece.final_location = None
        param.ds_tensor = piece
        param.ds_numel_aligned = init._aligned_size(param)
        free_param(param)
        return param

    def cut(self, param: nn.Parameter) -> None:
        """Partition a whole parameter in place, with rank 0's values; collective."""
        self.init._convert_to_zero_parameters([param])


def prefer_huge_pages(tensor: torch.Tensor) -> None:
    """Asks Linux for 2 MB pages under a CPU tensor not yet written to: filling it then takes 512 times fewer page faults."""
    huge, advice = 2 << 20, getattr(mmap, "MADV_HUGEPAGE", None)
    first = -(-tensor.data_ptr() // huge) * huge
    length = (tensor.data_ptr() + tensor.nbytes - first) // huge * huge
    if advice is not None and length > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), advice)  # advice: a refusal is no matter


def own_range(param: Any) -> RowPartition:
    """This rank's flat range of a partitioned parameter."""
    group = param.ds_process_group
    return RowPartition(param.ds_numel, 1, dist.get_world_size(group=group), dist.get_rank(group=group))


def check_layout(partitioner: Partitioner) -> None:
    """Compare a parameter made by hand with one made by DeepSpeed; collective.

    Raises:
        RuntimeError: they differ in an attribute.
    """
    world = dist.get_world_size()
    whole = nn.Parameter(torch.arange(2 * world + 1, dtype=torch.float32, device=partitioner.device))
    by_hand = partitioner.empty(whole)
    theirs = nn.Parameter(whole.detach().clone())
    partitioner.cut(theirs)
    mine, reference = describe(by_hand), describe(theirs)
    if mine != reference:
        different = sorted(k for k in mine.keys() | reference.keys() if mine.get(k) != reference.get(k))
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} builds ZeRO-3 parameters in another way (differing: "
            f"{', '.join(different)}); install deepspeed {KNOWN_VERSION}* or load with from_pretrained."
        )


def describe(param: Any) -> dict[str, object]:
    """What a partitioned parameter's attributes say, its values and its own id left out."""
    described: dict[str, object] = {}
    for prefix, thing in (("", param), ("ds_tensor.", param.ds_tensor)):
        for name, value in vars(thing).items():
            plain = isinstance(value, (int, float, str, Enum, torch.Size, torch.dtype, type(None)))
            described[prefix + name] = value if plain else type(value).__name__
        described[prefix + "data"] = (tuple(thing.shape), thing.dtype, thing.device, thing.requires_grad)
    described.pop("ds_id", None)
    return described
