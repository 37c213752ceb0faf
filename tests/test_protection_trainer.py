"""Two lines in a stock transformers Trainer: under ZeRO-3 on one and two ranks, and in one process without DeepSpeed."""

from __future__ import annotations

import copy
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from masked_artefacts import (
    Artefacts,
    DenseAnyOptimizer,
    odd_model,
    read_artefacts,
    reference_losses,
    token_batches,
    train_only,
    write_artefacts,
)
from ranks import run_ranks
from safetensors.torch import load_file
from test_masked_step import LOSS, WEIGHT, Case, gathered, make_engine, protect, run_all, train_step
from transformers import Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import TrainerCallback

from warp_ds import WarpCallback
from warp_ds.cluster import processes
from warp_ds.zero.placements import Replicated
from warp_ds.zero.plain_step import PlainDriver
from warp_ds.zero.zero3_step import Zero3Driver

STEPS, LR, EPS, DECAY, CLIP = 5, 1e-2, 1e-4, 0.1, 0.5


class Reporter(TrainerCallback):
    """Stands where TensorBoard's and W&B's callbacks stand: among the Trainer's own, before those it is given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


class Keep(TrainerCallback):
    """The model that is trained, whole, at the end."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights = gathered(type("Holder", (), {"module": kwargs["model"]}))


def samples() -> list[dict[str, torch.Tensor]]:
    """One global batch, which is every step's: the order of samples does not matter. The first token predicts nothing."""
    rows = token_batches(1)[0]
    labels = rows.clone()
    labels[:, 0] = -100
    return [{"input_ids": ids, "labels": label} for ids, label in zip(rows, labels, strict=True)]


def fit(
    artefacts: Artefacts,
    folder: Path,
    zero: dict[str, Any] | None,
    resume: bool = False,
    steps: int = STEPS,
    accumulation: int = 1,
    dtype: torch.dtype = torch.float32,
    protected: bool = True,
    clip: float = CLIP,
    only: bool = False,
    **more: Any,
) -> tuple[Trainer, WarpCallback, Keep]:
    deepspeed = (
        None
        if zero is None
        else {
            "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True, **zero},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": dtype == torch.bfloat16},
        }
    )
    set_seed(0)
    warp, keep = WarpCallback(basis_dir=artefacts.basis, masks_dir=artefacts.masks), Keep()
    model = odd_model(dtype)
    if only:
        train_only(model, artefacts.frozen)
    trainer = Trainer(
        model=model,
        train_dataset=samples(),
        callbacks=[warp, keep] if protected else [keep],
        args=TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=12 // processes.world_size() // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=steps,
            learning_rate=LR,
            adam_epsilon=EPS,
            max_grad_norm=clip,
            lr_scheduler_type="constant",
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            deepspeed=deepspeed,
            bf16=dtype == torch.bfloat16 and zero is not None,
            **{"save_strategy": "no", "weight_decay": DECAY, **more},
        ),
    )
    reporter = Reporter()
    trainer.callback_handler.callbacks.insert(1, reporter)
    if protected:
        warp.before_reporters(trainer)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    if protected:
        assert all("grad_norm_removed" in logs for logs in reporter.seen if "loss" in logs)
    return trainer, warp, keep


