"""Packed bits are numpy's, in both directions, at every width."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from warp_ds.method.mask import frozen_count, pack_bits, unpack_bits


@pytest.mark.parametrize("m", [0, 1, 5])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 21, 64])
def test_bits_are_numpys(m: int, n: int) -> None:
    frozen = torch.rand(m, n, generator=torch.Generator().manual_seed(m * 100 + n)) < 0.4
    packed = pack_bits(frozen)
    assert packed.dtype == torch.uint8 and packed.shape == (m, -(-n // 8))
    assert np.array_equal(packed.numpy(), np.packbits(frozen.numpy(), axis=1).reshape(packed.shape))
    assert torch.equal(unpack_bits(packed, n), frozen)
    expected = np.unpackbits(packed.numpy(), axis=1, count=n).astype(bool).reshape(m, n)
    assert np.array_equal(unpack_bits(packed, n).numpy(), expected)


def test_all_frozen_and_none() -> None:
    assert pack_bits(torch.ones(2, 9, dtype=torch.bool)).tolist() == [[255, 128]] * 2
    assert pack_bits(torch.zeros(2, 9, dtype=torch.bool)).tolist() == [[0, 0]] * 2


def test_frozen_count_rounds_exactly() -> None:
    assert [frozen_count(r, 10) for r in (0.0, 0.1, 0.24, 0.26, 1.0)] == [0, 1, 2, 3, 10]
    assert frozen_count(0.1, 4096 * 11008) == 4508877
    # Halves go to even, as Python rounds.
    assert [frozen_count(0.5, entries) for entries in (1, 3, 5)] == [0, 2, 2]


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_and_1_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        frozen_count(ratio, 10)
