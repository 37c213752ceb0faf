"""S = Σ_b |∂L_b/∂C| (section 2.4 of the method) from a layer's inputs and output gradients.

For y = W x and C = W U: ∂L/∂C = (∂L/∂W) U = (Σ_t g_t x_tᵀ) U = Σ_t g_t (x_tᵀ U), with g = ∂L/∂y. So the n x n
rotation is applied to tokens, and the gradient of W itself is never formed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def coefficient_gradient(g: Tensor, xu: Tensor) -> Tensor:
    """∂L/∂C [rows, r] from g = ∂L/∂y [t, rows] and the rotated inputs x U [t, r], in fp32."""
    return g.float().T @ xu.float()


def rotated_inputs(x: Tensor, columns: Tensor | None) -> Tensor:
    """x U [t, r] in fp32 for x [t, n] and U [n, r]; None stands for the identity.

    Columns beyond r are left out: scores of complement directions are 0 by definition.
    """
    return x.float() if columns is None else x.float() @ columns


def response_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Σ_t weights_t · cross-entropy of the token that follows position t, in fp32.

    ``logits`` [B, L, V]; ``labels`` [B, L], -100 where no loss is; ``weights`` [B, L] belong to the labels:
    1 / (response tokens of the importance batch) makes the sum over a batch's samples L_b.
    """
    targets, weights = labels[:, 1:], weights[:, 1:]
    chosen = targets != -100
    if not chosen.any():
        return 0.0 * logits[..., 0].float().sum()  # every rank runs a backward pass, also one without samples
    losses = torch.nn.functional.cross_entropy(logits[:, :-1][chosen].float(), targets[chosen], reduction="none")
    return (losses * weights[chosen]).sum()
