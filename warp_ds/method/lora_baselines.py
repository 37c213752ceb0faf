"""Published ways to keep a LoRA adapter from undoing safety, each by its own formula, on plain tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from warp_ds.method.rotation import Rotation


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


def wsr(aligned: Tensor, delta: Tensor, rotation: Rotation, frozen: Tensor) -> Tensor:
    """W + ((ΔW U) ⊙ (1 - M)) Uᵀ: an adapter's update without its rotated coefficients that M freezes, so of full rank.

    The original's WSR-LoRA by entries (models/lora_wsr_elementwise.py of min-seong-kim/Safety-WaRP-LLM), its mask put on the
    trained product instead of in every forward pass. Takes W and ΔW [m, n], U as ``rotation``, M bool [m, n]; returns fp64
    [m, n].
    """
    kept = rotation.rotate(delta.double()).masked_fill(frozen, 0.0)
    return aligned.double() + rotation.unrotate(kept)


# ---------------------------------------------------------------- GuardSpace (ICLR 2026, openreview 887vde4ZAW)


def null_directions(values: Tensor, n: int, share: float) -> tuple[int, float]:
    """How many eigenvectors of C, from the last, span GuardSpace's null space, and what share of trace(C) they hold.

    ``values`` [k], descending, the eigenvalues of C [n, n] that are stored; those beyond them are taken as zero. Where none
    is, the smallest that hold at most ``share`` of the trace stand in for zero ones.
    """
    s = values.double()
    zero = n - int((s > 0).sum())
    if zero:
        return zero, 0.0
    tail = torch.cumsum(s.flip(0), 0) / s.sum()
    count = int((tail <= share).sum())
    return count, float(tail[count - 1]) if count else 0.0


def guardspace_start(w: Tensor, columns: Tensor, values: Tensor, r: int, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """A [r, n] and B [m, r] fp32 of the smallest r components of W C = P Σ Qᵀ: B = P_r √Σ_r, A = √Σ_r (Qᵀ C⁻¹)_r.

    C = U diag(values) Uᵀ of ``columns`` U [n, k]; where it is singular, ``damping`` x mean(diag C) goes onto its diagonal. C is
    the mean over tokens, where the paper has the sum: B A is the same. Raises ValueError where r is above min(m, n).
    """
    w, u, s = w.double(), columns.double(), values.double()
    if r > min(w.shape):
        raise ValueError(f"rank {r} is above {min(w.shape)}, the rank of a weight {list(w.shape)}")
    singular = u.shape[1] < u.shape[0] or not bool((s > 0).all())
    load = damping * float(s.sum()) / u.shape[0] if singular else 0.0
    wc = (w @ u * s) @ u.T + load * w
    left, sigma, right = torch.linalg.svd(wc, full_matrices=False)
    root, rows = sigma[-r:].sqrt(), right[-r:]
    inner = rows @ u
    inverse = (inner / (s + load)) @ u.T + ((rows - inner @ u.T) / load if load else 0.0)
    return (root[:, None] * inverse).float(), (left[:, -r:] * root).float()


# ---------------------------------------------------------------- SaLoRA (Li et al., ICLR 2025, arXiv 2501.01765)


def first_outputs(w: Tensor, columns: Tensor, values: Tensor, rank: int) -> Tensor:
    """U_C [m, k] fp32, the first ``rank`` left singular vectors of W X (fewer where X has a lower rank), of which SaLoRA's
    fixed module is I - U_C U_Cᵀ. X Xᵀ is U diag(values) Uᵀ up to a factor, ``columns`` U [n, k]."""
    left, sigma, _ = torch.linalg.svd((w.double() @ columns.double()) * values.double().sqrt(), full_matrices=False)
    seen = int((sigma > sigma[0] * 1e-7).sum()) if len(sigma) and sigma[0] > 0 else 0
    return left[:, : min(rank, seen)].float()


def salora_start(w: Tensor, outputs: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """A₀ [r, n] and B₀ [m, r] fp32: the first r singular components P √Σ, √Σ Qᵀ of W, B₀ within the task's ``outputs`` U_D
    [m, k]: B₀ = U_D U_Dᵀ P √Σ (its authors' code). Raises ValueError where r is above min(m, n)."""
    if r > min(w.shape):
        raise ValueError(f"rank {r} is above {min(w.shape)}, the rank of a weight {list(w.shape)}")
    left, sigma, right = torch.linalg.svd(w.double(), full_matrices=False)
    root, within = sigma[:r].sqrt(), outputs.double()
    return (root[:, None] * right[:r]).float(), (within @ (within.T @ (left[:, :r] * root))).float()


# ---------------------------------------------------------------- AsFT (arXiv 2506.08473)


def asft_penalty(a: Tensor, b: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """‖(I - Ĉ) B A‖²_F, and its gradients by A and B; Ĉ = V Vᵀ / ‖V‖_F of V = W_aligned - W_unaligned, no true projector.

    ``a`` [r, n], ``b`` [m, r], ``v`` [m, n]; of products only [m, r] and [r, r] are made: with X = (I - Ĉ) B it is
    trace(XᵀX A Aᵀ). B A goes in without LoRA's scale, as in its authors' code.
    """
    size = torch.linalg.vector_norm(v)

    def off_alignment(x: Tensor) -> Tensor:
        return x - v @ (v.T @ x) / size if size > 0 else x

    x = off_alignment(b)
    inner, outer = x.T @ x, a @ a.T
    return (inner * outer).sum(), 2.0 * inner @ a, 2.0 * off_alignment(x @ outer)
