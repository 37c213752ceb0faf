"""A LoRA adapter as PEFT saves it (adapter_config.json, adapter_model.safetensors): which layers it changes, and by what.

Read without PEFT, and so that what is not understood is refused by name: ΔW = s B A, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from warp_ds.errors import ArtifactError
from warp_ds.models.adapter_config import not_plain, of_layer, why_not_loaded
from warp_ds.models.directory import FLOATS
from warp_ds.store.checkpoint_index import TensorLocation, read_header
from warp_ds.store.files import read_json
from warp_ds.store.layers import TargetLayer

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "adapter_base.json"
"""The fingerprint of the model that it was trained on, which phases 0 and 3 write beside PEFT's files."""
PREFIX = "base_model.model."


def is_adapter(directory: Path) -> bool:
    """Whether PEFT would find an adapter there."""
    return (directory / CONFIG).is_file() and (directory / WEIGHTS).is_file()


@dataclass(frozen=True)
class LoraFactors:
    """ΔW = s B A of one layer, in the dtype of the file."""

    a: Tensor
    """[r, n]"""
    b: Tensor
    """[m, r]"""
    scaling: float

    def delta(self) -> Tensor:
        """ΔW [m, n] fp32."""
        return (self.scaling * self.b.float()) @ self.a.float()


@dataclass(frozen=True)
class AdapterDirectory:
    """The files of an adapter."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, TensorLocation]
    """By the name of a parameter of the adapted model, such as model.layers.0.mlp.down_proj.lora_A.weight."""

    @staticmethod
    def of(directory: str | Path) -> AdapterDirectory:
        """Raises ArtifactError where it is no adapter, or not plain LoRA; CheckpointError for damaged weights."""
        directory = Path(directory)
        if not (directory / CONFIG).is_file():
            named = sorted(path.parent.name for path in directory.glob(f"*/{CONFIG}"))
            raise ArtifactError(
                f"{directory} is no adapter (no {CONFIG}): give "
                + (f"one of its adapters ({', '.join(named)})" if named else "a directory that PEFT or phase 3 has saved")
            )
        config = read_json(directory / CONFIG)
        if not isinstance(config, dict):
            raise ArtifactError(f"{directory / CONFIG} holds no JSON object")
        if problem := not_plain(config):
            raise ArtifactError(f"{directory / CONFIG}: {problem}; what is known is plain LoRA, W' = W + s B A")
        if not (directory / WEIGHTS).is_file():
            raise ArtifactError(
                f"{directory} has no {WEIGHTS}: pickled (.bin) and sharded adapters are not read; load and save it again with "
                "PEFT"
            )
        stored = read_header(directory / WEIGHTS)
        if foreign := sorted(name for name in stored if not name.startswith(PREFIX)):
            # PEFT leaves such a tensor out, without a word: what is certified here would not be what is loaded.
            raise ArtifactError(
                f"{directory / WEIGHTS} holds {foreign[0]!r}, which PEFT does not load (no {PREFIX!r} before it)"
            )
        tensors = {name.removeprefix(PREFIX): location for name, location in stored.items()}
        opened = AdapterDirectory(directory, config, tensors)
        for name in opened.layers:
            opened._check(name)
            if problem := why_not_loaded(config, name, stored[f"{PREFIX}{name}.lora_A.weight"].shape[0]):
                raise ArtifactError(f"{directory} holds a pair for {name} that PEFT does not load: {problem}")
        for whole in config.get("modules_to_save") or ():
            if not any(f".{whole}." in f".{name}" for name in opened.others):
                raise ArtifactError(f"{directory / CONFIG}: modules_to_save names {whole}, which {WEIGHTS} has not")
        return opened

    @property
    def base_name(self) -> str:
        """The model that it was trained on, as PEFT names it: a directory or a hub name; empty where it does not say."""
        named = self.config.get("base_model_name_or_path")
        return named if isinstance(named, str) else ""

    @property
    def base_fingerprint(self) -> str | None:
        """That model's, where this program trained the adapter. ArtifactError where the file that says so was damaged."""
        if not (self.directory / BASE).is_file():
            return None
        said = read_json(self.directory / BASE)
        fingerprint = said.get("model_fingerprint") if isinstance(said, dict) else None
        if not isinstance(fingerprint, str):
            raise ArtifactError(
                f"{self.directory / BASE} is not what this program writes: train the adapter again, or remove it"
            )
        return fingerprint

    @property
    def layers(self) -> list[str]:
        """Module names of the layers with an A."""
        return [name.removesuffix(".lora_A.weight") for name in self.tensors if name.endswith(".lora_A.weight")]

    @property
    def others(self) -> list[str]:
        """What it holds besides A and B: whole weights (modules_to_save), biases, tokens."""
        own = {f"{layer}.lora_{side}.weight" for layer in self.layers for side in "AB"}
        return sorted(self.tensors.keys() - own)

    def shape(self, layer: str) -> tuple[int, int]:
        """(m, n) of the layer that it changes."""
        return self.tensors[f"{layer}.lora_B.weight"].shape[0], self.tensors[f"{layer}.lora_A.weight"].shape[1]

    def factors(self, layer: str) -> LoraFactors:
        """A, B and s of a layer."""
        a, b = (self.read(f"{layer}.lora_{side}.weight") for side in "AB")
        return LoraFactors(a, b, self._scaling(layer, len(a)))

    def read(self, name: str) -> Tensor:
        """One tensor; ArtifactError where it cannot be read."""
        try:
            with safe_open(self.tensors[name].path, framework="pt") as file:
                return file.get_tensor(self.tensors[name].name)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{self.directory} has no readable {name} ({error})") from error

    def of_targets(self, targets: list[TargetLayer]) -> Iterator[tuple[TargetLayer, LoraFactors | None]]:
        """Each layer with what the adapter adds to it; None: nothing. ArtifactError for another shape."""
        for target in targets:
            if f"{target.name}.lora_A.weight" not in self.tensors:
                yield target, None
                continue
            if self.shape(target.name) != target.shape:
                raise ArtifactError(
                    f"{self.directory}: {target.name} is {self.shape(target.name)}, not {target.shape} as the masks have it: "
                    "it is of another model"
                )
            yield target, self.factors(target.name)

    def _check(self, layer: str) -> None:
        a, b = (self.tensors.get(f"{layer}.lora_{side}.weight") for side in "AB")
        shapes = [None if side is None else side.shape for side in (a, b)]
        if (
            a is None
            or b is None
            or (len(a.shape), len(b.shape)) != (2, 2)
            or not a.shape[0] == b.shape[1] > 0
            or not {a.dtype, b.dtype} <= set(FLOATS)
        ):
            raise ArtifactError(
                f"{self.directory / WEIGHTS}: A and B of {layer} are {shapes}, no pair [r, n] and [m, r] of floats"
            )

    def _scaling(self, layer: str, r: int) -> float:
        """alpha / r, or alpha / √r of rsLoRA (Kalajdzievski, 2023), as peft/tuners/lora/layer.py has it."""
        alpha = of_layer(self.config, "alpha_pattern", "lora_alpha", layer)
        return float(alpha or 0.0) / (math.sqrt(r) if self.config.get("use_rslora") else r)
