"""A rotated layer: its name, place, type and shape, and the names of its files."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetLayer:
    """A linear layer y = W x that is rotated."""

    name: str
    """Module name in the model, such as model.layers.0.mlp.down_proj."""
    layer: int
    """Number of its block."""
    type: str
    """One of config.LAYER_TYPES."""
    m: int
    """Outputs: rows of W."""
    n: int
    """Inputs: columns of W."""

    @property
    def stem(self) -> str:
        """layer_00_ffn_down"""
        return f"layer_{self.layer:02d}_{self.type}"

    @property
    def mask_file(self) -> str:
        """layer_00_ffn_down_mask.safetensors"""
        return f"{self.stem}_mask.safetensors"
