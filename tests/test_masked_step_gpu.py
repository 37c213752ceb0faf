"""On a GPU: FusedAdam, fp16 with loss scaling, and offload that really crosses a bus. Skipped where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_masked_step import STEPS, Case, run_all, run_replay, write_all

from warp_ds.cluster import processes
from warp_ds.method.products import SPLIT_ERROR

OFFLOAD = {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 100}
SCALED = {"fp16": {"enabled": True, "initial_scale_power": 40, "hysteresis": 1, "loss_scale_window": 100}}
ACCUMULATE_FP32 = {"data_types": {"grad_accum_dtype": "fp32"}}
#: What Adam makes of the rounding of rotated gradients: about lr times their relative error a step. TF32 rounds both factors by
#: 2^-11 of their size; split products are held to the bound that a CPU's emulation of them is (test_masked_step.py's "split
#: products"), also where 'auto' takes them. (A CPU has no TF32, so the same case is held to 2e-6 there.)
TF32, SPLIT = STEPS * 1e-2 * 2.0**-10, STEPS * 1e-2 * SPLIT_ERROR
#: name -> (case, dtype, configuration, error allowed to the masters; see test_masked_step.py)
GPU = {
    "fused adam": (Case("", "fused adam", groups=True), torch.float32, {}, 2e-6),
    "fused adam, coupled decay": (
        Case("", "fused adam coupled", groups=True, accumulation=2, zero={"sub_group_size": 100}),
        torch.float32,
        {},
        2e-6,
    ),
    **{
        f"fused adam, bf16, {way}": (
            Case("", "fused adam", groups=True, products=way),
            torch.bfloat16,
            ACCUMULATE_FP32,
            allowed,
        )
        for way, allowed in {"exact": 2e-6, "split": 2e-6 + SPLIT, "auto": 2e-6 + SPLIT, "tf32": TF32}.items()
    },
    "fused adam, bf16 accumulation": (Case("", "fused adam", groups=True), torch.bfloat16, {}, STEPS * 1e-2 * 2.0**-8 + SPLIT),
    "fp16": (Case("", "fused adam", groups=True), torch.float16, {**SCALED, **ACCUMULATE_FP32}, 2e-6),
    "fp16, offloaded": (Case("", "cpu adam", groups=True, zero=OFFLOAD), torch.float16, {**SCALED, **ACCUMULATE_FP32}, 2e-6),
    "adamw": (Case("", "adamw", groups=True), torch.float32, {}, 2e-6),
    "cpu adam, offloaded": (Case("", "cpu adam", groups=True, zero=OFFLOAD), torch.float32, {}, 2e-6),
    "cpu adam, partly offloaded": (
        Case("", "cpu adam", zero={**OFFLOAD, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}),
        torch.float32,
        {},
        2e-6,
    ),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    """In a process of its own: the others have made DeepSpeed choose the CPU."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env={**os.environ, "DS_ACCELERATOR": "cuda"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = json.loads((tmp_path / "found.json").read_text())
    wrong = {}
    for name, (_, dtype, _, allowed) in GPU.items():
        one = found[name]
        exact = one["moved"] == 0 and one["shards"] == 0 and (one["skipped"] > 0) == (dtype == torch.float16)
        if not (exact and one["masters"] < allowed and one["weights"] < 2 * allowed and one["norm"] < 1e-3):
            wrong[name] = (one, allowed)
    assert not wrong, wrong


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    processes.init_distributed("cuda" if torch.cuda.is_available() else "cpu")
    root = write_all(folder / "artefacts")
    # An initial scale of 2^40 overflows for the first steps; there must be some left.
    jobs = [
        (name, run_replay, (case, dtype, config, root / "odd" / "activation", 40 if dtype == torch.float16 else STEPS))
        for name, (case, dtype, config, _) in GPU.items()
    ]
    if not torch.cuda.is_available():  # What of it can be tried without one.
        jobs = [job for job in jobs if job[2][1] != torch.float16 and "fused" not in job[2][0].optimizer]
    (folder / "found.json").write_text(json.dumps(run_all(jobs)))
    processes.shutdown()
