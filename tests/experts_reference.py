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
    """X [t, n] of each expert's down projection and of its gate and up, by "module.down_proj" or "module.gate_up_proj" and its
    number; of each block, by its module."""
    model = dense_reference.load(root / "m")
    found: dict[str, list[np.ndarray]] = {}

    def hook(name: str, module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        hidden, *chosen = inputs
        family, down, of_block = model.config.model_type, f"{name}.down_proj", []
        for expert in range(module.num_experts):
            if family == "llama4_text":  # every token times its weight, which is 0 where it is routed elsewhere
                x = hidden.chunk(module.num_experts)[expert]
                x = x[x.abs().sum(dim=-1) > 0]
                of_block.append(x.numpy())
            else:
                x = hidden[(chosen[0] == expert).any(dim=-1)]
            found.setdefault(f"{name}.gate_up_proj {expert}", []).append(x.numpy())
            w = rows_of_stored(family, f"{name}.gate_up_proj", module.gate_up_proj)[expert]
            gate, up = (x @ w.T).chunk(2, dim=-1)
            if family == "gpt_oss":
                bias = module.gate_up_proj_bias[expert]
                gate, up = (gate + bias[0::2]).clamp(max=7.0), (up + bias[1::2]).clamp(-7.0, 7.0)
                made = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            else:
                made = torch.nn.functional.silu(gate) * up
            found.setdefault(f"{down} {expert}", []).append(made.numpy())
        found.setdefault(name, []).append(np.concatenate(of_block) if of_block else hidden.numpy())

    for name, module in model.named_modules():
        if name.endswith(".experts"):
            module.register_forward_pre_hook(lambda module, inputs, name=name: hook(name, module, inputs))
    with torch.no_grad():
        for row in rows_reference.safety_rows(root):
            model(torch.tensor([row["input_ids"]]), use_cache=False)
    return {name: np.concatenate(parts) for name, parts in found.items()}


def rows_of_stored(family: str, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A stacked parameter of experts [E, outputs, inputs], gates before ups: gpt-oss and Llama 4 store it transposed."""
    if family not in ("gpt_oss", "llama4_text") or not name.endswith(("gate_up_proj", "down_proj")) or tensor.dim() != 3:
        return tensor
    w = tensor.transpose(1, 2)
    return torch.cat([w[:, 0::2], w[:, 1::2]], dim=1) if family == "gpt_oss" and "gate_up" in name else w


def as_stored(family: str, name: str, w: torch.Tensor) -> torch.Tensor:
    """What ``rows_of_stored`` was made of."""
    if rows_of_stored(family, name, w) is w:
        return w
    if family == "gpt_oss" and "gate_up" in name:
        gates, ups = w.chunk(2, dim=1)
        w = torch.stack([gates, ups], dim=2).flatten(1, 2)
    return w.transpose(1, 2)


def sees(part: Part, apart: bool) -> str:
    """The key of ``experts_inputs`` of a layer such as model.layers.0.mlp.experts.down_proj[experts_down_003]; ``apart``:
    whether experts have bases of their own."""
    holder, _, kind = part.name.partition("[")
    module = holder.rpartition(".")[0]
    return f"{holder} {int(kind.rstrip(']').rpartition('_')[2])}" if apart or "down" in kind else module


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
        family = model.config.model_type
        gradients = {p: flat(rows_of_stored(family, p, params[p].grad)) for p in {part.module for part in parts.values()}}
        batches.append({name: gradients[part.module][part.rows].numpy().copy() for name, part in parts.items()})
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
        self.parts, self.family = parts, model.config.model_type
        self.start = {k: rows_of_stored(self.family, k, p.detach()).contiguous().clone() for k, p in model.named_parameters()}
        named = {name: rows_of(part, self.start[parameter_of(part)]) for name, part in parts.items()}
        bases, frozen = ({name: getattr(part, what) for name, part in parts.items()} for what in ("basis", "frozen"))
        super().__init__(named, bases, frozen, decay=dict.fromkeys(named, 0.1), **more)

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        rows = {k: rows_of_stored(self.family, k, g).contiguous() for k, g in gradients.items()}
        super().step({name: rows_of(part, rows[parameter_of(part)]) for name, part in self.parts.items()})

    def weights(self) -> dict[str, torch.Tensor]:
        found = {parameter_of(part): self.start[parameter_of(part)].clone() for part in self.parts.values()}
        for name, w in super().weights().items():
            part = self.parts[name]
            flat(found[parameter_of(part)])[slice(None) if part.rows is None else part.rows] = w
        return {name: as_stored(self.family, name, w) for name, w in found.items()}


def training(root: Path, parts: dict[str, Part]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of phase 3's five steps with --train_scope warp."""
    model = dense_reference.load(root / "m")
    trained = sorted({parameter_of(part) for part in parts.values()})
    optimizer = ExpertsAdamW(model, parts, lr=2e-3, eps=1e-4, clip=0.5)
    loss = task_loss(root, AutoTokenizer.from_pretrained(root / "m"))
    return train(model, trained, [torch.zeros(0)] * 5, optimizer, loss), optimizer.weights()
