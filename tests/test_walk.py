"""Models that are run block by block must prove that this is their plain forward pass: chains do, others do not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from phase12_jobs import Tokenizer, make_rows
from torch import Tensor, nn

from warp_ds.store.layers import TargetLayer
from warp_ds.zero.batches import Samples
from warp_ds.zero.walk import BlockWalk

WIDTH, DEPTH, VOCABULARY = 12, 3, 131


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(WIDTH, WIDTH), torch.zeros(())

    def forward(self, hidden_states: Tensor, more: Tensor | None = None) -> Any:
        x = hidden_states if more is None else hidden_states + more
        self.kept = hidden_states + torch.tanh(self.linear(x))
        return self.kept


class Model(nn.Module):
    """A decoder without attention: what its blocks are given beside the hidden states decides whether it is a chain."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embedding, self.blocks = nn.Embedding(VOCABULARY, WIDTH), nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    @property
    def base_model(self) -> Model:
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None, use_cache: Any = None
    ) -> Any:
        embedded = hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        earlier = []
        for number, block in enumerate(self.blocks):
            earlier.append(hidden)
            if self.kind == "earlier outputs" and number == 2:
                hidden = block(hidden, earlier[1])
            elif self.kind == "the embedding again" and number == 1:
                hidden = block(hidden, embedded)
            elif self.kind == "state of the batch before" and number:
                hidden = block(hidden, self.blocks[0].kept.mean())
            elif self.kind == "between blocks" and number:
                hidden = block(hidden * 1.5)
            elif self.kind == "backwards" and not number:
                hidden = self.blocks[2](block(hidden))
            else:
                hidden = block(hidden)
        if self.kind == "the embedding at the end":
            hidden = hidden + embedded
        return SimpleNamespace(logits=self.head(hidden))


def why_not(kind: str, logits: bool, last: int = DEPTH - 1) -> str | None:
    model = Model(kind)
    layers = [TargetLayer(f"blocks.{i}.linear", i, "ffn_down", WIDTH, WIDTH) for i in range(last + 1)]
    walk = BlockWalk(model, list(model.blocks))
    reason = walk.why_not(Samples(make_rows(), Tokenizer(), "cpu").few(), layers, logits)
    assert all("forward" not in block.__dict__ for block in model.blocks), "a block's forward was left replaced"
    assert walk.fetches[: last + 1] == [2] * (last + 1) or reason
    return reason


@pytest.mark.parametrize("logits", [False, True])
def test_a_chain_is_walked(logits: bool) -> None:
    assert why_not("chain", logits) is None


@pytest.mark.parametrize("logits", [False, True])
@pytest.mark.parametrize(
    "kind,said",
    [
        ("earlier outputs", "what blocks.2.linear sees differs by"),
        ("the embedding again", "what blocks.1.linear sees differs by"),
        ("state of the batch before", "what blocks.1.linear sees differs by"),
        ("between blocks", "what blocks.1.linear sees differs by"),
        ("backwards", "block 2 is not run once, after the one before it"),
    ],
)
def test_what_is_no_chain_is_said(kind: str, said: str, logits: bool) -> None:
    assert said in str(why_not(kind, logits))


def test_only_what_is_walked_must_be_a_chain() -> None:
    """Phase 1 stops at its last layer; phase 2 goes on to the logits."""
    assert why_not("earlier outputs", False, last=1) is None
    assert "sees" not in str(why_not("earlier outputs", True, last=1)) and "logits" in str(
        why_not("earlier outputs", True, last=1)
    )
    assert why_not("the embedding at the end", False) is None
    assert "the logits differs" in str(why_not("the embedding at the end", True))
