"""A rotated layer: its name, place, type and shape, and the names of its files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetLayer:
    """A linear layer y = W x that is rotated: where it lies in the model, and nothing of how it is held.

    W is a whole parameter of the model. Rows of a fused projection, or one expert of a stacked parameter, would be named here.
    """

    name: str
    """Module name in the model, such as model.layers.0.mlp.down_proj."""
    layer: int
    """Number of its block."""
    type: str
    """One of models.layer_names.LAYER_TYPES."""
    m: int
    """Outputs: rows of W."""
    n: int
    """Inputs: columns of W."""

    @property
    def parameter(self) -> str:
        """Name of the parameter W [m, n] that it lies in."""
        return f"{self.name}.weight"

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)"""
        return self.m, self.n

    @property
    def stem(self) -> str:
        """layer_00_ffn_down"""
        return f"layer_{self.layer:02d}_{self.type}"

    @property
    def mask_file(self) -> str:
        """layer_00_ffn_down_mask.safetensors"""
        return f"{self.stem}_mask.safetensors"
