"""What is to be run and on what: the job's flags, a model's sizes, and the DeepSpeed config that serves them."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from warp_ds.flags.arguments import BasisArguments, ImportanceArguments, TrainArguments
from warp_ds.flags.groups import DTYPE_BYTES
from warp_ds.models.classes import auto_class
from warp_ds.models.context import text_config
from warp_ds.models.families import PATHS
from warp_ds.models.flops import active_parameters, routing
from warp_ds.models.source import local_model_dir, read_config, snapshot
from warp_ds.models.targets import find_blocks, lacking_in_words, targets_and_lacking
from warp_ds.models.transformers_internals import DEQUANTISED, quantisation_of
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.fetch import outside
from warp_ds.zero.partition import RowPartition

OFFLOADS = ("none", "optimizer", "all")


@dataclass(frozen=True)
class Sharding:
    """The settings of a DeepSpeed config that decide memory (elements, DeepSpeed's names)."""

    config: str
    offload: str
    reduce_bucket_size: int = 500_000_000
    max_live_parameters: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000
    sub_group_size: int = 1_000_000_000


SHARDINGS = [
    Sharding("zero3.json", "none"),
    Sharding("zero3_70b.json", "none", reduce_bucket_size=100_000_000, sub_group_size=100_000_000),
    Sharding("zero3_offload_optimizer.json", "optimizer"),
    Sharding("zero3_offload.json", "all"),
]


@dataclass(frozen=True)
class Job:
    """What is to be run: the flags of the phases that change what they need, and the machines."""

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory: float = 80e9
    """Bytes of one GPU."""
    host_memory: float | None = None
    """Bytes of one node; None: not checked."""
    offload: str = "none"
    dtype: str = "bfloat16"
    layer_type: str = BasisArguments.layer_type
    target_layers: str = BasisArguments.target_layers
    tokens: int = BasisArguments.max_length
    """Of a sample, on average; --max_length is the most that it can be."""
    basis_samples: int = BasisArguments.safety_samples
    importance_samples: int = ImportanceArguments.safety_samples
    utility_samples: int = TrainArguments.utility_samples
    batch_size: int = BasisArguments.batch_size
    train_batch_size: int = TrainArguments.batch_size
    global_batch_size: int = TrainArguments.global_batch_size
    importance_batch_size: int = ImportanceArguments.importance_batch_size
    epochs: float = TrainArguments.epochs
    max_rank: int = BasisArguments.max_rank
    expert_basis: str = BasisArguments.expert_basis
    output_basis: str = BasisArguments.output_basis
    basis_placement: str = TrainArguments.basis_placement
    train_scope: str = TrainArguments.train_scope
    objective: str = TrainArguments.objective
    """What phase 3 minimises: it may keep something of the start model's logits."""
    adapter: str = TrainArguments.adapter
    lora_r: int = TrainArguments.lora_r
    lora_dropout: float = TrainArguments.lora_dropout
    merge_adapter: bool = TrainArguments.merge_adapter
    keep_ratio: float = ImportanceArguments.keep_ratio
    """Share of the columns that an adapter stays out of."""
    mask_unit: str = ImportanceArguments.mask_unit
    """What is frozen together; no adapter goes with masks of entries."""
    gradient_checkpointing: bool = TrainArguments.gradient_checkpointing
    on_gpu: bool = True
    """False for a CPU, where buffers that are reserved but not filled take no memory."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def itemsize(self) -> int:
        return DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Shape:
    """A model's sizes, in elements."""

    name: str
    parameters: int
    numels: dict[int, int]
    """elements of a parameter -> how many such parameters"""
    blocks: list[int]
    embedding: int
    head: int
    """All that is neither block nor input embedding."""
    hidden: int
    intermediate: int
    """Of the feed-forward part that a token passes, at its widest: of a mixture all the experts that it is routed to."""
    vocabulary: int
    stored_itemsize: int
    targets: list[TargetLayer]
    loading: str = ""
    """How the weights are read, in words."""
    active: int = 0
    """Parameters that a token is multiplied with."""
    routed: int = 1
    """Experts that a token is routed to, of ``experts`` in a block."""
    experts: int = 1
    lacking: str = ""
    """Of the blocks that were chosen those without a layer of some type, in words."""

    def shard(self, ranks: int) -> int:
        """Elements of all parameters on one rank, padding included."""
        return sum(RowPartition(numel, 1, ranks, 0).length * count for numel, count in self.numels.items())

    def given(self, tokens: int) -> int:
        """Tokens of ``tokens`` that one expert is given, if all are given as many."""
        return math.ceil(tokens * self.routed / self.experts)


def read_shape(model_name: str, layer_type: str, target_layers: str) -> Shape:
    """A model's sizes from its config; builds it on meta. ConfigError where there is none."""
    name = str(Path(model_name).parent) if Path(model_name).name == "config.json" else model_name
    directory = local_model_dir(name) or snapshot(name, files=["config.json"])
    config = read_config(directory)
    with torch.device("meta"):
        model = auto_class(config).from_config(config, trust_remote_code=False)
    text = text_config(config)
    blocks = list(find_blocks(model)[1])
    embedding = model.get_input_embeddings()
    rest = {id(p): p for m in outside(model, blocks) if m is not embedding for p in m.parameters(recurse=False)}
    numels = [p.numel() for p in model.parameters()]
    targets, lacking = targets_and_lacking(model, target_layers, layer_type)
    routed, experts = routing(config)
    stored = getattr(config, "dtype", None) or torch.bfloat16
    return Shape(
        name=model_name,
        parameters=sum(numels),
        numels=dict(Counter(numels)),
        blocks=[sum(p.numel() for p in block.parameters()) for block in blocks],
        embedding=embedding.weight.numel(),
        head=sum(p.numel() for p in rest.values()),
        hidden=text.hidden_size,
        intermediate=_widest(text, blocks, routed),
        vocabulary=text.vocab_size,
        stored_itemsize=(getattr(torch, stored) if isinstance(stored, str) else stored).itemsize,
        targets=targets,
        loading=_loading(quantisation_of(config), directory),
        active=active_parameters(model),
        routed=routed,
        experts=experts,
        lacking=lacking_in_words(lacking),
    )


def _loading(quantisation: str | None, directory: Path) -> str:
    if quantisation is None:
        pickled = any(directory.glob("*.bin")) and not any(directory.glob("*.safetensors"))
        return "stored as pickles (.bin): loaded whole on rank 0 by from_pretrained, not in shards" if pickled else _IN_SHARDS
    if quantisation == "mxfp4":
        return "stored as mxfp4: each rank reads the experts of its own partitions, one at a time, in the training's dtype"
    if quantisation in DEQUANTISED:
        return (
            f"stored as {quantisation}: each parameter is made whole on one rank, the ranks by turns, and dealt out; warp-ds "
            "verify cannot read such a start model"
        )
    return f"stored as {quantisation}: loaded whole on rank 0 by from_pretrained, not in shards"


_IN_SHARDS = "loaded in shards: each rank reads the bytes of its own partitions"


def _widest(text: Any, blocks: list[nn.Module], routed: int) -> int:
    """The feed-forward width: of a mixture what a token passes; else what the configuration says, at its largest; else the
    widest input of a block's linear layers."""
    if any(_experts_width(block, text.hidden_size) for block in blocks):
        return max(routed * _experts_width(block, text.hidden_size) + _common_width(block) for block in blocks)
    stated = getattr(text, "intermediate_size", None)
    if isinstance(stated, (list, tuple)):
        return max(stated)
    widths = (module.in_features for block in blocks for module in block.modules() if isinstance(module, nn.Linear))
    return stated or max(widths, default=text.hidden_size)


def _experts_width(block: nn.Module, hidden: int) -> int:
    """Inputs of one stacked expert's down projection, whichever way it lies; 0 for a block without such."""
    stacked = [p for name, p in block.named_parameters() if name.endswith("experts.down_proj") and p.dim() == 3]
    return max((p[0].numel() // hidden for p in stacked), default=0)


def _common_width(block: nn.Module) -> int:
    """Inputs of the down projection that every token passes, dense or a shared expert's."""
    inner = dict(block.named_modules())
    found = next((inner[path] for path in PATHS["ffn_down"] if path in inner), None)
    return int(getattr(found, "in_features", 0))


# Choosing ---------------------------------------------------------------------------------------------------------


def choose_sharding(shape: Shape, job: Job) -> Sharding:
    """The ds_config for the offload asked for; large models take the one with small buckets."""
    fitting = [sharding for sharding in SHARDINGS if sharding.offload == job.offload]
    return fitting[-1] if shape.parameters > 30e9 else fitting[0]
