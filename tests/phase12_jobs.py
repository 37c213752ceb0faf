"""What the ranks of the phase 1 and phase 2 tests run, and the samples they run it on."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from tiny_models import SIZES, tiny_model
from torch import Tensor

from warp_ds.cluster.dealing import LeastLoaded
from warp_ds.cluster.processes import barrier, rank, world_size
from warp_ds.errors import OtherRankError
from warp_ds.flags.arguments import BasisArguments, ImportanceArguments
from warp_ds.models.targets import find_targets
from warp_ds.phases import importance
from warp_ds.phases.basis import compute_basis, run_basis
from warp_ds.phases.importance import compute_masks, importance_scores
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import write_tensors
from warp_ds.store.layers import TargetLayer
from warp_ds.zero import collect
from warp_ds.zero.collect import NotFinite, Traffic, deliver
from warp_ds.zero.load import load_sharded
from warp_ds.zero.scores import RowScores
from warp_ds.zero.select import choose
from warp_ds.zero.settings import zero3_config
from warp_ds.zero.walk import BlockWalk

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
    common = {
        "model_name": str(model),
        "dtype": "float32",
        "device": "cpu",
        "layer_type": ALL_TYPES,
        "batch_size": 2,
        "importance_batch_size": 2,
    }
    return ImportanceArguments(**{**common, **more})


def load(arguments: Any) -> tuple[Any, list[Any]]:
    model = load_sharded(
        arguments.model_name,
        ds_config=zero3_config(arguments),
        dtype=arguments.torch_dtype,
        experts_in_rows=True,
        progress=False,
    ).eval()
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
        scores = importance_scores(model, Tokenizer(), layers, rows, store, arguments, notes, directory)
        write_tensors(directory / f"rank_{rank()}.safetensors", scores)
        found.append(notes)
        barrier()
    return found


def held_job(cases: list[tuple[ImportanceArguments, list[Any], Path, Path]]) -> list[int]:
    """The most coefficients of S that this rank held at once, of each (arguments, rows, basis, directory)."""
    found, original = [], RowScores.of
    for arguments, rows, basis, directory in cases:
        model, layers = load(arguments)
        counts: list[int] = []

        def counted(self: RowScores, name: str, counts: list[int] = counts) -> Tensor:
            of = original(self, name)
            held = [*self._sums.values(), *(self._compared.values() if self.unit == "entry" else [])]
            counts.append(sum(rows.numel() for rows in held))
            return of

        RowScores.of = counted  # type: ignore[method-assign]
        try:
            importance_scores(model, Tokenizer(), layers, rows, BasisStore(basis), arguments, [], directory)
        finally:
            RowScores.of = original  # type: ignore[method-assign]
        found.append(max(counts))
        barrier()
    return found


def masks_job(cases: list[tuple[ImportanceArguments, list[Any], Path | None, Path]]) -> list[dict[str, Any]]:
    """Phase 2 of each (arguments, rows, basis, directory); the metadata of each."""
    found = []
    for arguments, rows, basis, directory in cases:
        model, layers = load(arguments)
        store = BasisStore(basis) if basis else None
        fingerprints = {**FINGERPRINTS, **({"basis": store.fingerprint()} if store else {})}
        metadata = compute_masks(
            model, Tokenizer(), layers, rows if isinstance(rows, tuple) else [rows], store, arguments, directory, fingerprints
        )
        found.append(dataclasses.asdict(metadata))
    return found


def announced_job(phase: str, begun: Path, *case: Any) -> float:
    """One case of ``basis_job`` or ``masks_job``, which touches ``begun`` as it begins; its seconds from then."""
    model, layers = load(case[0])
    barrier()
    started = time.perf_counter()
    begun.touch()
    if phase == "basis":
        arguments, rows, directory = case
        compute_basis(model, Tokenizer(), layers, rows, arguments, directory, FINGERPRINTS)
    else:
        arguments, rows, basis, directory = case
        store = BasisStore(basis)
        compute_masks(
            model, Tokenizer(), layers, [rows], store, arguments, directory, {**FINGERPRINTS, "basis": store.fingerprint()}
        )
    return time.perf_counter() - started


def whole_passes_job(cases: list[tuple[ImportanceArguments, list[Any], Path | None, Path]]) -> list[list[str]]:
    """``scores_job`` for a model that cannot be walked."""
    BlockWalk.why_not = lambda self, *_, **__: "the test says so"  # type: ignore[method-assign]
    return scores_job(cases)


def choose_job(cases: list[tuple[list[list[torch.Tensor]], list[int]]]) -> list[list[list[tuple[Any, float | None]]]]:
    """This rank's (mask, lowest frozen score) of each block, of each (groups of whole score matrices, wanted)."""
    found = []
    for groups, wanted in cases:
        local = [[torch.tensor_split(scores, world_size())[rank()] for scores in group] for group in groups]
        chosen = choose(local, wanted)
        found.append(
            [
                [(choice.mask(scores).numpy(), choice.value) for choice, scores in zip(choices, blocks, strict=True)]
                for choices, blocks in zip(chosen, local, strict=True)
            ]
        )
    return found


