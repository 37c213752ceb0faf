"""What a device multiplies in a second, in each of the ways that --products may take: measured, or by its data sheet."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from warp_ds.method.products import EXACT, Products, Rates, add_bf16, products
from warp_ds.models.flops import device_peak

WAYS = ("exact", "split", "tf32")
FP32_PEAKS = {
    r"\bH100 PCIe\b": 51e12,
    r"\bH[12]00\b(?! NVL)": 67e12,
    r"\bA100\b": 19.5e12,
    r"\bA40\b": 37.4e12,
    r"\bA10\b": 31.2e12,
    r"\bL40S\b": 91.6e12,
    r"\bL40\b": 90.5e12,
    r"\bL4\b": 30.3e12,
    r"\bMI300X\b": 163.4e12,
}
"""Operations a second of fp32 products, by the data sheets of ``models.flops.PEAKS``; Blackwell's are not confirmed."""


def best_seconds(
    work: Callable[[], Any], wait: Callable[[], Any] = lambda: None, clock: Callable[[], float] = time.perf_counter
) -> float:
    """The least of four runs, each after ``wait``; what a GPU has not finished counts."""
    took = []
    for _ in range(4):
        wait()
        begun = clock()
        work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        took.append(clock() - begun)
    return min(took)


def measured_rates(device: str, rows: int, n: int, **how: Any) -> Rates:
    """Of a [rows, n] by an [n, n] matrix, taken as the masked step and phase 2 take them: on a CPU bf16 parts are multiplied
    in fp32, and TF32 is what the processor makes of it. ``how``: of ``best_seconds``."""
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(k, n, device=device, generator=generator) for k in (rows, n))
    halves, total = (a.bfloat16(), b.bfloat16()), torch.zeros_like(a)
    ways: dict[str, Callable[[], Any]] = {
        "bf16": lambda: add_bf16(total, *halves),
        "tf32": partial(products("tf32", torch.bfloat16, device).mm, a, b),
        "fp32": partial(EXACT.mm, a, b),
    }
    return Rates(**{kind: 2.0 * rows * n * n / best_seconds(work, **how) for kind, work in ways.items()})


def device_rates(name: str) -> Rates | None:
    """What a device's data sheet allows, TF32 at half of bf16's rate as on all of them; None for another."""
    bf16 = device_peak(torch.bfloat16, name)
    fp32 = next((peak for pattern, peak in FP32_PEAKS.items() if re.search(pattern, name)), None)
    return None if bf16 is None or fp32 is None else Rates(bf16, bf16 / 2, fp32)


def sheet_rates(name: str) -> Rates:
    """By the data sheet of a GPU, or the end of the program."""
    rates = device_rates(name)
    if rates is None:
        raise SystemExit(f"--sheet {name!r}: no such GPU is known; give a name as torch has it, such as 'NVIDIA H200'")
    return rates


def way_of(name: str, dtype: str, device: str) -> Products:
    """How ``--products name`` takes them in a model of ``dtype``."""
    return products(name, getattr(torch, dtype), device)
