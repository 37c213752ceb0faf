"""Bases of a real model's layers: SmolLM2-135M-Instruct, where SMOLLM2 names its directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from warp_ds.method.covariance import Covariance
from warp_ds.method.eigenbasis import covariance_basis

MODEL = os.environ.get("SMOLLM2", "")
TEXT = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k_train.jsonl"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (Path(MODEL, "config.json").is_file() and TEXT.is_file()),
        reason="SMOLLM2 names no model, or the shared data are not there",
    ),
]


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    """[7,000 tokens and more, n] of the inputs of four layers in four blocks."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    parts: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj", "up_proj", "down_proj")) and name.split(".")[2] in ("0", "5", "12", "29"):
            module.register_forward_pre_hook(lambda _, x, name=name: parts.setdefault(name, []).append(x[0][0]))
    with torch.no_grad():
        for line in TEXT.read_text(encoding="utf-8").splitlines()[:40]:
            model(torch.tensor([tokenizer(" ".join(map(str, json.loads(line).values())))["input_ids"]]))
    return {name: torch.cat(part) for name, part in parts.items()}


def test_columns_do_not_correlate_and_ranks_do_not_hang_on_the_order_of_sums(inputs: dict[str, torch.Tensor]) -> None:
    """Before: up to 64 of 576 columns correlated above 0.1 in fp32, and ranks were cut at fp32's rounding."""
    assert len(inputs) == 16
    for name, x in inputs.items():
        sigma = x.double().T @ x.double() / len(x)
        ranks = set()
        for seed in range(3):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            total = Covariance(x.shape[1])
            for piece in x[order].split(500 + 37 * seed):
                total.add(piece)
            basis = covariance_basis(total.result())
            ranks.add(basis.rank)
        assert ranks == {x.shape[1]}, name
        u = basis.columns.double()
        between = u.T @ sigma @ u
        size = between.diagonal().sqrt()
        assert (between / size[:, None] / size).fill_diagonal_(0.0).abs().max() < 0.1, name
        exact = torch.linalg.eigvalsh(sigma).flip(0)
        assert (basis.values.double() / exact - 1).abs().max() < 0.1, name
