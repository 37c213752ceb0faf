"""Phases 1, 2 and 3 with --output_basis on 1, 2 and 3 ranks, against the dense one-process reference; verify, audit, overlap.

Tolerances as in the references of one side: bases from fp32 activations, five fp32 steps against fp64 ones. A loss of 6.5 is
logged in steps of 4.8e-7, of which products on both sides may take a few.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import dense_reference
import numpy as np
import pytest
import torch
import two_sided_reference
from phase3_jobs import common, losses, make_model, phase3
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_phase3_resume_world import run
from two_sided_reference import Layer, read_layers

from warp_ds.cluster.processes import all_gather_object
from warp_ds.errors import WarpError
from warp_ds.evaluation.adapter_certificate import certify_adapter
from warp_ds.evaluation.certificate import certify
from warp_ds.evaluation.movement import frozen_drift
from warp_ds.evaluation.overlap import overlap
from warp_ds.flags.arguments import BasisArguments, ImportanceArguments
from warp_ds.phases import audit
from warp_ds.phases.basis import run_basis
from warp_ds.phases.importance import run_importance
from warp_ds.phases.shrink import shrink
from warp_ds.store.bases import BasisStore
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore

LAYERS = "ffn_down,ffn_up,attn_q,attn_v"
WORLDS = (1, 2, 3)
KINDS = ("activation", "gradient")
TRAINED = [*(("activation", world) for world in WORLDS), ("gradient", 2)]
UNITS = ("row", "column", "entry")


def job(root: Path, world: int) -> dict[str, Any]:
    """Bases of each kind, masks of each unit, and five steps of entry masks in both; directories and losses."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        output = root / f"{kind}{world}"
        shared = common(root, output, layer_type=LAYERS, safety_data=str(root / "refusals_fit.jsonl"), safety_samples=0)
        found[kind, "basis"] = run_basis(BasisArguments(**shared, output_basis=kind)) / "basis"
        for unit in UNITS if kind == "activation" else ("entry",):
            more = {"keep_ratio": 0.2, "importance_batch_size": 3, "run_name": unit, "mask_unit": unit}
            found[kind, unit] = run_importance(ImportanceArguments(**shared | more)) / "masks"
        if (kind, world) in TRAINED:
            trained = phase3(root, output, output, masks_dir=str(found[kind, "entry"]))
            found[kind, "trained"], found[kind, "losses"] = trained / "model", losses(trained)
    found["audit"] = in_frozen(found["activation", "entry"], found["activation", "basis"])
    return found


def some_gradient(layer: TargetLayer) -> torch.Tensor:
    return torch.randn(layer.m, layer.n, generator=torch.Generator().manual_seed(layer.m + layer.layer))


def in_frozen(masks: Path, basis: Path) -> dict[str, np.ndarray]:
    """What of a gradient the audit says lies in the frozen subspace, all rows."""
    found = {}
    for layer in MaskStore(masks).layers:
        rows = audit.own_rows(layer).block
        mine = audit._in_frozen(some_gradient(layer)[rows.start : rows.stop], layer, MaskStore(masks), BasisStore(basis))
        found[layer.name] = torch.cat(all_gather_object(mine)).numpy()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("both")
    make_model(directory)
    return directory


@pytest.fixture(scope="module")
def jobs(root: Path) -> dict[int, dict[Any, Any]]:
    return {world: run_ranks(world, job, root, world)[0] for world in WORLDS}


@pytest.fixture(scope="module")
def moments(root: Path, jobs: Any) -> dict[str, dict[str, np.ndarray]]:
    names = list(layers_of(jobs[1], "activation"))
    return {
        "activation": two_sided_reference.output_covariances(root, names),
        "gradient": two_sided_reference.gradient_moments(root, names),
    }


def layers_of(found: Any, kind: str, unit: str = "entry") -> dict[str, Layer]:
    return read_layers(found[kind, "basis"], found[kind, unit])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("kind", KINDS)
