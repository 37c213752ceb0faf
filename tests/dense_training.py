"""Masked, rotated training as one plain process does it: full matrices, plain PyTorch, no line of the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def complete_basis(u: torch.Tensor) -> torch.Tensor:
    """[U, U⊥] fp64, the complement from LAPACK's Householder reflectors of U."""
    q = np.linalg.qr(u.double().numpy(), mode="complete")[0]
    return torch.cat([u.double(), torch.from_numpy(q[:, u.shape[1] :])], dim=1)


class DenseAdamW:
    """AdamW (Loshchilov and Hutter) on every trained parameter; on C = W U for the masked ones; fp64 throughout."""

    def __init__(
        self,
        named: dict[str, torch.Tensor],
        bases: dict[str, torch.Tensor | None],
        frozen: dict[str, torch.Tensor],
        lr: float,
        eps: float,
        decay: dict[str, float],
        clip: float,
        betas: tuple[float, float] = (0.9, 0.999),
        coupled: bool = False,
    ):
        self.full = {
            k: complete_basis(u) if u is not None else torch.eye(named[k].shape[1], dtype=torch.float64)
            for k, u in bases.items()
        }
        self.frozen, self.lr, self.eps, self.decay, self.clip = frozen, lr, eps, decay, clip
        self.betas, self.coupled, self.t = betas, coupled, 0
        self.value = {k: (p.double() @ self.full[k] if k in self.full else p.double()) for k, p in named.items()}
        self.m = {k: torch.zeros_like(v) for k, v in self.value.items()}
        self.v = {k: torch.zeros_like(v) for k, v in self.value.items()}
        self.norm = self.removed = 0.0

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        self.t += 1
        g = {k: (x.double() @ self.full[k] if k in self.full else x.double()) for k, x in gradients.items()}
        before = sum(float(x.square().sum()) for k, x in g.items() if k in self.frozen)
        for k, mask in self.frozen.items():
            g[k] = g[k].masked_fill(mask, 0.0)
        after = sum(float(x.square().sum()) for k, x in g.items() if k in self.frozen)
        self.removed = ((before - after) / before) ** 0.5 if before else 0.0
        self.norm = sum(float(x.square().sum()) for x in g.values()) ** 0.5
        if self.clip:
            scale = max(1.0, (self.norm + 1e-6) / self.clip)
            g = {k: x / scale for k, x in g.items()}
        b1, b2 = self.betas
        for k, x in g.items():
            free = ~self.frozen[k] if k in self.frozen else torch.ones_like(x, dtype=torch.bool)
            decay = self.decay.get(k, 0.0)
            if self.coupled:
                x = x + decay * self.value[k] * free
            else:
                self.value[k] = torch.where(free, self.value[k] * (1 - self.lr * decay), self.value[k])
            self.m[k] = b1 * self.m[k] + (1 - b1) * x
            self.v[k] = b2 * self.v[k] + (1 - b2) * x * x
            mhat, vhat = self.m[k] / (1 - b1**self.t), self.v[k] / (1 - b2**self.t)
            self.value[k] = self.value[k] - self.lr * mhat / (vhat.sqrt() + self.eps)

    def weights(self) -> dict[str, torch.Tensor]:
        """W fp64 of every trained parameter."""
        return {k: (v @ self.full[k].T if k in self.full else v) for k, v in self.value.items()}


def train(
    model: torch.nn.Module,
    trained: list[str],
    batches: list[torch.Tensor],
    optimizer: DenseAdamW,
    loss_of: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor],
) -> list[float]:
    """One optimizer step a global batch of token ids; returns the loss of each before its step."""
    params = dict(model.named_parameters())
    losses = []
    for batch in batches:
        with torch.no_grad():
            for k, w in optimizer.weights().items():
                params[k].copy_(w)
        model.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step({k: params[k].grad for k in trained})
    with torch.no_grad():
        for k, w in optimizer.weights().items():
            params[k].copy_(w)
    return losses


def encoded(path: Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) token ids of a file's rows, as a model without a chat template gets them."""
    prompts = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    samples = []
    for row in map(json.loads, path.read_text().splitlines()):
        before = prompts + tokenizer(f"Question: {row['prompt']}\nAnswer:", add_special_tokens=False)["input_ids"]
        after = tokenizer(f" {row['response']}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        samples.append((before, after))
    return samples


def phase3_reference(root: Path, artefacts: Path, scope: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Five full-batch clipped AdamW steps in fp64, from the files of phases 1 and 2; losses and final weights."""
    model = AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float64)
    tokenizer = AutoTokenizer.from_pretrained(root / "m")
    basis, masks = ((artefacts / f"phase{i}_latest" / kind).resolve() for i, kind in ((1, "basis"), (2, "masks")))
    bases, frozen = {}, {}
    for name, entry in json.loads((masks / "metadata.json").read_text())["layers"].items():
        file = json.loads((basis / "metadata.json").read_text())["layers"][name]["file"]
        bases[f"{name}.weight"] = load_file(basis / file)["U"]
        bits = load_file(masks / entry["file"])["frozen"].numpy()
        frozen[f"{name}.weight"] = torch.from_numpy(np.unpackbits(bits, axis=1)[:, : entry["shape"][1]].astype(bool))
    trained = {k: p.detach().clone() for k, p in model.named_parameters() if scope == "all" or k in frozen}
    loss = task_loss(root, tokenizer)
    # Trainer decays no biases and norm weights.
    decay = {k: 0.0 if "norm" in k else 0.1 for k in trained}
    optimizer = DenseAdamW(trained, bases, frozen, lr=2e-3, eps=1e-4, decay=decay, clip=0.5)
    return train(model, list(trained), [torch.zeros(0)] * 5, optimizer, loss), optimizer.weights()


def task_loss(root: Path, tokenizer: Any) -> Callable[[torch.nn.Module, Any], torch.Tensor]:
    """Mean loss over all response tokens of the task's file, whatever batch it is asked for."""
    samples = encoded(root / "utility_train.jsonl", tokenizer)

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        # One sample at a time, without padding: the mean over all response tokens.
        total, count = torch.zeros((), dtype=torch.float64), 0
        for before, after in samples:
            logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
            total = total + torch.nn.functional.cross_entropy(logits, torch.tensor(after), reduction="sum")
            count += len(after)
        return total / count

    return loss
