"""What the published controls minimise during training, on plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def logit_distance(logits: Tensor, start: Tensor) -> Tensor:
    """Dark Experience Replay (Buzzega et al., NeurIPS 2020; on safety samples arXiv 2512.10150): ‖z - z₀‖² / V per token.

    ``logits`` z and the start model's z₀, both [t, V]; a mean over the vocabulary, as in the authors' code. Returns [t] fp32.
    """
    return (logits.float() - start.float()).square().mean(-1)


@torch.no_grad()
def move_average(average: Tensor, weights: Tensor, decay: float) -> None:
    """ā_t = d ā_{t-1} + (1 - d) θ_t in place, ā_0 = θ_0: the exponential average of the weights over the steps. fp32."""
    average.lerp_(weights.float(), 1.0 - decay)
