"""What the published controls minimise during training, on plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def logit_distance(logits: Tensor, start: Tensor) -> Tensor:
    """Dark Experience Replay (Buzzega et al., NeurIPS 2020; on safety samples arXiv 2512.10150): ‖z - z₀‖² / V per token.

    ``logits`` z and the start model's z₀, both [t, V]; a mean over the vocabulary, as in the authors' code. Returns [t] fp32.
    """
    return (logits.float() - start.float()).square().mean(-1)


FIRST, EARLY, LATE = 0.5, 2.0, 0.1
"""Constrained fine-tuning: beta of an answer's first token, of tokens 2 to 5, and of those after them."""


def token_strengths(positions: Tensor) -> Tensor:
    """beta_t fp32 of tokens at ``positions`` (1: the first of its answer), as Qi et al. set it."""
    early = torch.where(positions <= 5, EARLY, LATE)
    return torch.where(positions == 1, FIRST, early).float()


def constrained_loss(logprobs: Tensor, start: Tensor, beta: Tensor) -> Tensor:
    """Token-wise constrained fine-tuning (Qi et al., ICLR 2025): -(2 / β_t) log σ(β_t Δ_t), Δ_t = log π_θ - log π_start.

    Its gradient is the cross-entropy's times 2 σ(-β_t Δ_t): 1 at the start model, less the more a token has gained.
    All [t] fp32; returns [t].
    """
    return -2.0 / beta * functional.logsigmoid(beta * (logprobs - start))


@torch.no_grad()
def move_average(average: Tensor, weights: Tensor, decay: float) -> None:
    """ā_t = d ā_{t-1} + (1 - d) θ_t in place, ā_0 = θ_0: the exponential average of the weights over the steps. fp32."""
    average.lerp_(weights.float(), 1.0 - decay)