def deliver_job(x: torch.Tensor, route: str, owner: int, dtype: torch.dtype) -> dict[str, Any] | None:
    """What the owner gets of tokens [T, n] that are split unevenly over the ranks (rank 0 has none beyond one rank)."""
    n = x.shape[1]
    cuts = [0, 0, 5, 6, len(x)] if world_size() > 1 else [0, len(x)]
    cuts = cuts[: world_size()] + [len(x)]
    covariance = collect.Covariance(n) if route == collect.REDUCE else None
    found = collect.LayerInput([TargetLayer("layer", 0, "ffn_down", 3, n)], route, covariance)
    for piece in x[cuts[rank()] : cuts[rank() + 1]].to(dtype).split(4):
        found.add(piece)
    traffic = Traffic()
    tokens, delivered = deliver(found, owner, dtype, traffic)
    if delivered is None:
        return {"tokens": tokens, "sent": traffic.bytes}
    tensors = {"x": delivered.x, "sigma": delivered.sigma}
    return {"tokens": tokens, "sent": traffic.bytes, **{k: t.float().numpy() for k, t in tensors.items() if t is not None}}


def failing_job(phase: str, spoil: str, directory: Path, arguments: Any, rows: list[Any]) -> str:
    """The message with which a phase stops on this rank when sample 6 makes ``spoil`` of block 1 infinite."""
    model, layers = load(arguments)
    module = model.get_submodule("model.layers.1.mlp.down_proj")
    marked = torch.tensor(rows[6]["input_ids"])

    def of_marked(batch_ids: torch.Tensor) -> torch.Tensor:
        return (
            (batch_ids[:, : len(marked)] == marked).all(dim=1)
            if batch_ids.shape[1] >= len(marked)
            else torch.zeros(len(batch_ids), dtype=torch.bool)
        )

    batches: list[torch.Tensor] = []
    original = collect.Samples.batch

    def remember(self: Any, indices: Any) -> Any:
        batch = original(self, indices)
        batches.append(batch.input_ids)
        return batch

    collect.Samples.batch = remember  # type: ignore[method-assign]
    if spoil == "inputs":

        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
            x = inputs[0].clone()
            ids = next(b for b in reversed(batches) if b.shape == x.shape[:2])
            x[of_marked(ids)] = float("inf")
            return (x,)

        module.register_forward_pre_hook(hook)
    else:

        def tap(_: Any, inputs: Any, y: torch.Tensor) -> torch.Tensor:
            ids = next(b for b in reversed(batches) if b.shape == y.shape[:2])
            rows_of = of_marked(ids)
            if y.requires_grad:
                y.register_hook(lambda g: torch.where(rows_of[:, None, None], float("nan"), g))
            return y

        model.get_submodule("model.layers.1.mlp").register_forward_hook(tap)
    try:
        if phase == "basis":
            compute_basis(model, Tokenizer(), layers, rows, arguments, directory, FINGERPRINTS)
        else:
            compute_masks(model, Tokenizer(), layers, [rows], None, arguments, directory, FINGERPRINTS)
    except (NotFinite, OtherRankError) as error:
        return str(error)
    return "no error"


def stopping_basis_job(arguments: BasisArguments, rows: list[Any], directory: Path, stop_after: int) -> None:
    """Phase 1 whose rank 0 dies at once when ``stop_after`` basis files are whole (never, for a large number)."""
    import os

    from warp_ds.phases import basis

    original = basis.write_tensors
    written = 0

    def write(path: Path, *more: Any) -> None:
        nonlocal written
        if rank() == 0 and written == stop_after:
            (path.parent / f".{path.name}.deadbeef.warp_ds.tmp").write_bytes(b"half")
            os._exit(9)
        original(path, *more)
        written += 1

    basis.write_tensors = write  # type: ignore[assignment]
    basis_job([(arguments, rows, directory)])


def stopping_masks_job(arguments: ImportanceArguments, rows: list[Any], store: Path, directory: Path, stop_after: int) -> None:
    """Phase 2, saving its scores after every step, whose last rank dies after ``stop_after`` savings."""
    import os

    importance.SAVE_SECONDS = -1.0
    original = importance.SavedScores.save
    saved = 0

    def save(self: Any, scores: Any, batches: int) -> None:
        nonlocal saved
        if rank() == world_size() - 1 and saved == stop_after:
            os._exit(9)
        original(self, scores, batches)
        saved += 1

    importance.SavedScores.save = save  # type: ignore[method-assign]
    masks_job([(arguments, rows, store, directory)])


def owners_of(costs: list[float], ranks: int) -> list[int]:
    owners = LeastLoaded(ranks)
    return [owners.next(cost) for cost in costs]


def run_job(*phases: Any) -> list[str]:
    """The run directories of phases started with these arguments."""
    run = {BasisArguments: run_basis, ImportanceArguments: importance.run_importance}
    return [str(run[type(arguments)](arguments)) for arguments in phases]