def test_output_bases_are_the_references(jobs: Any, moments: Any, kind: str, world: int) -> None:
    for name, layer in layers_of(jobs[world], kind).items():
        v, s = (layer.outputs[key].double().numpy() for key in ("U", "S"))
        wanted = moments[kind][name]
        assert np.abs(v.T @ v - np.eye(v.shape[1])).max() < 1e-5, name
        assert np.abs((v * s) @ v.T - wanted).max() < 1e-5 * np.abs(wanted).max(), name
        m, n = layer.frozen.shape
        assert v.shape[1] == (min(m, n) if kind == "activation" else m), name


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("kind", "unit"), [("activation", unit) for unit in UNITS] + [("gradient", "entry")])
def test_masks_are_the_references(root: Path, jobs: Any, kind: str, unit: str, world: int) -> None:
    layers = layers_of(jobs[world], kind, unit)
    for name, scores in two_sided_reference.importances(root, layers, 3).items():
        (wanted,) = dense_reference.unit_highest([scores], unit, 0.2)
        frozen = layers[name].frozen
        assert frozen.sum() == wanted.sum() and frozen.sum() > 0, name
        if unit == "entry":
            # What differs may only be scores within fp32's rounding of the threshold.
            least = scores[wanted].min()
            assert np.abs(scores[frozen != wanted] - least).max(initial=0.0) < 1e-4 * least, name
            assert (frozen != wanted).sum() <= 4, name
        else:
            assert (frozen == wanted).all(), name


@pytest.mark.parametrize(("kind", "world"), TRAINED)
def test_training_is_the_references_and_verify_says_kept(root: Path, jobs: Any, kind: str, world: int) -> None:
    found = jobs[world]
    expected, weights = two_sided_reference.training(root, layers_of(found, kind))
    assert found[kind, "losses"] == pytest.approx(expected, abs=2e-6)
    start, trained = (load_file(path / "model.safetensors") for path in (root / "m", found[kind, "trained"]))
    for name, value in trained.items():
        if name in weights:
            assert (value.double() - weights[name]).abs().max() < 1e-5, name
            assert (value - start[name]).abs().max() > 1e-3, name
        else:
            assert torch.equal(value, start[name]), name
    certificate = certify(root / "m", found[kind, "trained"], found[kind, "entry"])
    assert certificate.kept, (certificate.problems, certificate.reasons)
    assert any("_output_svd" in path for path in certificate.files["basis"])
    drift = frozen_drift(root / "m", found[kind, "trained"], found[kind, "entry"], found[kind, "basis"])
    assert drift == pytest.approx(certificate.frozen_drift, rel=1e-6) and drift < 1e-6


def test_verify_says_broken_of_one_frozen_coefficient(root: Path, jobs: Any, tmp_path: Path) -> None:
    """By a few times what rounding allows it: W + nudge v_i u_jᵀ, stored again. As much in a free one is kept."""
    found, name = jobs[1], "model.layers.0.mlp.down_proj"
    layer = layers_of(found, "activation")[name]
    honest = certify(root / "m", found["activation", "trained"], found["activation", "entry"])
    allowed = next(c.allowed_max for c in honest.layers if c.layer == name)
    v, u = (dense_reference.complete(side["U"].double().numpy()) for side in (layer.outputs, layer.inputs))
    for frozen in (True, False):
        (i, j), *_ = np.argwhere(layer.frozen == frozen)
        directory = tmp_path / str(frozen)
        shutil.copytree(found["activation", "trained"], directory)
        tensors = load_file(directory / "model.safetensors")
        nudge = torch.from_numpy(3 * allowed * np.outer(v[:, i], u[:, j]))
        tensors[f"{name}.weight"] = (tensors[f"{name}.weight"].double() + nudge).float()
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        told = certify(root / "m", directory, found["activation", "entry"])
        assert told.kept != frozen
        if frozen:
            assert [(c.layer, c.violations) for c in told.layers if c.violations] == [(name, 1)]


