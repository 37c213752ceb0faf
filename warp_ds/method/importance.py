"""S = Σ_b |∂L_b/∂C| from a layer's inputs and output gradients.

For y = W x and C = W U: ∂L/∂C = (∂L/∂W) U = (Σ_t g_t x_tᵀ) U, with g = ∂L/∂y over the tokens t. Either the tokens are
rotated, Σ_t g_t (x_tᵀ U), or their sum, (Σ_t g_t x_tᵀ) U: whichever takes fewer products (``tokens_first``). Only the r
stored columns of U are used: scores of complement directions are 0 by definition.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from warp_ds.method.products import EXACT, Products, Rates

ROWS, GPU_ROWS = 128, 1024
"""Rows of ∂L/∂C made at a time: on a CPU few enough to stay in a cache until their absolute values are added to S, on a
GPU enough to fill it."""


def tokens_first(tokens: float, ranks: int, rows: Sequence[int], n: int, r: int) -> bool:
    """Whether rotating the tokens of an importance batch takes fewer products than rotating its gradients.

    ``tokens``: of a batch; they are rotated once for all layers that see the input, and shared out over ``ranks``.
    ``rows``: of each of those layers on one rank.
    """
    return _tokens_first(tokens, ranks, rows, n, r) <= _gradient_first(tokens, rows, n, r)


def importance_flops(tokens: float, ranks: int, rows: Sequence[int], n: int, r: int, identity: bool = False) -> float:
    """Operations that one importance batch takes on one rank for the layers that share an input."""
    if identity:
        return 2.0 * tokens * sum(rows) * n
    return 2.0 * min(_tokens_first(tokens, ranks, rows, n, r), _gradient_first(tokens, rows, n, r))


def importance_seconds(
    tokens: float, ranks: int, rows: Sequence[int], n: int, r: int, dtype: torch.dtype, products: Products, rates: Rates
) -> float:
    """What ``importance_flops`` take by ``products`` at ``rates``, inputs and gradients of ``dtype``, U fp32."""
    if tokens_first(tokens, ranks, rows, n, r):  # x U, then gᵀ (x U)
        return products.seconds(2.0 * _tokens_first(tokens, ranks, rows, n, r), rates, dtype)
    summed = products.seconds(2.0 * tokens * sum(rows) * n, rates, dtype, dtype)
    return summed + products.seconds(2.0 * sum(rows) * n * r, rates)


def _tokens_first(tokens: float, ranks: int, rows: Sequence[int], n: int, r: int) -> float:
    return tokens / ranks * n * r + tokens * sum(rows) * r


def _gradient_first(tokens: float, rows: Sequence[int], n: int, r: int) -> float:
    return sum(rows) * n * (tokens + r)


def add_importance(
    total: Tensor,
    g: Tensor,
    right: Tensor,
    columns: Tensor | None = None,
    pending: Tensor | None = None,
    scale: float = 1.0,
    products: Products = EXACT,
) -> None:
    """total += scale · |gᵀ right + pending|, times U inside the bars where ``columns`` is given; all in fp32, by ``products``.

    ``total`` [rows, r]; ``g`` [t, rows]; ``right`` [t, k]: x U, or x itself for ``columns`` [k, r] or the identity;
    ``pending`` [rows, k]: what earlier tokens of the same importance batch have given.
    """
    rows = GPU_ROWS if total.is_cuda else ROWS
    for first in range(0, total.shape[0], rows):
        block = slice(first, min(first + rows, total.shape[0]))
        part = products.mm(g[:, block].T, right)
        if pending is not None:
            part += pending[block]
        if columns is not None:
            part = products.mm(part, columns)
        total[block].add_(part.abs_(), alpha=scale)


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
