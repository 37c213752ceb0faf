"""LoRA whose A or B stays out of the frozen directions: against dense fp64 training on one to three ranks, and what is refused.

Tolerances of weights as in test_masked_step.py. Losses of about 4 may be 8 units of fp32 off: 1.1e-6 was measured on 3 ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from adapter_models import KINDS, adapted, column_masks, kept_out, lora_reference, write_kinds
from masked_artefacts import Artefacts, odd_model, read_artefacts, token_batches, write_artefacts
from ranks import run_ranks
from test_masked_step import WEIGHT, gathered, train_step

import warp_ds
from warp_ds.cluster import processes
from warp_ds.errors import WarpError
from warp_ds.zero.masked_step import MaskedStep

LR, EPS, DECAY, CLIP, STEPS = 5e-3, 1e-4, 0.1, 0.05, 5
LOSS = 2e-6
LARGE = 10**9


def make_engine(dtype: torch.dtype = torch.float32, zero: dict[str, Any] | None = None, **more: Any) -> Any:
    model = adapted(dtype, **more)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=LR, eps=EPS, weight_decay=DECAY),
        config={
            "train_micro_batch_size_per_gpu": 12 // processes.world_size(),
            "gradient_clipping": CLIP,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **(zero or {})},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": dtype == torch.bfloat16},
        },
    )
    return engine


def stray_bits(protection: MaskedStep) -> int:
    """Entries of A U in frozen columns, or of Vᵀ B in frozen rows, of all ranks, with any bit set; -0.0 has one."""
    found = torch.zeros(1, dtype=torch.float64)
    for layer in protection.layers:
        bits = protection.driver.coefficients(layer).view(torch.int32)
        found += sum(float((bits[piece][frozen] != 0).sum()) for piece, frozen in layer.frozen_pieces(bits.device))
    return int(processes.all_reduce_sum(found))


def off(engine: Any, weights: dict[str, torch.Tensor]) -> float:
    now = gathered(engine)
    return max(float((now[name].double() - value).abs().max()) for name, value in weights.items())


def reached(artefacts: Artefacts, weights: dict[str, torch.Tensor]) -> float:
    """Of what is frozen in A or B, the length."""
    sides = {name: weights[name].double() for name in kept_out(artefacts)}
    return max(float(((w.T if "lora_B" in name else w) @ kept_out(artefacts)[name]).norm()) for name, w in sides.items())


def steps_as_the_reference(root: Path, zero: dict[str, Any], placement: str) -> None:
    artefacts = read_artefacts(root)
    batches = token_batches(STEPS)
    losses, weights = lora_reference(artefacts, batches, LR, EPS, DECAY, CLIP)
    engine = make_engine(zero=zero)
    protection = warp_ds.protect(engine, None, artefacts.masks, basis_placement=placement)
    assert len(protection.layers) == 6 and protection.masked_fraction > 0.1
    assert stray_bits(protection) == 0
    start = gathered(engine)
    assert reached(artefacts, start) < 1e-6  # before the first step too
    for batch, loss in zip(batches, losses, strict=True):
        found = train_step(engine, batch)
        assert abs(found - loss) < LOSS, (placement, zero, found - loss)
        assert stray_bits(protection) == 0
        assert protection.metrics().grad_norm_removed >= 0
    assert off(engine, weights) < WEIGHT
    assert reached(artefacts, gathered(engine)) < 1e-6
    assert max(float((weights[name] - start[name].double()).abs().max()) for name in weights) > 1e-2
    engine.destroy()


def resumes_to_the_bit(root: Path, folder: Path, dtype: torch.dtype) -> None:
    artefacts, batches = read_artefacts(root), token_batches(STEPS)
    engine = make_engine(dtype)
    warp_ds.protect(engine, None, artefacts.masks)
    for number, batch in enumerate(batches):
        if number == 2:
            engine.save_checkpoint(str(folder), exclude_frozen_parameters=True)
        train_step(engine, batch)
    whole = gathered(engine)
    engine.destroy()
    for first in ("load", "protect"):
        engine = make_engine(dtype)
        if first == "load":
            engine.load_checkpoint(str(folder), load_module_strict=False)
        protection = warp_ds.protect(engine, None, artefacts.masks)
        if first == "protect":
            engine.load_checkpoint(str(folder), load_module_strict=False)
        assert stray_bits(protection) == 0
        for batch in batches[2:]:
            train_step(engine, batch)
            assert stray_bits(protection) == 0
        again = gathered(engine)
        assert all(torch.equal(again[name], value) for name, value in whole.items()), first
        engine.destroy()


def assign(engine: Any, values: dict[str, torch.Tensor]) -> None:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        for name, param in engine.module.named_parameters():
            if name in values and processes.rank() == 0:
                param.data.copy_(values[name])
    engine.optimizer._restore_from_bit16_weights()


def trained_adapters_keep_what_they_do(root: Path, does: str) -> None:
    """One with B != 0 and a part in frozen directions is refused, on every rank; one without goes on."""
    artefacts, batches = read_artefacts(root), token_batches(STEPS)
    engine = make_engine()
    start = {name: value for name, value in gathered(engine).items() if "lora_B" in name}
    assign(engine, {name: torch.full_like(value, 0.5) for name, value in start.items()})
    with pytest.raises(ValueError, match=f"has been trained .* {does} frozen directions .* start from a new adapter"):
        warp_ds.protect(engine, None, artefacts.masks)
    engine.destroy()
    engine = make_engine(torch.bfloat16)
    warp_ds.protect(engine, None, artefacts.masks)
    for batch in batches[:2]:
        train_step(engine, batch)
    trained = gathered(engine)
    engine.destroy()
    engine = make_engine(torch.bfloat16)
    assign(engine, trained)
    protection = warp_ds.protect(engine, None, artefacts.masks)  # rounding alone is lost, whatever part of B a rank holds
    assert stray_bits(protection) == 0
    engine.destroy()


def replicated(root: Path) -> None:
    """Under DDP every rank takes the same step."""
    artefacts, batches = read_artefacts(root), token_batches(STEPS)
    losses, weights = lora_reference(artefacts, batches, LR, EPS, DECAY, CLIP)
    model = torch.nn.parallel.DistributedDataParallel(adapted())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, eps=EPS, weight_decay=DECAY)
    protection = warp_ds.protect_optimizer(model, optimizer, None, artefacts.masks)
    protection.max_grad_norm = CLIP
    for ids, loss in zip(batches, losses, strict=True):
        mine = ids.chunk(processes.world_size())[processes.rank()]
        found = model(input_ids=mine, labels=mine).loss
        found.backward()
        assert abs(float(processes.all_reduce_sum(found.detach().double())) / processes.world_size() - loss) < LOSS
        optimizer.step()
        optimizer.zero_grad()
        assert stray_bits(protection) == 0
    protection.release()
    for name, param in model.module.named_parameters():
        if name in weights:
            assert (param.detach().double() - weights[name]).abs().max() < WEIGHT, name


SMALL = {"stage3_param_persistence_threshold": LARGE, "sub_group_size": 100}


def on_one_rank(roots: dict[str, Path], folder: Path) -> None:
    for kind in KINDS:
        steps_as_the_reference(roots[kind], {}, "auto")
    for kind in ("columns", "rows, both sides"):
        steps_as_the_reference(roots[kind], SMALL, "replicated")
        steps_as_the_reference(roots[kind], {"offload_optimizer": {"device": "cpu"}}, "replicated")


def on_two_ranks(roots: dict[str, Path], folder: Path) -> None:
    columns, rows = roots["columns"], roots["rows, both sides"]
    steps_as_the_reference(columns, {}, "owner")
    steps_as_the_reference(rows, SMALL, "owner")
    for root in (columns, rows):
        replicated(root)
        resumes_to_the_bit(root, folder / root.name, torch.bfloat16)
    resumes_to_the_bit(columns, folder / "fp32", torch.float32)
    trained_adapters_keep_what_they_do(columns, "reads")
    engine = make_engine()
    with pytest.raises(WarpError, match="--basis_placement sharded.*owner or auto"):
        warp_ds.protect(engine, None, rows / "masks", basis_placement="sharded")
    engine.destroy()


def on_three_ranks(roots: dict[str, Path], folder: Path) -> None:
    steps_as_the_reference(roots["columns"], {}, "replicated")
    steps_as_the_reference(roots["columns"], SMALL, "sharded")
    steps_as_the_reference(roots["columns, both sides"], {}, "sharded")
    steps_as_the_reference(roots["rows"], {}, "sharded")
    steps_as_the_reference(roots["rows, both sides"], {}, "auto")
    trained_adapters_keep_what_they_do(roots["rows, both sides"], "writes into")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_step_under_zero3_or_ddp_is_the_dense_one(tmp_path: Path, world_size: int) -> None:
    job = {1: on_one_rank, 2: on_two_ranks, 3: on_three_ranks}[world_size]
    run_ranks(world_size, job, write_kinds(tmp_path), tmp_path / "checkpoints")


def plain_loop(artefacts: Artefacts, **more: Any) -> Any:
    model = adapted(**more)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, eps=EPS, weight_decay=DECAY)
    return model, optimizer, warp_ds.protect_optimizer(model, optimizer, None, artefacts.masks)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_deepspeed_is_the_dense_one(tmp_path: Path, kind: str) -> None:
    artefacts, batches = write_artefacts(tmp_path, odd_model(), **KINDS[kind]), token_batches(STEPS)
    losses, weights = lora_reference(artefacts, batches, LR, EPS, DECAY, CLIP)
    model, optimizer, protection = plain_loop(artefacts)
    protection.max_grad_norm = CLIP
    assert stray_bits(protection) == 0
    for ids, loss in zip(batches, losses, strict=True):
        found = model(input_ids=ids, labels=ids).loss
        assert abs(found.item() - loss) < LOSS
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert stray_bits(protection) == 0
    protection.release()
    for name, param in model.named_parameters():
        if name in weights:
            assert (param.detach().double() - weights[name]).abs().max() < WEIGHT, name
    # Goes on from what it holds, B != 0: rounding alone is taken out of A or B.
    warp_ds.protect_optimizer(model, optimizer, None, artefacts.masks)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "a variant of LoRA, Dora"),
    "itself": ({"target_modules": ["up_proj"], "modules_to_save": ["down_proj"]}, "down_proj itself trains beside the adapter"),
    "elsewhere": ({"target_modules": ["up_proj"]}, "none of the layers in the masks"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "has been trained"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_adapters_are_refused_by_name(tmp_path: Path, case: str) -> None:
    artefacts = column_masks(tmp_path)
    options, message = REFUSED[case]
    with pytest.raises((WarpError, ValueError), match=message):
        plain_loop(artefacts, **options)


def test_masks_of_entries_and_frozen_adapters_are_refused(tmp_path: Path) -> None:
    entries = write_artefacts(tmp_path / "entries", odd_model())
    with pytest.raises(WarpError, match="--mask_unit column or row"):
        plain_loop(entries)
    model = adapted(inference_mode=True)
    with pytest.raises(WarpError, match="does not train"):
        warp_ds.protect_optimizer(model, torch.optim.AdamW(model.parameters()), None, column_masks(tmp_path / "columns").masks)
