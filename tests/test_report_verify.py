"""The freeze certificate holds for protected training as saved, and for nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_training import complete_basis
from masked_artefacts import Artefacts, odd_model, token_batches, write_artefacts
from safetensors.torch import load_file, save_file

import warp_ds
from warp_ds.errors import ArtifactError
from warp_ds.evaluation.certificate import certify
from warp_ds.evaluation.certificate_output import write_certificate
from warp_ds.evaluation.movement import frozen_drift
from warp_ds.launch.cli import main
from warp_ds.method.rotation import Rotation
from warp_ds.store import digests
from warp_ds.store.files import write_json
from warp_ds.store.fingerprints import fingerprint_model
from warp_ds.store.masks import MaskStore

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def trained(folder: Path, artefacts: Artefacts | None, dtype: torch.dtype, lr: float = 1e-3) -> Path:
    """Ten AdamW steps of the model in bf16 or fp32, saved as ``dtype``; protected by ``artefacts``."""
    model = odd_model(torch.float32 if dtype == torch.float16 else dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    if artefacts is not None:
        warp_ds.protect_optimizer(model, optimizer, None, artefacts.masks)
    for ids in token_batches(10):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder, dtype = tmp_path_factory.mktemp("verify"), request.param
    before = folder / "before"
    odd_model(torch.float32 if dtype == torch.float16 else dtype).save_pretrained(before)
    artefacts = write_artefacts(folder, odd_model(), model_fingerprint=fingerprint_model(before))
    return {
        "folder": folder,
        "dtype": dtype,
        "before": before,
        "artefacts": artefacts,
        "protected": trained(folder / "protected", artefacts, dtype),
        "plain": trained(folder / "plain", None, dtype),
    }


def test_protected_training_keeps_it(case: dict[str, Any]) -> None:
    found = certify(case["before"], case["protected"], case["artefacts"].masks)
    assert found.kept and found.problems == []
    assert found.frozen == sum(int(f.sum()) for f in case["artefacts"].frozen.values())
    assert found.frozen + found.free == sum(f.numel() for f in case["artefacts"].frozen.values())
    # In fp32, products of 21 terms; in bf16 and fp16, half a unit of the last place of weights of about 0.02.
    assert found.frozen_drift < (1e-6 if case["dtype"] == torch.float32 else 4e-3)
    for model in ("protected", "plain"):  # the same sums in another order
        drift = frozen_drift(case["before"], case[model], case["artefacts"].masks, case["artefacts"].basis)
        certified = certify(case["before"], case[model], case["artefacts"].masks).frozen_drift
        assert drift == pytest.approx(certified, rel=1e-9)
    for layer in found.layers:
        assert layer.violations == 0 and layer.frozen_max <= layer.allowed_max
        assert layer.frozen_rms <= layer.frozen_max and layer.free_rms <= layer.free_max
        assert layer.free_max > 3 * layer.frozen_max, "free coefficients should have moved far more"


def test_moves_are_what_dense_products_say(case: dict[str, Any]) -> None:
    found = certify(case["before"], case["protected"], case["artefacts"].masks, case["artefacts"].basis)
    old, new = (load_file(case[k] / "model.safetensors") for k in ("before", "protected"))
    for layer in found.layers:
        name = f"{layer.layer}.weight"
        u, mask = case["artefacts"].bases[name], case["artefacts"].frozen[name]
        moved = (new[name].double() - old[name].double()) @ complete_basis(u)
        # The stored fp32 U is orthonormal within its rounding.
        for kind, which in (("frozen", mask), ("free", ~mask)):
            assert getattr(layer, f"{kind}_max") == pytest.approx(float(moved[which].abs().max()), rel=1e-5, abs=1e-9)
            assert getattr(layer, f"{kind}_rms") == pytest.approx(
                float(moved[which].square().mean().sqrt()), rel=1e-5, abs=1e-9
            )


def test_plain_fine_tuning_fails(case: dict[str, Any]) -> None:
    found = certify(case["before"], case["plain"], case["artefacts"].masks)
    assert not found.kept
    assert len(found.problems) == len(found.layers) and "moved further than rounding allows" in found.problems[0]
    assert all(layer.violations > 0.2 * layer.frozen for layer in found.layers)


@pytest.mark.parametrize("layer", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"])
def test_one_nudged_coefficient_fails(case: dict[str, Any], layer: str, tmp_path: Path) -> None:
    """By twice what rounding allows: W + nudge u_jᵀ, stored again."""
    shutil.copytree(case["protected"], tmp_path / "nudged")
    artefacts, name = case["artefacts"], f"{layer}.weight"
    tensors = load_file(tmp_path / "nudged" / "model.safetensors")
    row, column = artefacts.frozen[name].nonzero()[7].tolist()
    honest = certify(case["before"], case["protected"], artefacts.masks)
    allowed = next(c.allowed_max for c in honest.layers if c.layer == layer)
    rotation = Rotation(artefacts.bases[name], tensors[name].shape[1], torch.float64)
    nudge = torch.zeros(tensors[name].shape, dtype=torch.float64)
    nudge[row, column] = 2 * allowed
    tensors[name] = (tensors[name].double() + rotation.unrotate(nudge)).to(case["dtype"])
    save_file(tensors, tmp_path / "nudged" / "model.safetensors", metadata={"format": "pt"})
    found = certify(case["before"], tmp_path / "nudged", artefacts.masks)
    assert not found.kept
    assert [c.layer for c in found.layers if c.violations] == [layer]
    assert sum(c.violations for c in found.layers) == 1
    assert layer in found.problems[0] and "1 of" in found.problems[0]
    worst = next(c for c in found.layers if c.layer == layer)
    assert 0 < worst.worst_allowed < worst.worst_move == pytest.approx(2 * allowed, rel=0.6)
    assert worst.worst_allowed < worst.allowed_max, "its own allowance, not the layer's largest"
    assert f"{worst.worst_move:.3e}, where rounding allows {worst.worst_allowed:.3e}" in found.problems[0]


def test_the_run_behind_a_model_says_which_masks_it_had(
    case: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The hint stands beside the verdict, and only where the masks are others."""
    run, words = tmp_path / "phase3_x", ["--before", str(case["before"]), "--masks_dir", str(case["artefacts"].masks)]
    shutil.copytree(case["plain"], run / "model")
    own = MaskStore(case["artefacts"].masks).fingerprint()
    for inputs, expected in (
        ({}, "was trained without masks, not with those in"),
        ({"masks": "0" * 16}, "was trained with other masks (elsewhere), not with"),
        ({"masks": own}, None),
    ):
        write_json(run / "config.json", {"phase": "phase3", "inputs": inputs, "settings": {"masks_dir": "elsewhere"}})
        assert main(["verify", "--after", str(run / "model"), *words]) == 1
        printed = " ".join(capsys.readouterr().out.split())
        assert "BROKEN" in printed
        assert expected in printed if expected else "was trained with" not in printed


