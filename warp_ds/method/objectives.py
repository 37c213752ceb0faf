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


def divergence(logits: Tensor, start: Tensor) -> Tensor:
    """KL(π_start ‖ π_θ) of each token, which SafeGrad's alignment loss is the mean of; both [t, V], returns [t] fp32."""
    before = start.float().log_softmax(-1)
    return (before.exp() * (before - logits.float().log_softmax(-1))).sum(-1)


NO_DIRECTION = 1e-4
"""SafeGrad: a safety gradient below this share of the task's is rounding; at the start model it is 0."""


def conflict(inner: float, task: float, safety: float) -> float:
    """SafeGrad (Yi et al., https://arxiv.org/abs/2508.07172): c in g_task <- g_task - c g_safety, the projection onto the plane
    orthogonal to g_safety where the two are opposed: ⟨g_task, g_safety⟩ / ‖g_safety‖² where that is below 0, else 0.

    ``inner`` is the inner product, ``task`` and ``safety`` the squared norms, each over all parameters that train.
    """
    return inner / safety if inner < 0.0 and safety > NO_DIRECTION**2 * task else 0.0


@torch.no_grad()
def move_average(average: Tensor, weights: Tensor, decay: float) -> None:
    """ā_t = d ā_{t-1} + (1 - d) θ_t in place, ā_0 = θ_0: the exponential average of the weights over the steps. fp32."""
    average.lerp_(weights.float(), 1.0 - decay)
