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
"""Safe Delta: rows of the layers for which its authors quote s."""


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


def safe_delta(aligned: Tensor, fine_tuned: Tensor, hessian: Tensor, s: float, block: int = 128) -> tuple[Tensor, Tensor]:
    """Safe Delta (Lu et al., ICML 2025): which entries of Δ = W_fine-tuned - W_aligned are kept, and their compensation.

    Keeping Δ_ij costs Δ_ij² / (2 [H⁻¹]_jj) of safety and gains utility in proportion to Δ_ij²: so entries are taken by
    the ratio 2 [H⁻¹]_jj, largest first, while the cost of those taken is within ε = s (m / 4096) mean_j 1 / (2 [H⁻¹]_jj)
    (the scale of their code: a layer of 4096 rows has budget s). Then columns are fixed from left to right; what an
    entry departs from is made up for in the columns still open by the optimal-brain-surgeon step,
    w_F += (ŵ_j - w_j) / [H_F⁻¹]_jj · [H_F⁻¹]_j,: over the open columns F. Entries not taken end at the compensated
    aligned value. Their code selects within blocks of columns and spares the last 15 % of the ranking; the paper's
    formulas do neither, and nor does this: ``block`` columns are compensated for at once, as in GPTQ (Frantar et al., ICLR
    2023), which changes the order of the sums alone.

    Takes W [m, n] twice and H [n, n] fp64; returns W [m, n] fp32 and the entries kept, bool [m, n].
    """
    w, target = aligned.double().clone(), fine_tuned.double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    price = 1.0 / (2.0 * torch.diagonal(inverse))
    cost = (target - w).square() * price
    order = torch.argsort(price.expand_as(w).reshape(-1), stable=True)
    budget = s * w.shape[0] / SCALE_ROWS * float(price.mean())
    kept = torch.zeros(w.numel(), dtype=torch.bool)
    kept[order] = torch.cumsum(cost.reshape(-1)[order], 0) <= budget
    kept = kept.view_as(w)
    # Row j of the upper Cholesky factor of H⁻¹ is [H_F⁻¹]_j,: / [H_F⁻¹]_jj^½ over F = j, j + 1, ...
    upper = torch.linalg.cholesky(inverse, upper=True)
    for first in range(0, w.shape[1], block):
        own = slice(first, min(first + block, w.shape[1]))
        open_columns, u = w[:, own], upper[own, own]
        steps = torch.zeros_like(open_columns)
        for j in range(u.shape[0]):
            steps[:, j] = torch.where(kept[:, first + j], target[:, first + j] - open_columns[:, j], 0.0) / u[j, j]
            open_columns[:, j:] += torch.outer(steps[:, j], u[j, j:])
        w[:, own.stop :] += steps @ upper[own, own.stop :]
    return w.float(), kept


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
