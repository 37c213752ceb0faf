"""What the variants of benchmarks/masked_step.py train: the model, its bases and its masks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

#: Mean over the demo's 20 target layers, keep_ratio 0.1 (phase 2 of `make demo`).
COLUMN_PROFILE = [0.8445, 0.579, 0.2806, 0.1373, 0.0477, 0.0191, 0.0114, 0.0051, 0.0023, 0.0016, 0.0006, 0.0003, 0.0002]
COLUMN_PROFILE += [0.0001] * 3 + [0.0] * 4
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "attn_o": "self_attn.o_proj",
}
INPUTS = {"attn_q": "attn", "attn_k": "attn", "attn_v": "attn", "ffn_up": "ffn", "ffn_gate": "ffn"}


def make_model(a: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=a.vocab,
        hidden_size=a.hidden,
        intermediate_size=a.ffn,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        max_position_embeddings=max(2048, a.tokens),
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device(a.device):
        return LlamaForCausalLM(config).to(getattr(torch, a.dtype))


def targets(a: argparse.Namespace, model: Any) -> list[tuple[str, str, int, nn.Linear]]:
    return [
        (f"model.layers.{i}.{MODULES[kind]}", kind, i, model.get_submodule(f"model.layers.{i}.{MODULES[kind]}"))
        for i in range(a.layers)
        for kind in a.layer_type.split(",")
    ]


def random_basis(n: int, r: int, seed: int, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, r, generator=generator, device=device))[0]


def random_mask(m: int, n: int, r: int, keep_ratio: float, seed: int, device: str) -> torch.Tensor:
    profile = torch.tensor(COLUMN_PROFILE, device=device)
    share = profile[(torch.arange(n, device=device) * len(COLUMN_PROFILE)) // n] * (keep_ratio / 0.1)
    share[r:] = 0.0
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(m, n, generator=generator, device=device) < share.clamp(max=1.0)


def write_artefacts(a: argparse.Namespace, root: Path, both: bool = False) -> None:
    """Random bases and masks; ``both``: with V of the outputs, of as many columns as W Σ Wᵀ has."""
    from warp_ds.method.mask import pack_bits
    from warp_ds.store.bases import BasisStore
    from warp_ds.store.files import write_json, write_tensors
    from warp_ds.store.layers import TargetLayer
    from warp_ds.store.masks import write_mask
    from warp_ds.store.metadata import BasisMetadata, MasksMetadata, layer_entry, metadata_dict

    with torch.device("meta"):
        shape_of = make_model(argparse.Namespace(**{**vars(a), "device": "meta", "layers": a.layers}))
    unit = getattr(a, "mask_unit", "entry")
    columns = inputs = 0
    basis = BasisMetadata("random", "benchmark", "none", "all", "benchmark", 0)
    masks = MasksMetadata(
        a.keep_ratio, "global", unit, "random", "random", str(root / "basis"), None, "benchmark", "none", "benchmark"
    )
    for name, kind, i, module in targets(a, shape_of):
        m, n = module.weight.shape
        r = max(1, round(a.rank_share * n))
        layer = TargetLayer(name, i, kind, m, n)
        file = f"layer_{i:02d}_{INPUTS.get(kind, kind)}_svd.safetensors"
        if file not in basis.bases:
            write_tensors(root / "basis" / file, {"U": random_basis(n, r, 7 * i + n, a.device), "S": torch.ones(r)})
            basis.bases[file] = {"n": n, "rank": r}
        basis.layers[name] = layer_entry(layer, file)
        if both:
            file, q = f"{layer.stem}_output_svd.safetensors", min(m, r)
            write_tensors(root / "basis" / file, {"U": random_basis(m, q, 7 * i + m + 1, a.device), "S": torch.ones(q)})
            basis.layers[name]["output"], basis.bases[file] = file, {"n": m, "rank": q}
        frozen = random_mask(m, n, r, a.keep_ratio, i, a.device)
        columns, inputs = columns + int(frozen[0].sum()), inputs + n
        write_mask(root / "masks", layer, pack_bits(frozen))
        masks.layers[name] = layer_entry(layer, layer.mask_file, frozen=int(frozen.sum()), wanted=None, threshold=None)
        masks.frozen, masks.entries = masks.frozen + int(frozen.sum()), masks.entries + m * n
    masks.keep_ratio = columns / inputs if unit == "column" else masks.frozen / masks.entries
    write_json(root / "basis" / "metadata.json", metadata_dict(basis))
    masks.basis_fingerprint = BasisStore(root / "basis").fingerprint()
    write_json(root / "masks" / "metadata.json", metadata_dict(masks))
