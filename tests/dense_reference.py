"""The method in one process, dense and in fp64, in plain PyTorch and NumPy: it shares no code with the package.

Samples are rows {"input_ids", "labels"}, run one at a time and unpadded. Layers are named by their module names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

Row = dict[str, list[int]]


def load(directory: Any) -> Any:
    """The model in fp64, without dropout."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    if any(name.endswith(".experts") for name, _ in model.named_modules()):
        model.set_experts_implementation("eager")  # the default's kernel knows no fp64
    return model


def _ids(row: Row) -> torch.Tensor:
    return torch.tensor([row["input_ids"]])


def layer_inputs(model: Any, names: Sequence[str], rows: Sequence[Row], scope: str = "all") -> dict[str, np.ndarray]:
    """X [T, n] of each layer over the tokens of all rows: 'all' of them, or those of the 'response'."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for row in rows:
        keep = np.array([scope == "all" or label != -100 for label in row["labels"]])
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, name=name, keep=keep: found[name].append(inputs[0].detach().flatten(0, -2).numpy()[keep])
            )
            for name in names
        ]
        with torch.no_grad():
            model(_ids(row), use_cache=False)
        for handle in handles:
            handle.remove()
    return {name: np.concatenate(parts) for name, parts in found.items()}


def covariance(x: np.ndarray) -> np.ndarray:
    """Σ = (1/T) Σ_t x_t x_tᵀ"""
    return x.T @ x / len(x)


def eigen(sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, descending, and their vectors, each with its largest-magnitude entry positive."""
    values, vectors = np.linalg.eigh(sigma)
    values, vectors = values[::-1], vectors[:, ::-1]
    largest = vectors[np.abs(vectors).argmax(axis=0), np.arange(vectors.shape[1])]
    return values, vectors * np.where(largest < 0, -1.0, 1.0)


def complete(u: np.ndarray) -> np.ndarray:
    """U [n, r] and the complement that its Householder reflectors give: [n, n]."""
    return np.concatenate([u, np.linalg.qr(u, mode="complete")[0][:, u.shape[1] :]], axis=1)


def gradients(model: Any, names: Sequence[str], rows: Sequence[Row], batch_size: int) -> list[dict[str, np.ndarray]]:
    """∂L_b/∂W for each importance batch b with a response token; L_b is the mean over the batch's response tokens."""
    found = []
    for first in range(0, len(rows), batch_size):
        losses = []
        for row in rows[first : first + batch_size]:
            logits = model(_ids(row), use_cache=False).logits[0, :-1]
            targets = torch.tensor(row["labels"][1:])
            each = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
            losses.append(each[targets != -100])
        flat = torch.cat(losses)
        if not len(flat):
            continue
        model.zero_grad()
        flat.mean().backward()
        found.append({name: model.get_submodule(name).weight.grad.numpy().copy() for name in names})
    return found


def importance(batches: Sequence[dict[str, np.ndarray]], name: str, u: np.ndarray | None) -> np.ndarray:
    """S = Σ_b |∂L_b/∂W U| [m, n], U complete; 0 beyond the stored columns. ``u`` None is the identity."""
    m, n = batches[0][name].shape
    rotation = np.eye(n) if u is None else complete(u.astype(np.float64))
    scores = sum(np.abs(batch[name] @ rotation) for batch in batches)
    if u is not None:
        scores[:, u.shape[1] :] = 0.0
    return scores


def highest(scores: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """bool like each of ``scores``: the ``count`` highest of all together, ties by index, never a 0."""
    flat = np.concatenate([s.reshape(-1) for s in scores])
    order = np.argsort(-flat, kind="stable")[:count]
    taken = np.zeros(len(flat), dtype=bool)
    taken[order] = flat[order] > 0
    cuts = np.cumsum([s.size for s in scores])[:-1]
    return [part.reshape(s.shape) for part, s in zip(np.split(taken, cuts), scores, strict=True)]


def unit_highest(scores: Sequence[np.ndarray], unit: str, ratio: float) -> list[np.ndarray]:
    """bool masks [m, n] that freeze round(ratio x units) entries, columns or rows of the given score matrices."""
    reduced = {
        "entry": lambda s: s,
        "column": lambda s: np.sqrt((s**2).sum(axis=0, keepdims=True)),
        "row": lambda s: np.sqrt((s**2).sum(axis=1, keepdims=True)),
    }
    values = [reduced[unit](s) for s in scores]
    taken = highest(values, round(ratio * sum(v.size for v in values)))
    return [np.broadcast_to(t, s.shape) for t, s in zip(taken, scores, strict=True)]
