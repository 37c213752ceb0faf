"""The dense reference of mixtures of experts: Σ of each expert's tokens, importance, masks and five steps, in fp64.

What an expert is given is computed anew from the routed tokens, by the formulas of its layer; gradients are the stacked
parameters' own. It shares no code with the package.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dense_reference
import numpy as np
import rows_reference
import torch
from dense_training import DenseAdamW, task_loss, train
from rows_reference import Part
from transformers import AutoTokenizer


def experts_inputs(root: Path) -> dict[str, np.ndarray]:
    """X [t, n] of each expert's down projection, by "module.down_proj" and its number, and of each block, by its module."""
    model = dense_reference.load(root / "m")
    found: dict[str, list[np.ndarray]] = {}

    def hook(name: str, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        hidden, chosen, _ = inputs
        found.setdefault(name, []).append(hidden.numpy())
        for expert in range(module.num_experts):
            x = hidden[(chosen == expert).any(dim=-1)]
            gate, up = (x @ module.gate_up_proj[expert].T).chunk(2, dim=-1)
            found.setdefault(f"{name}.down_proj {expert}", []).append((torch.nn.functional.silu(gate) * up).numpy())

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda module, inputs, name=name: hook(name, module, inputs))
    with torch.no_grad():
        for row in rows_reference.safety_rows(root):
            model(torch.tensor([row["input_ids"]]), use_cache=False)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def sees(part: Part) -> str:
    """The key of ``experts_inputs`` of a layer such as model.layers.0.mlp.experts.down_proj[experts_down_003]."""
    holder, _, kind = part.name.partition("[")
    module = holder.rpartition(".")[0]
    return f"{holder} {int(kind.rstrip(']').rpartition('_')[2])}" if "down" in kind else module


def flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def importances(root: Path, parts: dict[str, Part], batch_size: int) -> dict[str, np.ndarray]:
    """S of each part: Σ_b |∂L_b/∂W U|, of its rows of the stacked parameter's gradient."""
    model = dense_reference.load(root / "m")
    rows = rows_reference.safety_rows(root)
    params = dict(model.named_parameters())
    batches: list[dict[str, np.ndarray]] = []
    for first in range(0, len(rows), batch_size):
        dense_reference.gradients(model, [], rows[first : first + batch_size], batch_size)
        batches.append({name: flat(params[part.module].grad)[part.rows].numpy().copy() for name, part in parts.items()})
    return {name: dense_reference.importance(batches, name, part.basis.numpy()) for name, part in parts.items()}


def parameter_of(part: Part) -> str:
    """An expert's layer is rows of a parameter of its module, any other one its module's weight."""
    return part.module if "[" in part.name else f"{part.module}.weight"


def rows_of(part: Part, tensor: torch.Tensor) -> torch.Tensor:
    """The part's own [m, n] of its parameter, or of that one's gradient."""
    return part.of(flat(tensor))


class ExpertsAdamW(DenseAdamW):
    """AdamW on the rotated coefficients of experts and other layers; the parameters' other rows stay."""

    def __init__(self, model: Any, parts: dict[str, Part], **more: Any):
        self.parts, self.start = parts, {k: p.detach().clone() for k, p in model.named_parameters()}
        named = {name: rows_of(part, self.start[parameter_of(part)]) for name, part in parts.items()}
        bases, frozen = ({name: getattr(part, what) for name, part in parts.items()} for what in ("basis", "frozen"))
        super().__init__(named, bases, frozen, decay=dict.fromkeys(named, 0.1), **more)

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        super().step({name: rows_of(part, gradients[parameter_of(part)]) for name, part in self.parts.items()})

    def weights(self) -> dict[str, torch.Tensor]:
        found = {parameter_of(part): self.start[parameter_of(part)].clone() for part in self.parts.values()}
        for name, w in super().weights().items():
            part = self.parts[name]
            flat(found[parameter_of(part)])[slice(None) if part.rows is None else part.rows] = w
        return found


def training(root: Path, parts: dict[str, Part]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of phase 3's five steps with --train_scope warp."""
    model = dense_reference.load(root / "m")
    trained = sorted({parameter_of(part) for part in parts.values()})
    optimizer = ExpertsAdamW(model, parts, lr=2e-3, eps=1e-4, clip=0.5)
    loss = task_loss(root, AutoTokenizer.from_pretrained(root / "m"))
    return train(model, trained, [torch.zeros(0)] * 5, optimizer, loss), optimizer.weights()
