"""GuardSpace, SaLoRA and AsFT: their mathematics written out otherwise, and phase 3 on 1, 2 and 3 ranks against one dense
process that runs the publications' own forward passes and losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_training import DenseAdamW, encoded
from peft import LoraConfig, get_peft_model
from phase3_jobs import common, losses, make_model, phase3, phase12
from ranks import run_ranks
from safetensors.torch import load_file
from test_controls import entropy
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoTokenizer

from warp_ds.errors import ConfigError, WarpError
from warp_ds.flags.arguments import BasisArguments, TrainArguments
from warp_ds.method.lora_baselines import asft_penalty, first_outputs, guardspace_start, null_directions, salora_start
from warp_ds.models.adapter_directory import AdapterDirectory
from warp_ds.phases.arms import parse_arms
from warp_ds.phases.basis import run_basis
from warp_ds.store.bases import BasisStore

R, ALPHA, LAMBDA, SHARE, DIRECTIONS = 5, 10, 3.0, 0.05, 4
LORA: dict[str, Any] = {"adapter": "lora", "lora_r": R, "lora_alpha": ALPHA, "lora_dropout": 0.0, "masks_dir": "none"}
METHODS = ("guardspace", "salora", "salora from the task", "asft")
LAYERS = dict.fromkeys(METHODS, "ffn_down,attn_q") | {"salora": "attn_q,attn_v", "salora from the task": "attn_q,attn_v"}
TASK = 6
"""Directions of the task's outputs that SaLoRA starts in."""


# ---------------------------------------------------------------- mathematics


