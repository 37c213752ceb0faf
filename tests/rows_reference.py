"""The dense reference of layers that are some rows of a parameter: Σ, importance, masks and five steps, in fp64.

Which rows those are is taken from the artefacts; ``test_families`` shows by what the model does that they are the right ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dense_reference
import numpy as np
import torch
from dense_training import DenseAdamW, encoded, task_loss, train
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass
class Part:
    """A layer of the artefacts: its parameter, and its rows of it (None for all)."""

    name: str
    rows: list[int] | None
    basis: torch.Tensor
    values: torch.Tensor
    frozen: torch.Tensor

    @property
    def module(self) -> str:
        return self.name.partition("[")[0]

    def of(self, w: torch.Tensor) -> torch.Tensor:
        return w if self.rows is None else w[self.rows]


def read_parts(artefacts: Path) -> dict[str, Part]:
    basis, masks = ((artefacts / f"phase{i}_latest" / kind).resolve() for i, kind in ((1, "basis"), (2, "masks")))
    of_basis = json.loads((basis / "metadata.json").read_text())["layers"]
    parts = {}
    for name, entry in json.loads((masks / "metadata.json").read_text())["layers"].items():
        bits = load_file(masks / entry["file"])["frozen"].numpy()
        stored = load_file(basis / of_basis[name]["file"])
        frozen = torch.from_numpy(np.unpackbits(bits, axis=1)[:, : entry["shape"][1]].astype(bool))
        rows = [row for first, end in entry["rows"] for row in range(first, end)] if "rows" in entry else None
        parts[name] = Part(name, rows, stored["U"], stored["S"], frozen)
    return parts


def safety_rows(root: Path) -> list[dict[str, list[int]]]:
    samples = encoded(root / "refusals_fit.jsonl", AutoTokenizer.from_pretrained(root / "m"))
    return [{"input_ids": before + after, "labels": [-100] * len(before) + after} for before, after in samples]


def covariances(root: Path, parts: dict[str, Part]) -> dict[str, np.ndarray]:
    model, modules = dense_reference.load(root / "m"), sorted({part.module for part in parts.values()})
    inputs = dense_reference.layer_inputs(model, modules, safety_rows(root))
    return {name: dense_reference.covariance(inputs[part.module]) for name, part in parts.items()}


def importances(root: Path, parts: dict[str, Part], batch_size: int) -> dict[str, np.ndarray]:
    model, modules = dense_reference.load(root / "m"), sorted({part.module for part in parts.values()})
    batches = dense_reference.gradients(model, modules, safety_rows(root), batch_size)
    found = {}
    for name, part in parts.items():
        own = [{name: batch[part.module] if part.rows is None else batch[part.module][part.rows]} for batch in batches]
        found[name] = dense_reference.importance(own, name, part.basis.numpy())
    return found


class PartsAdamW(DenseAdamW):
    """AdamW on the rotated coefficients of parts of parameters; the parameters' other rows stay, or train as they are."""

    def __init__(self, model: Any, parts: dict[str, Part], rest_trains: bool, **more: Any):
        self.parts, self.start = parts, {k: p.detach().clone() for k, p in model.named_parameters()}
        named = {name: part.of(self.start[f"{part.module}.weight"]) for name, part in parts.items()}
        self.rest: dict[str, list[int]] = {}
        for weight in {f"{part.module}.weight" for part in parts.values() if part.rows is not None}:
            taken = {row for part in parts.values() if f"{part.module}.weight" == weight for row in part.rows or ()}
            self.rest[weight] = [row for row in range(len(self.start[weight])) if row not in taken]
        if rest_trains:
            named |= {weight: self.start[weight][rows] for weight, rows in self.rest.items() if rows}
        super().__init__(
            named,
            {name: part.basis for name, part in parts.items()},
            {name: part.frozen for name, part in parts.items()},
            decay=dict.fromkeys(named, 0.1),
            **more,
        )

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        own = {name: part.of(gradients[f"{part.module}.weight"]) for name, part in self.parts.items()}
        super().step(own | {k: gradients[k][self.rest[k]] for k in self.value if k not in self.parts})

    def weights(self) -> dict[str, torch.Tensor]:
        found = {f"{part.module}.weight": self.start[f"{part.module}.weight"].clone() for part in self.parts.values()}
        for name, w in super().weights().items():
            if name not in self.parts:
                found[name][self.rest[name]] = w
            elif (rows := self.parts[name].rows) is None:
                found[f"{self.parts[name].module}.weight"] = w
            else:
                found[f"{self.parts[name].module}.weight"][rows] = w
        return found


def training(root: Path, parts: dict[str, Part]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of phase 3's five steps with --train_scope warp."""
    model = AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float64)
    trained = sorted({f"{part.module}.weight" for part in parts.values()})
    optimizer = PartsAdamW(model, parts, False, lr=2e-3, eps=1e-4, clip=0.5)
    loss = task_loss(root, AutoTokenizer.from_pretrained(root / "m"))
    return train(model, trained, [torch.zeros(0)] * 5, optimizer, loss), optimizer.weights()
