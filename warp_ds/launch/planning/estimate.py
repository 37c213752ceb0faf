"""What a phase needs, by part, and the parts that phases share: weights, activations, logits, hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field

from warp_ds.launch.planning.job import Job, Shape, Sharding
from warp_ds.models.targets import shared_inputs
from warp_ds.store.checkpoint_index import READ_BUFFER_BYTES
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.collect import REDUCE
from warp_ds.zero.expert_inputs import of_expert

GPU_CONTEXT = 1_500_000_000
"""Bytes that the driver's context and NCCL take on a GPU. Not measured by us."""
LIBRARIES = 60_000_000
"""Bytes of host memory that a phase's code and threads take; 20 to 120 MB were measured with a model of no size."""


@dataclass
class Estimate:
    """What one phase needs; bytes. ``gpu`` and ``host``: of one rank, by part."""

    phase: str
    gpu: dict[str, float] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)
    read: float = 0.0
    """By one rank, of files."""
    sent: float = 0.0
    """By one rank, to others."""
    written: float = 0.0
    """By all ranks; for training the model and one checkpoint."""
    disk: float = 0.0
    """At most, by all ranks."""
    checkpoint: float = 0.0
    """One checkpoint of all ranks; --save_minutes decides how many are written."""
    rotating: float = 0.0
    """Seconds a step that the masked step takes, on the machine that placements reckon with."""

    @property
    def gpu_total(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_total(self) -> float:
        return sum(self.host.values())


def after_loading(phase: str, shape: Shape, job: Job, sharding: Sharding) -> Estimate:
    """A phase that has loaded its model."""
    need = Estimate(phase)
    shard = shape.shard(job.ranks)
    (need.host if sharding.offload == "all" else need.gpu)["weights"] = shard * job.itemsize
    need.host["libraries"] = LIBRARIES
    if job.on_gpu:
        need.gpu["context"] = GPU_CONTEXT
        need.host["reading"] = READ_BUFFER_BYTES
    need.read = shape.parameters * shape.stored_itemsize / job.ranks
    return need


# Parts ------------------------------------------------------------------------------------------------------------


def others_share(ranks: int) -> float:
    """Share of a gathered or scattered tensor that crosses from each rank to others (a ring)."""
    return (ranks - 1) / ranks


def micro_batch(batch_size: int, tokens_of_rank: int, job: Job) -> int:
    return min(batch_size * job.tokens, tokens_of_rank)


def basis_rank(layer: TargetLayer, shape: Shape, job: Job) -> int:
    """Columns of a layer's stored basis: no more than its input has tokens."""
    r = min(layer.n, seen(layer, shape, job, job.basis_samples * job.tokens))
    return min(r, job.max_rank) if job.max_rank else r


def groups_of(shape: Shape, job: Job) -> list[list[TargetLayer]]:
    """The layers by the basis that they share."""
    return shared_inputs(shape.targets, job.expert_basis)


def seen(layer: TargetLayer, shape: Shape, job: Job, tokens: int) -> int:
    """How many of ``tokens`` make the layer's basis: one of an expert's own has those that are routed to it."""
    return shape.given(tokens) if of_expert(layer, job.expert_basis) else tokens


def experts_bases(shape: Shape, job: Job) -> tuple[int, float]:
    """(number, bytes on disk) of the experts' bases: one a down projection, one that gates and ups share, of a block or of an
    expert."""
    groups = [group[0] for group in groups_of(shape, job) if group[0].expert is not None]
    return len(groups), sum(basis_bytes(first.n, basis_rank(first, shape, job)) for first in groups)


def basis_bytes(n: int, r: int) -> float:
    """U [n, r] and S [r], fp32."""
    return 4.0 * (n * r + r)


def quarter_of_free(need: Estimate, job: Job) -> float:
    return max(0.0, job.gpu_memory - need.gpu_total) / 4


def keep_hidden_states(need: Estimate, size: float, job: Job) -> None:
    """Of zero/walk.py's ``HiddenStates``: on a GPU up to a quarter of what is free so far, the rest in host memory."""
    on_gpu = min(size, quarter_of_free(need, job)) if job.on_gpu else 0.0
    if on_gpu:
        need.gpu["hidden states"] = on_gpu
    need.host["hidden states"] = size - on_gpu


def decomposition_peak(tokens: int, n: int, r: int, b: int, way: str) -> float:
    """Peak of method/eigenbasis.py on the owner: what it is given, and its workspaces."""
    if tokens < n:
        # x, x in fp64; the Gram matrix, its eigenvectors and LAPACK's workspace, then the eigenvectors, u, and its QR.
        return tokens * n * (b + 8.0) + max(8.0 * 5 * tokens * tokens, 8.0 * tokens * tokens + 8.0 * 3 * n * r)
    gathered = 0.0 if way == REDUCE else float(tokens * n * b)
    # Σ in fp32 and, as the spectra of real models mostly want, in fp64; its eigenvectors and LAPACK's workspace.
    return max(gathered + 4.0 * n * n, (4.0 + 8.0 * 4) * n * n)


def forward_activations(shape: Shape, tokens: int, b: int) -> float:
    """Alive at once inside a block without a graph: its input, norms in fp32, and the feed-forward part."""
    return tokens * (3 * shape.intermediate * b + 4 * shape.hidden * b + 8 * shape.hidden + _dealt(shape, b))


def saved_activations(shape: Shape, tokens: int, b: int) -> float:
    """Kept by a block's graph: inputs of its linear layers, gate, up and their product, queries, keys and values, and
    two norms in fp32."""
    return tokens * (4 * shape.intermediate * b + 8 * shape.hidden * b + 2 * 8 * shape.hidden + _dealt(shape, b))


def _dealt(shape: Shape, b: int) -> int:
    """Of a token: its copies for the experts that it is routed to, and what each of them makes of it."""
    return 2 * shape.routed * shape.hidden * b if shape.experts > 1 else 0


def logits(shape: Shape, tokens: int, b: int) -> float:
    """Logits and their gradient in the weights' dtype, and both in fp32 for the loss."""
    return tokens * shape.vocabulary * 2.0 * (b + 4)


def gb(size: float) -> str:
    """Bytes in GB, in three or so digits."""
    return f"{size / 1e9:.2f}" if size < 100e9 else f"{size / 1e9:.0f}"
