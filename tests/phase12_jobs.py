"""What the ranks of the phase 1 and phase 2 tests run, and the samples they run it on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from tiny_models import SIZES, tiny_model

from warp_ds.artifacts import BasisStore, write_tensors
from warp_ds.config import BasisArguments, ImportanceArguments
from warp_ds.phases.basis import compute_basis
from warp_ds.phases.importance import compute_masks, importance_scores
from warp_ds.phases.targets import find_targets
from warp_ds.zero.load import load_sharded
from warp_ds.zero.runtime import barrier, rank, zero3_config

ALL_TYPES = "ffn_down,ffn_up,ffn_gate,attn_q,attn_k,attn_v,attn_o"
FINGERPRINTS = {"model": "m", "data": "d"}


class Tokenizer:
    """All that the phases ask of one."""

    eos_token_id = 2
    pad_token_id = 0


def make_rows(count: int = 11, longest: int = 20, silent: tuple[int, ...] = (4, 5)) -> list[dict[str, list[int]]]:
    """Samples of all lengths; those in ``silent`` have no response token."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for i in range(count):
        length = 5 + int(torch.randint(longest - 4, (1,), generator=generator))
        ids = torch.randint(3, SIZES["vocab_size"], (length,), generator=generator).tolist()
        prompt = length if i in silent else 2 + i % 3
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def save_model(directory: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(family, dtype).save_pretrained(directory)
    return directory


def basis_arguments(model: Path, **more: Any) -> BasisArguments:
    common = {"model_name": str(model), "dtype": "float32", "device": "cpu", "layer_type": ALL_TYPES, "batch_size": 2}
    return BasisArguments(**{**common, **more})


def importance_arguments(model: Path, **more: Any) -> ImportanceArguments:
    common = {"model_name": str(model), "dtype": "float32", "device": "cpu", "layer_type": ALL_TYPES,
              "batch_size": 2, "importance_batch_size": 2}
    return ImportanceArguments(**{**common, **more})


def load(arguments: Any) -> tuple[Any, list[Any]]:
    model = load_sharded(arguments.model_name, ds_config=zero3_config(arguments), dtype=arguments.torch_dtype,
                         progress=False).eval()
    return model, find_targets(model, arguments.target_layers, arguments.layer_type)


def basis_job(cases: list[tuple[BasisArguments, list[Any], Path]]) -> list[dict[str, Any]]:
    """Phase 1 of each (arguments, rows, directory); the metadata of each."""
    found = []
    for arguments, rows, directory in cases:
        model, layers = load(arguments)
        metadata = compute_basis(model, Tokenizer(), layers, rows, arguments, directory, FINGERPRINTS)
        found.append(dataclasses.asdict(metadata))
    return found


def scores_job(cases: list[tuple[ImportanceArguments, list[Any], Path | None, Path]]) -> list[list[str]]:
    """This rank's rows of S of each (arguments, rows, basis, directory), in directory/rank_<r>.safetensors; notes."""
    found: list[list[str]] = []
    for arguments, rows, basis, directory in cases:
        model, layers = load(arguments)
        notes: list[str] = []
        store = BasisStore(basis) if basis else None
        scores = importance_scores(model, Tokenizer(), layers, rows, store, arguments, notes)
        write_tensors(directory / f"rank_{rank()}.safetensors", scores)
        found.append(notes)
        barrier()
    return found


def masks_job(cases: list[tuple[ImportanceArguments, list[Any], Path | None, Path]]) -> list[dict[str, Any]]:
    """Phase 2 of each (arguments, rows, basis, directory); the metadata of each."""
    found = []
    for arguments, rows, basis, directory in cases:
        model, layers = load(arguments)
        store = BasisStore(basis) if basis else None
        fingerprints = {**FINGERPRINTS, **({"basis": store.fingerprint()} if store else {})}
        metadata = compute_masks(model, Tokenizer(), layers, rows, store, arguments, directory, fingerprints)
        found.append(dataclasses.asdict(metadata))
    return found