def test_files_that_are_too_coarse_say_so(case: dict[str, Any], tmp_path: Path) -> None:
    """Every weight by half a unit of its last place, as a few small steps in low precision leave it."""
    tensors = load_file(case["before"] / "model.safetensors")
    shutil.copytree(case["before"], tmp_path / "after")
    for name in (f"{layer.name}.weight" for layer in MaskStore(case["artefacts"].masks).layers):
        bits = tensors[name].view(torch.int32 if case["dtype"] == torch.float32 else torch.int16)
        bits[:, 0] ^= 1
    save_file(tensors, tmp_path / "after" / "model.safetensors", metadata={"format": "pt"})
    found = certify(case["before"], tmp_path / "after", case["artefacts"].masks)
    assert found.outcome == "cannot tell" and not found.kept and found.problems == []
    assert "too coarse to tell for 6 of 6 layers" in found.reasons[0]
    assert certify(case["before"], case["plain"], case["artefacts"].masks).reasons == []


def test_the_basis_is_found_after_a_move(case: dict[str, Any], tmp_path: Path) -> None:
    """Beside the masks' run, under the name of its own; where it is not, the message names both places and the flag."""
    for phase, kind in (("phase1_a", "basis"), ("phase2_b", "masks")):
        shutil.copytree(case["artefacts"].root / kind, tmp_path / "moved" / phase / kind)
    masks = tmp_path / "moved" / "phase2_b" / "masks"
    values = json.loads((masks / "metadata.json").read_text())
    write_json(masks / "metadata.json", values | {"basis_dir": "/before/phase1_a/basis"})
    found = certify(case["before"], case["protected"], masks)
    assert found.kept and found.basis == str(tmp_path / "moved" / "phase1_a" / "basis")
    shutil.rmtree(tmp_path / "moved" / "phase1_a")
    with pytest.raises(ArtifactError, match=f"/before/phase1_a/basis nor in {tmp_path}/moved/phase1_a/basis.*--basis_dir"):
        certify(case["before"], case["protected"], masks)


