"""What the tests of the masked step share: tiny models with odd sizes, bases and masks for them, dense references."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from dense_training import DenseAdamW, complete_basis, train
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from warp_ds.method.mask import pack_bits, unpack_bits
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import write_json, write_tensors
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore, write_mask
from warp_ds.store.metadata import BasisMetadata, MasksMetadata, layer_entry, metadata_dict

MODULES = {"ffn_down": "mlp.down_proj", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj"}


def two_blocks(hidden_size: int, intermediate_size: int, num_attention_heads: int, dtype: torch.dtype) -> PreTrainedModel:
    """A Llama of two blocks and 50 tokens, one key-value head of two."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_attention_heads": num_attention_heads}
    fixed = {"vocab_size": 50, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, **fixed, tie_word_embeddings=False)).to(dtype)


def odd_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Sizes that no world size above 1 divides: down_proj is 15 x 21, q_proj 6 x 15; a row of k_proj, 2 x 15, lies on
    up to three ranks of four."""
    return two_blocks(15, 21, 3, dtype)


def nano_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """down_proj is 3 x 3 and q_proj 2 x 3: of four ranks the last holds nothing but padding of either."""
    return two_blocks(3, 3, 1, dtype)


def wide_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Large enough for DeepSpeed to swap its optimizer to NVMe: sub-groups of 1 MiB on each of two ranks."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=129,
            intermediate_size=1401,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=2,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    ).to(dtype)


MODELS = {"odd": odd_model, "nano": nano_model, "wide": wide_model}


@dataclass
class Artefacts:
    """A basis and masks directory, and what is in them, by the name of the weight."""

    root: Path
    bases: dict[str, Tensor | None]
    frozen: dict[str, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)
    """V [m, q], where there is an output basis."""

    @property
    def basis(self) -> Path:
        return self.root / "basis"

    @property
    def masks(self) -> Path:
        return self.root / "masks"


def write_artefacts(
    root: Path,
    model: nn.Module,
    ranks: dict[str, int] | None = None,
    share: float = 0.3,
    seed: int = 1,
    basis: str = "activation",
    model_fingerprint: str = "f",
    unit: str = "entry",
    outputs: float = 0.0,
) -> Artefacts:
    """Random bases of at most ``ranks[layer type]`` columns and random masks; columns beyond the rank stay free.

    By default down_proj has reflectors (5 of 21 columns), q_proj a dense completed basis (10 of 15), k_proj all of it.
    ``outputs``: of how many directions of the outputs, as a share, an output basis has columns.
    """
    ranks = {"ffn_down": 5, "attn_q": 10, "attn_k": 99} if ranks is None else ranks
    g = torch.Generator().manual_seed(seed)
    bases, masks = (
        BasisMetadata("activation", model_fingerprint, "d", "all", "tiny", 10),
        MasksMetadata(share, "global", unit, "importance", basis, str(root / "basis"), None, model_fingerprint, "d", "tiny"),
    )
    params, units = dict(model.named_parameters()), [0, 0]
    for i in range(2):
        for kind, r in ranks.items():
            name = f"model.layers.{i}.{MODULES[kind]}"
            m, n = params[f"{name}.weight"].shape
            target = TargetLayer(name, i, kind, m, n)
            u = torch.linalg.qr(torch.randn(n, n, generator=g, dtype=torch.float64))[0][:, : min(n, r)].float()
            frozen = torch.rand(m, n, generator=g) < share
            if basis != "identity":
                file = f"{target.stem}_svd.safetensors"
                write_tensors(root / "basis" / file, {"U": u, "S": torch.ones(u.shape[1])})
                bases.layers[name], bases.bases[file] = layer_entry(target, file), {"n": n, "rank": u.shape[1]}
                frozen[:, u.shape[1] :] = False
            if outputs:
                v = torch.linalg.qr(torch.randn(m, m, generator=g, dtype=torch.float64))[0][
                    :, : max(1, int(m * outputs))
                ].float()
                file = f"{target.stem}_output_svd.safetensors"
                write_tensors(root / "basis" / file, {"U": v, "S": torch.ones(v.shape[1])})
                bases.layers[name]["output"], bases.bases[file] = file, {"n": m, "rank": v.shape[1]}
            if unit == "column":
                frozen = frozen[:1].expand(m, n)
            elif unit == "row":
                frozen = frozen[:, :1].expand(m, n)
            along = frozen[:, 0] if unit == "row" else frozen[0]
            units[0], units[1] = units[0] + int(along.sum()), units[1] + len(along)
            write_mask(root / "masks", target, pack_bits(frozen))
            masks.layers[name] = layer_entry(target, target.mask_file, frozen=int(frozen.sum()), wanted=None, threshold=None)
            masks.frozen, masks.entries = masks.frozen + int(frozen.sum()), masks.entries + frozen.numel()
    masks.keep_ratio = units[0] / units[1] if unit in ("column", "row") else masks.frozen / masks.entries
    if basis != "identity":
        write_json(root / "basis" / "metadata.json", metadata_dict(bases))
        masks.basis_fingerprint = BasisStore(root / "basis").fingerprint()
    write_json(root / "masks" / "metadata.json", metadata_dict(masks))
    return read_artefacts(root)


def read_artefacts(root: Path) -> Artefacts:
    masks = MaskStore(root / "masks")
    identity = masks.metadata.basis == "identity"
    store = None if identity else BasisStore(root / "basis")
    return Artefacts(
        root,
        {f"{t.name}.weight": None if store is None else store.columns(t.name)[0] for t in masks.layers},
        {f"{t.name}.weight": unpack_bits(masks.packed(t.name), t.n) for t in masks.layers},
        {}
        if store is None or not store.two_sided
        else {f"{t.name}.weight": store.output_columns(t.name)[0] for t in masks.layers},
    )


def token_batches(count: int, size: int = 12, length: int = 12) -> list[Tensor]:
    """Global batches of token ids; every sample counts the same number of tokens, so means of means are means."""
    return [torch.randint(0, 50, (size, length), generator=torch.Generator().manual_seed(10 + i)) for i in range(count)]


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, labels=ids).loss


# ---------------------------------------------------------------- references


class DenseAnyOptimizer:
    """Any optimizer of torch that acts entry by entry, on dense C = W U in fp64; frozen entries are put back by force.

    Same duties as DenseAdamW, and independent of it.
    """

    def __init__(
        self,
        named: dict[str, Tensor],
        artefacts: Artefacts,
        make: Callable[[list[dict[str, Any]]], Any],
        decay: dict[str, float],
        clip: float,
        lr: dict[str, float] | None = None,
    ):
        bases = artefacts.bases
        self.full = {
            k: complete_basis(u) if u is not None else torch.eye(named[k].shape[1], dtype=torch.float64)
            for k, u in bases.items()
        }
        self.frozen, self.clip, self.norm, self.removed = artefacts.frozen, clip, 0.0, 0.0
        self.value = {k: nn.Parameter(p.double() @ self.full[k] if k in self.full else p.double()) for k, p in named.items()}
        self.start = {k: self.value[k].detach().clone() for k in self.frozen}
        self.optimizer = make(
            [{"params": [p], "weight_decay": decay.get(k, 0.0), **({"lr": lr[k]} if lr else {})} for k, p in self.value.items()]
        )

    @torch.no_grad()
    def step(self, gradients: dict[str, Tensor]) -> None:
        before = after = 0.0
        for k, p in self.value.items():
            g = gradients[k].double() @ self.full[k] if k in self.full else gradients[k].double()
            if k in self.frozen:
                before += float(g.square().sum())
                g = g.masked_fill(self.frozen[k], 0.0)
                after += float(g.square().sum())
            p.grad = g
        self.removed = ((before - after) / before) ** 0.5 if before else 0.0
        self.norm = sum(float(p.grad.square().sum()) for p in self.value.values()) ** 0.5
        if self.clip:
            for p in self.value.values():
                p.grad /= max(1.0, (self.norm + 1e-6) / self.clip)
        self.optimizer.step()
        for k, mask in self.frozen.items():
            self.value[k][mask] = self.start[k][mask]

    def weights(self) -> dict[str, Tensor]:
        return {k: (v.detach() @ self.full[k].T if k in self.full else v.detach()) for k, v in self.value.items()}


def dense_adamw(
    model: nn.Module,
    artefacts: Artefacts,
    clip: float,
    decay: float | dict[str, float],
    lr: float = 1e-2,
    eps: float = 1e-4,
    coupled: bool = False,
) -> DenseAdamW:
    named = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    decays = decay if isinstance(decay, dict) else dict.fromkeys(named, decay)
    return DenseAdamW(named, artefacts.bases, artefacts.frozen, lr, eps, decays, clip, coupled=coupled)


def reference_losses(model: nn.Module, batches: list[Tensor], optimizer: Any) -> list[float]:
    """Loss of every global batch before its step; ``optimizer`` then holds the trained weights."""
    return train(model, [k for k, p in model.named_parameters() if p.requires_grad], batches, optimizer, loss_of)


def train_only(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """Turns every other parameter's requires_grad off."""
    chosen = set(names)
    for name, param in model.named_parameters():
        param.requires_grad_(name in chosen)
    return model