def test_verify_says_broken_of_many_small_moves(root: Path, jobs: Any, tmp_path: Path) -> None:
    """Every frozen coefficient of a layer along its sign, by less than rounding allows any of them."""
    found, name = jobs[1], "model.layers.0.mlp.down_proj"
    layer = layers_of(found, "activation")[name]
    shutil.copytree(found["activation", "trained"], tmp_path / "moved")
    tensors = load_file(tmp_path / "moved" / "model.safetensors")
    v, u = (dense_reference.complete(side["U"].double().numpy()) for side in (layer.outputs, layer.inputs))
    w = tensors[f"{name}.weight"].double().numpy()
    honest = certify(root / "m", found["activation", "trained"], found["activation", "entry"])
    size = 0.3 * next(c.allowed_max for c in honest.layers if c.layer == name)
    moved = v @ (size * np.sign(v.T @ w @ u) * layer.frozen) @ u.T
    tensors[f"{name}.weight"] = torch.from_numpy(w + moved).float()
    save_file(tensors, tmp_path / "moved" / "model.safetensors", metadata={"format": "pt"})
    told = certify(root / "m", tmp_path / "moved", found["activation", "entry"])
    assert told.outcome == "broken" and sum(c.violations for c in told.layers) < 5
    assert any("along their signs" in problem for problem in told.problems), told.problems


def test_masks_of_one_side_do_not_certify_both(root: Path, jobs: Any) -> None:
    """Training in the coordinates of gradients moves what is frozen in those of activations."""
    told = certify(root / "m", jobs[2]["gradient", "trained"], jobs[2]["activation", "entry"])
    assert told.outcome == "broken"


def test_overlap_is_of_subspaces_of_both_sides(jobs: Any) -> None:
    found = jobs[1]
    report = overlap([found["activation", "entry"], found["gradient", "entry"]])
    first, second = (layers_of(found, kind) for kind in KINDS)
    for shared in report["pairs"][0]["layers"]:
        name = next(name for name in first if shared["layer"] == _stem(name))
        sides = [
            (first[name].outputs, second[name].outputs, first[name].frozen, second[name].frozen),
            (first[name].inputs, second[name].inputs),
        ]
        turns = [
            (dense_reference.complete(a["U"].double().numpy()).T @ dense_reference.complete(b["U"].double().numpy())) ** 2
            for a, b in ((sides[0][0], sides[0][1]), (sides[1][0], sides[1][1]))
        ]
        a, b = first[name].frozen.astype(float), second[name].frozen.astype(float)
        wanted = (a * (turns[0] @ b @ turns[1].T)).sum() / min(a.sum(), b.sum())
        assert shared["subspace"] == pytest.approx(wanted, abs=1e-4)


def _stem(name: str) -> str:
    kinds = {"down_proj": "ffn_down", "up_proj": "ffn_up", "q_proj": "attn_q", "v_proj": "attn_v"}
    return f"layer_{int(name.split('.')[2]):02d}_{kinds[name.rpartition('.')[2]]}"


@pytest.mark.parametrize("world", WORLDS)
def test_the_audit_projects_on_both_sides(jobs: Any, world: int) -> None:
    layers = layers_of(jobs[world], "activation")
    for target in MaskStore(jobs[world]["activation", "entry"]).layers:
        layer = layers[target.name]
        v, u = (dense_reference.complete(side["U"].double().numpy()) for side in (layer.outputs, layer.inputs))
        wanted = v @ (layer.frozen * (v.T @ some_gradient(target).double().numpy() @ u)) @ u.T
        assert np.abs(jobs[world]["audit"][target.name] - wanted).max() < 1e-5


