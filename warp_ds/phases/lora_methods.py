"""Published ways to keep an adapter from undoing safety, in phase 3: GuardSpace, SaLoRA and AsFT (method/lora_baselines.py).

GuardSpace and SaLoRA hold something fixed beside A and B, in the forward pass of a layer y = W x + s B A x:
GuardSpace y = (W - s B₀ A₀ P) x + s B A P x, SaLoRA y = (W - s C B₀ A₀) x + s C B A x, or with no start of the task's own
y = W x + s C B A x. What comes out is an ordinary adapter of W, into which
that is folded.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from warp_ds.cluster import consensus, processes
from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import TrainArguments
from warp_ds.flags.controls import FIXED
from warp_ds.method.lora_baselines import asft_penalty, first_outputs, guardspace_start, null_directions, salora_start
from warp_ds.models.directory import ModelDirectory, by_parameter
from warp_ds.models.lora import lora_pairs, refuse_parts
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import write_tensors
from warp_ds.store.layers import TargetLayer
from warp_ds.store.runs import find_artifact
from warp_ds.zero.fetch import gathered
from warp_ds.zero.model import resolve_model_dir
from warp_ds.zero.penalty import AdapterPenalty, Penalised
from warp_ds.zero.shared_reading import model_fingerprint

logger = logging.getLogger(__name__)
FILE = "adapter_held.safetensors"
"""In the run's directory: what is held, fp32, as it was made before the first step."""


