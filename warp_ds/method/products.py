"""Products of fp32 matrices, as many bits of them as what is made of them keeps.

*split*: an fp32 operand is taken as the sum of two bf16 numbers, x = h + l + e with |e| <= 2^-16 |x|, and
A B = A_h B_h + A_h B_l + A_l B_h of bf16 products, each exact, added up in fp32 (Henry, Tang and Heinecke, "Leveraging the
bfloat16 Artificial Intelligence Datatype For Higher-Precision Computations", ARITH 2019, arXiv 1904.06376). For k terms

    |split - A B| <= (3 · 2^-16 + 6 k u) |A| |B|     entry by entry; u = 2^-24, 2^-23 where a unit cuts sums instead of rounding

and without the part of an operand that is bf16 already: it is its own h. TF32 keeps 10 bits of mantissa: 2 · 2^-11 in place of
3 · 2^-16. Numbers below 2^-110 lose their l, which bf16 does not hold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WAYS = ("auto", "exact", "split", "tf32")
"""What ``--products`` may say."""
SPLIT_ERROR = 3 * 2.0**-16
"""Of |A| |B|, beside the sums' rounding."""


@dataclass(frozen=True)
class Rates:
    """Operations a second of a device's products, by what it multiplies."""

    bf16: float
    tf32: float
    fp32: float


class Products(ABC):
    """How A B is taken: both float of any width, the result fp32 (fp64 of fp64)."""

    kind: str
    """Which of ``Rates`` they run at."""

    def number(self, a: torch.dtype, b: torch.dtype) -> int:
        """Products taken for one of operands of these dtypes."""
        return 1

    def seconds(self, operations: float, rates: Rates, a: torch.dtype = torch.float32, b: torch.dtype = torch.float32) -> float:
        """Of products that are ``operations`` by shape, at ``rates``; what making the parts takes is not in it."""
        return self.number(a, b) * operations / float(getattr(rates, self.kind))

    @abstractmethod
    def mm(self, a: Tensor, b: Tensor) -> Tensor:
        """A B for A [m, k], B [k, n]; new tensor [m, n]."""

    @abstractmethod
    def addmm_(self, total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
        """total += alpha A B, in place, for an fp32 (fp64 with fp64) ``total`` [m, n], which is returned."""


class Whole(Products):
    """One product of fp32 numbers, by what ``precision`` lets the hardware make of them."""

    def __init__(self, precision: str):
        self.precision = precision
        self.kind = "tf32" if precision == "tf32" else "fp32"

    def mm(self, a: Tensor, b: Tensor) -> Tensor:
        with matmul_precision(self.precision):
            return _fp32(a) @ _fp32(b)

    def addmm_(self, total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
        with matmul_precision(self.precision):
            return total.addmm_(_fp32(a), _fp32(b), alpha=alpha)


class Split(Products):
    """Two or three products of bf16 parts: one of operands that are both bf16. Of fp32 and narrower operands alone."""

    kind = "bf16"

    def number(self, a: torch.dtype, b: torch.dtype) -> int:
        return 1 + (a != torch.bfloat16) + (b != torch.bfloat16)

    def mm(self, a: Tensor, b: Tensor) -> Tensor:
        return self.addmm_(torch.zeros(a.shape[0], b.shape[1], device=a.device), a, b)

    def addmm_(self, total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
        (high_a, low_a), (high_b, low_b) = bf16_parts(a), bf16_parts(b)
        # The small ones first: their sums are rounded as finely as they are small.
        for left, right in ((low_a, high_b), (high_a, low_b), (high_a, high_b)):
            if left is not None and right is not None:
                add_bf16(total, left, right, alpha)
        return total


EXACT = Whole("ieee")
_BY_NAME: dict[str, Products] = {"exact": EXACT, "split": Split(), "tf32": Whole("tf32")}


def products(way: str, weights: torch.dtype, device: torch.device | str) -> Products:
    """Of a model whose weights have the dtype ``weights``, on ``device``: exact unless that is bf16, since fp16 keeps as
    many bits as TF32, and a certificate of fp32 weights allows for fp32's rounding alone.

    'auto' splits on a GPU, where fp32 products run at a tenth of bf16's rate; on a CPU three products for one cost more.
    ValueError for another way.
    """
    check_way(way)
    if weights != torch.bfloat16:
        return EXACT
    if way == "auto":
        way = "split" if torch.device(device).type == "cuda" else "exact"
    return _BY_NAME[way]


def check_way(way: str) -> None:
    """ValueError for another way than ``WAYS``."""
    if way not in WAYS:
        raise ValueError(f"products is {way!r}: choose one of {', '.join(WAYS)}")


def bf16_parts(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(h, l) in bf16 with x = h + l up to 2^-16 |x|; l None where x is bf16 itself."""
    if x.dtype == torch.bfloat16:
        return x, None
    high = x.bfloat16()
    return high, (x - high).bfloat16()  # the difference is exact in fp32


def add_bf16(total: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """total += alpha A B in place, for bf16 (on a GPU fp16 too) A [m, k], B [k, n] and fp32 ``total`` [m, n]: exact products,
    added up in fp32.

    A GPU takes halves as they are. On a CPU torch rounds products of halves to halves, so operands are made fp32.
    """
    if total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, alpha=alpha, out=total)
        return
    with matmul_precision("ieee"):
        total.addmm_(a.float(), b.float(), alpha=alpha)


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """A block in which fp32 products are taken as 'ieee' (fp32) or 'tf32' says, where the hardware can."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    # Asking the older setting would fail where the newer has been used, as transformers' tf32 argument does.
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    befores = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = precision
    try:
        yield
    finally:
        for backend, value in zip(backends, befores, strict=True):
            backend.fp32_precision = value


def _fp32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
