"""What ``plan`` and ``doctor`` say of a model beside figures: its experts, blocks that lack a layer, how it is read."""

from __future__ import annotations

from warp_ds.launch.planning.estimate import experts_bases, gb, groups_of
from warp_ds.launch.planning.job import Job, Shape
from warp_ds.zero.expert_inputs import of_expert


def of_model(shape: Shape, job: Job) -> list[str]:
    """A line each."""
    return [words for words in (_mixture(shape), _bases(shape, job), shape.lacking, shape.loading) if words]


def _mixture(shape: Shape) -> str:
    if shape.experts == 1:
        return ""
    return (
        f"mixture of experts: a token is given to {shape.routed} of a block's {shape.experts}, and passes "
        f"{shape.active / 1e9:.2f} B of {shape.parameters / 1e9:.2f} B parameters; activations are counted by the former, "
        "memory, bytes and checkpoints by the latter"
    )


def _bases(shape: Shape, job: Job) -> str:
    number, size = experts_bases(shape, job)
    if not number:
        return ""
    layers = sum(layer.expert is not None for layer in shape.targets)
    given = shape.given(job.basis_samples * job.tokens)
    own = [group[0] for group in groups_of(shape, job) if of_expert(group[0], job.expert_basis)]
    few = sum(given < first.n for first in own)
    words = f"experts: {layers} layers with {number} bases of {gb(size)} GB, if routing is even"
    return words + f"; {given} tokens each are fewer than {few} of them have inputs: use more --safety_samples" * bool(few)