@dataclass
class Held:
    """What is held beside one layer's A and B, fp32."""

    inputs: Tensor | None = None
    """Q [n, k]: x goes in as P x = x - Q Qᵀ x (GuardSpace)."""
    outputs: Tensor | None = None
    """U_C [m, k]: what comes out is C y = y - U_C U_Cᵀ y (SaLoRA)."""
    start: tuple[Tensor, Tensor] | None = None
    """A₀ [r, n], B₀ [m, r], whose s B₀ A₀ P (GuardSpace) or s C B₀ A₀ (SaLoRA) is taken off W."""
    _cast: dict[Any, Tensor] = field(default_factory=dict)

    def attach(self, module: Any, name: str, scaling: float) -> None:
        """Lets PEFT's LoRA layer ``module`` run with it."""
        module.held = self
        if self.inputs is not None:
            q = self.inputs
            module.lora_A[name].register_forward_pre_hook(lambda _, args: (self._without(args[0], q),))
        if self.outputs is not None:
            u = self.outputs
            module.lora_B[name].register_forward_hook(lambda _, args, y: self._without(y, u))
        if self.start is not None:
            module.register_forward_hook(lambda _, args, y: y - self._start_of(args[0], y) * scaling)

    def fold(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The pair of an ordinary adapter of W, of rank 2 r where ``start`` was taken off, in the dtype of ``a``."""
        low, a, b = a.dtype, a.float(), b.float()
        if self.start is not None:
            a, b = torch.cat([a, self.start[0]]), torch.cat([b, -self.start[1]], dim=1)
        if self.inputs is not None:
            a = a - (a @ self.inputs) @ self.inputs.T
        if self.outputs is not None:
            b = b - self.outputs @ (self.outputs.T @ b)
        return a.to(low), b.to(low)

    def _without(self, x: Tensor, directions: Tensor) -> Tensor:
        d = self._like(directions, x)
        return x - (x @ d) @ d.T

    def _start_of(self, x: Tensor, y: Tensor) -> Tensor:
        assert self.start is not None
        a, b = (self._like(side, y) for side in self.start)
        x = x.to(y.dtype)
        out = (x if self.inputs is None else self._without(x, self.inputs)) @ a.T @ b.T
        return out if self.outputs is None else self._without(out, self.outputs)

    def _like(self, tensor: Tensor, x: Tensor) -> Tensor:
        key = (id(tensor), x.device, x.dtype)
        if key not in self._cast:
            self._cast[key] = tensor.to(x.device, x.dtype)
        return self._cast[key]


@dataclass
class LoraMethod:
    """What --lora_method asks for, of one training."""

    arguments: TrainArguments
    basis: BasisStore | None
    task_basis: BasisStore | None
    unaligned: Path | None
    said: str = ""
    """What a card says of it, once it is attached."""

    @classmethod
    def read(cls, arguments: TrainArguments, fingerprint: str) -> LoraMethod:
        """``fingerprint``: the model's. Raises ConfigError, ArtifactError for a basis of another kind or model. Collective."""
        unaligned = None
        if arguments.unaligned_model is not None:
            unaligned = resolve_model_dir(arguments.unaligned_model, "--unaligned_model")
        with consensus.on_every_rank_or_none("checking what the adapters are held by"):
            bases = _checked_bases(arguments, fingerprint)
            if bases and not arguments.lora_layers:  # then the basis says which
                refuse_parts(bases["basis_dir"].layers, f"--lora_method {arguments.lora_method}")
            return cls(arguments, bases.get("basis_dir"), bases.get("task_basis_dir"), unaligned)

    def fingerprints(self) -> dict[str, str]:
        """Of what it reads. Collective."""
        unaligned = {} if self.unaligned is None else {"unaligned_model": model_fingerprint(self.unaligned)}
        bases = {"basis": self.basis, "task_basis": self.task_basis}
        return unaligned | {name: basis.fingerprint() for name, basis in bases.items() if basis is not None}

    def attach(self, adapted: Any, layers: Sequence[TargetLayer], directory: Path) -> list[TrainerCallback]:
        """Before the engine is made; ``layers`` have an adapter, which is whole; ``directory`` is the run's. Collective.

        Raises UnsupportedSetting where one is some rows of a weight."""
        if self.arguments.lora_method != "plain":
            refuse_parts(layers, f"--lora_method {self.arguments.lora_method}")
        if self.basis is not None:
            self.said = hold(adapted, layers, self.basis, self.task_basis, self.arguments, directory)
        if self.unaligned is None:
            return []
        self.said = f"AsFT, λ {self.arguments.asft_lambda:g}"
        return [AsFT(adapted, layers, self.unaligned, self.arguments.asft_lambda)]


def bases_of(arguments: TrainArguments) -> dict[str, BasisStore]:
    """What a method holds an adapter by (``basis_dir``), and starts it from (``task_basis_dir``)."""
    given = {name: getattr(arguments, name) for name in ("basis_dir", "task_basis_dir") if arguments.lora_method in FIXED}
    return {
        name: BasisStore(find_artifact(str(path), "basis", arguments.output_dir))
        for name, path in given.items()
        if path is not None
    }


def _checked_bases(arguments: TrainArguments, fingerprint: str) -> dict[str, BasisStore]:
    bases = bases_of(arguments)
    for name, basis in bases.items():
        basis.check(basis.layers, fingerprint, arguments.model_name)
        if basis.metadata.basis != "activation":
            raise ConfigError(
                f"--{name}: --lora_method {arguments.lora_method} needs the covariance of inputs, and {basis.directory} is of "
                f"the basis {basis.metadata.basis}: run phase 1 with --basis activation"
            )
    return bases


def hold(
    adapted: Any,
    layers: Sequence[TargetLayer],
    basis: BasisStore,
    task_basis: BasisStore | None,
    arguments: TrainArguments,
    directory: Path,
) -> str:
    """Attaches what --lora_method holds to each adapter, made once and kept in the run's ``directory``; what a card says of it.
    Collective.

    Raises ConfigError for a layer with an adapter and no basis, or where nothing is left of GuardSpace's null space.
    """
    for read in (basis, task_basis):
        _check_layers(layers, read, arguments)
    null, words = _null_spaces(basis, layers, arguments) if arguments.lora_method == "guardspace" else ({}, "")
    kept = _made_once(adapted, layers, basis, task_basis, arguments, directory / FILE)
    pairs, inputs = lora_pairs(adapted, layers), {}
    for layer in layers:
        pair, module = pairs[layer.name], _module(adapted, layer)
        held = Held(outputs=kept.get(f"{layer.name}.outputs"))
        if layer.name in null:
            file = basis.metadata.layers[layer.name]["file"]
            if file not in inputs:
                inputs[file] = basis.columns(layer.name)[0][:, : layer.n - null[layer.name]].contiguous()
            held.inputs = inputs[file]
        if f"{layer.name}.A" in kept:
            with torch.no_grad():
                pair.a.copy_(kept[f"{layer.name}.A"])
                pair.b.copy_(kept[f"{layer.name}.B"])
            held.start = (pair.a.detach().float().clone(), pair.b.detach().float().clone())  # as rounded
        held.attach(module, module.active_adapters[0], pair.scaling)
    start = "" if task_basis is None else f", started in {arguments.task_rank} of the task's"
    return words or f"SaLoRA, out of {arguments.safety_rank} directions of the safety outputs{start}"


def _made_once(
    adapted: Any,
    layers: Sequence[TargetLayer],
    basis: BasisStore,
    task_basis: BasisStore | None,
    arguments: TrainArguments,
    path: Path,
) -> dict[str, Tensor]:
    """Each layer's "outputs", "A" and "B" (``Held``) as far as the method has them: read from ``path``, or made and written."""
    modules = {layer.name: _module(adapted, layer) for layer in layers}

    def make(layer: TargetLayer, w: Tensor) -> dict[str, Tensor]:
        u, s = basis.columns(layer.name)
        try:
            if arguments.lora_method == "guardspace":
                return dict(zip("AB", guardspace_start(w, u, s, arguments.lora_r), strict=True))
            held = {"outputs": first_outputs(w, u, s, arguments.safety_rank)}
            if task_basis is None:
                return held
            task = first_outputs(w, *task_basis.columns(layer.name), arguments.task_rank)
            return held | dict(zip("AB", salora_start(w, task, arguments.lora_r), strict=True))
        except ValueError as error:
            raise ConfigError(f"--lora_r: {layer.name}: {error}") from error

    if not consensus.on_rank_0(path.is_file, "looking for what the adapters are held by"):
        made = of_weights(layers, modules, make)
        named = {f"{name}.{part}": t.contiguous() for name, parts in made.items() for part, t in parts.items()}
        consensus.on_rank_0(lambda: write_tensors(path, named), "writing what the adapters are held by")
    with consensus.on_every_rank_or_none("reading what the adapters are held by"):
        return load_file(path)


def folded(adapted: Any, state: dict[str, Tensor], config: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``state`` (A and B by their names in ``adapted``) as an ordinary adapter's, and what of ``config`` is other with it."""
    changed: dict[str, Any] = {}
    for prefix, module in adapted.named_modules():
        held: Held | None = getattr(module, "held", None)
        if held is None:
            continue
        a, b = (next(n for n in state if n.startswith(f"{prefix}.lora_{side}.")) for side in "AB")
        state[a], state[b] = (t.contiguous() for t in held.fold(state[a], state[b]))
        if held.start is not None:
            grown = math.sqrt(2) if config.use_rslora else 2
            changed = {"r": 2 * config.r, "lora_alpha": config.lora_alpha * grown}
    return state, changed


def of_weights(
    layers: Sequence[TargetLayer],
    modules: dict[str, Any],
    make: Callable[[TargetLayer, Tensor], dict[str, Tensor]],
    share: bool = True,
) -> dict[str, dict[str, Tensor]]:
    """``make``(layer, its W) of each layer, made by the ranks in turn; ``share``: for every rank, else for the one that did.
    Collective."""
    world = processes.world_size()
    made: dict[str, dict[str, Tensor]] = {}
    for begin in range(0, len(layers), world):
        together, mine = layers[begin : begin + world], None
        for index, layer in enumerate(together):
            weight = modules[layer.name].get_base_layer().weight
            with gathered([weight]):
                if index == processes.rank():
                    mine = (layer, weight.detach().clone())
        with consensus.on_every_rank_or_none("reckoning with the weights"):
            own = {} if mine is None else {mine[0].name: make(*mine)}
        for part in processes.all_gather_object(own) if share else [own]:
            made.update(part)
    return made


def _check_layers(layers: Sequence[TargetLayer], basis: BasisStore | None, arguments: TrainArguments) -> None:
    without = [layer.name for layer in layers if basis is not None and layer.name not in basis.metadata.layers]
    if basis is not None and without:
        raise ConfigError(
            f"--lora_method {arguments.lora_method}: {len(without)} of {len(layers)} layers with an adapter have no basis in "
            f"{basis.directory} (the first is {without[0]}): name its layers with --lora_layers, or run phase 1 for these too"
        )


def _module(adapted: Any, layer: TargetLayer) -> Any:
    return adapted.get_submodule(f"base_model.model.{layer.module}")


def _null_spaces(basis: BasisStore, layers: Sequence[TargetLayer], arguments: TrainArguments) -> tuple[dict[str, int], str]:
    """Directions of each layer's null space, and the cut in words."""
    found, shares, cut = {}, [], 0
    for layer in layers:
        n = layer.n
        count, share = null_directions(basis.columns(layer.name)[1], n, arguments.null_energy)
        if not count:
            raise ConfigError(
                f"--lora_method guardspace: no eigenvalue of {layer.name}'s {n} is zero, nor do the smallest hold at most "
                f"{arguments.null_energy:g} of the energy: raise --null_energy, or make the basis of fewer tokens"
            )
        of_file = basis.metadata.bases[basis.metadata.layers[layer.name]["file"]]
        share = share or max(0.0, 1.0 - float(of_file.get("energy") or 1.0))
        cut += share > 0
        found[layer.name] = count
        shares.append(share)
    words = (
        f"GuardSpace, a null space of {min(found.values())} to {max(found.values())} directions; in {len(layers) - cut} of "
        f"{len(layers)} layers of zero eigenvalues, in {cut} cut (at most {max(shares):.2g} of the energy)"
    )
    if processes.rank() == 0:
        logger.info("%s", words)
    return found, words


# ---------------------------------------------------------------- AsFT


class AsFT(TrainerCallback):
    """λ Σ ‖(I - Ĉ) B A‖²_F beside the loss; ``asft_penalty`` in the logs is the sum without λ. The loss that is logged is the
    task's alone."""

    def __init__(self, adapted: Any, layers: Sequence[TargetLayer], unaligned: Path, weight: float):
        """Collective. Raises ArtifactError where ``unaligned`` has no weight of a layer's name and shape."""
        self.adapted, self.layers, self.weight = adapted, layers, weight
        self.penalty: AdapterPenalty | None = None
        with consensus.on_every_rank_or_none("opening --unaligned_model"):
            source = ModelDirectory.of(unaligned)
            if not all(layer.parameter in source.tensors for layer in layers):
                source = by_parameter(source)
            for layer in layers:
                location = source.tensors.get(layer.parameter)
                if location is None or location.shape != layer.shape:
                    raise ConfigError(
                        f"--unaligned_model {unaligned} has {layer.parameter} "
                        + ("not" if location is None else f"of {location.shape}")
                        + f", which is of {layer.shape} here: give the model from before this one's alignment"
                    )

        def direction(layer: TargetLayer, w: Tensor) -> dict[str, Tensor]:
            return {"V": (w.float() - source.read(layer.parameter).to(w.device, torch.float32)).to(w.dtype)}

        modules = {layer.name: _module(adapted, layer) for layer in layers}
        self.directions = of_weights(layers, modules, direction, share=False)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        pairs = lora_pairs(self.adapted, self.layers)
        penalised = [
            Penalised(
                *(pairs[layer.name].a, pairs[layer.name].b, index % processes.world_size()),
                self.directions.get(layer.name, {}).get("V"),
            )
            for index, layer in enumerate(self.layers)
        ]
        optimizer: Any = kwargs["optimizer"]
        self.penalty = AdapterPenalty(optimizer.optimizer, penalised, asft_penalty, self.weight)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.penalty is not None and logs is not None and "loss" in logs:
            logs["asft_penalty"] = self.penalty.value
