"""Tiny models with LoRA adapters, masks of whole columns or rows for them, and the dense fp64 reference of their training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from dense_training import DenseAdamW, complete_basis, train
from masked_artefacts import Artefacts, loss_of, odd_model, write_artefacts
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from two_sided_reference import BothSidesAdamW

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


KINDS: dict[str, dict[str, Any]] = {
    "columns": {"unit": "column"},
    "columns, both sides": {"unit": "column", "outputs": 0.47},
    "rows": {"unit": "row"},
    "rows, both sides": {"unit": "row", "outputs": 0.47},
    "rows, no basis": {"unit": "row", "basis": "identity"},
}
"""Masks that an adapter can keep: by its A (columns) or by its B. V has columns for 7 of 15 outputs of down_proj; frozen rows
beyond them are of its complement."""


def write_kinds(root: Path) -> dict[str, Path]:
    for kind, more in KINDS.items():
        write_artefacts(root / kind, odd_model(), **more)
    return {kind: root / kind for kind in KINDS}


def column_masks(root: Path, **more: Any) -> Artefacts:
    return write_artefacts(root, odd_model(), unit="column", **more)


def side_name(layer: str, side: str) -> str:
    return f"base_model.model.{layer}.lora_{side}.default.weight"


def directions(artefacts: Artefacts, of_rows: bool) -> dict[str, Tensor]:
    """U_F [n, |F|], or V_F [m, |F|], fp64 of each masked layer, by its name."""
    found = {}
    for weight, frozen in artefacts.frozen.items():
        basis = artefacts.outputs.get(weight) if of_rows else artefacts.bases[weight]
        whole = torch.eye(frozen.shape[0 if of_rows else 1], dtype=torch.float64) if basis is None else complete_basis(basis)
        found[weight.removesuffix(".weight")] = whole[:, frozen[:, 0] if of_rows else frozen[0]]
    return found


def kept_out(artefacts: Artefacts) -> dict[str, Tensor]:
    """Of each masked A or Bᵀ, by its parameter's name, the directions D in which nothing of it is: A D = 0, Bᵀ D = 0."""
    of_rows = by_rows(artefacts)
    return {side_name(layer, "B" if of_rows else "A"): d for layer, d in directions(artefacts, of_rows).items()}


def by_rows(artefacts: Artefacts) -> bool:
    return all(bool((mask == mask[:, :1]).all()) for mask in artefacts.frozen.values())


def lora_reference(
    artefacts: Artefacts, batches: list[Tensor], lr: float, eps: float, decay: float, clip: float, **more: Any
) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and trained A and B of clipped AdamW in fp64 on A [U_F, complement], or [V_F, complement]ᵀ B: A starts without its
    part in U_F, B is 0, and the gradient in U_F or V_F is left out."""
    model = adapted(torch.float64, **more)
    named = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    settings: dict[str, Any] = {"lr": lr, "eps": eps, "decay": dict.fromkeys(named, decay), "clip": clip}
    kept, frozen = kept_out(artefacts), {}
    if by_rows(artefacts):
        whole = not artefacts.outputs  # then rows of W itself: no coordinates but its own
        for weight, mask in artefacts.frozen.items():
            b = side_name(weight.removesuffix(".weight"), "B")
            rows = mask[:, 0] if whole else torch.arange(len(mask)) < int(mask[:, 0].sum())
            frozen[b] = rows[:, None].expand(named[b].shape)
        optimizer: DenseAdamW = BothSidesAdamW(named, {} if whole else kept, {}, frozen, **settings)
        return train(model, list(named), batches, optimizer, loss_of), optimizer.weights()
    for a, u in kept.items():
        named[a] -= named[a] @ u @ u.T
        frozen[a] = (torch.arange(len(u)) < u.shape[1]).expand(len(named[a]), -1)
    bases = {a: u if u.shape[1] else None for a, u in kept.items()}
    optimizer = DenseAdamW(named, bases, frozen, **settings)
    return train(model, list(named), batches, optimizer, loss_of), optimizer.weights()
