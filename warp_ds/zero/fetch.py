"""Gathers the parameters of a ZeRO-3 model a part at a time, without a DeepSpeed engine.

An engine's hooks fetch and release around every submodule; phases 1 and 2 update nothing, and want each block's
parameters once per pass. Models that are not partitioned work too: there is nothing to gather.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """The given parameters are whole inside, and partitioned again after. Every rank enters together."""
    import deepspeed  # takes seconds, which a plan need not wait for

    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        yield


def outside(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules outside ``blocks`` that have parameters of their own: embeddings, last norm, head."""
    inside = {id(m) for block in blocks for m in block.modules()}
    return [m for m in model.modules() if id(m) not in inside and any(True for _ in m.parameters(recurse=False))]


@contextmanager
def saved_by_reference(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Autograd graphs made inside refer to the given whole parameters instead of keeping their memory alive.

    So the parameters can be partitioned until the backward pass, which must run with them gathered again.
    """
    memory = {p.untyped_storage().data_ptr(): p for p in parameters if p.numel()}

    def pack(tensor: Tensor) -> Any:
        parameter = memory.get(tensor.untyped_storage().data_ptr())
        return tensor if parameter is None else (parameter, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        parameter, size, stride, offset = packed
        return parameter.data.as_strided(size, stride, offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class FetchHooks:
    """Within the context, a forward pass gathers each of ``modules`` when it is reached; ``backward`` the same back."""

    def __init__(self, modules: Sequence[nn.Module], blocks: Sequence[nn.Module], backward: bool = False):
        self.units = [(m, list(m.parameters())) for m in blocks]
        self.units += [(m, list(m.parameters(recurse=False))) for m in modules]
        self.backward = backward
        self._open: dict[nn.Module, ExitStack] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> FetchHooks:
        for module, parameters in self.units:

            def fetch(module: nn.Module, *_: Any, parameters: list[nn.Parameter] = parameters) -> None:
                self._fetch(module, parameters)

            def release(module: nn.Module, *_: Any) -> None:
                self._release(module)

            self._handles.append(module.register_forward_pre_hook(fetch))
            self._handles.append(module.register_forward_hook(release))
            if self.backward and not isinstance(module, nn.Embedding):
                self._handles.append(module.register_full_backward_pre_hook(fetch))
                self._handles.append(module.register_full_backward_hook(release))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for stack in self._open.values():
            stack.close()
        self._open.clear()

    def _fetch(self, module: nn.Module, parameters: list[nn.Parameter]) -> None:
        if module not in self._open:
            stack = ExitStack()
            stack.enter_context(gathered(parameters))
            self._open[module] = stack

    def _release(self, module: nn.Module) -> None:
        stack = self._open.pop(module, None)
        if stack is not None:
            stack.close()
