"""The dense reference of C = Vᵀ W U, in fp64: V, importance and five steps, from the files of phases 1 and 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dense_reference
import numpy as np
import torch
from dense_training import DenseAdamW, complete_basis, task_loss, train
from rows_reference import safety_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


class BothSidesAdamW(DenseAdamW):
    """AdamW on C = Vᵀ W U of the parameters that have V [m, q] in ``outputs``: the one-sided reference of Vᵀ W."""

    def __init__(
        self,
        named: dict[str, torch.Tensor],
        outputs: dict[str, torch.Tensor],
        bases: dict[str, torch.Tensor | None],
        frozen: dict[str, torch.Tensor],
        **more: Any,
    ):
        self.left = {k: complete_basis(v) for k, v in outputs.items()}
        super().__init__({k: self._turned(k, p) for k, p in named.items()}, bases, frozen, **more)

    def _turned(self, k: str, w: torch.Tensor) -> torch.Tensor:
        return self.left[k].T @ w.double() if k in self.left else w

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        super().step({k: self._turned(k, g) for k, g in gradients.items()})

    def weights(self) -> dict[str, torch.Tensor]:
        return {k: self.left[k] @ w if k in self.left else w for k, w in super().weights().items()}


class Layer:
    """A layer of the artefacts: U and V with their eigenvalues, and its mask."""

    def __init__(self, basis: Path, masks: Path, name: str, of_basis: dict[str, Any], of_masks: dict[str, Any]):
        self.name = name
        self.inputs, self.outputs = load_file(basis / of_basis["file"]), load_file(basis / of_basis["output"])
        bits = load_file(masks / of_masks["file"])["frozen"].numpy()
        self.frozen = np.unpackbits(bits, axis=1)[:, : of_masks["shape"][1]].astype(bool)


def read_layers(basis: Path, masks: Path) -> dict[str, Layer]:
    of_basis, of_masks = (json.loads((path / "metadata.json").read_text())["layers"] for path in (basis, masks))
    return {name: Layer(basis, masks, name, of_basis[name], entry) for name, entry in of_masks.items()}


def output_covariances(root: Path, names: list[str]) -> dict[str, np.ndarray]:
    """W Σ Wᵀ of each layer."""
    model = dense_reference.load(root / "m")
    inputs = dense_reference.layer_inputs(model, names, safety_rows(root))
    weights = {name: model.get_submodule(name).weight.detach().numpy() for name in names}
    return {name: weights[name] @ dense_reference.covariance(inputs[name]) @ weights[name].T for name in names}


def gradient_moments(root: Path, names: list[str]) -> dict[str, np.ndarray]:
    """(1/T) Σ_t g_t g_tᵀ of each layer over all tokens, of the sum over samples of the mean loss of their responses."""
    model, tokens = dense_reference.load(root / "m"), 0
    sums: dict[str, np.ndarray] = {}
    for row in safety_rows(root):
        kept: dict[str, torch.Tensor] = {}

        def keep(name: str, y: torch.Tensor, kept: dict[str, torch.Tensor] = kept) -> None:
            y.retain_grad()
            kept[name] = y

        handles = [model.get_submodule(k).register_forward_hook(lambda _, x, y, k=k, keep=keep: keep(k, y)) for k in names]
        logits = model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, torch.tensor(row["labels"][1:]), ignore_index=-100).backward()
        for handle in handles:
            handle.remove()
        tokens += len(row["input_ids"])
        for name, y in kept.items():
            g = y.grad[0].numpy()
            sums[name] = sums.get(name, 0.0) + g.T @ g
    return {name: total / tokens for name, total in sums.items()}


def importances(root: Path, layers: dict[str, Layer], batch_size: int) -> dict[str, np.ndarray]:
    """S = Σ_b |Vᵀ ∂L_b/∂W U| [m, n], 0 beyond the stored columns of either side."""
    model = dense_reference.load(root / "m")
    batches = dense_reference.gradients(model, list(layers), safety_rows(root), batch_size)
    found = {}
    for name, layer in layers.items():
        u, v = (side["U"].double().numpy() for side in (layer.inputs, layer.outputs))
        scores = np.zeros(layer.frozen.shape)
        scores[: v.shape[1], : u.shape[1]] = sum(np.abs(v.T @ batch[name] @ u) for batch in batches)
        found[name] = scores
    return found


def training(root: Path, layers: dict[str, Layer]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and weights of phase 3's five steps with --train_scope warp."""
    model = AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float64)
    weights = dict(model.named_parameters())
    named = {f"{name}.weight": weights[f"{name}.weight"].detach().clone() for name in layers}
    optimizer = BothSidesAdamW(
        named,
        {f"{name}.weight": layer.outputs["U"] for name, layer in layers.items()},
        {f"{name}.weight": layer.inputs["U"] for name, layer in layers.items()},
        {f"{name}.weight": torch.from_numpy(layer.frozen) for name, layer in layers.items()},
        **{"lr": 2e-3, "eps": 1e-4, "decay": dict.fromkeys(named, 0.1), "clip": 0.5},
    )
    loss = task_loss(root, AutoTokenizer.from_pretrained(root / "m"))
    return train(model, list(named), [torch.zeros(0)] * 5, optimizer, loss), optimizer.weights()
