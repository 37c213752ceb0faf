"""The original's .pt bases and masks, written as its code writes them, and what the phases make of them converted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phase12_jobs import save_model

from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.launch.cli import main
from warp_ds.method.mask import unpack_bits
from warp_ds.models.targets import targets_of
from warp_ds.phases.convert import convert
from warp_ds.store.bases import BasisStore
from warp_ds.store.masks import MaskStore

TYPES = ("ffn_down", "attn_q", "attn_k")


def write_original(root: Path, model: Path, ratio: float = 0.1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Phases 1 and 2 of the original as they save: torch.linalg.svd of a Gram matrix, NumPy masks by quantile.

    Layer name -> (U, mask).
    """
    generator = torch.Generator().manual_seed(0)
    made = {}
    for layer in targets_of(model, "all", ",".join(TYPES)):
        x = torch.randn(3 * layer.n, layer.n, generator=generator)
        _, s, ut = torch.linalg.svd(x.T @ x, full_matrices=False)
        basis, masks = (root / run / kind / layer.type for run, kind in (("phase1", "basis"), ("phase2", "masks")))
        basis.mkdir(parents=True, exist_ok=True)
        masks.mkdir(parents=True, exist_ok=True)
        torch.save({"U": ut.t(), "S": s, "UT": ut}, basis / f"layer_{layer.layer:02d}_svd.pt")
        scores = torch.rand(layer.shape, generator=generator).numpy()
        mask = (scores >= np.quantile(scores, 1 - ratio)).astype(np.float32)
        torch.save({"mask": mask}, masks / f"layer_{layer.layer:02d}_mask.pt")
        made[layer.name] = (ut.t().numpy(), mask)
    (root / "phase1" / "basis" / "metadata.json").write_text(json.dumps({"model_name": "m", "total_tokens": 123}))
    (root / "phase2" / "masks" / "metadata.json").write_text(json.dumps({"phase": 2, "keep_ratio": ratio}))
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.mark.parametrize("ratio", [0.1, 0.0371])
def test_bases_and_masks_of_the_original(model: Path, tmp_path: Path, ratio: float) -> None:
    made = write_original(tmp_path, model, ratio)
    words = ["--basis_dir", tmp_path / "phase1", "--masks_dir", tmp_path / "phase2", "--model_name", model]
    assert main(["convert-basis", *map(str, words), "--output", str(tmp_path / "new")]) == 0
    basis, masks = BasisStore(tmp_path / "new" / "basis"), MaskStore(tmp_path / "new" / "masks")
    found = masks.find_basis(None)
    assert found is not None and found.directory == (tmp_path / "new" / "basis").resolve()
    masks.check(basis, basis.metadata.model_fingerprint, "m")
    assert {layer.name for layer in basis.layers} == set(made) == {layer.name for layer in masks.layers}
    for layer in masks.layers:
        u, mask = made[layer.name]
        assert np.array_equal(basis.columns(layer.name)[0].numpy(), u)
        assert np.array_equal(unpack_bits(masks.packed(layer.name), layer.n).numpy(), mask == 1)
    assert masks.metadata.frozen == sum(int(mask.sum()) for _, mask in made.values())
    assert basis.metadata.tokens == 123 and f"keep_ratio {ratio}" in masks.metadata.notes[0]


def test_the_first_version_s_layout(model: Path, tmp_path: Path) -> None:
    write_original(tmp_path, model)
    flat = tmp_path / "first" / "checkpoints" / "basis"
    flat.mkdir(parents=True)
    for path in (tmp_path / "phase1" / "basis" / "ffn_down").iterdir():
        held = torch.load(path, weights_only=True)
        torch.save({"U": held["U"], "S": held["S"], "Vh": held["UT"]}, flat / path.name)
    with pytest.raises(ArtifactError, match="of which layer type it is.*--layer_type"):
        convert(str(tmp_path / "first"), None, model, "m", tmp_path / "new")
    basis, masks = convert(str(tmp_path / "first"), None, model, "m", tmp_path / "new", "ffn_down")
    assert masks is None and {entry["type"] for entry in basis.layers.values()} == {"ffn_down"}


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def spoil(path: Path, what: str) -> None:
    held = torch.load(path, weights_only="mask" not in path.name)
    if what == "code":
        path.write_bytes(pickle.dumps({"U": Evil()}, protocol=2))
    elif what == "zip code":
        torch.save({**held, "more": Evil()}, path)
    elif what == "other model":
        torch.save({"U": torch.eye(7), "S": torch.ones(7)}, path)
    elif what == "sixteen bits":
        torch.save({"U": held["U"].bfloat16(), "S": held["S"].bfloat16()}, path)
    elif what == "transposed":
        torch.save({**held, "UT": held["U"].clone()}, path)
    elif what == "ascending":
        torch.save({"U": held["U"], "S": held["S"].flip(0)}, path)
    elif what == "no basis":
        torch.save({"V": held["U"]}, path)
    elif what == "halves":
        torch.save({"mask": held["mask"] * 0.5}, path)
    elif what == "narrow":
        torch.save({"mask": held["mask"][:, 1:]}, path)


@pytest.mark.parametrize(
    "kind, what, message",
    [
        ("svd", "code", "is no file of tensors alone .*nothing else is unpickled"),
        ("svd", "zip code", "is no file of tensors alone"),
        ("svd", "other model", "has 40 inputs: it is of another model"),
        ("svd", "sixteen bits", "U is not orthonormal"),
        ("svd", "transposed", "UT is not U transposed"),
        ("svd", "ascending", "S is no descending spectrum"),
        ("svd", "no basis", "holds 'V', not the tensors U and S"),
        ("mask", "halves", "has no other entries"),
        ("mask", "narrow", "of another model"),
        ("mask", "zip code", "is no file of tensors alone"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, what: str, message: str
) -> None:
    write_original(tmp_path, model)
    (path,) = tmp_path.glob(f"*/*/attn_k/layer_01_{kind}.pt")
    spoil(path, what)
    with pytest.raises(ArtifactError, match=f"layer_01_{kind}.pt.*{message}"):
        convert(str(tmp_path / "phase1"), str(tmp_path / "phase2"), model, "m", tmp_path / "new")
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".*")) and "run" not in capfd.readouterr().out


def test_layers_that_the_model_or_the_basis_lacks(model: Path, tmp_path: Path) -> None:
    write_original(tmp_path, model)
    basis = tmp_path / "phase1" / "basis" / "attn_q"
    (basis / "layer_01_svd.pt").rename(basis / "layer_09_svd.pt")
    with pytest.raises(ConfigError, match="layer_09_svd.pt is of block 9, but .* has 2 blocks"):
        convert(str(tmp_path / "phase1"), None, model, "m", tmp_path / "new")
    (basis / "layer_09_svd.pt").unlink()
    with pytest.raises(ArtifactError, match="layer_01_mask.pt has no basis in --basis_dir"):
        convert(str(tmp_path / "phase1"), str(tmp_path / "phase2"), model, "m", tmp_path / "new")
    with pytest.raises(ArtifactError, match="no layer_00_mask.pt in .*check --masks_dir"):
        convert(str(tmp_path / "phase1"), str(tmp_path / "phase1"), model, "m", tmp_path / "new")
