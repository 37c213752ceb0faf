"""The published methods that ours is compared with, each by its own formula, on plain tensors.

What basis, unit and score of a mask can say (OSFT, null space, original space, random) is not here: see phases/arms.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

DAMPING = 0.01
"""Safe Delta: share of the mean of H's diagonal that is added to it."""
SCALE_ROWS = 4096
"""Safe Delta: rows and columns of the layers for which its authors quote s."""
SCALE_COLUMNS = 2048
"""Safe Delta: columns among which a budget is spent."""
SPARED = 0.15
"""Safe Delta: share of a block's entries, those of the highest price, that are never taken."""


def safety_share(task_samples: int, ratio: float) -> int:
    """SafeInstr (Bianchi et al., ICLR 2024): how many safety samples are mixed into the task's, ``ratio`` of their number."""
    return math.ceil(ratio * task_samples - 1e-9)


def resta(fine_tuned: Tensor, aligned: Tensor, unaligned: Tensor, alpha: float) -> Tensor:
    """Resta (Bhardwaj et al., ACL 2024): θ = θ_fine-tuned + α (θ_aligned - θ_unaligned), in fp32.

    The bracket is the safety vector: what undoing the alignment takes away.
    """
    return fine_tuned.float() + alpha * (aligned.float() - unaligned.float())


def safety_hessian(columns: Tensor, values: Tensor, damping: float = DAMPING) -> Tensor:
    """H = 2 Σ + λ I [n, n] fp64, Σ = U diag(values) Uᵀ of the safety inputs, λ = ``damping`` x mean(diag(2 Σ)).

    The Hessian of ‖ΔW x‖² for each row of W; ``columns`` U [n, r] and ``values`` [r] as phase 1 stores them.
    """
    u, s = columns.double(), values.double()
    h = 2.0 * (u * s) @ u.T
    return h + torch.eye(h.shape[0], dtype=h.dtype) * max(damping * float(torch.diagonal(h).mean()), 1e-30)


def safe_delta(
    aligned: Tensor, fine_tuned: Tensor, hessian: Tensor, s: float, block: int = SCALE_COLUMNS, at_once: int = 128
) -> tuple[Tensor, Tensor]:
    """Safe Delta (Lu et al., ICML 2025): which entries of Δ = W_fine-tuned - W_aligned are kept, and their compensation.

    As in the authors' code, block of ``block`` columns after block, from left to right. With R the upper Cholesky factor
    of H⁻¹, R_jj² = [H_F⁻¹]_jj over the columns F = j, j + 1, ... that are still open: keeping Δ_ij costs Δ_ij² / 2 R_jj² of
    safety. Within a block the entries are taken by that price, the lowest first, while their cost is within the block's
    ε = s (m / 4096) (block / 4096) mean_j 1 / 2 R_jj² (a layer of 4096 rows and columns has budget s); the SPARED dearest
    are never taken. What an entry departs from is made up for in the columns still open by the optimal-brain-surgeon step,
    w_F += (ŵ_j - w_j) / [H_F⁻¹]_jj · [H_F⁻¹]_j,:, so that a later block's Δ is what is left after that. Entries not taken
    end at the compensated aligned value. Their code compensates after every fourth column, this after every one;
    the columns after ``at_once`` of them are reached at once, as in GPTQ (Frantar et al., ICLR 2023): another order of sums.

    Takes W [m, n] twice and H [n, n] fp64; returns W [m, n] fp32 and the entries kept, bool [m, n].
    """
    w, target = aligned.double().clone(), fine_tuned.double()
    # Row j of the factor is [H_F⁻¹]_j,: / [H_F⁻¹]_jj^½.
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    price = 0.5 / torch.diagonal(upper).square()
    kept = torch.zeros_like(w, dtype=torch.bool)
    for first in range(0, w.shape[1], block):
        own = slice(first, min(first + block, w.shape[1]))
        budget = s * (w.shape[0] / SCALE_ROWS) * (block / SCALE_ROWS) * float(price[own].mean())
        kept[:, own] = _affordable((target[:, own] - w[:, own]).square() * price[own], price[own], budget)
        for begin in range(first, own.stop, at_once):
            _settle(w, target, kept, upper, slice(begin, min(begin + at_once, own.stop)))
    return w.float(), kept


def _affordable(cost: Tensor, price: Tensor, budget: float) -> Tensor:
    """The entries of ``cost`` [m, b] that are taken by their column's ``price`` [b] within ``budget``: bool [m, b]."""
    order = torch.argsort(price.expand_as(cost).reshape(-1), stable=True)
    order = order[: cost.numel() - int(SPARED * cost.numel())]
    taken = torch.zeros(cost.numel(), dtype=torch.bool)
    taken[order] = torch.cumsum(cost.reshape(-1)[order], 0) <= budget
    return taken.view_as(cost)


def _settle(w: Tensor, target: Tensor, kept: Tensor, upper: Tensor, own: slice) -> None:
    """Fixes the columns ``own`` of w, from left to right, and compensates in all those after them; in place."""
    open_columns, u = w[:, own], upper[own, own]
    steps = torch.zeros_like(open_columns)
    for j in range(u.shape[0]):
        column = own.start + j
        steps[:, j] = torch.where(kept[:, column], target[:, column] - open_columns[:, j], 0.0) / u[j, j]
        open_columns[:, j:] += torch.outer(steps[:, j], u[j, j:])
    w[:, own.stop :] += steps @ upper[own, own.stop :]


# ---------------------------------------------------------------- safety neurons (Zhao et al., ICLR 2025)
# A neuron is a row or a column of a weight. Its importance for an input x is how far its layer's output moves when it
# is switched off; it is a safety neuron if it is important for every x of the safety set. So what counts is the least
# importance over the set, and a threshold on that is a share of the neurons.


def linear_neurons(hidden: Tensor, following: Tensor) -> Tensor:
    """‖(h ⊙ e_k) W_followingᵀ‖ of each k: FFN neurons (rows of up and gate, columns of down), and value neurons.

    ``hidden`` h [t, n], what the following projection sees; ``following`` its weight [m, n]. Returns [n].
    """
    return torch.linalg.vector_norm(hidden.float(), dim=0) * torch.linalg.vector_norm(following.float(), dim=0)


def attention_neurons(query: Tensor, key: Tensor) -> Tensor:
    """‖softmax(Q Kᵀ / √d) - softmax((Q Kᵀ - Q_k K_kᵀ) / √d)‖ of each channel k: rows of the query and key projections.

    ``query``, ``key`` [t, d] of one head, as projected; attention is causal. Returns [d].
    """
    t, d = query.shape
    q, k = query.float(), key.float()
    causal = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()

    def attend(scores: Tensor) -> Tensor:
        return (scores / d**0.5).masked_fill(~causal, float("-inf")).softmax(-1)

    scores = q @ k.T
    whole = attend(scores)
    return torch.stack([torch.linalg.vector_norm(whole - attend(scores - torch.outer(q[:, c], k[:, c]))) for c in range(d)])


def top_share(least: Tensor, share: float) -> Tensor:
    """The round(share · n) neurons of highest ``least`` importance [n], ties by index: bool [n]."""
    chosen = torch.zeros_like(least, dtype=torch.bool)
    chosen[torch.argsort(least, descending=True, stable=True)[: round(share * least.numel())]] = True
    return chosen


def robust_neurons(safety: Tensor, foundation: Tensor) -> Tensor:
    """RSN-Tune: safety neurons that are not foundation neurons, so that later training on a task spares them."""
    return safety & ~foundation
