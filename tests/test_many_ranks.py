"""8, 16 and 32 ranks, many times more than cores: the masked step and the whole job, as on few."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from phase3_jobs import common, losses, make_model, phase3, phase12
from ranks import run_ranks
from test_masked_step import LOSS, WEIGHT, Case, run_all, run_case, write_all

from warp_ds.evaluation.certificate import certify
from warp_ds.flags.arguments import ImportanceArguments
from warp_ds.phases.importance import run_importance

pytestmark = pytest.mark.slow

WORLDS = (8, 16, 32)
HOURS = 3600.0  # 32 processes on two cores: minutes, and nothing hangs for an hour
PLACEMENTS = ("replicated", "sharded", "owner")


def masks_again(root: Path, artefacts: Path, output: Path) -> None:
    """Phase 2 on another world's bases."""
    shared = common(root, output, layer_type="ffn_down,ffn_up,attn_q,attn_k,attn_v")
    run_importance(
        ImportanceArguments(
            **shared,
            safety_data=str(root / "refusals_fit.jsonl"),
            safety_samples=0,
            basis_dir=str(artefacts / "phase1_latest"),
            keep_ratio=0.2,
            importance_batch_size=3,
        )
    )


def job(root: Path, artefacts: Path, output: Path) -> str:
    phase12(root, output / "own")
    masks_again(root, artefacts, output)
    return str(phase3(root, artefacts, output / "trained"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many")
    make_model(path)
    run_ranks(1, phase12, path, path / "artefacts")
    path.joinpath("run").write_text(run_ranks(1, partial(phase3, path, path / "artefacts", path / "one"))[0].as_posix())
    return path


@pytest.mark.parametrize("world_size", WORLDS)
def test_the_masked_step_equals_the_dense_reference(tmp_path: Path, world_size: int) -> None:
    write_all(tmp_path)
    cases = [Case(placement, placement=placement, only=True, clip=0.005, samples=max(WORLDS)) for placement in PLACEMENTS]
    found = run_ranks(world_size, run_all, [(case.name, run_case, (case, tmp_path)) for case in cases], timeout=HOURS)[0]
    for placement, result in found.items():
        assert result["moved"] == 0, f"{placement}: {result['moved']} frozen coefficients moved"
        assert result["loss"] < LOSS and result["weights"] < WEIGHT, (placement, result)
        assert result["trained"] > 1e-3, (placement, result)


def masks_of(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "masks").glob("*.safetensors"))}


def promised(run: Path) -> dict[str, Any]:
    layers = json.loads((run / "masks" / "metadata.json").read_text())["layers"]
    return {name: entry["frozen"] for name, entry in layers.items()}


@pytest.mark.parametrize("world_size", WORLDS)
def test_the_whole_job_does_the_same(root: Path, world_size: int) -> None:
    output, artefacts = root / f"world{world_size}", root / "artefacts"
    run = Path(run_ranks(world_size, job, root, artefacts, output, timeout=HOURS)[0])
    same, own = (masks_of(output / name / "phase2_latest") for name in (".", "own"))
    assert same == masks_of(artefacts / "phase2_latest") and same
    # Its own bases differ in rounding, which may swap entries whose scores are that near.
    assert promised(output / "own" / "phase2_latest") == promised(artefacts / "phase2_latest") and own
    assert losses(run) == pytest.approx(losses(Path((root / "run").read_text())), abs=1e-6)
    kept = certify(root / "m", run / "model", artefacts / "phase2_latest" / "masks")
    assert kept.kept, kept.problems
