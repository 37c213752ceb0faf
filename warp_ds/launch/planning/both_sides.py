"""What bases of the outputs (--output_basis) add to a plan: V [m, q] of every layer, beside U that layers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from warp_ds.errors import ConfigError
from warp_ds.launch.planning.estimate import basis_bytes, decomposition_peak, others_share, seen
from warp_ds.launch.planning.job import Job, Shape
from warp_ds.method.covariance import kept_entries
from warp_ds.method.rotation import Rotation
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.collect import REDUCE, ROUTED, route
from warp_ds.zero.placement_costs import Dtypes
from warp_ds.zero.placements import Owner, Placement
from warp_ds.zero.whole_layers import WholeLayers


def check_output_basis(job: Job) -> None:
    """ConfigError for what the phases refuse beside an output basis, and for adapters by rows, which are not reckoned with."""
    if job.adapter == "lora" and (job.output_basis != "identity" or job.mask_unit == "row"):
        raise ConfigError(
            "--adapter lora: plan reckons with masks of whole columns, which rotate A alone, and not with those of rows: leave "
            "--output_basis and --mask_unit row out here"
        )
    if job.output_basis == "identity":
        return
    if job.basis_placement not in ("auto", Owner.name) and job.ranks > 1:
        raise ConfigError(
            f"--basis_placement {job.basis_placement}: an output basis mixes the rows of a weight: give owner or auto"
        )


def output_rank(layer: TargetLayer, shape: Shape, job: Job) -> int:
    """q: columns of V, at most as many as tokens; outputs are no more than their inputs span, gradients are not of them."""
    tokens = job.basis_samples * job.tokens
    if job.output_basis == "activation":
        r = min(layer.m, layer.n, seen(layer, shape, job, tokens))
    else:
        r = min(layer.m, tokens if layer.expert is None else shape.given(tokens))
    return min(r, job.max_rank) if job.max_rank else r


def left_bytes(layer: TargetLayer, shape: Shape, job: Job) -> float:
    """Of V's columns, fp32."""
    return 0.0 if job.output_basis == "identity" else 4.0 * layer.m * output_rank(layer, shape, job)


def files(shape: Shape, job: Job) -> float:
    """Bytes of all V on disk."""
    if job.output_basis == "identity":
        return 0.0
    return sum(basis_bytes(layer.m, output_rank(layer, shape, job)) for layer in shape.targets)


def of_activations(group: Sequence[TargetLayer], tokens: int, shape: Shape, job: Job) -> tuple[float, float]:
    """(bytes that the owner of a group's covariance holds of W, fp32, until all its bases are made; the peak beyond that of the
    largest V: method/two_sided.py, ``output_basis``)."""
    held = sum(4.0 * layer.m * layer.n for layer in group)
    peak = 0.0
    for layer in group:
        m, n, q = layer.m, layer.n, output_rank(layer, shape, job)
        w = 8.0 * m * n
        if tokens < n:
            y = 8.0 * tokens * (n + m)
            inner = decomposition_peak(tokens, m, q, 8, REDUCE) if tokens < m else (8.0 + 4.0 + 8.0 * 4) * m * m
        else:
            y = (4.0 + 8.0) * n * n + w
            inner = (8.0 + 8.0 * 4) * min(m, n) ** 2 + (2 * w if m > n else 0.0)
        peak = max(peak, w + y + inner)
    return held, peak


def sent_of_weights(group: Sequence[TargetLayer], job: Job) -> float:
    """Each W is gathered once for its V."""
    return sum(float(layer.m * layer.n) for layer in group) * job.itemsize * others_share(job.ranks)


def of_gradients(shape: Shape, job: Job, mine: int) -> tuple[float, float, float]:
    """(bytes that a rank holds of all layers' output gradients, or of their sums; peak of the largest decomposition; bytes that
    it sends): phases/output_bases.py, ``from_gradients``. ``mine``: a rank's tokens."""
    tokens, b = job.basis_samples * job.tokens, job.itemsize
    held = peak = sent = 0.0
    for layer in shape.targets:
        way = ROUTED if layer.expert is not None else route(tokens, layer.m, job.ranks, b)
        own = mine if layer.expert is None else shape.given(mine)
        size = of_sums = float(own * layer.m * b)
        if way == REDUCE:
            size, of_sums = 4.0 * layer.m * layer.m, 4.0 * kept_entries(layer.m, "cuda" if job.on_gpu else "cpu")
        held, sent = held + size, sent + of_sums * others_share(job.ranks)
        given = tokens if layer.expert is None else shape.given(tokens)
        peak = max(peak, decomposition_peak(given, layer.m, output_rank(layer, shape, job), b, way))
    return held, peak, sent


def place(held: Mapping[str, tuple[str, int]], shape: Shape, job: Job) -> tuple[Placement, dict[str, tuple[str, int]]]:
    """Where phase 3 holds U and V, and, for each layer, the key and bytes of both; ``held``: of its U alone."""
    left = {layer.name: Rotation.held_bytes(layer.m, output_rank(layer, shape, job)) for layer in shape.targets}
    both = {name: (name, size + left[name]) for name, (_, size) in held.items()}
    right = {name: file for name, (file, _) in held.items()}
    dtypes = Dtypes(weights=getattr(torch, job.dtype))
    return WholeLayers(shape.targets, both, job.ranks, dtypes=dtypes, left=left, right=right), both
