"""Products of bf16 parts against fp64: within their bound, and exact where operands are bf16."""

from __future__ import annotations

import pytest
import torch

from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import ImportanceArguments, TrainArguments
from warp_ds.flags.flag import dataclass_fields
from warp_ds.method.products import EXACT, SPLIT_ERROR, WAYS, Products, bf16_parts, products

M, K, N = 17, 300, 23


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of very different sizes: what is lost of the small ones must not be hidden by the large."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(M, K, generator=generator), torch.randn(K, N, generator=generator)
    return (a * torch.logspace(-6, 6, M)[:, None]).to(dtype), (b * torch.logspace(4, -4, N)).to(dtype)


def error(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest error over |A| |B|."""
    assert found.dtype == torch.float32
    return float(((found.double() - a.double() @ b.double()).abs() / (a.double().abs() @ b.double().abs())).max())


@pytest.fixture
def split() -> Products:
    return products("split", torch.bfloat16, "cpu")


ROUNDING = 6 * K * 2.0**-23


def test_parts_are_as_near_as_the_bound_says() -> None:
    x = torch.cat([operands()[0].flatten(), torch.tensor([0.0, -0.0, 1.0, 2.0**-100, 3e38])])
    high, low = bf16_parts(x)
    assert low is not None
    assert bool(((high.double() + low.double() - x.double()).abs() <= 2.0**-16 * x.double().abs()).all())
    same, none = bf16_parts(high)
    assert same is high and none is None


def test_split_products_are_within_their_bound(split: Products) -> None:
    a, b = operands()
    found = split.mm(a, b)
    assert 2.0**-24 < error(found, a, b) < SPLIT_ERROR + ROUNDING
    assert error(a.bfloat16().float() @ b.bfloat16().float(), a, b) > 2.0**-12, "then one product would do"
    half = b.bfloat16()
    assert error(split.mm(a, half), a, half) < 2.0**-16 + ROUNDING
    assert error(split.mm(half.T, a.T), half.T, a.T) < 2.0**-16 + ROUNDING


def test_bf16_operands_are_multiplied_exactly(split: Products) -> None:
    """Whole numbers up to 2^8, whose sums are whole numbers below 2^24: any rounding of a product would be seen."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-255, 256, size, generator=generator).bfloat16() for size in ((M, 60), (60, N)))
    assert torch.equal(split.mm(a, b).double(), a.double() @ b.double())
    total = torch.ones(M, N)
    assert split.addmm_(total, a, b, alpha=-1.0) is total
    assert torch.equal(total.double(), 1.0 - a.double() @ b.double())


def test_exact_products_are_fp32s() -> None:
    a, b = operands()
    assert error(EXACT.mm(a, b), a, b) < K * 2.0**-24
    assert torch.equal(EXACT.mm(a.bfloat16(), b.bfloat16()), a.bfloat16().float() @ b.bfloat16().float())
    assert EXACT.mm(a.double(), b.double()).dtype == torch.float64


def test_only_bf16_models_have_fewer_bits() -> None:
    for way in WAYS:
        assert products(way, torch.float32, "cuda") is products(way, torch.float16, "cuda") is EXACT
    assert products("auto", torch.bfloat16, "cpu") is EXACT
    assert products("auto", torch.bfloat16, "cuda") is products("split", torch.bfloat16, "cpu")
    with pytest.raises(ValueError, match=r"'fast': choose one of auto, exact, split, tf32"):
        products("fast", torch.bfloat16, "cpu")
    assert tuple(dataclass_fields(TrainArguments)["products"].metadata["choices"]) == WAYS
    for way, dtype in (("split", "float32"), ("tf32", "float16")):
        with pytest.raises(ConfigError, match=f"--products {way} rounds more coarsely than {dtype} weights"):
            ImportanceArguments(products=way, dtype=dtype).check()
