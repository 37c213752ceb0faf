"""Tiny models with LoRA adapters, masks of whole columns for them, and the dense fp64 reference of their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from dense_training import DenseAdamW, complete_basis, train
from masked_artefacts import Artefacts, loss_of, odd_model, write_artefacts
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

RANK, ALPHA = 5, 12
TARGETS = ["down_proj", "q_proj", "k_proj", "up_proj"]
"""up_proj has no mask: its adapter trains freely."""


def lora_config(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **more})


def adapted(dtype: torch.dtype = torch.float32, **more: Any) -> PeftModel:
    """The odd model with adapters of 5 rows, which 2 and 3 ranks cut; the same on every rank."""
    model = odd_model()
    torch.manual_seed(3)
    return get_peft_model(model, lora_config(**more), autocast_adapter_dtype=False).to(dtype)


def column_masks(root: Path, **more: Any) -> Artefacts:
    return write_artefacts(root, odd_model(), unit="column", **more)


def a_name(layer: str) -> str:
    return f"base_model.model.{layer}.lora_A.default.weight"


def frozen_columns(artefacts: Artefacts) -> dict[str, Tensor]:
    """U_F [n, |F|] fp64 of each masked layer, by its name."""
    found = {}
    for weight, frozen in artefacts.frozen.items():
        u = artefacts.bases[weight]
        whole = torch.eye(frozen.shape[1], dtype=torch.float64) if u is None else complete_basis(u)
        found[weight.removesuffix(".weight")] = whole[:, frozen[0]]
    return found


def lora_reference(
    artefacts: Artefacts, batches: list[Tensor], lr: float, eps: float, decay: float, clip: float, **more: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and trained A and B of clipped AdamW in fp64 on A [U_F, complement]: A starts without its part in U_F, whose
    gradient is left out."""
    model = adapted(torch.float64, **more)
    named = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    bases, frozen = {}, {}
    for layer, u in frozen_columns(artefacts).items():
        a = named[a_name(layer)]
        a -= a @ u @ u.T
        bases[a_name(layer)] = u if u.shape[1] else None
        frozen[a_name(layer)] = (torch.arange(len(u)) < u.shape[1]).expand(len(a), -1)
    optimizer = DenseAdamW(named, bases, frozen, lr, eps, dict.fromkeys(named, decay), clip)
    return train(model, list(named), batches, optimizer, loss_of), optimizer.weights()