def test_swapped_directories_are_refused(case: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="belong to the model"):
        certify(case["protected"], case["before"], case["artefacts"].masks)


def test_the_same_directory_twice_is_no_training(case: dict[str, Any]) -> None:
    found = certify(case["before"], case["before"], case["artefacts"].masks)
    assert found.outcome == "cannot tell" and "nothing moved at all" in found.reasons[0]


def test_shards_read_as_one_file(case: dict[str, Any], tmp_path: Path) -> None:
    tensors = load_file(case["protected"] / "model.safetensors")
    shutil.copytree(case["protected"], tmp_path / "sharded", ignore=shutil.ignore_patterns("*.safetensors"))
    names = sorted(tensors)
    weight_map = {}
    for index, part in enumerate((names[::2], names[1::2])):
        save_file({k: tensors[k] for k in part}, tmp_path / "sharded" / f"model-{index}.safetensors")
        weight_map.update(dict.fromkeys(part, f"model-{index}.safetensors"))
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    whole, sharded = (certify(case["before"], d, case["artefacts"].masks) for d in (case["protected"], tmp_path / "sharded"))
    assert sharded.kept and sharded.layers == whole.layers


def test_other_directories_are_refused(case: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no masks in"):
        certify(case["before"], case["protected"], tmp_path)
    with pytest.raises(ArtifactError, match="no readable weight"):
        shutil.copytree(case["protected"], tmp_path / "less")
        tensors = load_file(tmp_path / "less" / "model.safetensors")
        del tensors["model.layers.1.mlp.down_proj.weight"]
        save_file(tensors, tmp_path / "less" / "model.safetensors")
        certify(case["before"], tmp_path / "less", case["artefacts"].masks)
    with pytest.raises(ArtifactError, match="were made with the basis"):
        other = write_artefacts(tmp_path / "other", odd_model(), seed=5)
        certify(case["before"], case["protected"], case["artefacts"].masks, other.basis)


def test_identity_basis(case: dict[str, Any], tmp_path: Path) -> None:
    artefacts = write_artefacts(tmp_path, odd_model(), basis="identity", model_fingerprint=fingerprint_model(case["before"]))
    after = trained(tmp_path / "after", artefacts, case["dtype"])
    found = certify(case["before"], after, artefacts.masks)
    assert found.kept and found.basis is None
    if case["dtype"] != torch.float16:  # Saved in the dtype it was trained in, nothing was rounded.
        assert found.frozen_drift == 0.0
    assert not certify(case["before"], case["plain"], artefacts.masks).kept


def test_the_certificate_lies_where_the_report_looks(case: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    run = tmp_path / "phase3_x"
    shutil.copytree(case["protected"], run / "model")
    write_json(run / "config.json", {"phase": "phase3"})
    (tmp_path / "phase3_latest").symlink_to("phase3_x")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    rest = ["--before", str(case["before"]), "--masks_dir", str(case["artefacts"].masks)]
    assert main(["verify", "--after", str(tmp_path / "phase3_latest" / "model"), *rest]) == 0
    assert json.loads((run / "certificate.json").read_text())["kept"] and not list(Path().iterdir())
    assert main(["verify", "--after", str(case["protected"]), *rest]) == 0
    assert [p.name for p in Path().iterdir()] == ["certificate.json"]


def test_the_certificate_is_json(case: dict[str, Any], tmp_path: Path) -> None:
    found = certify(case["before"], case["protected"], case["artefacts"].masks)
    write_certificate(found, tmp_path / "certificate.json")
    assert json.loads((tmp_path / "certificate.json").read_text()) == found.values()
    assert found.masks_fingerprint == MaskStore(case["artefacts"].masks).fingerprint()


def test_every_file_is_digested_once_in_one_pass(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[str] = []
    own = digests._digest
    monkeypatch.setattr(digests, "_digest", lambda part, within: (passes.append(part.path), own(part, within))[1])
    for _ in range(2):  # the second time nothing is taken from the first
        certificate = certify(case["before"], case["protected"], case["artefacts"].masks)
        sha256 = {path: digest for group in certificate.files.values() for path, digest in group.items()}
        assert sorted(passes) == sorted(sha256) and len(passes) > 10
        assert all(hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest for path, digest in sha256.items())
        assert certificate.after_fingerprint == fingerprint_model(case["protected"])
        passes.clear()