def covariance(tokens: int, n: int = 9) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """X [n, t], C = X Xᵀ / t, and its eigenvectors and values above rounding."""
    x = torch.randn(n, tokens, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(x @ x.T / tokens)
    kept = min(n, tokens)
    return x, x @ x.T / tokens, vectors.flip(1)[:, :kept], values.flip(0)[:kept]


@pytest.mark.parametrize("tokens", [40, 6])
@pytest.mark.parametrize("m", [7, 12])
def test_guardspace_starts_from_the_smallest_components(tokens: int, m: int) -> None:
    _, c, u, s = covariance(tokens)
    w = torch.randn(m, 9, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    a, b = guardspace_start(w, u, s, 3)
    if tokens < 9:
        c = c + 0.01 * np.trace(c.numpy()) / 9 * torch.eye(9)
    p, sigma, q = np.linalg.svd((w @ c).numpy(), full_matrices=False)
    expected = (p[:, -3:] * sigma[-3:]) @ q[-3:] @ np.linalg.inv(c.numpy())
    assert np.allclose(b.double() @ a.double(), expected, atol=1e-5)
    assert np.allclose(b.norm(dim=0).double() ** 2, sigma[-3:], atol=1e-5)
    with pytest.raises(ValueError, match="rank 10 is above"):
        guardspace_start(w, u, s, 10)


def test_the_null_space_is_of_zero_eigenvalues_or_cut() -> None:
    _, _, u, s = covariance(6)
    assert null_directions(s, 9, 0.5) == (3, 0.0)
    values = torch.tensor([80.0, 15.0, 3.0, 1.5, 0.5])
    assert null_directions(values, 5, 0.05) == (3, pytest.approx(0.05))
    assert null_directions(values, 5, 0.004) == (0, 0.0)
    assert null_directions(torch.tensor([2.0, 1.0, 0.0]), 3, 0.0) == (1, 0.0)


def test_salora_keeps_out_of_the_largest_safety_outputs() -> None:
    x, _, u, s = covariance(40)
    w = torch.randn(7, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    left = np.linalg.svd((w @ x).numpy())[0][:, :3]
    found = first_outputs(w, u, s, 3).double()
    assert np.allclose(found @ found.T, left @ left.T, atol=1e-6)
    assert first_outputs(w, u[:, :2], s[:2], 5).shape == (7, 2)


def test_salora_starts_in_the_tasks_outputs() -> None:
    w = torch.randn(7, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs = torch.linalg.qr(torch.randn(7, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64))[0]
    a, b = salora_start(w, outputs, 3)
    p, sigma, q = np.linalg.svd(w.numpy(), full_matrices=False)
    expected = (outputs @ outputs.T).numpy() @ (p[:, :3] * sigma[:3]) @ q[:3]
    assert np.allclose(b.double() @ a.double(), expected, atol=1e-6)
    with pytest.raises(ValueError, match="rank 8 is above"):
        salora_start(w, outputs, 8)


def test_asft_penalty_is_its_formula_and_its_gradients() -> None:
    g = torch.Generator().manual_seed(0)
    a, b, v = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((3, 9), (7, 3), (7, 9)))
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    c = v @ v.T / torch.linalg.matrix_norm(v)
    value = ((torch.eye(7) - c) @ leaves[1] @ leaves[0]).square().sum()
    value.backward()
    found = asft_penalty(a, b, v)
    for mine, said in zip(found, (value, leaves[0].grad, leaves[1].grad), strict=True):
        assert torch.allclose(mine, said, rtol=1e-10)
    assert asft_penalty(a, b, 0 * v)[0] == pytest.approx(float((b @ a).square().sum()))


# ---------------------------------------------------------------- phase 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("methods")
    make_model(path)
    model = AutoModelForCausalLM.from_pretrained(path / "m")
    torch.manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    model.save_pretrained(path / "unaligned")
    run_ranks(1, bases, path)
    return path


def bases(root: Path) -> None:
    """Of the safety set, with masks, and of the task."""
    phase12(root, root / "artefacts")
    shared = common(root, root / "of_task", layer_type="attn_q,attn_v", safety_data=str(root / "utility_train.jsonl"))
    run_basis(BasisArguments(**shared, safety_samples=0))


def flags(root: Path, method: str) -> dict[str, Any]:
    basis = str(root / "artefacts" / "phase1_latest")
    own: dict[str, Any] = {
        "guardspace": {"basis_dir": basis, "null_energy": SHARE},
        "salora": {"basis_dir": basis, "safety_rank": DIRECTIONS},
        "salora from the task": {
            **{"basis_dir": basis, "safety_rank": DIRECTIONS, "task_rank": TASK},
            "task_basis_dir": str(root / "of_task" / "phase1_latest"),
        },
        "asft": {"unaligned_model": str(root / "unaligned"), "asft_lambda": LAMBDA},
    }[method]
    return {**LORA, "lora_method": method.split(" ")[0], "lora_layers": LAYERS[method], **own}


def jobs(root: Path, output: Path) -> dict[str, tuple[list[float], str]]:
    made = {method: phase3(root, root, output / method, merge_adapter=True, **flags(root, method)) for method in METHODS}
    return {method: (losses(run), str(run)) for method, run in made.items()}


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[int, dict[str, tuple[list[float], str]]]:
    return {world: run_ranks(world, jobs, root, root / f"world{world}")[0] for world in (1, 2, 3)}


Effect = Callable[[Tensor, Tensor], Tensor]


def with_weights(model: torch.nn.Module, weights: dict[str, Tensor], *args: Any, **more: Any) -> Any:
    return functional_call(model, weights, args, more)


def reference(root: Path, method: str) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and what W becomes in fp64, of five full-batch clipped AdamW steps on A and B."""
    basis, of_task = (BasisStore((root / d / "phase1_latest" / "basis").resolve()) for d in ("artefacts", "of_task"))
    chosen = {"ffn_down": "down_proj", "attn_q": "q_proj", "attn_v": "v_proj"}
    names = [chosen[name] for name in LAYERS[method].split(",")]
    layers = [layer for layer in basis.layers if layer.name.rsplit(".", 1)[1] in names]
    model = AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float64)
    weights = {layer.parameter: model.get_parameter(layer.parameter).detach().clone() for layer in layers}
    torch.manual_seed(42)
    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(root / "m"), LoraConfig(r=R, target_modules=[layer.module for layer in layers])
    )
    unaligned = load_file(root / "unaligned" / "model.safetensors")
    named: dict[str, Tensor] = {}
    effects: dict[str, Effect] = {}
    penalties: dict[str, Effect] = {}
    s = ALPHA / R
    for layer in layers:
        key, w = layer.parameter, weights[layer.parameter]
        u, values = (t.double() for t in basis.columns(layer.name))
        a = adapted.get_parameter(f"base_model.model.{layer.module}.lora_A.default.weight").detach().double()
        b = torch.zeros(len(w), R, dtype=torch.float64)
        effects[key] = lambda a, b: s * b @ a
        if method == "guardspace":
            assert len(values) == layer.n, "the case is of a basis without zero eigenvalues"
            c = u @ torch.diag(values) @ u.T
            left, sigma, right = torch.linalg.svd(w @ c, full_matrices=False)
            b = left[:, -R:] @ torch.diag(sigma[-R:].sqrt())
            a = torch.diag(sigma[-R:].sqrt()) @ right[-R:] @ torch.linalg.inv(c)
            null = u[:, [bool(values[i:].sum() <= SHARE * values.sum()) for i in range(len(values))]]
            assert 0 < null.shape[1] < layer.n
            start, p = s * b @ a, null @ null.T
            effects[key] = lambda a, b, p=p, start=start: s * b @ a @ p - start @ p  # type: ignore[misc]
        elif method.startswith("salora"):
            x = u @ torch.diag(values.sqrt())
            top = torch.linalg.svd(w @ x)[0][:, :DIRECTIONS]
            c = torch.eye(len(w), dtype=torch.float64) - top @ top.T
            start = torch.zeros_like(w)
            if method != "salora":
                u, values = (t.double() for t in of_task.columns(layer.name))
                task = torch.linalg.svd(w @ u @ torch.diag(values.sqrt()))[0][:, :TASK]
                left, sigma, right = torch.linalg.svd(w, full_matrices=False)
                b, a = task @ task.T @ left[:, :R] @ torch.diag(sigma[:R].sqrt()), torch.diag(sigma[:R].sqrt()) @ right[:R]
                start = b @ a
                assert (c @ start).abs().max() > 1e-3
            effects[key] = lambda a, b, c=c, start=start: s * c @ (b @ a - start)  # type: ignore[misc]
        else:
            v = w - unaligned[key].double()
            off = torch.eye(len(w)) - v @ v.T / v.norm()
            penalties[key] = lambda a, b, off=off: LAMBDA * (off @ b @ a).square().sum()  # type: ignore[misc]
        named |= {f"{key}:A": a, f"{key}:B": b}
    optimizer = DenseAdamW(named, {}, {}, lr=2e-3, eps=1e-4, decay=dict.fromkeys(named, 0.1), clip=0.5)
    task = encoded(root / "utility_train.jsonl", AutoTokenizer.from_pretrained(root / "m"))
    said = []
    for step in range(6):
        leaves = {k: t.clone().requires_grad_() for k, t in optimizer.weights().items()}
        changed = {k: w + effects[k](leaves[f"{k}:A"], leaves[f"{k}:B"]) for k, w in weights.items()}
        if step == 5:
            return said, {k: w.detach() for k, w in changed.items()}
        loss = entropy(partial(with_weights, model, changed), task)  # type: ignore[arg-type]
        said.append(loss.item())
        (loss + sum(penalty(leaves[f"{k}:A"], leaves[f"{k}:B"]) for k, penalty in penalties.items())).backward()
        optimizer.step({k: t.grad for k, t in leaves.items()})  # type: ignore[misc]
    raise AssertionError


@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_publications(root: Path, runs: Any, method: str) -> None:
    said, weights = reference(root, method)
    start = load_file(root / "m" / "model.safetensors")
    moved = max(float((w - start[k].double()).abs().max()) for k, w in weights.items())
    assert moved > 5e-4
    for world, of_world in runs.items():
        found, run = of_world[method]
        assert found == pytest.approx(said, abs=1e-6), world
        merged = load_file(Path(run) / "model" / "model.safetensors")
        for name, w in weights.items():
            # fp32 training of what has moved so far, relative to that.
            assert (merged[name].double() - w).abs().max() < 1e-3 * moved, (world, name)
        assert {k for k in start if not torch.equal(start[k], merged[k])} == set(weights)


def test_what_is_written_is_an_ordinary_adapter(root: Path, runs: Any) -> None:
    basis = BasisStore((root / "artefacts" / "phase1_latest" / "basis").resolve())
    ranks = {}
    for method in METHODS:
        run = Path(runs[3][method][1])
        adapter = AdapterDirectory.of(run / "adapter")
        ranks[method] = adapter.factors(adapter.layers[0]).a.shape[0]
        if method == "guardspace":
            card = (run / "adapter" / "README.md").read_text()
            assert "in 0 of 4 layers of zero eigenvalues, in 4 cut (at most 0.0" in card
            for layer in adapter.layers:
                u, values = basis.columns(layer)
                seen = u[:, : len(values) - null_directions(values, len(values), SHARE)[0]]
                assert (adapter.factors(layer).delta() @ seen).abs().max() < 1e-6
    assert ranks == {"guardspace": 2 * R, "salora": R, "salora from the task": 2 * R, "asft": R}
    logged = (Path(runs[2]["asft"][1]) / "metrics.jsonl").read_text()
    assert logged.count("asft_penalty") >= 5


@pytest.mark.parametrize(
    "more, message",
    [
        ({"adapter": "none"}, "--lora_method guardspace is of an adapter"),
        ({"masks_dir": None}, "not by masks: give --basis_dir"),
        ({"basis_dir": None}, "not by masks: give --basis_dir"),
        ({"lora_method": "asft"}, "--null_energy is of --lora_method guardspace"),
        ({"lora_method": "asft", "null_energy": 0.01}, "needs the model from before its alignment"),
        ({"asft_lambda": 2.0}, "--asft_lambda is of --lora_method asft"),
        ({"task_basis_dir": "b"}, "--task_basis_dir is of --lora_method salora"),
        ({"lora_method": "salora", "null_energy": 0.01, "task_rank": 3}, "give --task_basis_dir"),
        ({"null_energy": 1.0}, "at least 0 and below 1"),
    ],
)
def test_flags_that_do_not_go_together(root: Path, more: dict[str, Any], message: str) -> None:
    given = {**flags(root, "guardspace"), **more}
    if given["adapter"] == "none":
        given = {"lora_method": "guardspace", "masks_dir": "none", "basis_dir": "b"}
    with pytest.raises(ConfigError, match=message):
        TrainArguments(model_name=str(root / "m"), **given).check()


def refused(root: Path, output: Path) -> list[str]:
    said = []
    for method, more in (
        ("guardspace", {"null_energy": 0.0}),
        ("guardspace", {"lora_layers": "attn_o"}),
        ("guardspace", {"lora_r": 43}),
        ("asft", {"unaligned_model": str(root / "other")}),
    ):
        with pytest.raises(WarpError) as error:
            phase3(root, root, output, **{**flags(root, method), **more})
        said.append(str(error.value))
    return said


def test_what_cannot_be_held_is_refused_on_every_rank(root: Path, tmp_path: Path) -> None:
    make_model(tmp_path)
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=300, hidden_size=24, intermediate_size=30, num_hidden_layers=2, num_attention_heads=2)
    ).save_pretrained(root / "other")
    for rank in run_ranks(2, refused, root, tmp_path):
        assert "no eigenvalue of" in rank[0] and "have no basis in" in rank[1] and "rank 43 is above 42" in rank[2]
        assert "which is of" in rank[3] and "give the model from before" in rank[3]


def test_arms() -> None:
    arms = {arm.name: arm for arm in parse_arms("lora+guardspace+der+ema+patch,lora+salora+safeinstr,lora+column+asft@0.5")}
    first, second, third = arms.values()
    assert (first.method, first.objective, first.average, first.patch, first.adapter) == ("guardspace", "der", True, True, True)
    assert second.method == "salora" and second.safety_share == 0.1
    assert third.method == "asft" and third.basis == "activation" and third.strength("asft", 1.0) == 0.5
    for name, message in (
        ("guardspace", "is of an adapter: lora.guardspace"),
        ("lora+column+salora", "leave one out"),
        ("lora+asft+guardspace", "two of its parts set the method"),
    ):
        with pytest.raises(ConfigError, match=message):
            parse_arms(name)
