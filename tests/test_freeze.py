"""warp_ds.freeze: entries named by the user stay to the bit, all else trains as a dense fp64 optimizer trains it.

Five steps against fp64, eps 1e-4 as in ``test_masked_step``: weights within 1e-5, in bf16 as ``BF16`` says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import warp_ds
from warp_ds.cluster import processes
from warp_ds.errors import ConfigError
from warp_ds.method.entries import frozen_entries

STEPS, WEIGHT, LR = 5, 1e-5, 1e-2
BF16 = 0.2 * LR
"""Of an entry of the master: AdamW moves it by up to LR a step (0.04 in five, on average), and a gradient that is wrong by
bf16's 2^-9 by up to about 2^-9 of that; where terms cancel in a gradient's sum it is wrong by more. Measured 2e-4 to 4e-4.
Decay alone moves an entry of 0.5 by 8e-3."""


class Shapes(nn.Module):
    """Parameters of 1 to 3 dimensions, of sizes that no world size divides; the head is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(13, 5)
        self.conv = nn.Conv1d(5, 7, 3, padding=1)
        self.gain = nn.Parameter(torch.tensor([1.5]))
        self.back = nn.Linear(7, 5)
        self.head = nn.Linear(5, 13, bias=False)
        self.head.weight = self.embed.weight
        with torch.no_grad():
            self.conv.weight[0, 1] = -0.0  # a pruned weight keeps its sign bit

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.conv(self.embed(ids).transpose(1, 2)).tanh().transpose(1, 2) * self.gain
        return nn.functional.cross_entropy(self.head(self.back(hidden))[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def masks() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    pruned = torch.rand(7, 5, 3, generator=generator) < 0.5
    pruned[0, 1] = True
    return {
        "embed.weight": slice(0, 9),
        "head.weight": [10],  # tied: with the nine above, ten rows
        "conv.weight": pruned,
        "conv.bias": [0, 4],
        "back.weight": (slice(None), [0, 6]),
        "back.bias": warp_ds.AllBut([2]),
    }


def frozen_of(model: nn.Module, given: dict[str, Any]) -> dict[str, Tensor]:
    """Written out by hand, not by the code under test."""
    embed, back, bias = torch.zeros(13, 5).bool(), torch.zeros(5, 7).bool(), torch.zeros(7).bool()
    embed[:9] = embed[10] = back[:, 0] = back[:, 6] = bias[0] = bias[4] = True
    rest = torch.ones(5).bool()
    rest[2] = False
    return {
        "embed.weight": embed,
        "conv.weight": given["conv.weight"],
        "conv.bias": bias,
        "back.weight": back,
        "back.bias": rest,
    }


def make(kind: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    if kind == "adam":
        return torch.optim.Adam(groups, lr=LR, eps=1e-4)
    return torch.optim.AdamW(groups, lr=LR, eps=1e-4)


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: other decay for what has one dimension."""
    decayed = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) > 1]
    others = [p for p in model.parameters() if len(getattr(p, "ds_shape", p.shape)) <= 1]
    return [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.1}]


def batches(count: int = STEPS) -> list[Tensor]:
    return [torch.randint(0, 13, (12, 9), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def dense(kind: str, clip: float, plain_steps: int = 0, bf16: bool = False) -> dict[str, Tensor]:
    """One process, fp64: gradients of frozen entries are 0, and after every step they are put back by force.

    ``bf16``: gradients are those at the weights rounded to bf16, as each forward pass sees them."""
    model = (Shapes().bfloat16() if bf16 else Shapes()).double()
    optimizer = make(kind, groups_of(model))
    frozen, start = frozen_of(model, masks()), {}
    named = dict(model.named_parameters())
    for step, ids in enumerate(batches()):
        if step == plain_steps:
            start = {k: named[k].detach().clone() for k in frozen}
            for k, mask in frozen.items():
                for moment in optimizer.state.get(named[k], {}).values():
                    if moment.shape == mask.shape:
                        moment[mask] = 0.0
        optimizer.zero_grad()
        masters = {k: p.detach().clone() for k, p in named.items()}
        with torch.no_grad():
            for p in named.values() if bf16 else ():
                p.copy_(p.bfloat16())
        model(ids).backward()
        with torch.no_grad():
            for k, p in named.items():
                p.copy_(masters[k])
        for k in frozen if start else ():
            named[k].grad[frozen[k]] = 0.0
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        with torch.no_grad():
            for k in start:
                named[k][frozen[k]] = start[k][frozen[k]]
    return {k: p.detach().clone() for k, p in named.items()}


def engine_of(kind: str, clip: float, dtype: torch.dtype = torch.float32, **zero: Any) -> Any:
    model = Shapes().to(dtype)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=make(kind, groups_of(model)),
        config={
            "train_micro_batch_size_per_gpu": 12 // processes.world_size(),
            "gradient_clipping": clip,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": dtype == torch.bfloat16},
        },
    )
    return engine


def engine_steps(engine: Any, ids: list[Tensor]) -> None:
    for batch in ids:
        engine.backward(engine(batch.chunk(processes.world_size())[processes.rank()]))
        engine.step()


def whole(engine: Any) -> dict[str, Tensor]:
    return {k: safe_get_full_fp32_param(p).to("cpu", copy=True) for k, p in engine.module.named_parameters()}


def gathered(engine: Any) -> dict[str, Tensor]:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {k: p.detach().to("cpu", copy=True) for k, p in engine.module.named_parameters()}


def moved_bits(frozen: dict[str, Tensor], before: dict[str, Tensor], after: dict[str, Tensor]) -> int:
    kinds = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    return sum(
        int((before[k].view(kinds[before[k].dtype]) != after[k].view(kinds[after[k].dtype]))[m].sum())
        for k, m in frozen.items()
    )


CASES: list[tuple[str, float, int, dict[str, Any]]] = [
    ("adamw", 0.2, 0, {}),
    ("adamw", 0.2, 2, {"stage3_param_persistence_threshold": 10**9}),
    ("adam", 0.0, 2, {"sub_group_size": 20}),
    ("sgd", 0.2, 2, {}),
    ("adamw", 0.2, 0, {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 20}),
]


def under_zero3(expected: list[dict[str, Tensor]], in_bf16s: dict[str, Tensor], folder: str) -> None:
    for (kind, clip, plain, zero), reference in zip(CASES, expected, strict=True):
        engine = engine_of(kind, clip, **zero)
        engine_steps(engine, batches()[:plain])
        before, weights = whole(engine), gathered(engine)
        step = warp_ds.freeze(engine, masks())
        engine_steps(engine, batches()[plain:])
        after, frozen = whole(engine), frozen_of(engine.module, masks())
        assert moved_bits(frozen, before, after) == moved_bits(frozen, weights, gathered(engine)) == 0, (kind, zero)
        for k, value in reference.items():
            assert (after[k] - value).abs().max() < WEIGHT, (kind, plain, zero, k)
        assert step.masked_fraction == pytest.approx(
            sum(m.sum() for m in frozen.values()) / sum(m.numel() for m in frozen.values())
        )
        assert step.metrics().rotate_bytes == 0 and step.metrics().grad_norm_removed >= 0
        step.release()
        engine_steps(engine, batches()[:1])
        assert moved_bits(frozen, after, whole(engine)) > 0  # the protection has ended
        engine.destroy()
    in_bf16(in_bf16s)
    checkpoints(folder)


def in_bf16(expected: dict[str, Tensor]) -> None:
    """Masters against the reference, whose gradients are exact where these are rounded to bf16's 8 bits in every product."""
    engine = engine_of("adamw", 0.2, torch.bfloat16)
    before, weights = whole(engine), gathered(engine)
    warp_ds.freeze(engine, masks())
    engine_steps(engine, batches())
    frozen = frozen_of(engine.module, masks())
    assert moved_bits(frozen, before, whole(engine)) == moved_bits(frozen, weights, gathered(engine)) == 0
    for k, after in whole(engine).items():
        free = ~frozen.get(k, torch.zeros_like(after).bool())
        assert (after - expected[k])[free].abs().max() < BF16 and not torch.equal(after[free], before[k][free]), k
    engine.destroy()


def checkpoints(folder: str) -> None:
    """Goes on to the bit with the same masks, loaded before or after they are given, and names another one."""
    engine = engine_of("adamw", 0.2)
    warp_ds.freeze(engine, masks())
    engine_steps(engine, batches()[:3])
    engine.save_checkpoint(folder, "here")
    engine_steps(engine, batches()[3:])
    expected = whole(engine)
    engine.destroy()
    for first in (True, False):
        engine = engine_of("adamw", 0.2)
        if first:
            warp_ds.freeze(engine, masks())
        engine.load_checkpoint(folder, "here")
        if not first:
            warp_ds.freeze(engine, masks())
        engine_steps(engine, batches()[3:])
        assert all(torch.equal(expected[k], v) for k, v in whole(engine).items())
        engine.destroy()
    for other, said in (
        ({**masks(), "conv.bias": [0, 5]}, "with another mask of conv.bias:"),
        ({k: v for k, v in masks().items() if k != "conv.bias"}, "with a mask, which is not given now, of conv.bias:"),
        ({**masks(), "gain": True}, "without the mask given now of gain:"),
    ):
        engine = engine_of("adamw", 0.2)
        engine.load_checkpoint(folder, "here")
        with pytest.raises(ValueError, match=said):
            warp_ds.freeze(engine, other)
        engine.destroy()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_zero3_equals_the_dense_reference(world_size: int, tmp_path: Path) -> None:
    expected = [dense(kind, clip, plain) for kind, clip, plain, _ in CASES]
    run_ranks(world_size, under_zero3, expected, dense("adamw", 0.2, bf16=True), str(tmp_path))


def in_plain_torch(kind: str, clip: float, plain: int, folder: str | None = None) -> dict[str, Tensor]:
    """Under DDP where there are ranks; optionally leaving and going on after three steps."""
    model: nn.Module = Shapes()
    if processes.world_size() > 1:
        model = DistributedDataParallel(model)
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    optimizer = make(kind, groups_of(inner))
    step: Any = None
    start: dict[str, Tensor] = {}
    for number, ids in enumerate(batches()):
        if number == plain:
            start = {k: p.detach().clone() for k, p in inner.named_parameters()}
            step = warp_ds.freeze_optimizer(model, optimizer, masks())
            step.max_grad_norm = clip
        if number == 3 and folder is not None:
            state, weights = optimizer.state_dict(), {k: v.clone() for k, v in inner.state_dict().items()}
            torch.save(state, f"{folder}/optimizer.pt")
            model = inner = Shapes()
            optimizer = make(kind, groups_of(inner))
            step = warp_ds.freeze_optimizer(model, optimizer, masks())
            step.max_grad_norm = clip
            model.load_state_dict(weights)
            optimizer.load_state_dict(torch.load(f"{folder}/optimizer.pt", weights_only=True))
        optimizer.zero_grad()
        model(ids.chunk(processes.world_size())[processes.rank()]).backward()
        if step is None and clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    found = {k: p.detach().clone() for k, p in inner.named_parameters()}
    assert moved_bits(frozen_of(inner, masks()), start, found) == 0
    return found


def under_ddp(expected: dict[str, Tensor]) -> None:
    for k, value in in_plain_torch("adamw", 0.2, 2).items():
        assert (value - expected[k]).abs().max() < WEIGHT, k


def test_ddp_equals_the_dense_reference() -> None:
    run_ranks(2, under_ddp, dense("adamw", 0.2, 2))


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd"])
def test_plain_torch_equals_the_dense_reference(kind: str) -> None:
    expected = dense(kind, 0.2)
    for k, value in in_plain_torch(kind, 0.2, 0).items():
        assert (value - expected[k]).abs().max() < WEIGHT, k


def test_plain_torch_goes_on_from_its_state(tmp_path: Path) -> None:
    whole = in_plain_torch("adamw", 0.2, 0)
    for k, value in in_plain_torch("adamw", 0.2, 0, str(tmp_path)).items():
        assert torch.equal(value, whole[k]), k
    state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    model = Shapes()
    optimizer = make("adamw", groups_of(model))
    warp_ds.freeze_optimizer(model, optimizer, {**masks(), "conv.weight": True})
    with pytest.raises(ValueError, match=r"with another mask of conv\.weight"):
        optimizer.load_state_dict(state)


def given_different_masks() -> None:
    engine = engine_of("adamw", 0.0)
    with pytest.raises(ConfigError, match=r"rank 1 was given another mask of conv\.bias than rank 0"):
        warp_ds.freeze(engine, {"conv.bias": [processes.rank()]})
    with pytest.raises(Exception, match=r"no parameter .* 'conv\.wight'|failed on rank 0"):
        warp_ds.freeze(engine, {"conv.wight" if processes.rank() == 0 else "conv.weight": True})
    engine.destroy()


def test_ranks_that_differ_are_refused_on_all() -> None:
    run_ranks(2, given_different_masks)


def test_every_form_of_a_mask() -> None:
    shape = (4, 6)
    rows, columns = torch.zeros(shape).bool(), torch.zeros(shape).bool()
    rows[[1, 3]] = True
    columns[:, 2:4] = True
    one_row = rows[:, :1]
    for form in ([1, 3], range(1, 4, 2), {3, 1}, torch.tensor([1, -1]), rows, one_row, slice(1, None, 2), rows.numpy()):
        assert torch.equal(frozen_entries(form, shape), rows), form
    for form in ((slice(None), slice(2, 4)), (slice(None), [2, 3]), columns[:1], warp_ds.AllBut(~columns)):
        assert torch.equal(frozen_entries(form, shape), columns), form
    assert frozen_entries(True, shape).all() and not frozen_entries([], shape).any()
    assert frozen_entries(2, (4,)).tolist() == [False, False, True, False]
    assert bool(frozen_entries(True, ())) and frozen_entries(torch.tensor(False), ()).shape == ()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.zeros(4).bool(), r"does not fit a parameter of shape \(4, 6\)"),
        (torch.zeros(4, 6), "no mask: give a boolean tensor"),
        (torch.zeros(4, dtype=torch.uint8), "no mask: give a boolean tensor"),
        ([4], "does not fit"),
        ([True, False, True, False], "no mask"),
        ([0.5], "no mask"),
        ("rows", "no mask"),
        ((slice(None), slice(None), 0), "does not fit"),
    ],
)
def test_what_is_no_mask_is_refused(wrong: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        frozen_entries(wrong, (4, 6))


def test_names_that_do_not_fit_are_refused() -> None:
    model = Shapes()
    model.gain.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters())
    for given, said in (
        ({}, "no mask is given"),
        ({"conv.wight": True}, r"no parameter of this model is named 'conv\.wight': there are conv\.weight, conv\.bias"),
        ({"weight": True}, "several parameters are named"),
        ({"gain": True}, "gain does not train"),
        ({"conv.bias": [9]}, r"conv\.bias: a mask does not fit a parameter of shape \(7,\)"),
    ):
        with pytest.raises(ConfigError, match=said):
            warp_ds.freeze_optimizer(model, optimizer, given)
    with pytest.raises(ConfigError, match="not Shapes: for a model and its optimizer there is warp_ds.freeze_optimizer"):
        warp_ds.freeze(model, {"gain": True})