def test_shrinking_keeps_the_output_basis(root: Path, jobs: Any, tmp_path: Path) -> None:
    found = jobs[1]
    shrink(found["activation", "column"], None, tmp_path / "small")
    smaller = read_layers(tmp_path / "small" / "basis", tmp_path / "small" / "masks")
    for name, layer in layers_of(found, "activation", "column").items():
        assert torch.equal(smaller[name].outputs["U"], layer.outputs["U"])
        # Layers that share U keep the columns of each.
        assert layer.frozen.any(axis=0).sum() <= smaller[name].inputs["U"].shape[1] < layer.inputs["U"].shape[1]
        assert smaller[name].frozen.sum() == layer.frozen.sum()


# ---------------------------------------------------------------- on another number of ranks, and what is refused


def stopped(root: Path) -> str:
    """Two ranks: an undisturbed run, and one that is stopped after two steps."""
    whole = run("masked", root, root / "whole", train_scope="warp")
    assert whole is not None and run("masked", root, root / "stopped", stop_at=2, train_scope="warp") is None
    return str(whole)


def resumed(root: Path, output: Path) -> str:
    finished = run("masked", root, output, train_scope="warp")
    assert finished is not None
    return str(finished)


def test_a_run_goes_on_on_another_number_of_ranks(root: Path, jobs: Any) -> None:
    if not (root / "artefacts").exists():
        (root / "artefacts").symlink_to(root / "activation2")
    whole = Path(run_ranks(2, stopped, root)[0])
    frozen = {name: layer.frozen for name, layer in layers_of(jobs[2], "activation").items()}
    finished = Path(run_ranks(3, resumed, root, root / "stopped")[0])
    assert losses(finished) == pytest.approx(losses(whole), abs=2e-6)
    ends = [torch.load(run / "end.pt") for run in (whole, finished)]
    for name, mask in frozen.items():
        before, after = (end[name].numpy().view(np.int32)[mask] for end in ends)
        assert mask.any() and (before == after).all(), name
        assert (ends[0][name] - ends[1][name]).abs().max() < 1e-5


def test_what_cannot_be_is_refused_by_name(root: Path, jobs: Any) -> None:
    masks = str(jobs[1]["activation", "column"])
    shared = common(root, root / "refused", layer_type=LAYERS, safety_data=str(root / "refusals_fit.jsonl"))

    def told(what: Any) -> str:
        with pytest.raises(WarpError) as error:
            what()
        return str(error.value)

    said = told(lambda: run_basis(BasisArguments(**shared, basis="weight", output_basis="activation")))
    assert "--output_basis activation" in said and "--basis weight" in said
    said = told(lambda: run_basis(BasisArguments(**shared, token_scope="prompt", output_basis="gradient")))
    assert "--output_basis gradient" in said and "--token_scope prompt" in said
    entries = str(jobs[1]["activation", "entry"])
    said = told(lambda: phase3(root, root, root / "refused", masks_dir=entries, adapter="lora"))
    assert "freeze single coefficients" in said and "--mask_unit column or row" in said
    rows = str(jobs[1]["activation", "row"])
    assert run_ranks(2, refused_placement, root, masks) == [True, True]
    assert run_ranks(2, refused_placement, root, rows, "lora") == [True, True]


def refused_placement(root: Path, masks: str, adapter: str = "none") -> bool:
    try:
        phase3(root, root, root / "refused", masks_dir=masks, basis_placement="sharded", adapter=adapter)
    except WarpError as error:
        return "--basis_placement sharded" in str(error) and not list((root / "refused").glob("phase3_*"))
    return False


def adapter_of_columns(root: Path, masks: str) -> Path:
    lora: dict[str, Any] = {"adapter": "lora", "lora_r": 4, "lora_dropout": 0.0}
    return phase3(root, root, root / "adapter", masks_dir=masks, basis_placement="sharded", epochs=1, **lora)


def test_an_adapter_s_columns_need_no_rows_together(root: Path, jobs: Any) -> None:
    """W U_F is the same whatever V is, so any placement will do."""
    masks = jobs[1]["activation", "column"]
    run = run_ranks(2, adapter_of_columns, root, str(masks))[0]
    assert certify_adapter(root / "m", run / "adapter", masks).kept
