"""Phases 1 and 2 on 1, 2 and 3 ranks (3 cuts rows) against the dense one-process reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dense_reference as reference
import numpy as np
import pytest
import torch
from phase12_jobs import (
    basis_arguments,
    basis_job,
    held_job,
    importance_arguments,
    make_rows,
    masks_job,
    save_model,
    scores_job,
)
from ranks import run_ranks
from safetensors.numpy import load_file
from tiny_models import FAMILIES

from warp_ds.store.masks import MaskStore
from warp_ds.zero.scores import of_units

WORLDS = [1, 2, 3]
ROWS = make_rows()
IMPORTANCE_BATCH = 2
#: Up to two rows of at most 40 tokens: of samples of 5 to 20 tokens, two to eight in a row.
PACKED: dict[str, Any] = {"packing": True, "batch_size": 2, "max_length": 40}

# Rounding of an fp32 forward and backward pass and of fp32 sums over about 150 tokens, relative to the largest value:
# measured 2e-7 to 2e-6 on these models.
FP32 = 1e-5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: save_model(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def dense(models: dict[str, Path]) -> dict[str, Any]:
    return {family: reference.load(directory) for family, directory in models.items()}


def basis_cases(models: dict[str, Path], root: Path) -> dict[str, tuple[Any, list[Any], Path]]:
    cases = {family: (basis_arguments(path), ROWS, root / family) for family, path in models.items()}
    few = ROWS[:2]  # fewer tokens than inputs: the numerical rank is less than n
    extra = {
        "response": (basis_arguments(models["llama"], token_scope="response", layer_type="ffn_down,attn_v"), ROWS),
        "few": (basis_arguments(models["llama"]), few),
        "one_sample": (basis_arguments(models["llama"], batch_size=4, layer_type="ffn_down"), ROWS[:1]),
        "rank0": (basis_arguments(models["llama"], svd_placement="rank0"), ROWS),
        "hooks": (basis_arguments(models["llama"], collect="hooks"), ROWS),
        "few_hooks": (basis_arguments(models["llama"], collect="hooks"), few),
        "packed": (basis_arguments(models["llama"], **PACKED), ROWS),
        "packed_hooks": (basis_arguments(models["llama"], **PACKED, collect="hooks"), ROWS),
        "packed_response": (basis_arguments(models["qwen2"], **PACKED, token_scope="response"), ROWS),
        "cut": (basis_arguments(models["llama"], energy=0.9, max_rank=20, layer_type="ffn_down,attn_q"), ROWS),
        "weight": (basis_arguments(models["llama"], basis="weight"), ROWS),
        "random": (basis_arguments(models["llama"], basis="random"), ROWS),
    }
    return cases | {name: (*case, root / name) for name, case in extra.items()}


@pytest.fixture(scope="module", params=WORLDS)
def bases(request: pytest.FixtureRequest, models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp(f"bases{request.param}")
    cases = basis_cases(models, root)
    metadata = run_ranks(request.param, basis_job, list(cases.values()))
    return {
        name: (arguments, rows, directory, entry)
        for (name, (arguments, rows, directory)), entry in zip(cases.items(), metadata[0], strict=True)
    }


def stored(bases: Any, case: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    _, _, directory, metadata = bases[case]
    tensors = load_file(directory / metadata["layers"][name]["file"])
    return tensors["U"].astype(np.float64), tensors["S"].astype(np.float64)


def assert_basis(u: np.ndarray, s: np.ndarray, sigma: np.ndarray, what: str) -> None:
    """Σ, eigenvalues, signs and every projector between clear gaps."""
    values, vectors = reference.eigen(sigma)
    largest = values[0]
    assert np.abs(u.T @ u - np.eye(u.shape[1])).max() < FP32, what
    assert np.abs((u * s) @ u.T - sigma).max() < FP32 * largest, what
    assert np.abs(s - values[: len(s)]).max() < FP32 * largest, what
    assert (values[len(s) :] < FP32 * largest).all(), what
    top = u[np.abs(u).argmax(axis=0), np.arange(u.shape[1])]
    assert (top > 0).all(), what
    compared = 0
    for k in range(1, len(s) + 1):
        gap = values[k - 1] - (values[k] if k < len(values) else 0.0)
        if gap < 1e-3 * largest:
            continue
        # Davis and Kahan: a projector turns by at most the error of Σ over the gap.
        bound = FP32 * largest / gap
        assert np.abs(u[:, :k] @ u[:, :k].T - vectors[:, :k] @ vectors[:, :k].T).max() < bound, (what, k)
        compared += 1
    assert compared >= 3, what


@pytest.mark.parametrize(
    "case",
    [*FAMILIES, "response", "few", "few_hooks", "one_sample", "rank0", "hooks", "packed", "packed_hooks", "packed_response"],
)
def test_bases_are_the_covariances_eigenvectors(bases: Any, dense: dict[str, Any], case: str) -> None:
    arguments, rows, directory, metadata = bases[case]
    family = case if case in FAMILIES else Path(arguments.model_name).name
    inputs = reference.layer_inputs(dense[family], list(metadata["layers"]), rows, arguments.token_scope)
    for name, x in inputs.items():
        u, s = stored(bases, case, name)
        assert_basis(u, s, reference.covariance(x), f"{case} {name}")
        entry = metadata["bases"][metadata["layers"][name]["file"]]
        assert entry["tokens"] == len(x) and entry["rank"] == len(s)
        assert entry["orthogonality_error"] <= 1e-5 and entry["residual"] <= 1e-5
    assert metadata["tokens"] == len(x)


def test_layers_with_one_input_share_one_file(bases: Any) -> None:
    _, _, directory, metadata = bases["llama"]
    files = {name.removeprefix("model."): entry["file"] for name, entry in metadata["layers"].items()}
    for block in range(2):
        stem = f"layer_{block:02d}"
        for kind, module in (
            ("attn_q", "self_attn.q_proj"),
            ("attn_q", "self_attn.k_proj"),
            ("attn_q", "self_attn.v_proj"),
            ("attn_o", "self_attn.o_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_up", "mlp.gate_proj"),
            ("ffn_down", "mlp.down_proj"),
        ):
            assert files[f"layers.{block}.{module}"] == f"{stem}_{kind}_svd.safetensors"
    assert sorted(p.name for p in directory.iterdir()) == sorted({*files.values(), "metadata.json"})


def test_rank_is_the_number_of_different_inputs_where_they_are_few(bases: Any, dense: dict[str, Any]) -> None:
    _, rows, _, metadata = bases["few"]
    assert sum(len(row["input_ids"]) for row in rows) < 40
    for name, x in reference.layer_inputs(dense["llama"], list(metadata["layers"]), rows).items():
        entry = metadata["bases"][metadata["layers"][name]["file"]]
        assert entry["rank"] == np.linalg.matrix_rank(x.astype(np.float32)), name


def test_energy_and_max_rank_cut_what_is_stored(bases: Any, dense: dict[str, Any]) -> None:
    _, rows, _, metadata = bases["cut"]
    for name, x in reference.layer_inputs(dense["llama"], list(metadata["layers"]), rows).items():
        values, _ = reference.eigen(reference.covariance(x))
        share = np.cumsum(values) / values.sum()
        expected = min(20, int((share < 0.9).sum()) + 1)
        u, _ = stored(bases, "cut", name)
        entry = metadata["bases"][metadata["layers"][name]["file"]]
        assert u.shape[1] == entry["rank"] == expected
        assert entry["energy"] == pytest.approx(share[expected - 1], abs=FP32)


def test_rank0_writes_the_same_files(bases: Any) -> None:
    (_, _, here, _), (_, _, there, _) = bases["llama"], bases["rank0"]
    for path in here.glob("*.safetensors"):
        assert path.read_bytes() == (there / path.name).read_bytes(), path.name


def test_weight_basis_holds_right_singular_vectors(bases: Any, dense: dict[str, Any]) -> None:
    for name in bases["weight"][3]["layers"]:
        w = dense["llama"].get_submodule(name).weight.detach().numpy()
        u, s = stored(bases, "weight", name)
        assert np.allclose(s, np.linalg.svd(w, compute_uv=False), atol=FP32)
        assert np.abs((u * s**2) @ u.T - w.T @ w).max() < FP32 * s[0] ** 2


def test_random_basis_is_the_same_on_any_world_size(bases: Any, models: dict[str, Path], tmp_path: Path) -> None:
    _, _, directory, metadata = bases["random"]
    ((arguments, rows, _),) = [basis_cases(models, tmp_path)["random"]]
    run_ranks(1, basis_job, [(arguments, rows, tmp_path / "one")])
    for file in metadata["bases"]:
        assert (directory / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
        u = load_file(directory / file)["U"].astype(np.float64)
        assert np.abs(u.T @ u - np.eye(u.shape[1])).max() < FP32
    assert len(metadata["bases"]) == 8  # a shared input has one rotation


# ---------------------------------------------------------------- phase 2, with one basis for all world sizes


@pytest.fixture(scope="module")
def given(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """family -> a basis directory, made once; 'thin' has fewer columns than inputs."""
    root = tmp_path_factory.mktemp("given")
    cases = {family: (basis_arguments(path), ROWS, root / family) for family, path in models.items()}
    cases["thin"] = (basis_arguments(models["llama"], max_rank=15), ROWS, root / "thin")
    run_ranks(1, basis_job, list(cases.values()))
    return {name: case[2] for name, case in cases.items()}


def columns(directory: Path, name: str) -> np.ndarray:
    import json

    entry = json.loads((directory / "metadata.json").read_text())["layers"][name]
    return load_file(directory / entry["file"])["U"]


@pytest.fixture(scope="module")
def dense_gradients(dense: dict[str, Any], given: dict[str, Path]) -> dict[str, Any]:
    names = {family: [n for n, _ in dense[family].named_modules() if n.endswith("_proj")] for family in dense}
    return {
        family: (names[family], reference.gradients(dense[family], names[family], ROWS, IMPORTANCE_BATCH)) for family in dense
    }


def score_cases(models: dict[str, Path], given: dict[str, Path], root: Path) -> dict[str, Any]:
    cases = {family: (importance_arguments(path), ROWS, given[family]) for family, path in models.items()}
    llama = models["llama"]
    cases |= {
        "identity": (importance_arguments(llama, basis="identity"), ROWS, None),
        "thin": (importance_arguments(llama), ROWS, given["thin"]),
        "checkpointing": (importance_arguments(llama, gradient_checkpointing=True), ROWS, given["llama"]),
        # Importance batches that lie on several steps, and micro-batches that hold several importance batches.
        "one_at_a_time": (importance_arguments(llama, batch_size=1), ROWS, given["llama"]),
        "many_at_a_time": (importance_arguments(llama, batch_size=5), ROWS, given["llama"]),
        "packed": (importance_arguments(llama, **PACKED), ROWS, given["llama"]),
        # One row a rank that one sample nearly fills: importance batches lie on several steps.
        "packed_short": (importance_arguments(llama, **{**PACKED, "batch_size": 1, "max_length": 21}), ROWS, given["llama"]),
        "packed_recomputed": (importance_arguments(llama, **PACKED, gradient_checkpointing=True), ROWS, given["llama"]),
    }
    return {name: (*case, root / name) for name, case in cases.items()}


@pytest.fixture(scope="module", params=WORLDS)
def scores(
    request: pytest.FixtureRequest, models: dict[str, Path], given: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    root = tmp_path_factory.mktemp(f"scores{request.param}")
    cases = score_cases(models, given, root)
    notes = run_ranks(request.param, scores_job, list(cases.values()))[0]
    found = {}
    for (name, case), note in zip(cases.items(), notes, strict=True):
        parts = [load_file(case[3] / f"rank_{r}.safetensors") for r in range(request.param)]
        found[name] = (case, {layer: np.concatenate([p[layer] for p in parts]) for layer in parts[0]}, note)
    return found


@pytest.mark.parametrize(
    "case",
    [
        *FAMILIES,
        "identity",
        "thin",
        "checkpointing",
        "one_at_a_time",
        "many_at_a_time",
        "packed",
        "packed_short",
        "packed_recomputed",
    ],
)
def test_importance(scores: Any, dense_gradients: dict[str, Any], case: str) -> None:
    (_, _, basis, _), found, notes = scores[case]
    names, gradients = dense_gradients[case if case in FAMILIES else "llama"]
    assert set(found) == set(names)
    for name in names:
        u = None if basis is None else columns(basis, name)
        expected = reference.importance(gradients, name, u)
        s = found[name]
        assert s.dtype == np.float32
        assert np.abs(s - expected[:, : s.shape[1]]).max() < FP32 * expected.max(), name
        assert not expected[:, s.shape[1] :].any(), name
    assert notes == ["1 importance batches have no response token and add nothing"]


def mask_cases(models: dict[str, Path], given: dict[str, Path], root: Path) -> dict[str, Any]:
    llama = models["llama"]
    cases = {family: (importance_arguments(path), given[family]) for family, path in models.items()}
    for scope in ("layer", "global"):
        for unit in ("entry", "column", "row"):
            more = {"mask_scope": scope, "mask_unit": unit, "keep_ratio": 0.23}
            cases[f"{scope}_{unit}"] = (importance_arguments(llama, **more), given["thin"])
            if unit != "entry":
                walked = importance_arguments(llama, gradient_checkpointing=True, **more)
                cases[f"{scope}_{unit}_walked"] = (walked, given["thin"])
            for score in ("singular_value", "random"):
                arguments = importance_arguments(llama, score=score, **more)
                cases[f"{scope}_{unit}_{score}"] = (arguments, given["llama"])
    cases["thin_random"] = (importance_arguments(llama, score="random", keep_ratio=0.23), given["thin"])
    cases["identity"] = (importance_arguments(llama, basis="identity"), None)
    cases["none"] = (importance_arguments(llama, keep_ratio=0.0, layer_type="ffn_down"), given["llama"])
    cases["all"] = (importance_arguments(llama, keep_ratio=1.0, layer_type="ffn_down,attn_k"), given["thin"])
    return {name: (arguments, ROWS, basis, root / name) for name, (arguments, basis) in cases.items()}


@pytest.fixture(scope="module", params=WORLDS)
def masks(
    request: pytest.FixtureRequest, models: dict[str, Path], given: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    root = tmp_path_factory.mktemp(f"masks{request.param}")
    cases = mask_cases(models, given, root)
    metadata = run_ranks(request.param, masks_job, list(cases.values()))[0]
    found = {}
    for (name, case), entry in zip(cases.items(), metadata, strict=True):
        bits = {
            layer: np.unpackbits(load_file(case[3] / e["file"])["frozen"], axis=1, count=e["shape"][1]).astype(bool)
            for layer, e in entry["layers"].items()
        }
        found[name] = (case, bits, entry)
    return found


def groups(names: list[str], scope: str) -> list[list[str]]:
    return [names] if scope == "global" else [[name] for name in names]


@pytest.mark.parametrize(
    "case",
    [
        *FAMILIES,
        "identity",
        "none",
        "all",
        "layer_entry",
        "layer_column",
        "layer_row",
        "global_entry",
        "global_column",
        "global_row",
        "layer_column_walked",
        "layer_row_walked",
        "global_column_walked",
        "global_row_walked",
    ],
)
def test_masks_freeze_the_most_important(masks: Any, dense_gradients: dict[str, Any], case: str) -> None:
    (arguments, _, basis, _), bits, metadata = masks[case]
    _, gradients = dense_gradients[case if case in FAMILIES else "llama"]
    names = list(metadata["layers"])
    expected = {n: reference.importance(gradients, n, None if basis is None else columns(basis, n)) for n in names}
    differing = 0
    for group in groups(names, arguments.mask_scope):
        wanted = reference.unit_highest([expected[n] for n in group], arguments.mask_unit, arguments.keep_ratio)
        for name, mask in zip(group, wanted, strict=True):
            assert bits[name].sum() == metadata["layers"][name]["frozen"]
            differing += int((bits[name] != mask).sum())
        if arguments.mask_unit == "entry":
            assert sum(bits[n].sum() for n in group) == sum(m.sum() for m in wanted)
    assert metadata["frozen"] == sum(b.sum() for b in bits.values())
    assert metadata["entries"] == sum(b.size for b in bits.values())
    # Entries on either side of a threshold may swap where their scores agree to fp32 rounding; on these models and
    # samples none does.
    assert differing == 0


def test_norms_of_many_rows() -> None:
    """Columns are summed in parts of rows, of which the last is a short one; a rank may have none."""
    rows = torch.rand(2500, 7, generator=torch.Generator().manual_seed(1))
    by_columns, by_rows = (rows.double().square().sum(dim=dim).sqrt() for dim in (0, 1))
    found = of_units(rows, "column"), of_units(rows, "row")
    assert found[0].shape == (1, 7) and found[1].shape == (2500, 1)
    for norms, wanted in zip(found, (by_columns, by_rows), strict=True):
        assert (norms.flatten() - wanted).abs().max() < FP32 * wanted.max()
    assert not of_units(rows[:0], "column").any()
    assert of_units(rows, "entry") is rows


@pytest.mark.parametrize("world_size", WORLDS)
def test_one_walk_holds_the_rows_of_one_block(
    world_size: int, models: dict[str, Path], given: dict[str, Path], tmp_path: Path
) -> None:
    """Of masks of columns and rows; without gradient checkpointing every step is a walk of its own, and all rows are held."""
    llama, cases = models["llama"], {}
    for walked in (True, False):
        for unit in ("entry", "column", "row"):
            arguments = importance_arguments(llama, mask_unit=unit, gradient_checkpointing=walked)
            cases[walked, unit] = (arguments, ROWS, given["thin"], tmp_path / f"{unit}{walked}")
    of_ranks = run_ranks(world_size, held_job, list(cases.values()))
    for held in of_ranks:
        most = dict(zip(cases, held, strict=True))
        whole = {unit: most[False, unit] for unit in ("entry", "column", "row")}
        assert whole["column"] == whole["row"] == whole["entry"] == most[True, "entry"] > 0
        # Two blocks that are alike.
        assert most[True, "column"] == most[True, "row"] == whole["entry"] // 2


@pytest.mark.parametrize("case", ["qwen2", "none", "layer_entry", "layer_column", "layer_row", "global_entry"])
def test_histograms_are_those_of_the_scores(masks: Any, dense_gradients: dict[str, Any], case: str) -> None:
    (arguments, _, basis, directory), _, metadata = masks[case]
    _, gradients = dense_gradients[case if case in FAMILIES else "llama"]
    stored = MaskStore(directory).scores()
    assert list(stored["layers"]) == list(metadata["layers"])
    axis = {"entry": (), "column": 0, "row": 1}[arguments.mask_unit]
    for name, found in stored["layers"].items():
        u = columns(basis, name)
        scores = np.sqrt((reference.importance(gradients, name, u) ** 2).sum(axis=axis))
        assert found["zeros"] == (scores == 0).sum(), name
        assert found["zeros"] + sum(found["counts"]) == scores.size
        edges = 10.0 ** ((found["first"] + np.arange(len(found["counts"]) + 1)) / stored["bins_per_decade"])
        below = found["zeros"] + np.cumsum([0, *found["counts"]])
        # Edges are up to 0.8 % higher than powers of ten.
        rounding = FP32 * scores.max()
        least = np.cumsum(np.histogram(scores, [-1.0, *np.maximum(edges - rounding, 0.0)])[0])
        most = np.cumsum(np.histogram(scores, [-1.0, *(edges * (1 + 2**-7) + rounding)])[0])
        assert (least <= below).all() and (below <= most).all(), name
        # The test sees something: at most a tenth of the scores lie within these bounds of one edge.
        assert (most - least).max() < 0.1 * (scores > 0).sum() + 2, name


def test_fewer_than_wanted_are_noted(masks: Any) -> None:
    (_, _, basis, _), bits, metadata = masks["all"]
    for name, entry in metadata["layers"].items():
        m, n = entry["shape"]
        assert entry["wanted"] == m * n > entry["frozen"]
        assert not bits[name][:, 15:].any(), "complement directions are never frozen"
    assert sum("no more score above 0" in note for note in metadata["notes"]) == len(bits)
    assert not any(masks["none"][1][name].any() for name in masks["none"][1])


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("unit", ["entry", "column", "row"])
def test_singular_value_scores(masks: Any, scope: str, unit: str) -> None:
    (arguments, _, basis, _), bits, metadata = masks[f"{scope}_{unit}_singular_value"]
    values = {}
    for name, entry in metadata["layers"].items():
        import json

        file = json.loads((basis / "metadata.json").read_text())["layers"][name]["file"]
        s = np.zeros(entry["shape"][1], dtype=np.float32)
        tensors = load_file(basis / file)
        s[: len(tensors["S"])] = tensors["S"]
        values[name] = np.broadcast_to(s, entry["shape"])
    for group in groups(list(values), scope):
        wanted = reference.unit_highest([values[n] for n in group], unit, arguments.keep_ratio)
        if unit == "row":  # all rows of a layer tie, to the bit or not: only their number is defined
            assert sum(bits[n].sum() for n in group) == sum(m.sum() for m in wanted)
            continue
        for name, mask in zip(group, wanted, strict=True):
            assert (bits[name] == mask).all(), name


@pytest.fixture(scope="module")
def masks_of_one(models: dict[str, Path], given: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    cases = {name: case for name, case in mask_cases(models, given, tmp_path_factory.mktemp("one")).items() if "random" in name}
    run_ranks(1, masks_job, list(cases.values()))
    return cases


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("unit", ["entry", "column", "row"])
def test_random_masks_do_not_depend_on_the_world_size(masks: Any, masks_of_one: Any, scope: str, unit: str) -> None:
    (_, _, _, directory), _, metadata = masks[f"{scope}_{unit}_random"]
    assert metadata["frozen"] > 0
    for entry in metadata["layers"].values():
        other = masks_of_one[f"{scope}_{unit}_random"][3] / entry["file"]
        assert (directory / entry["file"]).read_bytes() == other.read_bytes()


def test_random_masks_freeze_no_more_directions_than_are_stored(masks: Any) -> None:
    """What completes a short basis scores 0, as for importances: a control must not have what no other mask can have."""
    (_, bits, metadata) = masks["thin_random"]
    for name, frozen in bits.items():
        assert not frozen[:, 15:].any() and frozen[:, :15].any(), name
        wanted = min(round(0.23 * frozen.size), frozen[:, :15].size)
        assert frozen.sum() == metadata["layers"][name]["frozen"] == wanted, name


def test_bf16_runs_and_agrees_roughly(
    tmp_path: Path, given: dict[str, Path], models: dict[str, Path], dense_gradients: dict[str, Any]
) -> None:
    names, gradients = dense_gradients["llama"]
    ways = ("exact", "split")
    runs = [importance_arguments(models["llama"], dtype="bfloat16", batch_size=1, products=way) for way in ways]
    run_ranks(2, scores_job, [(run, ROWS, given["llama"], tmp_path / run.products) for run in runs])
    exact, split = ([load_file(tmp_path / way / f"rank_{r}.safetensors") for r in range(2)] for way in ways)
    for name in names:
        found, apart = (np.concatenate([p[name] for p in parts]) for parts in (exact, split))
        # The same gradients and inputs; 3 * 2^-16 is the bound of products of rows and columns without signs.
        assert 0 < np.abs(apart - found).max() < 3 * 2.0**-16 * found.max(), name
        frozen, otherwise = (reference.highest([s], s.size // 10)[0] for s in (found, apart))
        assert (frozen != otherwise).sum() <= 2, name  # of neighbours at the threshold
        expected = reference.importance(gradients, name, columns(given["llama"], name))[:, : found.shape[1]]
        # bf16 has 8 bits: 0.4 % a rounding, over a few dozen roundings on the way.
        assert np.abs(found - expected).max() < 0.1 * expected.max(), name
