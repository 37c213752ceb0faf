"""Phase 1's bases of what layers give, V of C = Vᵀ W U (--output_basis): of the outputs, or of their gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from warp_ds.cluster.preemption import leave_if_asked
from warp_ds.cluster.processes import world_size
from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import BasisArguments
from warp_ds.method.covariance import Covariance
from warp_ds.method.eigenbasis import Basis, inputs_basis, unseen_basis
from warp_ds.method.two_sided import output_basis
from warp_ds.phases.importance import frozen_model, loss_weights, passes, scaled_loss
from warp_ds.phases.packing import micro_batch
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.batches import Samples
from warp_ds.zero.collect import REDUCE, ROUTED, Background, Delivered, LayerInput, Traffic, deliver, route, stop_together
from warp_ds.zero.fetch import gathered
from warp_ds.zero.importance_steps import importance_batches
from warp_ds.zero.scores import Finite

Write = Callable[[TargetLayer, Basis, int, str, float], None]
"""Writes V of a layer: its basis, of how many tokens, from what, and the seconds that it took."""


def check_output_basis(arguments: BasisArguments) -> None:
    """ConfigError where the output basis that is asked for cannot be had beside the rest."""
    asked = f"--output_basis {arguments.output_basis}"
    if arguments.output_basis == "activation" and arguments.basis != "activation":
        raise ConfigError(
            f"{asked} is made of the covariance of the layers' inputs, which --basis {arguments.basis} does not collect: give "
            "--basis activation, or --output_basis gradient"
        )
    if arguments.output_basis == "gradient" and arguments.token_scope == "prompt":
        raise ConfigError(f"{asked} needs a loss, and --token_scope prompt runs prompts alone: use all or response")


def weights_of(model: Any, layers: Sequence[TargetLayer], mine: bool) -> list[tuple[TargetLayer, Tensor]]:
    """W [m, n] of each layer, fp32, where they are ``mine``; nothing on other ranks. Collective."""
    found = []
    for layer in layers:
        weight = model.get_parameter(layer.parameter)
        with gathered([weight]):
            if mine:
                found.append((layer, layer.of(weight.detach()).float().clone()))
    return found


def from_outputs(
    weights: Sequence[tuple[TargetLayer, Tensor]], delivered: Delivered, arguments: BasisArguments, write: Write
) -> None:
    """V of each layer that sees one input: the eigenvectors of W Σ Wᵀ."""
    for layer, w in weights:
        begun = time.monotonic()
        if delivered.x is None and delivered.sigma is None:
            basis = unseen_basis(layer.m)
        else:
            basis = output_basis(w, delivered.x, delivered.sigma, arguments.energy, arguments.max_rank)
        write(layer, basis, delivered.tokens, "outputs", time.monotonic() - begun)


def from_gradients(
    model: Any,
    layers: Sequence[TargetLayer],
    samples: Samples,
    arguments: BasisArguments,
    scratch: Path,
    owner: dict[str, int],
    write: Write,
) -> None:
    """V of each layer: the eigenvectors of (1/T) Σ_t g_t g_tᵀ, g_t = ∂L/∂y_t over the tokens that count, L the sum over samples
    of the mean cross-entropy of their response tokens (importance batches of one sample). One backward pass. Collective.

    Raises ConfigError where no sample has a response token, NotFinite.
    """
    batches, _ = importance_batches(samples, 1)
    if not batches:
        raise ConfigError("--output_basis gradient: no sample has a response token: raise --max_length, or give responses")
    scale = 2.0**12 if arguments.dtype == "float16" else 1.0
    loss = partial(scaled_loss, loss_weights(batches, samples), scale)
    seen = {layer.name: _empty(layer, samples, arguments.torch_dtype.itemsize) for layer in layers}
    with frozen_model(model):
        for _, shown in passes(model, layers, batches, samples, loss, arguments, scratch, micro_batch(arguments)[0]):
            finite = Finite()
            for _, batch, taken in shown:
                for layer in (layer for layer in layers if layer.name in taken):
                    tapped = taken.pop(layer.name)
                    finite.watch(layer, batch, tapped)
                    seen[layer.name].add(
                        batch.take(tapped.g) if tapped.places is None else batch.take_at(tapped.g, tapped.places)[0]
                    )
            stop_together(finite.failure(), "inputs or output gradients", samples)
            leave_if_asked()
    traffic = Traffic()
    with Background("decomposing the output gradients", samples.device) as decompositions:
        for layer in layers:
            _, delivered = deliver(seen.pop(layer.name), owner[layer.name], arguments.torch_dtype, traffic)
            if delivered is not None:
                decompositions.start(partial(_decomposed, layer, delivered, arguments, scale, write))
        decompositions.meet()


def _empty(layer: TargetLayer, samples: Samples, itemsize: int) -> LayerInput:
    """What ``deliver`` brings to the owner: the layer's output gradients as if they were inputs."""
    way = ROUTED if layer.expert is not None else route(samples.tokens, layer.m, world_size(), itemsize)
    return LayerInput([replace(layer, n=layer.m)], way, Covariance(layer.m, samples.device) if way == REDUCE else None)


def _decomposed(layer: TargetLayer, delivered: Delivered, arguments: BasisArguments, scale: float, write: Write) -> None:
    begun = time.monotonic()
    basis = inputs_basis(layer.m, delivered.x, delivered.sigma, arguments.energy, arguments.max_rank)
    basis.values /= scale * scale
    write(layer, basis, delivered.tokens, "gradients", time.monotonic() - begun)
