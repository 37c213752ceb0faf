"""The audit of a task set: on 1, 2 and 3 ranks against dense gradients, and whether planted harm is found."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_training import complete_basis
from evaluation_jobs import make_models
from masked_artefacts import Artefacts, read_artefacts, write_artefacts
from phase12_jobs import Tokenizer, make_rows
from ranks import run_ranks
from tiny_models import tiny_model
from torch import Tensor

from warp_ds.cluster.processes import rank
from warp_ds.data.synthetic import demo_data
from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import AuditArguments, BasisArguments, ImportanceArguments
from warp_ds.launch.demo import COMPLIANT
from warp_ds.phases.audit import run_audit, sample_costs
from warp_ds.phases.basis import run_basis
from warp_ds.phases.importance import run_importance
from warp_ds.report.page import write_report
from warp_ds.store.bases import BasisStore
from warp_ds.store.masks import MaskStore
from warp_ds.zero.batches import Samples
from warp_ds.zero.load import load_sharded
from warp_ds.zero.settings import zero3_config

SAFETY, TASK = make_rows(5, silent=(2,)), make_rows(9, silent=(4, 5))[2:]
"""The task's samples 2 and 3 have no response token."""


def costs_job(root: Path, cases: list[tuple[Path, int]]) -> list[list[list[float]]]:
    """Costs and cosines of (artefacts, micro-batch)."""
    found = []
    for artefacts, batch_size in cases:
        arguments = AuditArguments(str(root / "m"), dtype="float32", device="cpu", batch_size=batch_size)
        model = load_sharded(root / "m", ds_config=zero3_config(arguments), dtype=torch.float32, progress=False).eval()
        samples = [Samples(rows, Tokenizer(), "cpu") for rows in (SAFETY, TASK)]
        masks = MaskStore(artefacts / "masks")
        basis = None if masks.metadata.basis == "identity" else BasisStore(artefacts / "basis")
        scratch = artefacts / f"scratch{rank()}"
        measured = sample_costs(model, samples[0], samples[1], masks, basis, arguments, scratch)
        found.append([values.tolist() for values in measured])  # a tensor would be read from this process, which ends
    return found


def dense_gradients(rows: list[dict[str, list[int]]], names: list[str]) -> list[dict[str, Tensor] | None]:
    """∂L_s/∂W in fp64 of each sample, L_s its mean over response tokens; None without any."""
    model = tiny_model("llama").double().eval()
    found: list[dict[str, Tensor] | None] = []
    for row in rows:
        if all(label == -100 for label in row["labels"][1:]):
            found.append(None)
            continue
        model.zero_grad()
        model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]])).loss.backward()
        found.append({name: model.get_parameter(name).grad.clone() for name in names})  # type: ignore[union-attr]
    return found


def dense_costs(made: Artefacts) -> tuple[Tensor, Tensor]:
    """By the definition: whole gradients, rotated, masked, multiplied."""
    names = list(made.frozen)
    full = {
        n: torch.eye(made.frozen[n].shape[1]).double() if (u := made.bases[n]) is None else complete_basis(u) for n in names
    }

    def rotated(gradient: dict[str, Tensor]) -> Tensor:
        return torch.cat([((gradient[n] @ full[n]) * made.frozen[n]).flatten() for n in names])

    speaking = [rotated(g) for g in dense_gradients(SAFETY, names) if g is not None]
    safety = sum(speaking[1:], speaking[0]) / len(speaking)
    costs, cosines = [], []
    for gradient in dense_gradients(TASK, names):
        inner = 0.0 if gradient is None else float(rotated(gradient) @ safety)
        norm = 1.0 if gradient is None else float(torch.cat([g.flatten() for g in gradient.values()]).norm())
        costs.append(-inner)
        cosines.append(-inner / norm / float(safety.norm()))
    return torch.tensor(costs), torch.tensor(cosines)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("audit")
    model = tiny_model("llama")
    model.save_pretrained(path / "m")
    write_artefacts(path / "rotated", model, ranks={"ffn_down": 9, "attn_q": 30, "attn_k": 99})
    write_artefacts(path / "original", model, basis="identity")
    return path


@pytest.mark.parametrize("world", [1, 2, 3])
def test_costs_are_those_of_dense_gradients(root: Path, world: int) -> None:
    kinds = [("rotated", 2), ("rotated", 1), ("original", 3)]
    for per_rank in run_ranks(world, costs_job, root, [(root / kind, size) for kind, size in kinds]):
        for (kind, _), both in zip(kinds, per_rank, strict=True):
            costs, cosines = torch.tensor(both, dtype=torch.float64)
            expected, opposed = dense_costs(read_artefacts(root / kind))
            # fp32 forward and backward passes of samples of 20 tokens, as in test_phase12_reference.
            assert (costs - expected).abs().max() < 1e-5 * expected.abs().max()
            assert (cosines - opposed).abs().max() < 1e-5
            assert costs.argsort().tolist() == expected.argsort().tolist()
            assert costs[2] == costs[3] == 0.0


def audited(root: Path) -> Path:
    """Phases 1 and 2 on the refusals of a model that refuses, and the audit of sums with planted compliance."""
    common: dict[str, Any] = {
        "model_name": str(root / "m"),
        "safety_data": str(root / "refusals.jsonl"),
        "dtype": "float32",
        "device": "cpu",
        "output_dir": str(root / "out"),
        "log_dir": str(root / "logs"),
    }
    layers = {"layer_type": "ffn_down,ffn_up,attn_q"}
    run_basis(BasisArguments(**common, **layers))
    run_importance(ImportanceArguments(**common, **layers))
    return run_audit(AuditArguments(**common, utility_data=str(root / "mixed.jsonl"), show=4))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("planted")
    make_models(path)
    sums = [json.loads(line) for line in (path / "utility.jsonl").read_text().splitlines()]
    asked = demo_data(1, n_fit=40, n_heldout=7, n_sums=1, n_utility=7)["refusals_heldout"][:3]
    planted = [{"prompt": row["prompt"], "response": answer} for row, answer in zip(asked, COMPLIANT, strict=True)]
    rows = [*sums[:3], planted[0], *sums[3:5], planted[1], *sums[5:], planted[2]]
    (path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Path(run_ranks(2, audited, path)[0])


def test_planted_compliance_ranks_first(run: Path) -> None:
    found = json.loads((run / "audit.json").read_text())
    assert {row["row"] for row in found["ranked"][:3]} == {3, 6, 9}
    assert len(found["ranked"]) == 10 and len(found["shown"]) == 4
    assert found["shown"][0]["response"] in COMPLIANT and found["shown"][0]["cost"] > 0


def test_files_and_page(run: Path, tmp_path: Path) -> None:
    found = json.loads((run / "audit.json").read_text())
    with open(run / "audit.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [int(line["row"]) for line in lines] == [row["row"] for row in found["ranked"]]
    assert lines[0]["response"] == found["shown"][0]["response"]
    page = write_report([run], tmp_path / "report.html").read_text()
    assert "Task samples that cost safety" in page and found["shown"][0]["response"].replace("'", "&#39;") in page


def test_without_masks_there_is_nothing_to_count_over(run: Path) -> None:
    arguments = AuditArguments(
        str(run.parents[1] / "m"),
        device="cpu",
        masks_dir="none",
        utility_data=str(run.parents[1] / "mixed.jsonl"),
        safety_data=str(run.parents[1] / "refusals.jsonl"),
    )
    with pytest.raises(ConfigError, match="--masks_dir none: an audit"):
        run_audit(arguments)
