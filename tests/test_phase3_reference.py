"""The whole job on 1, 2 and 3 ranks (3 cuts rows), phase 3 against the dense one-process reference."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_training import phase3_reference
from phase3_jobs import SAMPLES, interrupted_and_resumed, make_model, phase12, whole_job
from ranks import run_ranks
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from warp_ds.evaluation.certificate import certify

WORLDS = (1, 2, 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("job")
    make_model(path)
    return path


@pytest.fixture(scope="module")
def artefacts(root: Path) -> Path:
    run_ranks(1, phase12, root, root / "artefacts")
    return root / "artefacts"


@pytest.fixture(scope="module")
def jobs(root: Path, artefacts: Path) -> dict[int, dict[str, Any]]:
    return {world: run_ranks(world, whole_job, root, artefacts, root / f"world{world}")[0] for world in WORLDS}


@pytest.mark.parametrize("scope", ["warp", "all"])
@pytest.mark.parametrize("world", WORLDS)
def test_training_equals_the_dense_reference(root: Path, artefacts: Path, jobs: Any, world: int, scope: str) -> None:
    losses, weights = phase3_reference(root, artefacts, scope)
    run = Path(jobs[world]["runs"][scope])
    # fp32 against fp64 at an Adam eps of 1e-4: measured below 5e-7 and 2e-6.
    assert jobs[world]["losses"][scope] == pytest.approx(losses, abs=1e-6)
    trained = load_file(run / "model" / "model.safetensors")
    start = load_file(root / "m" / "model.safetensors")
    for name, value in trained.items():
        if name in weights:
            assert (value.double() - weights[name]).abs().max() < 1e-5, name
        else:
            assert torch.equal(value, start[name]), name
    assert any((trained[name] - start[name]).abs().max() > 1e-3 for name in weights)


@pytest.mark.parametrize("world", WORLDS)
def test_export_is_an_ordinary_model_and_keeps_the_promise(root: Path, artefacts: Path, jobs: Any, world: int) -> None:
    run = Path(jobs[world]["runs"]["warp"])
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("How do I rob a bank?", return_tensors="pt")["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
    assert (run / "model" / "README.md").is_file()
    kept = certify(root / "m", run / "model", artefacts / "phase2_latest" / "masks")
    assert kept.kept, kept.problems
    unmasked = certify(root / "m", Path(jobs[world]["runs"]["identity"]) / "model", artefacts / "phase2_latest" / "masks")
    assert not unmasked.kept


def test_any_number_of_ranks_does_the_same(jobs: Any) -> None:
    for world in WORLDS[1:]:
        for name, losses in jobs[1]["losses"].items():
            assert jobs[world]["losses"][name] == pytest.approx(losses, abs=1e-6), (world, name)
        assert jobs[world]["answers"] == jobs[1]["answers"]
        for name, value in jobs[1]["evaluation"].items():
            assert jobs[world]["evaluation"][name] == pytest.approx(value, abs=1e-5), (world, name)


def test_gradient_checkpointing_changes_nothing(jobs: Any) -> None:
    for world in WORLDS:
        assert jobs[world]["losses"]["checkpointing"] == pytest.approx(jobs[world]["losses"]["warp"], abs=1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(root: Path, artefacts: Path, world: int) -> None:
    found = run_ranks(world, interrupted_and_resumed, root, artefacts, root / f"resume{world}")[0]
    assert found["runs"] == 1
    assert found["resumed"] == found["whole"] and len(found["whole"]) == 5
    whole, resumed = (load_file(Path(path) / "model.safetensors") for path in found["model"])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_run_that_dies_before_its_first_checkpoint_logs_no_step_twice(root: Path, artefacts: Path) -> None:
    found = run_ranks(1, partial(interrupted_and_resumed, save_steps=100), root, artefacts, root / "no_checkpoint")[0]
    assert found["runs"] == 1
    assert found["resumed"] == found["whole"] and len(found["whole"]) == 5


def test_the_batch_has_odd_samples() -> None:
    assert all(SAMPLES % (2 * world) for world in WORLDS)
