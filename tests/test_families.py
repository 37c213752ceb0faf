"""What ``--layer_type`` finds in transformers' families, or with what words it refuses; and that it is what it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL, CUT, FAMILIES, FFN, QKV, Family, table
from phase12_jobs import Tokenizer
from torch import Tensor, nn

from warp_ds.errors import ConfigError
from warp_ds.models.expert_rows import hold_in_rows
from warp_ds.models.layer_names import KNOWN_TYPES, in_ranges
from warp_ds.models.targets import find_blocks, find_targets, lacking_in_words, targets_and_lacking
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.batches import Samples
from warp_ds.zero.walk import BlockWalk


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_found_or_refused_by_name(name: str) -> None:
    family = FAMILIES[name]
    model, held = family.model(name), family.model(name)
    hold_in_rows(held)
    weights = dict(held.named_parameters(remove_duplicate=False))
    for kind in KNOWN_TYPES:
        if kind not in family.found:
            if kind in family.refused:
                with pytest.raises(ConfigError, match=family.refused[kind]):
                    find_targets(model, "all", kind)
            continue
        layers, lacking = targets_and_lacking(model, "all", kind)
        assert layers == targets_and_lacking(held, "all", kind)[0]
        assert in_ranges(sorted({layer.layer for layer in layers})) == family.found[kind], kind
        assert bool(lacking) == (family.found[kind] != ALL)
        for layer in layers:
            weight = weights[layer.parameter]
            assert layer.fits(tuple(weight.shape)) and layer.of(weight).shape == layer.shape
            stacked = kind in family.fused or layer.expert is not None
            assert bool(layer.rows) == stacked or name == "minimax"


def test_the_page_has_this_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "families.md").read_text(encoding="utf-8")
    assert table() in page, "python tests/families.py prints it"


def test_blocks_that_lack_a_type_are_counted() -> None:
    model = FAMILIES["lfm2"].model("lfm2")
    layers, lacking = targets_and_lacking(model, "0-2", "attn_q,ffn_down")
    assert [(layer.layer, layer.type) for layer in layers] == [(0, "ffn_down"), (1, "ffn_down"), (1, "attn_q"), (2, "ffn_down")]
    assert lacking_in_words(lacking) == "attn_q is in 1 of 3 blocks (not in 0,2)"
    with pytest.raises(ConfigError, match="has no attn_q in the 2 blocks that --target_layers 0,2 names"):
        find_targets(model, "0,2", "attn_q")


# ---------------------------------------------------------------- that rows are what they are called


class Seen:
    """What the output and down projections of one block get, where the outputs of some rows are changed on the way."""

    def __init__(self, name: str, family: Family):
        self.model = Family(family.more, {}, kind=name.partition(",")[0]).model(name, "cpu").double()
        self.layers = {layer.type: layer for kind in family.found for layer in find_targets(self.model, "1", kind)}

    def __call__(self, changed: str | None, change: Any) -> dict[str, Tensor]:
        seen: dict[str, Tensor] = {}
        handles = []
        for kind in ("attn_o", "ffn_down"):

            def note(module: nn.Module, inputs: tuple[Tensor, ...], kind: str = kind) -> None:
                seen[kind] = inputs[0].detach().clone()

            handles.append(self.model.get_submodule(self.layers[kind].module).register_forward_pre_hook(note))
        if changed is not None:
            layer = self.layers[changed]

            def alter(module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
                z = y.clone()
                for first, end in layer.rows or ((0, layer.m),):
                    z[..., first:end] = change(z[..., first:end])
                return z

            handles.append(self.model.get_submodule(layer.module).register_forward_hook(alter))
        with torch.no_grad():
            self.model(input_ids=torch.arange(3, 12)[None], use_cache=False)
        for handle in handles:
            handle.remove()
        return seen


def at_the_first_token(y: Tensor) -> Tensor:
    z = y.clone()
    z[:, 0] = 3 * z[:, 0].flip(-1) + 1
    return z


@pytest.mark.parametrize("name", CUT)
def test_rows_are_the_projections_that_they_are_called(name: str) -> None:
    """By what only that projection does: the first token sees itself alone, whatever its query, and through its value; later
    ones see it through its key, too. The up projection is multiplied in as it is, the gate is not."""
    see = Seen(name, CUT[name])
    plain = see(None, None)["attn_o"]
    moved = {kind: see(kind, at_the_first_token)["attn_o"] - plain for kind in QKV}
    first, later = ({kind: float(x[:, part].abs().max()) for kind, x in moved.items()} for part in (slice(1), slice(1, None)))
    assert first["attn_q"] < 1e-12 and later["attn_q"] < 1e-12
    assert first["attn_k"] < 1e-12 < 1e-6 < later["attn_k"]
    assert first["attn_v"] > 1e-3
    taken = [rows for kind in QKV for rows in see.layers[kind].rows]
    assert sum(end - begin for begin, end in taken) == see.layers["attn_q"].height
    if "ffn_gate" in see.layers:
        down = see(None, None)["ffn_down"]
        assert torch.allclose(see("ffn_up", lambda y: 2 * y)["ffn_down"], 2 * down, rtol=1e-9, atol=1e-15)
        assert not torch.allclose(see("ffn_gate", lambda y: 2 * y)["ffn_down"], 2 * down, rtol=1e-2)


# ---------------------------------------------------------------- the walk


WALKS = ["llama", "falcon_h1", "gemma3n_text", "gemma4_text, shared keys", "inkling2_text", "qwen3_next", "gpt_neox"]


@pytest.mark.parametrize("name", WALKS)
def test_a_family_is_walked_or_known_to_be_no_chain(name: str) -> None:
    family = FAMILIES[name]
    model = family.model(name, "cpu")
    layers: list[TargetLayer] = [x for kind in family.found if kind not in FFN for x in find_targets(model, "all", kind)]
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (9, 12, 7)]
    walk = BlockWalk(model, list(find_blocks(model)[1]))
    for logits in (False, True):
        reason = walk.why_not(Samples(rows, Tokenizer(), "cpu").few(), layers, logits)
        assert (reason is None) == family.walk, reason
