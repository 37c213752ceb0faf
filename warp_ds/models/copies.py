"""Which elements of which tensors end up where, found by running code that moves them on meta tensors.

Views share their tensor's storage and say themselves which of its elements they are (offset, sizes, strides). What makes
new storages by copying (``cat``, ``stack``, ``contiguous``, ``reshape`` of a permuted tensor) is seen on the way through
PyTorch's dispatcher. So any chain of such operations is followed without knowing who wrote it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import Any, Generic

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from warp_ds.store.pieces import Origin, Piece, joined

SCATTERED_RUNS = 4096
"""As many runs of a copy are followed however short they are ..."""
SHORTEST_RUN = 64
"""... and more only if they have at least this many elements: a transposed matrix is no list of ranges."""

_aten = torch.ops.aten
_WHOLE = {_aten.clone.default, _aten._to_copy.default, _aten.lift_fresh_copy.default}


class CannotMap(Exception):
    """A tensor's elements are no list of ranges of others; the message says why."""


class Copies(TorchDispatchMode, Generic[Origin]):
    """Follows copies of the tensors given to ``add``, as long as it is entered. Meta tensors only."""

    def __init__(self) -> None:
        super().__init__()
        # By storage. The tensors are kept, so that no storage's address is used again.
        self._origins: dict[int, tuple[Tensor, Origin]] = {}
        self._copied: dict[int, tuple[Tensor, list[tuple[Tensor, Tensor]]]] = {}
        self._computed: dict[int, tuple[Tensor, str]] = {}
        self._runs: dict[int, list[tuple[int, int, int, int]]] = {}

    def add(self, tensor: Tensor, origin: Origin) -> None:
        """``tensor``, contiguous and alone in its storage, stands for ``origin``."""
        self._origins[_storage(tensor)] = (tensor, origin)

    def origins(self) -> list[Origin]:
        return [origin for _, origin in self._origins.values()]

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [t for a in (*args, *(kwargs or {}).values()) for t in (a if isinstance(a, (list, tuple)) else [a])]
        given = [tensor for tensor in given if isinstance(tensor, Tensor) and self._knows(_storage(tensor))]
        made = [result for result in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(result, Tensor)]
        if not given:
            return out
        if func._schema.is_mutable:  # it wrote where copies lie
            self._computed.update({_storage(tensor): (tensor, str(func)) for tensor in given})
        for result in made:
            if result.is_meta and not self._knows(_storage(result)):  # else a view
                copied = _copied_by(func, args, kwargs or {}, result) if given[0].dtype == result.dtype else None
                if copied is None:
                    self._computed[_storage(result)] = (result, str(func))
                else:
                    self._copied[_storage(result)] = (result, copied)
        return out

    def _knows(self, storage: int) -> bool:
        return storage in self._origins or storage in self._copied or storage in self._computed

    def pieces(self, tensor: Tensor) -> list[Piece[Origin]]:
        """What a meta tensor [any shape], read in its own order, is made of.

        Raises:
            CannotMap: it holds something else than copies of what was added, or is scattered over it.
        """
        return list(joined(self._pieces(tensor)))

    def _pieces(self, tensor: Tensor) -> Iterator[Piece[Origin]]:
        (starts,), length = _runs_of(tensor)
        storage, begin = _storage(tensor), 0
        for start in starts.tolist():
            for origin, first, count in self._within(storage, start, start + length):
                yield Piece(origin, first, begin, count)
                begin += count

    def _within(self, storage: int, start: int, stop: int) -> Iterator[tuple[Origin, int, int]]:
        """Elements [start, stop) of a storage, as (origin, first element, elements)."""
        if storage in self._computed:
            raise CannotMap(f"its values are computed by {self._computed[storage][1]}")
        if storage in self._origins:
            yield self._origins[storage][1], start, stop - start
            return
        if storage not in self._copied:
            raise CannotMap("it is made of something that is stored nowhere")
        runs = self._runs_into(storage)
        index = bisect_right(runs, start, key=lambda run: run[0]) - 1
        while start < stop:
            begin, length, source, first = runs[index]
            end = min(begin + length, stop)
            yield from self._within(source, first + start - begin, first + end - begin)
            start, index = end, index + 1

    def _runs_into(self, storage: int) -> list[tuple[int, int, int, int]]:
        """Of a storage made by copying, ascending: (first element, elements, the storage that they are from, where there)."""
        if storage not in self._runs:
            self._runs[storage] = runs = []
            for target, source in self._copied[storage][1]:
                (begins, firsts), length = _runs_of(target, source)
                runs += [(b, length, _storage(source), f) for b, f in zip(begins.tolist(), firsts.tolist(), strict=True)]
            runs.sort()
        return self._runs[storage]


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _copied_by(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> list[tuple[Tensor, Tensor]] | None:
    """(part of the result, what was copied there), or None where ``func`` does more than copy."""
    if func in _WHOLE:
        return [(out, args[0])]
    if func not in (_aten.cat.default, _aten.stack.default):
        return None
    tensors = args[0]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.ndim
    if func is _aten.stack.default:
        return [(out.select(dim, index), tensor) for index, tensor in enumerate(tensors)]
    tensors = [tensor for tensor in tensors if tensor.shape != (0,)]  # cat takes these for nothing, whatever the others are
    lengths = [tensor.shape[dim] for tensor in tensors]
    return [(out.narrow(dim, sum(lengths[:i]), lengths[i]), tensor) for i, tensor in enumerate(tensors)]


def _runs_of(*tensors: Tensor) -> tuple[list[npt.NDArray[np.int64]], int]:
    """Where in their storages the runs of tensors of one shape begin, in the tensors' order, and the runs' length: as long
    as all of them go on by one element.

    Raises:
        CannotMap: there are many of a few elements each.
    """
    if tensors[0].numel() == 0:
        return [np.zeros(0, np.int64) for _ in tensors], 0
    dims: list[tuple[int, tuple[int, ...]]] = []
    for size, strides in zip(tensors[0].shape, zip(*(tensor.stride() for tensor in tensors), strict=True), strict=True):
        if size == 1:
            continue
        if dims and all(outer == size * inner for outer, inner in zip(dims[-1][1], strides, strict=True)):
            dims[-1] = (dims[-1][0] * size, strides)
        else:
            dims.append((size, strides))
    length = dims.pop()[0] if dims and all(stride == 1 for stride in dims[-1][1]) else 1
    if (runs := tensors[0].numel() // length) > SCATTERED_RUNS and length < SHORTEST_RUN:
        raise CannotMap(f"it is transposed, or scattered otherwise ({runs} runs of {length} elements)")
    found = []
    for index, tensor in enumerate(tensors):
        begins = np.array([tensor.storage_offset()], np.int64)
        for size, strides in dims:
            begins = (begins[:, None] + np.arange(size, dtype=np.int64) * strides[index]).reshape(-1)
        found.append(begins)
    return found, length
