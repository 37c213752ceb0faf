"""The optimizer on NVMe, where DeepSpeed's async I/O builds. Slow: compiling it takes minutes on two cores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.utils import safe_get_full_fp32_param
from masked_artefacts import Artefacts, read_artefacts, token_batches, wide_model, write_artefacts
from ranks import run_ranks
from test_masked_step import LOSS, STEPS, WEIGHT, Case, make_engine, protect, reference_of, run_all, train_step, weight_error

from warp_ds.cluster import processes
from warp_ds.errors import UnsupportedSetting

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not AsyncIOBuilder().is_compatible(False), reason="DeepSpeed's async_io needs libaio-dev"),
]

KINDS = {
    "one by one": {"pipeline_read": False, "pipeline_write": False},
    "pipelined": {"pipeline_read": True, "pipeline_write": True},
}


def coefficients(engine: Any, artefacts: Artefacts) -> dict[str, torch.Tensor]:
    params = dict(engine.module.named_parameters())
    return {name: safe_get_full_fp32_param(params[name]).clone() for name in artefacts.frozen}


def train_on_nvme(optimizer: str, root: Path, swap: Path, options: dict[str, Any]) -> dict[str, Any]:
    case = Case(
        "nvme",
        optimizer,
        "wide",
        accumulation=2,
        groups=True,
        zero={"offload_optimizer": {"device": "nvme", "nvme_path": str(swap), "buffer_count": 8, **options}},
    )
    losses, dense = reference_of(case, root)
    artefacts = read_artefacts(root / "wide" / "activation")
    engine = make_engine(case)
    swapped = [engine.optimizer._swappable_optimizer_subgroup(i) for i in range(len(engine.optimizer.fp16_groups))]
    # A checkpoint without protection, for the refusals below.
    engine.save_checkpoint(swap / "unprotected", "here")
    assert True in swapped and False in swapped, "the test wants sub-groups on NVMe and others in memory"
    protection = protect(engine, artefacts)
    before = coefficients(engine, artefacts)
    found = [train_step(engine, batch, case.accumulation) for batch in token_batches(STEPS)]
    after = coefficients(engine, artefacts)
    with pytest.raises(UnsupportedSetting, match="swap files"):
        engine.save_checkpoint(swap / "checkpoint")
    result = {
        "loss": max(abs(a - b) for a, b in zip(found, losses, strict=True)),
        "weights": weight_error(engine, dense.weights()),
        "moved": sum(int((after[k] != before[k])[mask].sum()) for k, mask in artefacts.frozen.items()),
        "free": min(float((after[k] - before[k])[~mask].abs().max()) for k, mask in artefacts.frozen.items()),
        "norm": abs(float(engine.get_global_grad_norm()) - dense.norm),
        "removed": abs(protection.metrics().grad_norm_removed - dense.removed),
    }
    engine.save_16bit_model(swap, "model.bin")
    if processes.rank() == 0:
        for name, value in torch.load(swap / "model.bin", weights_only=True).items():
            assert (value.double() - dense.weights()[name]).abs().max() < WEIGHT, f"exported {name}"
    protection.release()
    for name, param in engine.module.named_parameters():
        if name in artefacts.frozen:
            released = safe_get_full_fp32_param(param)
            assert (released.double() - dense.weights()[name]).abs().max() < WEIGHT
    processes.barrier()
    protect(engine := make_engine(case), artefacts)
    with pytest.raises(UnsupportedSetting, match="swap files"):
        engine.load_checkpoint(swap / "unprotected", "here")
    processes.barrier()
    engine.destroy()
    return result


def test_optimizer_on_nvme(tmp_path: Path) -> None:
    write_artefacts(tmp_path / "wide" / "activation", wide_model(), {"ffn_down": 5, "attn_q": 100})
    jobs = [
        (f"{optimizer}, {kind}", train_on_nvme, (optimizer, tmp_path, tmp_path / f"{optimizer} {kind}", options))
        for optimizer in ("adamw", "cpu adam")
        for kind, options in KINDS.items()
    ]
    for name, found in run_ranks(2, run_all, jobs, timeout=500)[0].items():
        assert found["moved"] == 0 and found["free"] > 1e-3, (name, found)
        assert found["loss"] < LOSS and found["weights"] < WEIGHT, (name, found)
        assert found["norm"] < 1e-5 and found["removed"] < 1e-5, (name, found)
