"""Products of bf16 parts against fp64: within their bound, and exact where operands are bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import ImportanceArguments, TrainArguments
from warp_ds.flags.flag import dataclass_fields
from warp_ds.method.importance import add_importance
from warp_ds.method.products import EXACT, SPLIT_ERROR, WAYS, Products, bf16_parts, products
from warp_ds.method.rotation import Rotation

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


class Counted(TorchDispatchMode):
    """How many matrices are multiplied, by torch's own operators."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("r", "of_bf16", "of_fp32"), [(K, 2, 3), (K // 4, 2 + 3, 3 + 3)], ids=["dense", "reflectors"])
def test_bf16_gradients_take_a_product_less_with_a_basis(split: Products, r: int, of_bf16: int, of_fp32: int) -> None:
    """G V of the reflectors is fp32, so its product with them takes three."""
    rotation = Rotation(torch.linalg.qr(torch.randn(K, r, generator=torch.Generator().manual_seed(2)))[0], K)
    g = operands()[0].bfloat16()
    with Counted() as by_bf16:
        found = rotation.rotate(g, split)
    with Counted() as by_fp32:
        same = rotation.rotate(g.float(), split)
    assert (by_bf16.count, by_fp32.count) == (of_bf16, of_fp32)
    assert found.dtype == torch.float32 and torch.equal(found, same), "what is left out is a product of zeros"
    exact = g.double() @ rotation.unrotate(torch.eye(K)).T.double()
    bound = 2 * (SPLIT_ERROR + ROUNDING) * K**0.5  # of a row's size, whose entries add up in two products at most
    assert bool(((found - exact).abs() <= bound * g.double().norm(dim=1, keepdim=True)).all())
    assert torch.equal(rotation.rotate(g), rotation.rotate(g.float())), "exact products are those of the same fp32 numbers"


def test_inputs_and_output_gradients_of_phase_2_are_multiplied_as_they_are(split: Products) -> None:
    """Of bf16: gᵀ x is one product, x U and gᵀ (x U) are two each, (gᵀ x) U three beside it."""
    g, x = (torch.randn(40, size, generator=torch.Generator().manual_seed(size)).bfloat16() for size in (M, K))
    columns = torch.linalg.qr(torch.randn(K, N, generator=torch.Generator().manual_seed(4)))[0]

    def count(rotated: bool, u: torch.Tensor | None) -> int:
        with Counted() as counted:
            right = split.mm(x, columns) if rotated else x
            add_importance(torch.zeros(M, K if u is None and not rotated else N), g, right, u, products=split)
        return counted.count

    assert (count(False, None), count(True, None), count(False, columns)) == (1, 2 + 2, 1 + 3)


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
