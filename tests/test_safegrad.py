"""SafeGrad on one and two ranks against the projection of whole fp64 gradients: alone, under a mask, with a CPU's optimizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_training import DenseAdamW, encoded
from phase3_jobs import TRAINER, losses, make_model, phase3, phase12
from ranks import run_ranks
from safetensors.torch import load_file
from test_controls import assert_same, entropy, logits
from transformers import AutoModelForCausalLM, AutoTokenizer

from warp_ds.cluster import processes
from warp_ds.method.objectives import conflict

STEPS = 5


def safegrad(root: Path, output: Path, **more: Any) -> Path:
    given = {
        "objective": "safegrad",
        "replay_data": str(root / "refusals_fit.jsonl"),
        "masks_dir": "none",
        "train_scope": "all",
    }
    return phase3(root, root / "artefacts", output, **{**given, **more})


def runs(root: Path, output: Path) -> dict[str, Any]:
    """Of every parameter; of masked layers alone; with samples fewer than a step takes, and fewer than there are."""
    made = {"all": safegrad(root, output / "all"), "few": safegrad(root, output / "few", replay_batch_size=3, batch_size=1)}
    if processes.world_size() == 2:
        masks = str(root / "artefacts" / "phase2_latest")
        made["masked"] = safegrad(root, output / "masked", masks_dir=masks, train_scope="warp")
        made["offloaded"] = safegrad(root, output / "offloaded", deepspeed=str(root / "offload.json"))
    found = {}
    for name, run in made.items():
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        removed = [line["safegrad_removed"] for line in lines if "loss" in line]
        found[name] = (losses(run), removed, str(run / "model" / "model.safetensors"))
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("safegrad")
    make_model(path)
    offload = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    (path / "offload.json").write_text(json.dumps({"zero_optimization": offload, "zero_force_ds_cpu_optimizer": False}))
    run_ranks(1, phase12, path, path / "artefacts")
    return path


@pytest.fixture(scope="module")
def made(root: Path) -> dict[int, dict[str, Any]]:
    return {world: run_ranks(world, runs, root, root / f"world{world}")[0] for world in (1, 2)}


def masked_layers(root: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """U and frozen entries of each masked parameter, from the files of phases 1 and 2."""
    basis, masks = ((root / "artefacts" / f"phase{i}_latest" / kind).resolve() for i, kind in ((1, "basis"), (2, "masks")))
    bases: dict[str, Any] = {}
    frozen = {}
    files = json.loads((basis / "metadata.json").read_text())["layers"]
    for name, entry in json.loads((masks / "metadata.json").read_text())["layers"].items():
        bases[f"{name}.weight"] = load_file(basis / files[name]["file"])["U"]
        bits = np.unpackbits(load_file(masks / entry["file"])["frozen"].numpy(), axis=1)[:, : entry["shape"][1]]
        frozen[f"{name}.weight"] = torch.from_numpy(bits.astype(bool))
    return bases, frozen


def reference(root: Path, masked: bool, surgery: bool = True) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, what was removed of the safety gradient in each step, and the last weights, in fp64."""
    tokenizer = AutoTokenizer.from_pretrained(root / "m")
    model, start = (AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float64) for _ in range(2))
    task, safety = (encoded(root / f"{name}.jsonl", tokenizer) for name in ("utility_train", "refusals_fit"))
    bases, frozen = masked_layers(root) if masked else ({}, {})
    params = dict(model.named_parameters())
    trained = [name for name in params if not masked or name in frozen]
    decay = {name: 0.0 if "norm" in name else float(TRAINER["weight_decay"]) for name in trained}  # type: ignore[arg-type]
    optimizer = DenseAdamW(
        {name: params[name].detach().clone() for name in trained}, bases, frozen, lr=2e-3, eps=1e-4, decay=decay, clip=0.5
    )
    with torch.no_grad():
        before = torch.cat(logits(start, safety)).log_softmax(-1)

    def gradient(loss: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict(zip(trained, torch.autograd.grad(loss, [params[name] for name in trained]), strict=True))

    said, removed = [], []
    for _ in range(STEPS):
        with torch.no_grad():
            for name, weights in optimizer.weights().items():
                params[name].copy_(weights)
        loss = entropy(model, task)
        said.append(loss.item())
        own = gradient(loss)
        now = torch.cat(logits(model, safety)).log_softmax(-1)
        other = gradient((before.exp() * (before - now)).sum(-1).mean())
        inner = sum(float((own[name] * other[name]).sum()) for name in trained)
        sizes = [sum(float(g.square().sum()) for g in of.values()) for of in (own, other)]
        c = inner / sizes[1] if surgery and inner < 0 and sizes[1] ** 0.5 > 1e-4 * sizes[0] ** 0.5 else 0.0
        removed.append(c)
        optimizer.step({name: own[name] - c * other[name] for name in trained})
    return said, removed, optimizer.weights()


@pytest.mark.parametrize("name, world", [("all", 1), ("all", 2), ("masked", 2), ("offloaded", 2)])
def test_the_tasks_gradient_never_points_against_safety(root: Path, made: Any, name: str, world: int) -> None:
    said, removed, weights = reference(root, masked=name == "masked")
    found, took, path = made[world][name]
    assert found == pytest.approx(said, abs=2e-6)
    assert took == pytest.approx(removed, rel=1e-3)  # of a difference that is small beside both gradients
    assert took[0] == 0.0 and min(took) < 0.0, "the start model's own is rounding; later ones conflict"
    assert_same(path, weights)
    _, _, without = reference(root, masked=name == "masked", surgery=False)
    assert max(float((without[k] - weights[k]).abs().max()) for k in weights) > 1e-4


def test_any_number_of_ranks_takes_the_same_samples(made: Any) -> None:
    one, two = (made[world]["few"] for world in (1, 2))
    assert one[0] == pytest.approx(two[0], abs=1e-6) and one[1] == pytest.approx(two[1], rel=1e-3)
    a, b = load_file(one[2]), load_file(two[2])
    assert all((a[name] - b[name]).abs().max() < 1e-5 for name in a)


def test_what_is_removed() -> None:
    g, s = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for safety in (s, -s):
        inner = float(g @ safety)
        kept = g - conflict(inner, float(g @ g), float(safety @ safety)) * safety
        assert float(kept @ safety) == pytest.approx(max(inner, 0.0), abs=1e-12)
    assert conflict(-1e-9, 1.0, 1e-9) == 0.0 and conflict(-1.0, 0.0, 0.0) == 0.0
