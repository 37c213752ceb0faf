"""Experts that saw fewer tokens than they have inputs, or none: log, metadata and report say so; nothing more is frozen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from phase3_jobs import make_model, phase12
from ranks import run_ranks
from rows_reference import read_parts
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from warp_ds.report import mask_section, sections
from warp_ds.report.runs import Runs
from warp_ds.report.tables import Table

EXPERTS, INNER = 24, 20


def crowded(vocabulary: int) -> Any:
    """More experts than a few refusals have tokens for."""
    sizes = dict(hidden_size=24, intermediate_size=28, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)
    sizes |= dict(num_experts=EXPERTS, moe_intermediate_size=INNER, num_experts_per_tok=1, head_dim=8)
    ends = dict(pad_token_id=2, bos_token_id=0, eos_token_id=1, max_position_embeddings=256)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=vocabulary, **sizes, **ends))


def job(root: Path) -> str:
    import logging

    kept: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: kept.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("warp_ds.phases.basis").addHandler(handler)
    phase12(root, root / "out", "experts_down")
    return "\n".join(kept)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("crowded")
    make_model(made, crowded)
    return made


@pytest.fixture(scope="module")
def log(root: Path) -> str:
    return run_ranks(2, job, root)[0]


def test_they_are_said_and_nothing_of_the_complement_is_frozen(root: Path, log: str) -> None:
    basis = (root / "out" / "phase1_latest").resolve()
    entries = json.loads((basis / "basis" / "metadata.json").read_text())["bases"]
    few = {file: entry for file, entry in entries.items() if entry["tokens"] < INNER}
    unseen = [file for file, entry in few.items() if not entry["tokens"]]
    assert len(entries) == 2 * EXPERTS and unseen and len(unseen) < len(few) < len(entries), "the case is no such case"
    assert f"{len(few)} bases of experts are of fewer tokens of the safety set than they have inputs" in log
    assert all(entry["rank"] <= max(1, entry["tokens"]) for entry in few.values())
    parts = read_parts(root / "out")
    frozen_of_few = 0
    for name, part in parts.items():
        rank = part.basis.shape[1]
        assert not part.frozen[:, rank:].any(), name
        tokens = entries[f"layer_{int(name.split('.')[2]):02d}_{name.partition('[')[2].rstrip(']')}_svd.safetensors"]["tokens"]
        assert rank <= max(1, tokens)
        assert tokens or not part.frozen.any(), name
        frozen_of_few += int(part.frozen.sum()) if 0 < tokens < INNER else 0
    assert frozen_of_few > 0  # of what they saw, there is
    masks = (root / "out" / "phase2_latest").resolve()
    (drawn,) = mask_section.masks(Runs([masks]), root)
    assert len(drawn.blocks) >= 4  # also of experts that have no score at all
    (table,) = [block for block in drawn.blocks if isinstance(block, Table)]
    frozen = sorted(float(p.frozen.float().mean()) for name, p in parts.items() if "layers.1." in name)
    least, median, most = frozen[0], (frozen[EXPERTS // 2 - 1] + frozen[EXPERTS // 2]) / 2, frozen[-1]
    assert [row[0] for row in table.rows] == [
        f"layer_0{b}_experts_down, {EXPERTS} experts: least, median, most" for b in (0, 1)
    ]
    assert table.rows[1][1] == f"{least:.1%}, {median:.1%}, {most:.1%}" and least < most
    (note,) = [b.text for s in sections.bases(Runs([basis]), root) for b in s.blocks if isinstance(b, sections.Note)]
    shown = sections._drawn(entries)
    assert len(shown) == 2 and all(entries[file]["tokens"] >= INNER for file in shown)
    assert note.startswith(f"{len(few)} of {2 * EXPERTS} bases of experts are of fewer safety tokens")
