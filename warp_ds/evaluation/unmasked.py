"""What a certificate does not claim, listed: tensors without a mask, configuration, tokenizer: changed, or the same."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from warp_ds.store.digests import digest_parts, whole_file
from warp_ds.store.files import parse_json, read_json
from warp_ds.store.fingerprints import VOLATILE
from warp_ds.store.layers import Ranges

#: The first that matches a tensor's name.
KINDS = {
    "biases": r"\.bias$",
    "norms": r"norm[^.]*\.weight$|(^|\.)ln_\w+\.weight$",
    "embeddings": r"(^|\.)(embed\w*|wte|wpe)\.weight$",
    "output layer (lm_head)": r"(^|\.)(lm_head|embed_out|output)\.weight$",
    "other layers": r"",
}
FILES = {
    "generation_config.json": ("generation_config.json",),
    "tokenizer": (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
    ),
    "chat template": ("chat_template.jinja", "chat_template.json"),
}
CONFIG = "config.json"
SAME, CHANGED = "the same", "changed"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a model directory as a certificate compares it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    sha256: str


def stored(tensor: Tensor) -> StoredTensor:
    """A tensor that is part of a stored one."""
    content = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return StoredTensor(tensor.dtype, tuple(tensor.shape), hashlib.sha256(content).hexdigest())


def rows_of(tensor: Tensor, rows: Ranges) -> Tensor:
    """The rows of a tensor seen as [rows, its last dimension]."""
    whole = tensor.view(-1, tensor.shape[-1])
    return torch.cat([whole[first:end] for first, end in rows])


@dataclass(frozen=True)
class Difference:
    """Whether one kind of what no mask covers is the same in both models."""

    what: str
    state: str
    """SAME or CHANGED"""
    detail: str


def config_files() -> list[str]:
    """Names of the files that are looked at beside the weights."""
    return [CONFIG, *(name for names in FILES.values() for name in names)]


def compare_tensors(before: Mapping[str, StoredTensor], after: Mapping[str, StoredTensor], read: Any) -> list[Difference]:
    """Of each kind of tensor; ``read`` (name -> both tensors) where dtypes differ."""
    differences = []
    for kind in KINDS:
        names = [name for name in sorted(before.keys() | after.keys()) if kind_of(name) == kind]
        changed = [_named(name, before, after) for name in names if not _same(name, before, after, read)]
        shown = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        detail = f"{len(changed)} of {len(names)}: {shown}" if changed else f"{len(names)}" if names else "none in either"
        differences.append(Difference(kind, CHANGED if changed else SAME, detail))
    return differences


def kind_of(name: str) -> str:
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


def _named(name: str, before: Mapping[str, StoredTensor], after: Mapping[str, StoredTensor]) -> str:
    return name + (" (only before)" if name not in after else " (only after)" if name not in before else "")


def _same(name: str, before: Mapping[str, StoredTensor], after: Mapping[str, StoredTensor], read: Any) -> bool:
    if name not in before or name not in after or before[name].shape != after[name].shape:
        return False
    if before[name].dtype == after[name].dtype:
        return before[name].sha256 == after[name].sha256
    old, new = read(name)
    return _equal(old, new)


def _equal(old: Tensor, new: Tensor) -> bool:
    return old.dtype.is_floating_point == new.dtype.is_floating_point and torch.equal(old.double(), new.double())


def compare_files(before: Path, after: Path) -> list[Difference]:
    """Of configuration, tokenizer and chat template."""
    old, new = (read_json(directory / CONFIG) for directory in (before, after))
    keys = [key for key in sorted(old.keys() | new.keys()) if key not in VOLATILE and old.get(key) != new.get(key)]
    differences = [Difference(CONFIG, CHANGED if keys else SAME, ", ".join(keys))]
    for what, names in FILES.items():
        changed = [name for name in names if _content(before / name) != _content(after / name)]
        there = any(_content(before / name) is not None for name in names)
        detail = ", ".join(changed) or ("" if there else "none in either")
        differences.append(Difference(what, CHANGED if changed else SAME, detail))
    return differences


def _content(path: Path) -> Any:
    """What a file says, without what only says who wrote it; None where there is none."""
    if not os.path.isfile(path):
        return None
    if path.suffix == ".json":
        try:
            value = parse_json(path.read_bytes())
            return {k: v for k, v in value.items() if k not in VOLATILE} if isinstance(value, dict) else value
        except ValueError:
            pass
    return digest_parts([whole_file(path)])[0].sha256
