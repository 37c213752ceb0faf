"""Small parts that all phases share: the DeepSpeed configuration, and each rank's part of the host's memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks

from warp_ds.config import BasisArguments
from warp_ds.zero.runtime import zero3_config
from warp_ds.zero.walk import _control_group_memory, host_memory


@pytest.mark.parametrize("dtype, expected", [("bfloat16", {"grad_accum_dtype": "fp32"}), ("float32", None)])
def test_micro_batches_are_summed_in_fp32(dtype: str, expected: dict[str, str] | None, tmp_path: Path) -> None:
    """DeepSpeed's default is the model's dtype: the sum would depend on how many micro-batches, so on the ranks."""
    assert zero3_config(BasisArguments(dtype=dtype, device="cpu")).get("data_types") == expected
    own = {"zero_optimization": {"stage": 3}, "data_types": {"grad_accum_dtype": "bf16"}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    arguments = BasisArguments(dtype=dtype, device="cpu", deepspeed=str(tmp_path / "own.json"))
    assert zero3_config(arguments)["data_types"] == {"grad_accum_dtype": "bf16"}


def memory_of_this_rank() -> tuple[int, int]:
    return host_memory(), min(_control_group_memory(), default=1 << 60)


def test_ranks_of_one_machine_share_its_memory() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    found = run_ranks(2, memory_of_this_rank)
    assert all(0 < mine <= min(total, group) / 2 for mine, group in found)
