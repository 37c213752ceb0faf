"""Published ways to keep a LoRA adapter from undoing safety, each by its own formula, on plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def safe_lora(aligned: Tensor, fine_tuned: Tensor, unaligned: Tensor, threshold: float) -> tuple[Tensor, float]:
    """Safe LoRA (Hsu et al., NeurIPS 2024, https://arxiv.org/abs/2405.16833, section 3 and their code's projection).

    V = W_aligned - W_unaligned, Ĉ = V Vᵀ / ‖V‖_F, ΔW = W_fine-tuned - W_aligned. Where cos(ΔW, Ĉ ΔW) <= ``threshold``, both
    taken as vectors, ΔW is replaced by Ĉ ΔW; else it stays. Ĉ is no projector (it scales by V's size), as published.

    Takes W [m, n] three times; returns W [m, n] fp32 and the cosine (0 where either is 0).
    """
    v, delta = aligned.double() - unaligned.double(), fine_tuned.double() - aligned.double()
    size = torch.linalg.vector_norm(v)
    projected = v @ (v.T @ delta) / size if size > 0 else torch.zeros_like(delta)
    lengths = torch.linalg.vector_norm(delta) * torch.linalg.vector_norm(projected)
    cosine = float((delta * projected).sum() / lengths) if lengths > 0 else 0.0
    return (aligned.double() + (projected if cosine <= threshold else delta)).float(), cosine
