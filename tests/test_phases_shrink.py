"""``warp-ds shrink``: the same coefficients stay frozen in a smaller basis, and what trains freely has other coordinates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from masked_artefacts import MODULES, Artefacts, odd_model, read_artefacts, write_artefacts
from torch import Tensor, nn

import warp_ds
from warp_ds.errors import ArtifactError
from warp_ds.launch.cli import main
from warp_ds.method.mask import pack_bits
from warp_ds.phases.shrink import shrink
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import write_json
from warp_ds.store.masks import MaskStore, write_mask
from warp_ds.store.metadata import metadata_dict


@pytest.fixture
def whole(tmp_path: Path) -> Artefacts:
    """Few frozen coefficients, so that columns of every layer have none; k_proj shares q_proj's basis."""
    root = tmp_path / "whole"
    # Sparse enough that both layers of a shared basis leave columns unused, which the first test asserts.
    write_artefacts(root, odd_model(), {"ffn_down": 15, "attn_q": 15, "attn_k": 15}, share=0.03)
    path = root / "basis" / "metadata.json"
    metadata = json.loads(path.read_text())
    for i in range(2):
        q, k = (f"model.layers.{i}.{MODULES[kind]}" for kind in ("attn_q", "attn_k"))
        del metadata["bases"][metadata["layers"][k]["file"]]
        metadata["layers"][k]["file"] = metadata["layers"][q]["file"]
    path.write_text(json.dumps(metadata))
    masks = root / "masks" / "metadata.json"
    fingerprint = BasisStore(root / "basis").fingerprint()
    masks.write_text(json.dumps({**json.loads(masks.read_text()), "basis_fingerprint": fingerprint}))
    return read_artefacts(root)


def test_the_same_directions_stay_frozen(whole: Artefacts, tmp_path: Path) -> None:
    found = shrink(whole.masks, None, tmp_path / "out" / "small")
    small = read_artefacts(tmp_path / "out" / "small")
    assert small.frozen.keys() == whole.frozen.keys()
    for name, frozen in whole.frozen.items():
        u, v = whole.bases[name], small.bases[name]
        assert u is not None and v is not None
        before = [(int(row), u[:, column]) for row, column in frozen.nonzero()]
        after = [(int(row), v[:, column]) for row, column in small.frozen[name].nonzero()]
        assert [row for row, _ in before] == [row for row, _ in after]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(before, after, strict=True))
    shared = {kind: f"model.layers.0.{MODULES[kind]}.weight" for kind in ("attn_q", "attn_k")}
    used = {kind: whole.frozen[name].any(dim=0) for kind, name in shared.items()}
    assert not torch.equal(used["attn_q"], used["attn_k"])  # or the union would not be tested
    one = next(one for one in found if one.file == BasisStore(small.basis).metadata.layers[shared["attn_k"][:-7]]["file"])
    assert one.kept == int((used["attn_q"] | used["attn_k"]).sum()) < one.stored == 15
    assert len(found) == 4 and all(one.held_after < one.held_before for one in found)


def freeze_all(artefacts: Artefacts, name: str) -> None:
    """Every coefficient of one layer, beyond the stored columns too."""
    metadata = MaskStore(artefacts.masks).metadata
    entry = metadata.layers[name]
    (layer,) = (layer for layer in MaskStore(artefacts.masks).layers if layer.name == name)
    write_mask(artefacts.masks, layer, pack_bits(torch.ones(layer.m, layer.n) > 0))
    metadata.frozen += layer.m * layer.n - entry["frozen"]
    entry["frozen"], metadata.keep_ratio = layer.m * layer.n, metadata.frozen / metadata.entries
    write_json(artefacts.masks / "metadata.json", metadata_dict(metadata))


def trained(artefacts: Artefacts, kind: type[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """W after four protected steps of a plain process, fp64 but for the bases."""
    model = odd_model(torch.float64)
    optimizer = kind(model.parameters(), lr=1e-2)  # type: ignore[call-arg]
    protection = warp_ds.protect_optimizer(model, optimizer, artefacts.basis, artefacts.masks)
    g = torch.Generator().manual_seed(5)
    for _ in range(4):
        tokens = torch.randint(0, 50, (4, 9), generator=g)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    protection.release()
    return {name: p.detach() for name, p in model.named_parameters() if name in artefacts.frozen}


def test_training_keeps_them_and_only_adam_notices(whole: Artefacts, tmp_path: Path) -> None:
    """Plain gradient descent does not depend on the coordinates of what is free; Adam does."""
    shrink(whole.masks, whole.basis, tmp_path / "small")
    small = read_artefacts(tmp_path / "small")
    start = dict(odd_model(torch.float64).named_parameters())
    for kind, alike in ((torch.optim.SGD, True), (torch.optim.AdamW, False)):
        a, b = trained(whole, kind), trained(small, kind)
        # fp32 rotations: 1e-6 is some roundings of weights of 0.1; Adam's four steps of 1e-2 differ by far more.
        apart = max((a[name] - b[name]).abs().max().item() for name in a)
        assert (apart < 1e-6) is alike, (kind, apart)
        assert apart < 1e-6 or apart > 1e-3
        for name, frozen in whole.frozen.items():
            u = whole.bases[name]
            assert u is not None
            moved = ((b[name] - start[name]).detach() @ u.double()).abs()
            assert moved[frozen[:, : u.shape[1]]].max() < 1e-6 < moved.max()


def test_the_command(whole: Artefacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["shrink", "--masks_dir", str(whole.masks), "--output", str(tmp_path / "small")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "layer_00_attn_q" in printed and f"--masks_dir {tmp_path / 'small' / 'masks'}" in printed
    assert main(command) == 2
    assert "exists: remove it" in capsys.readouterr().err


def test_wrong_input(whole: Artefacts, tmp_path: Path) -> None:
    identity = write_artefacts(tmp_path / "identity", odd_model(), basis="identity")
    other = write_artefacts(tmp_path / "other", odd_model(), seed=2)
    with pytest.raises(ArtifactError, match="nothing to drop"):
        shrink(identity.masks, None, tmp_path / "small")
    with pytest.raises(ArtifactError, match="were made with the basis"):
        shrink(whole.masks, other.basis, tmp_path / "small")
    rows = write_artefacts(tmp_path / "rows", odd_model())
    freeze_all(rows, "model.layers.1.mlp.down_proj")
    with pytest.raises(ArtifactError, match="beyond the 5 stored columns, as --mask_unit row does"):
        shrink(rows.masks, None, tmp_path / "small")
    next(whole.masks.glob("*.safetensors")).unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        shrink(whole.masks, None, tmp_path / "small")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["identity", "other", "rows", "whole"]  # nothing half-written


def test_a_layer_without_frozen_coefficients_keeps_a_column(tmp_path: Path) -> None:
    nothing = write_artefacts(tmp_path / "whole", odd_model(), share=0.0)
    assert {one.kept for one in shrink(nothing.masks, None, tmp_path / "small")} == {1}
    model: nn.Module = odd_model()
    warp_ds.protect_optimizer(model, torch.optim.AdamW(model.parameters()), None, tmp_path / "small" / "masks").release()
