"""OSFT's left side: under ``--left_projection`` no step moves W along the left singular directions of its frozen columns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_training import DenseAdamW, task_loss, train
from phase3_jobs import LAYERS, common, losses, make_model, phase3
from ranks import run_ranks
from safetensors.torch import load_file
from test_rows_reference import phi3
from transformers import AutoModelForCausalLM, AutoTokenizer

from warp_ds.cluster import processes
from warp_ds.errors import ConfigError, UnsupportedSetting
from warp_ds.flags.arguments import BasisArguments, ImportanceArguments
from warp_ds.phases.basis import run_basis
from warp_ds.phases.importance import run_importance
from warp_ds.protection import protect_optimizer
from warp_ds.store.masks import MaskStore


def artefacts(root: Path, layers: str = LAYERS) -> None:
    """OSFT's masks: the leading right singular vectors of W."""
    shared = common(root, root / "artefacts", layer_type=layers, safety_data=str(root / "refusals_fit.jsonl"), safety_samples=0)
    run_basis(BasisArguments(**shared, basis="weight"))
    run_importance(ImportanceArguments(**shared, keep_ratio=0.3, mask_unit="column", score="singular_value"))


def jobs(root: Path, output: Path) -> dict[str, Any]:
    kinds: dict[str, dict[str, Any]] = {"both": {"left_projection": True}}
    if processes.world_size() == 2:
        kinds |= {"owner": {"left_projection": True, "basis_placement": "owner"}, "right": {}}
    made = {name: phase3(root, root / "artefacts", output / name, **more) for name, more in kinds.items()}
    return {name: (losses(run), str(run / "model" / "model.safetensors")) for name, run in made.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("left")
    make_model(path)
    run_ranks(1, artefacts, path)
    return path


@pytest.fixture(scope="module")
def made(root: Path) -> dict[int, dict[str, Any]]:
    return {world: run_ranks(world, jobs, root, root / f"world{world}")[0] for world in (1, 2, 3)}


def counts(root: Path) -> dict[str, int]:
    """Frozen columns of each masked parameter."""
    masks = (root / "artefacts" / "phase2_latest" / "masks").resolve()
    layers = json.loads((masks / "metadata.json").read_text())["layers"]
    return {f"{name}.weight": entry["frozen"] // entry["shape"][0] for name, entry in layers.items()}


class Osft(DenseAdamW):
    """AdamW on W V, V the right singular vectors: gradients and what is free without their part in U_h."""

    def __init__(self, named: dict[str, torch.Tensor], k: dict[str, int], bases: dict[str, torch.Tensor]):
        self.left: dict[str, torch.Tensor] = {}
        frozen = {}
        for name, w in named.items():
            self.left[name] = torch.from_numpy(np.linalg.svd(w.double().numpy())[0][:, : k[name]].copy())
            frozen[name] = (torch.arange(w.shape[1]) < k[name]).expand(w.shape)
        super().__init__(named, bases, frozen, lr=2e-3, eps=1e-4, decay=dict.fromkeys(named, 0.1), clip=0.5)

    def _without(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x - self.left[name] @ (self.left[name].T @ x)

    def step(self, gradients: dict[str, torch.Tensor]) -> None:
        super().step({name: self._without(name, g.double()) for name, g in gradients.items()})
        for name, value in self.value.items():
            self.value[name] = torch.where(self.frozen[name], value, self._without(name, value))


@pytest.fixture(scope="module")
def reference(root: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float64)
    named = {name: p.detach().clone() for name, p in model.named_parameters() if name in counts(root)}
    basis = (root / "artefacts" / "phase1_latest" / "basis").resolve()
    files = json.loads((basis / "metadata.json").read_text())["layers"]
    # As stored: Adam's path depends on which directions complete V where W has fewer rows than columns.
    bases = {name: load_file(basis / files[name.removesuffix(".weight")]["file"])["U"] for name in named}
    optimizer = Osft(named, counts(root), dict(bases))
    loss = task_loss(root, AutoTokenizer.from_pretrained(root / "m"))
    return train(model, list(named), [torch.zeros(0)] * 5, optimizer, loss), optimizer.weights()


def kept(root: Path, path: str) -> list[tuple[float, float]]:
    """(|U_hᵀ ΔW| / |ΔW|, |ΔW V_h| / |ΔW|) of each masked layer."""
    before, after, found = load_file(root / "m" / "model.safetensors"), load_file(path), []
    for name, k in counts(root).items():
        u, _, vh = torch.linalg.svd(before[name].double())
        moved = after[name].double() - before[name].double()
        found.append((float((u[:, :k].T @ moved).norm() / moved.norm()), float((moved @ vh[:k].T).norm() / moved.norm())))
    return found


@pytest.mark.parametrize("world, name", [(1, "both"), (2, "both"), (3, "both"), (2, "owner")])
def test_both_sides_are_those_of_the_dense_reference(root: Path, made: Any, reference: Any, world: int, name: str) -> None:
    said, weights = reference
    found, path = made[world][name]
    assert found == pytest.approx(said, abs=1e-6)
    trained = load_file(path)
    # As in test_phase3_reference; signs of singular vectors do not matter to Adam on whole columns.
    assert max(float((trained[name].double() - w).abs().max()) for name, w in weights.items()) < 1e-5
    left, right = map(max, zip(*kept(root, path), strict=True))
    assert left < 2e-5 and right < 2e-5, "fp32 weights of 0.02 that move by 0.01: rounding"


def test_the_right_side_alone_moves_along_the_left(root: Path, made: Any) -> None:
    left, right = zip(*kept(root, made[2]["right"][1]), strict=True)
    assert min(left) > 0.1 and max(right) < 2e-5


def test_an_optimizer_without_deepspeed(root: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "m")
    masked = [p for name, p in model.named_parameters() if name in counts(root)]
    optimizer = torch.optim.AdamW(masked, lr=2e-3, weight_decay=0.1)
    masks = root / "artefacts" / "phase2_latest" / "masks"
    step = protect_optimizer(model, optimizer, None, masks, left_projection=True)
    for seed in range(3):
        ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(seed))
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    step.release()
    model.save_pretrained(tmp_path / "trained")
    left, right = map(max, zip(*kept(root, str(tmp_path / "trained" / "model.safetensors")), strict=True))
    assert left < 2e-5 and right < 2e-5


def of_fused(root: Path, output: Path) -> str:
    return str(phase3(root, root / "artefacts", output, left_projection=True) / "model" / "model.safetensors")


def test_rows_of_a_fused_weight_have_a_left_side_of_their_own(tmp_path: Path) -> None:
    """Some of Phi-3's qkv_proj and gate_up_proj, the rest of which is held."""
    make_model(tmp_path, phi3)
    run_ranks(1, artefacts, tmp_path, "attn_k,ffn_gate")
    after = load_file(run_ranks(2, of_fused, tmp_path, tmp_path / "out")[0])
    before, masks = (
        load_file(tmp_path / "m" / "model.safetensors"),
        MaskStore(tmp_path / "artefacts" / "phase2_latest" / "masks"),
    )
    for layer in masks.layers:
        w, trained = (torch.cat([of[layer.parameter][a:b] for a, b in layer.rows]).double() for of in (before, after))
        k = masks.metadata.layers[layer.name]["frozen"] // layer.m
        u, moved = torch.linalg.svd(w)[0][:, :k], trained - w
        assert k and float(moved.norm()) > 0.01 and float((u.T @ moved).norm() / moved.norm()) < 2e-5


def test_what_has_no_left_side_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--left_projection is of masks"):
        phase3(root, root, tmp_path, masks_dir="none", left_projection=True)
    shared = common(root, tmp_path, layer_type="ffn_down", safety_data=str(root / "refusals_fit.jsonl"), safety_samples=5)
    run_importance(ImportanceArguments(**shared, basis="identity"))
    with pytest.raises(UnsupportedSetting, match="of the basis identity, unit entry: make them with --basis weight"):
        phase3(root, tmp_path, tmp_path / "out", left_projection=True)
