"""The stored columns of bases, at hand where phase 2 takes its products."""

from __future__ import annotations

import torch
from torch import Tensor

from warp_ds.cluster.memory import free_gpu_memory
from warp_ds.store.bases import BasisStore


class Columns:
    """U, and V where there is an output basis, on the device, kept there as far as a quarter of a GPU's free memory goes."""

    def __init__(self, basis: BasisStore | None, device: torch.device | str):
        """``basis`` None: the identity."""
        self.basis = basis
        self.device = torch.device(device)
        # On a CPU the files are mapped: nothing is read twice while they fit in memory.
        self.free = free_gpu_memory(self.device) // 4 if self.device.type == "cuda" else 0
        self._kept: dict[str, Tensor] = {}

    def get(self, name: str) -> Tensor | None:
        """U [n, r] of the layer called ``name``; None for the identity."""
        if self.basis is None:
            return None
        file = self.basis.metadata.layers[name]["file"]
        return self._kept[file] if file in self._kept else self._keep(file, self.basis.columns(name)[0])

    def left(self, name: str) -> Tensor | None:
        """V [m, q]; None without an output basis."""
        if self.basis is None or not self.basis.two_sided:
            return None
        file = self.basis.metadata.layers[name]["output"]
        return self._kept[file] if file in self._kept else self._keep(file, self.basis.output_columns(name)[0])

    def _keep(self, file: str, columns: Tensor) -> Tensor:
        columns = columns.to(self.device)
        size = columns.numel() * columns.element_size()
        if size <= self.free:
            self.free -= size
            self._kept[file] = columns
        return columns
