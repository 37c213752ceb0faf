"""What placements of bases (``placements``) reckon with: machines, the dtypes of what is rotated, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """What ``auto`` reckons with: fixed, not measured at the start, so that a resumed run chooses as the first one did."""

    multiply_adds: float
    """A second and rank, in the products of a rotation."""
    bandwidth: float
    """Bytes a second that a rank sends while all do."""
    overlaps: bool
    """Whether sending leaves the processor that computes alone."""
    splits: bool = False
    """Whether fp32 products are taken as three of bf16 parts, so that those with a bf16 factor are two."""


#: An H100 (half its peak of dense bf16 products, three for one of fp32 numbers) on 200 Gb/s of network a GPU; a few CPU cores
#: on 10 Gb/s.
GPU, CPU = Machine(8e13, 2.5e10, True, splits=True), Machine(5e10, 1.25e9, False)


@dataclass(frozen=True)
class Cost:
    """What a placement costs the rank that it costs most."""

    sent: float
    """Bytes a step, to other ranks."""
    held: float
    """Bytes: bases, and what is brought together to use them."""
    multiply_adds: float
    """A step."""
    ahead: bool = False
    """Whether what is sent can be sent ahead of its use."""
    by_bf16: float = 0.0
    """Of the multiply-adds, those with a factor that is bf16 as it is."""

    def seconds(self, machine: Machine) -> float:
        """A step's."""
        multiply_adds = self.multiply_adds - self.by_bf16 / 3 * machine.splits
        parts = multiply_adds / machine.multiply_adds, self.sent / machine.bandwidth
        return max(parts) if self.ahead and machine.overlaps else sum(parts)


@dataclass(frozen=True)
class Dtypes:
    """What a step's gradients come as and are kept as (``Driver.gradient``), and what its weights are rounded to."""

    gradients: torch.dtype = torch.float32
    weights: torch.dtype = torch.float32

    def by_bf16(self, size: int, n: int) -> float:
        """The share of a gradient's multiply-adds with a basis of n columns, of ``size`` bytes, that have a bf16 factor: with
        reflectors, Q = I - V Yᵀ, those of G V alone."""
        if (self.gradients, self.weights) != (torch.bfloat16, torch.bfloat16):
            return 0.0
        return 1.0 if size >= 4 * n * n else 0.5


FP32 = Dtypes()
