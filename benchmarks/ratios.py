"""What the masked step and phase 2 cost beside plain training, by arithmetic: operations and bytes over what a device does.

The ratios are of one rank. Left out is what moves bytes alone: making the parts of split products, masks, optimizer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from warp_ds.method.products import Products, Rates


def rotating_seconds(multiply_adds: float, products: Products, rates: Rates, by_bf16: float = 0.0, share: float = 1.0) -> float:
    """A step's two rotations: of gradients with U, and of fp32 coefficients with Uᵀ.

    ``multiply_adds``: of both, as ``zero.placements.Cost`` has it; ``by_bf16``: those of them with a bf16 factor, half of
    all where gradients are bf16 as they are; ``share``: what smaller bases (``warp-ds shrink``, ``--max_rank``) leave.
    """
    of_fp32 = products.seconds(2 * share * (multiply_adds - by_bf16), rates)
    return of_fp32 + products.seconds(2 * share * by_bf16, rates, torch.bfloat16)


def step_ratio(plain: float, rotating: float) -> float:
    """Of the masked step's seconds to the plain step's, nothing overlapping."""
    return 1 + rotating / plain


def scores_ratio(plain: float, passes: float, products: Iterable[float], reading: float = 0.0) -> float:
    """Of phase 2's seconds to plain training passes' over the same samples.

    ``plain``: seconds of those; ``passes``: share of their operations that phase 2's own passes take (no gradient of
    a weight is made); ``products``: seconds, ``method.importance.importance_seconds`` of all batches and inputs;
    ``reading``: seconds that bases take from their files to the device.
    """
    return passes + (sum(products) + reading) / plain


def memory_ratio(plain: float, bases: float, without: float = 1.0, share: float = 1.0) -> float:
    """Of peak bytes: ``without`` is the ratio beside the bases' bytes, of which ``share`` is held."""
    return without + share * bases / plain


def share_within(bar: float, ratio: float, without: float = 1.0) -> float:
    """Which share of the bases (of their bytes, or of the products with them) a ratio may keep to come down to ``bar``.

    ``ratio`` is linear in that share, and ``without`` them; 1 where it is within the bar, 0 where nothing helps.
    """
    if ratio <= bar:
        return 1.0
    return max(0.0, (bar - without) / (ratio - without))
