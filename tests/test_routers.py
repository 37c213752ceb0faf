"""What is seen of a router's product, and that torch's linear function is itself again after every pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from warp_ds.errors import ConfigError
from warp_ds.models.routers import watch


class Router(nn.Module):
    """W [3, 4], by which ``way`` says how x is multiplied."""

    def __init__(self, way: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.weight, self.way = nn.Parameter(torch.arange(12.0).view(3, 4) / 8), way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(x, self.weight).softmax(-1)


@pytest.fixture(autouse=True)
def _linear() -> Iterator[None]:
    before = functional.linear
    yield
    left, functional.linear = functional.linear, before  # type: ignore[assignment]
    assert left is before


X = torch.arange(8.0).view(2, 4).bfloat16()


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_what_is_multiplied_is_seen(factor: float) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    router = Router(lambda x, w: functional.linear(factor * x.float(), w))
    handles = watch(router, lambda x, y: seen.append((x, y)))
    out = router(X)
    ((x, y),) = seen
    assert (x is X) == (factor == 1.0) and torch.equal(x.float(), factor * X.float())
    assert torch.equal(y, factor * X.float() @ router.weight.T) and torch.equal(out, y.softmax(-1))
    for handle in handles:
        handle.remove()
    router(X)
    assert len(seen) == 1


def test_several_watchers_each_see_it() -> None:
    seen: list[int] = []
    router = Router(lambda x, w: functional.linear(x.float(), w))
    for number in range(2):
        watch(router, lambda x, y, number=number: seen.append(number))  # type: ignore[misc]
    router(X)
    assert sorted(seen) == [0, 1]


@pytest.mark.parametrize("times", [0, 2])
def test_other_products_are_refused(times: int) -> None:
    def way(x: Tensor, w: Tensor) -> Tensor:
        return x.float() @ w.T if not times else functional.linear(x.float(), w) + functional.linear(x.float(), w)

    router = Router(way)
    watch(router, lambda x, y: None)
    with pytest.raises(ConfigError, match=f"a Router multiplies .* {times} times in a pass.*leave router out"):
        router(X)


def test_a_pass_that_fails_or_is_cut_short() -> None:
    """A recomputed pass ends as soon as it has what the backward pass needs, by an exception of torch's."""

    def broken(x: Tensor, w: Tensor) -> Tensor:
        raise RuntimeError("broken")

    router = Router(broken)
    watch(router, lambda x, y: None)
    with pytest.raises(RuntimeError, match="broken"):
        router(X)
    seen: list[Tensor] = []
    router = Router(lambda x, w: functional.linear(x, w).sin())
    watch(router, lambda x, y: seen.append(y))
    checkpoint(router, X.float().requires_grad_(), use_reentrant=False).sum().backward()
    assert len(seen) == 2
