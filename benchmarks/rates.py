"""What a device multiplies in a second, in each of the ways that --products may take: measured, or by its data sheet."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from warp_ds.method.products import EXACT, Products, Rates, add_bf16, products
from warp_ds.models.flops import device_rates

WAYS = ("exact", "split", "tf32")


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


def sheet_rates(name: str) -> Rates:
    """By the data sheet of a GPU, or the end of the program."""
    rates = device_rates(name)
    if rates is None:
        raise SystemExit(f"--sheet {name!r}: no such GPU is known; give a name as torch has it, such as 'NVIDIA H200'")
    return rates


def way_of(name: str, dtype: str, device: str) -> Products:
    """How ``--products name`` takes them in a model of ``dtype``."""
    return products(name, getattr(torch, dtype), device)
