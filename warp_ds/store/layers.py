"""A rotated layer: its name, place, type and shape, which rows of a parameter it is, and the names of its files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Ranges = tuple[tuple[int, int], ...]
"""Ranges of rows, (first, end) each, ascending and apart."""


@dataclass(frozen=True)
class TargetLayer:
    """A linear layer y = W x that is rotated: where it lies in the model, and nothing of how it is held.

    W is a whole parameter of the model, or some rows of one: a projection of a fused weight, an expert of a stacked one.
    """

    name: str
    """Its own: the module's in the model, such as model.layers.0.mlp.down_proj; with what of it in brackets, where W is some
    rows: model.layers.0.self_attn.qkv_proj[attn_q]."""
    layer: int
    """Number of its block."""
    type: str
    """One of models.layer_names.LAYER_TYPES, or of EXPERT_TYPES with the expert's number: experts_down_007."""
    m: int
    """Outputs: rows of W."""
    n: int
    """Inputs: columns of W."""
    rows: Ranges = ()
    """Which rows of the parameter W is made of, in order; () for all."""
    height: int = 0
    """Rows of the whole parameter, where ``rows`` names some; a parameter of more than two dimensions is seen as
    [height, n]."""
    stored: str = ""
    """Name of the parameter, where it is not the module's weight."""

    @property
    def module(self) -> str:
        """Name of the module that sees its input."""
        return self.stored.rpartition(".")[0] if self.stored else self.name.partition("[")[0]

    @property
    def parameter(self) -> str:
        """Name of the parameter [m, n], or [height, n], that it lies in."""
        return self.stored or f"{self.module}.weight"

    @property
    def expert(self) -> int | None:
        """Which of its block's experts it belongs to; None for a layer that sees every token."""
        return int(self.type.rpartition("_")[2]) if self.type.startswith("experts_") else None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)"""
        return self.m, self.n

    @property
    def whole_shape(self) -> tuple[int, int]:
        """(rows, columns) of the parameter."""
        return self.height or self.m, self.n

    @property
    def stem(self) -> str:
        """layer_00_ffn_down"""
        return f"layer_{self.layer:02d}_{self.type}"

    @property
    def mask_file(self) -> str:
        """layer_00_ffn_down_mask.safetensors"""
        return f"{self.stem}_mask.safetensors"

    def of(self, parameter: Tensor) -> Tensor:
        """W [m, n] of the whole parameter: a view of it where its rows lie together."""
        whole = parameter.view(self.whole_shape)
        if not self.rows:
            return whole
        parts = [whole[first:end] for first, end in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def replaced(self, parameter: Tensor, w: Tensor) -> Tensor:
        """The whole parameter with W [m, n] in its place, in the dtype of W."""
        if not self.rows:
            return w.view(parameter.shape)
        whole = parameter.to(w.dtype, copy=True)
        rows = whole.view(self.whole_shape)
        for (first, end), part in zip(self.rows, w.split([end - first for first, end in self.rows]), strict=True):
            rows[first:end] = part
        return whole

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a parameter of ``shape`` can be the one that it lies in."""
        rows = 1
        for size in shape[:-1]:
            rows *= size
        return len(shape) >= 2 and (rows, shape[-1]) == self.whole_shape and (len(shape) == 2 or bool(self.rows))


SCOPES = ("layer", "block", "global")
"""What one threshold is for: a layer; a block's experts of a type together, other layers alone; all layers."""


def scope_groups(layers: Sequence[TargetLayer], scope: str) -> list[list[int]]:
    """Which of the layers have one threshold, in their order."""
    if scope == "global":
        return [list(range(len(layers)))]
    groups: dict[object, list[int]] = {}
    for index, layer in enumerate(layers):
        together = scope == "block" and layer.expert is not None
        groups.setdefault((layer.layer, layer.type.rpartition("_")[0]) if together else index, []).append(index)
    return list(groups.values())


def uncovered(layers: Iterable[TargetLayer]) -> dict[str, Ranges]:
    """Parameter -> the rows of it that none of the layers has, for those that some layer has rows of."""
    rows: dict[str, tuple[int, list[tuple[int, int]]]] = {}
    for layer in layers:
        if layer.rows:
            rows.setdefault(layer.parameter, (layer.height, []))[1].extend(layer.rows)
    left: dict[str, Ranges] = {}
    for parameter, (height, own) in rows.items():
        ends = [0, *(end for part in sorted(own) for end in part), height]
        if gaps := tuple((begin, end) for begin, end in zip(ends[::2], ends[1::2], strict=True) if begin < end):
            left[parameter] = gaps
    return left