def lines(trainer: Trainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def expect_reference(
    artefacts: Artefacts, trainer: Trainer, keep: Keep, what: str, clip: float = CLIP, only: bool = False
) -> None:
    model = odd_model()
    if only:
        train_only(model, artefacts.frozen)
    named = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
    # Trainer's decay, on everything but norms.
    decay = {k: 0.0 if "norm" in k else DECAY for k in named}
    dense = DenseAnyOptimizer(named, artefacts, lambda g: torch.optim.AdamW(g, lr=LR, eps=EPS), decay, clip)
    removed, norms = [], []
    inner = dense.step

    def step(gradients: dict[str, torch.Tensor]) -> None:
        inner(gradients)
        removed.append(dense.removed)
        norms.append(dense.norm)

    dense.step = step  # type: ignore[method-assign]
    losses = reference_losses(model, token_batches(1) * STEPS, dense)
    found = lines(trainer)
    assert len(found) == STEPS
    share = sum(int(f.sum()) for f in artefacts.frozen.values()) / sum(f.numel() for f in artefacts.frozen.values())
    for line, loss, without, norm in zip(found, losses, removed, norms, strict=True):
        assert abs(line["loss"] - loss) < LOSS, (what, line, loss)
        assert abs(line["grad_norm_removed"] - without) < 1e-5, (what, line, without)
        assert abs(line["grad_norm"] / norm - 1) < 1e-4, (what, line, norm)
        assert abs(line["masked_fraction"] - share) < 1e-9
        assert line["rotate_seconds"] > 0
    for name, weights in dense.weights().items():
        error = (keep.weights[name].double() - weights).abs().max()
        assert error < WEIGHT, f"{what}: {name} is off by {error}"


def under_zero3(artefacts: Artefacts, folder: Path) -> None:
    trainer, warp, keep = fit(artefacts, folder / "persistent", {})
    assert isinstance(warp.protection.driver, Zero3Driver)
    expect_reference(artefacts, trainer, keep, "persistent")
    trainer, _, keep = fit(
        artefacts,
        folder / "accumulated",
        {"stage3_param_persistence_threshold": 0},
        accumulation=2,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )
    expect_reference(artefacts, trainer, keep, "accumulated, checkpointed")
    # Where nothing else trains, the mask decides the norm, and whether it is clipped.
    trainer, _, keep = fit(artefacts, folder / "only", {}, clip=0.005, only=True)
    expect_reference(artefacts, trainer, keep, "only masked layers", clip=0.005, only=True)
    # The same as a loop of one's own.
    engine = make_engine(Case("loop", decay=DECAY, clip=CLIP))
    for group in engine.optimizer.optimizer.param_groups:
        group["weight_decay"] = 0.0
    protect(engine, artefacts)
    for batch in token_batches(1) * STEPS:
        train_step(engine, batch)
    loop = gathered(engine)
    engine.destroy()
    _, _, keep = fit(artefacts, folder / "as a loop", {}, weight_decay=0.0)
    for name, value in loop.items():
        assert (keep.weights[name] - value).abs().max() < WEIGHT, name


def resumes_under_zero3(artefacts: Artefacts, folder: Path, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    whole, _, kept = fit(artefacts, folder, {"stage3_param_persistence_threshold": 100}, dtype=dtype, **options)
    whole.save_model(str(folder / "model"))
    if processes.rank() == 0:
        saved = load_file(folder / "model" / "model.safetensors")
        assert saved.keys() == kept.weights.keys() and all(torch.equal(saved[k], v) for k, v in kept.weights.items())
        checkpoint = folder / "checkpoint-4"
        exported = get_fp32_state_dict_from_zero_checkpoint(checkpoint)
        for name, value in load_file(checkpoint / "model.safetensors").items():
            # In fp32 exactly the weights trained on; in bf16 those, before they were rounded.
            assert torch.equal(exported[name].to(dtype), value), name
            assert value.dtype == dtype
    again, _, kept_again = fit(
        artefacts, folder, {"stage3_param_persistence_threshold": 100}, dtype=dtype, resume=True, **options
    )
    assert [line["loss"] for line in lines(again)] == [line["loss"] for line in lines(whole)]
    for name, value in kept.weights.items():
        assert torch.equal(kept_again.weights[name], value), name
    # The optimizer's second life without protection, or the other way round, is noticed.
    with pytest.raises(ValueError, match="already stepped without protection"):
        _resume_of_an_unprotected_run(artefacts, folder / "unprotected", options)


def _resume_of_an_unprotected_run(artefacts: Artefacts, folder: Path, options: dict[str, Any]) -> None:
    fit(artefacts, folder, {}, protected=False, steps=2, **options)
    fit(artefacts, folder, {}, resume=True, **options)


def refused_by_the_callback(artefacts: Artefacts, folder: Path) -> None:
    for stage, word in ((2, "ZeRO stage 1 or 2"), (0, "without ZeRO")):
        with pytest.raises(ValueError, match=word):
            fit(artefacts, folder, {"stage": stage})


@pytest.mark.parametrize("world_size", [1, 2])
def test_trainer_under_zero3(tmp_path: Path, world_size: int) -> None:
    artefacts = write_artefacts(tmp_path / "artefacts", odd_model())
    jobs = [
        ("exact", under_zero3, (artefacts, tmp_path / "exact")),
        ("resumed", resumes_under_zero3, (artefacts, tmp_path / "resumed", torch.float32)),
        ("resumed, bf16", resumes_under_zero3, (artefacts, tmp_path / "resumed bf16", torch.bfloat16)),
    ]
    if world_size == 1:
        jobs.append(("refused", refused_by_the_callback, (artefacts, tmp_path / "refused")))
    run_ranks(world_size, run_all, jobs)


# ---------------------------------------------------------------- without DeepSpeed


def without_deepspeed(root: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    artefacts = read_artefacts(root)
    trainer, warp, keep = fit(artefacts, folder / "plain", None)
    assert isinstance(warp.protection.driver, PlainDriver)
    assert trainer.args.max_grad_norm == CLIP, "the callback has not given the clipping back"
    expect_reference(artefacts, trainer, keep, "plain")
    trainer, _, keep = fit(artefacts, folder / "accumulated", None, accumulation=3, gradient_checkpointing=True)
    expect_reference(artefacts, trainer, keep, "plain, accumulated, checkpointed")

    trainer, _, keep = fit(artefacts, folder / "only", None, clip=0.005, only=True)
    expect_reference(artefacts, trainer, keep, "plain, only masked layers", clip=0.005, only=True)

    # Resumed: C is made anew from W, so within rounding.
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole, _, kept = fit(artefacts, folder / "resumed", None, **options)
    again, _, kept_again = fit(artefacts, folder / "resumed", None, resume=True, **options)
    for line, expected in zip(lines(again), lines(whole), strict=True):
        assert abs(line["loss"] - expected["loss"]) < LOSS
    for name, value in kept.weights.items():
        assert (kept_again.weights[name] - value).abs().max() < WEIGHT, name

    # A pure bf16 model: C and its moments are fp32 all the same, and a resumed run gets its moments back as bf16.
    whole, _, kept = fit(artefacts, folder / "bf16", None, dtype=torch.bfloat16, **options)
    again, warp, kept_again = fit(artefacts, folder / "bf16", None, dtype=torch.bfloat16, resume=True, **options)
    assert isinstance(warp.protection.driver, PlainDriver)
    # C starts again from weights of 8 bits: half a unit of the largest weights, and what three steps make of it.
    for line, expected in zip(lines(again), lines(whole), strict=True):
        assert abs(line["loss"] - expected["loss"]) < 2e-2
    for name, value in kept.weights.items():
        assert (kept_again.weights[name].float() - value.float()).abs().max() < 2**-7 * max(1.0, float(value.abs().max()))


def replicated(artefacts: Artefacts, folder: Path) -> None:
    """Under DDP every rank takes the same step."""
    trainer, warp, keep = fit(artefacts, folder, None, clip=0.005, only=True)
    assert isinstance(warp.protection.driver, PlainDriver)
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    expect_reference(artefacts, trainer, keep, "DDP", clip=0.005, only=True)


def test_trainer_under_ddp(tmp_path: Path) -> None:
    run_ranks(2, replicated, write_artefacts(tmp_path / "artefacts", odd_model()), tmp_path / "run")


def frozen_bits_in_a_loop(root: Path) -> None:
    """Plain torch loop: frozen bits stay, the optimizer is its own afterwards, and twice is refused."""
    import warp_ds

    artefacts, model = read_artefacts(root), odd_model(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    defaults = copy.deepcopy(optimizer.param_groups[0]["weight_decay"])
    protection = warp_ds.protect_optimizer(model, optimizer, None, artefacts.masks)
    driver = protection.driver
    assert isinstance(driver, PlainDriver) and isinstance(protection.placement, Replicated)
    with pytest.raises(ValueError, match="protected already"):
        warp_ds.protect_optimizer(model, optimizer, None, artefacts.masks)
    stored = warp_ds.store.masks.MaskStore(artefacts.masks).find_basis()
    assert stored is not None
    for layer in protection.layers:  # what is trained with is the polished basis
        rotation = stored.rotation(layer.target.name)
        if rotation.matrix is not None:
            held = protection.placement.whole[layer.basis].matrix
            assert held is not None and torch.equal(held, rotation.polished().matrix)
            assert not torch.equal(held, rotation.matrix), "this basis needs no polish: nothing is seen"
    assert any(rotation.matrix is not None for rotation in protection.placement.whole.values())
    before = {k: v.clone() for k, v in driver.all_coefficients().items()}
    for ids in token_batches(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert optimizer.param_groups[0]["weight_decay"] == defaults
    for name, after in driver.all_coefficients().items():
        mask = artefacts.frozen[f"{name}.weight"]
        assert torch.equal(after[mask], before[name][mask]) and not torch.equal(after[~mask], before[name][~mask])
        assert dict(model.named_parameters())[f"{name}.weight"].dtype == torch.bfloat16
    protection.release()
    frozen = dict(model.named_parameters())["model.layers.0.mlp.down_proj.weight"]
    others = [p for p in model.parameters() if p is not frozen]
    with pytest.raises(ValueError, match="down_proj is not among the optimizer's parameters"):
        warp_ds.protect_optimizer(model, torch.optim.SGD(others, lr=LR), None, artefacts.masks)
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(ValueError, match="no gradient"):
        protection = warp_ds.protect_optimizer(model, torch.optim.SGD(model.parameters(), lr=LR), None, artefacts.masks)
        frozen.grad = None
        protection.driver.optimizer.step()


def overflow_in_a_loop(root: Path) -> None:
    """A GradScaler that finds an overflow leaves a fused optimizer to skip the step: nothing moves, decay included."""
    import warp_ds

    artefacts, model = read_artefacts(root), odd_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY, fused=True)
    protection = warp_ds.protect_optimizer(model, optimizer, None, artefacts.masks)
    driver = protection.driver
    assert isinstance(driver, PlainDriver) and isinstance(protection.placement, Replicated)
    protection.max_grad_norm = CLIP
    ids = token_batches(1)[0]
    before = {k: v.clone() for k, v in driver.all_coefficients().items()}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for scale in (float("inf"), 1.0):
        scaler.scale(model(input_ids=ids, labels=ids).loss * scale).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = any(not torch.equal(after, before[name]) for name, after in driver.all_coefficients().items())
        assert moved == (scale == 1.0)
        assert scale != 1.0 or protection.grad_norm is not None, "nothing was clipped"
        assert optimizer.param_groups[0]["weight_decay"] == DECAY
    scaler.scale(model(input_ids=ids, labels=ids).loss).backward()
    with pytest.raises(ValueError, match="still scaled"):
        scaler.step(optimizer)


def gradients_of_other_widths(root: Path) -> None:
    """fp64 weights, and fp32 gradients of bf16 weights that are asked for after protecting, are rotated as they come; a
    gradient that fp32 coefficients cannot have is refused before anything is changed."""
    import warp_ds

    artefacts, ids = read_artefacts(root), token_batches(1)[0]
    for dtype in (torch.float64, torch.bfloat16):
        model = odd_model(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        protection = warp_ds.protect_optimizer(model, optimizer, None, artefacts.masks)
        driver = protection.driver
        assert isinstance(driver, PlainDriver)
        if dtype == torch.bfloat16:
            for param in model.parameters():
                param.grad_dtype = torch.float32
        for _ in range(3):
            model(input_ids=ids, labels=ids).loss.backward()
        named, before = dict(model.named_parameters()), {k: c.clone() for k, c in driver.all_coefficients().items()}
        gradients = {name: named[f"{name}.weight"].grad.double() for name in before}
        assert dtype == torch.float64 or any(not torch.equal(g, g.bfloat16().double()) for g in gradients.values())
        optimizer.step()
        for name, after in driver.all_coefficients().items():
            frozen, basis = artefacts.frozen[f"{name}.weight"], artefacts.bases[f"{name}.weight"]
            rotated = gradients[name] if basis is None else gradients[name] @ basis.double()
            known = ~frozen[:, : rotated.shape[1]]  # of the complement any basis will do
            assert torch.equal(after[frozen], before[name][frozen])
            moved = (before[name].double() - after.double())[:, : rotated.shape[1]] / LR
            # C is fp32, of which a step of LR moves the last digits: 2^-24 of it by LR.
            assert (moved - rotated)[known].abs().max() < 2.0**-22 * before[name].abs().max() / LR
    model = odd_model()
    narrow = dict(model.named_parameters())["model.layers.0.mlp.down_proj.weight"]
    narrow.grad_dtype = torch.bfloat16
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    warp_ds.protect_optimizer(model, optimizer, None, artefacts.masks)
    start = narrow.detach().clone()
    model(input_ids=ids, labels=ids).loss.backward()
    with pytest.raises(ValueError, match="down_proj keeps its gradient in torch.bfloat16 .grad_dtype."):
        optimizer.step()
    assert torch.equal(narrow, start)


def test_trainer_without_deepspeed(tmp_path: Path) -> None:
    write_artefacts(tmp_path / "artefacts", odd_model())
    # In a process of its own: Trainer's state is global.
    with ProcessPoolExecutor(1, mp_context=ranks._context) as alone:
        alone.submit(without_deepspeed, tmp_path / "artefacts", tmp_path).result()
        alone.submit(frozen_bits_in_a_loop, tmp_path / "artefacts").result()
        alone.submit(overflow_in_a_loop, tmp_path / "artefacts").result()
        alone.submit(gradients_of_other_widths, tmp_path / "artefacts").result()
