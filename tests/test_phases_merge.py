"""Merging model directories file by file: what a merge that was stopped had written is not made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from warp_ds.phases.merge import MARK, merge

FILES = {f"model-{i}.safetensors": {f"layer{i}.weight": torch.full((2, 3), float(i))} for i in range(3)}


@pytest.fixture()
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m"
    path.mkdir()
    for file, tensors in FILES.items():
        save_file(tensors, path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in FILES.items() for name in tensors}
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


def test_a_merge_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    def formula(name: str, tuned: Tensor, aligned: Tensor) -> Tensor:
        asked.append(name)
        if len(asked) == 2:
            raise RuntimeError("the node was lost")
        return tuned + aligned + 1

    output = tmp_path / "merged"
    with pytest.raises(RuntimeError, match="node was lost"):
        merge(model, model, output, formula)
    assert not (output / MARK).exists()
    merge(model, model, output, formula)
    merge(model, model, output, formula)
    assert asked == ["layer0.weight", "layer1.weight", "layer1.weight", "layer2.weight"]
    for i, file in enumerate(FILES):
        assert torch.equal(load_file(output / file)[f"layer{i}.weight"], torch.full((2, 3), 2.0 * i + 1))
    assert (output / MARK).is_file() and (output / "model.safetensors.index.json").is_file()
