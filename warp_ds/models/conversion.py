"""Parameters that transformers computes of stored tensors as it loads them: 4-bit and float8 weights made whole.

With ``transformers_internals``, which finds them, the place of transformers' converters; known to hold for transformers 5.23.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.integrations.mxfp4 import Mxfp4Dequantize

from warp_ds.models.copies import Copies
from warp_ds.store.checkpoint_index import RangeReader, TensorLocation


@dataclass(eq=False)
class Conversion:
    """One run of a transformers converter: what it is given, and what it makes of that."""

    converter: WeightConverter
    layer_name: str
    model: PreTrainedModel
    given: dict[str, list[torch.Tensor]]
    """The converter's pattern -> checkpoint tensors, on meta."""
    copies: Copies[TensorLocation]

    @property
    def by_expert(self) -> bool:
        """Whether it makes each expert, the first dimension of all that it is given, by itself, and its values are those of
        any floating-point dtype: MXFP4's."""
        return [type(operation) for operation in self.converter.operations] == [Mxfp4Dequantize]

    def origins(self) -> set[TensorLocation]:
        """The stored tensors that it is given."""
        return {piece.origin for tensors in self.given.values() for t in tensors for piece in self.copies.pieces(t)}

    def run(self, reader: RangeReader, expert: int | None = None) -> dict[str, torch.Tensor]:
        """The same with the stored values, on the CPU: whole parameters, by their names; or [1, ...] of one ``expert``."""
        converter = copy.deepcopy(self.converter)
        for pattern, tensors in self.given.items():
            values = [self._read(tensor, reader, expert) for tensor in tensors]
            converter.collected_tensors[pattern] = values  # type: ignore[assignment]
        made = converter.convert(self.layer_name, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _read(self, tensor: torch.Tensor, reader: RangeReader, expert: int | None) -> torch.Tensor:
        size = tensor.numel() if expert is None else tensor[0].numel()
        start = size * (expert or 0)
        value = torch.empty(tensor.shape if expert is None else (1, *tensor.shape[1:]), dtype=tensor.dtype)
        for piece in (piece.within(start, start + size) for piece in self.copies.pieces(tensor)):
            if piece.length > 0:
                reader.read(piece.origin, piece.first, value.view(-1)[piece.begin - start : piece.end - start])
        return value
