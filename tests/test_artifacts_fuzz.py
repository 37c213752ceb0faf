"""Every field of the artefacts by type, every tensor by dtype, shape and value: refused by name, or the same result."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from masked_artefacts import odd_model, write_artefacts
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from warp_ds.errors import ArtifactError
from warp_ds.store.bases import BasisStore
from warp_ds.store.masks import MaskStore

VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a\nb",
    "\udc80",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
    [None],
    [1, 2, 3],
)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz") / "whole"
    write_artefacts(root, odd_model())
    return root


def read(root: Path) -> dict[str, Any]:
    """All that training takes from the artefacts."""
    masks = MaskStore(root / "masks")
    basis = masks.find_basis(root / "basis")
    masks.check(basis, "f", "tiny")
    result: dict[str, Any] = {}
    for layer in masks.layers:
        result[layer.name] = [layer, masks.packed(layer.name)]
        if basis is not None:
            basis.check([layer], "f", "tiny")
            result[layer.name] += [*basis.columns(layer.name), basis.held(layer.name)]
    return result


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for a, b in zip(one.values(), other.values(), strict=True)
        for x, y in zip(a, b, strict=True)
    )


def refused_or_same(root: Path, whole: dict[str, Any]) -> bool:
    """Whether it was refused; anything but ArtifactError in one line, or another result, fails the test."""
    try:
        assert same(read(root), whole)
    except ArtifactError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000, str(error)
        str(error).encode()
        return True
    return False


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The place of every value, and of every name of an object."""
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from fields(value[key], (*path, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from fields(value[index], (*path, index))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    changed = copy.deepcopy(value)
    if not path:
        return new
    inner = changed
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = new
    return changed


def drop(value: Any, path: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(value)
    inner = changed
    for step in path[:-1]:
        inner = inner[step]
    del inner[path[-1]]
    return changed


@pytest.mark.parametrize("kind", ["basis", "masks"])
def test_every_field(artefacts: Path, kind: str, tmp_path: Path) -> None:
    whole, root = read(artefacts), tmp_path / "copy"
    shutil.copytree(artefacts, root)
    path = root / kind / "metadata.json"
    good = json.loads(path.read_text())
    tried = accepted = 0
    # One layer stands for all six: the others are checked by the same lines.
    first = next(iter(good["layers"]))
    places = [
        p
        for p in fields(good)
        if len(p) < 2 or p[0] not in ("layers", "bases") or p[1] in (first, *list(good.get("bases", ()))[:1])
    ]
    for place in places:
        variants = [put(good, place, value) for value in VALUES]
        if place:
            variants.append(drop(good, place))
        variants += [put(good, (*place, "extra"), 1)] if isinstance(_at(good, place), dict) else []
        for variant in variants:
            if variant == good and repr(variant) == repr(good):
                continue
            path.write_text(json.dumps(variant), encoding="utf-8", errors="surrogatepass")
            tried += 1
            accepted += not refused_or_same(root, whole)
    assert tried > 400
    # Texts that are for people (names, notes) may be others; of a basis, every byte is in the masks' fingerprint.
    assert accepted < (60 if kind == "masks" else 1), accepted


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        value = value[step]
    return value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "NaN",
        '"x"',
        "[" * 100_000,
        "\x00",
        '{"format": "warp_ds.masks"}',
        '{"a": 1, "a": 2}',
        "1" * 10_000,
    ],
)
def test_no_metadata_at_all(artefacts: Path, text: str, tmp_path: Path) -> None:
    shutil.copytree(artefacts, tmp_path / "copy")
    for kind, store in (("basis", BasisStore), ("masks", MaskStore)):
        (tmp_path / "copy" / kind / "metadata.json").write_text(text)
        with pytest.raises(ArtifactError):
            store(tmp_path / "copy" / kind)


@pytest.mark.parametrize("kind", ["basis", "masks"])
def test_what_is_no_file(artefacts: Path, kind: str, tmp_path: Path) -> None:
    """FIFOs are not waited for."""
    whole = read(artefacts)
    for index, make in enumerate(
        (
            os.mkfifo,
            os.mkdir,
            lambda path: os.symlink("nowhere", path),
            lambda path: None,
            lambda path: os.symlink("/dev/zero", path),
        )
    ):
        for name in ("metadata.json", f"layer_00_ffn_down_{'svd' if kind == 'basis' else 'mask'}.safetensors"):
            root = tmp_path / f"{index}_{name}"
            shutil.copytree(artefacts, root)
            (root / kind / name).unlink()
            make(root / kind / name)
            assert refused_or_same(root, whole), (index, name)


def test_every_tensor(artefacts: Path, tmp_path: Path) -> None:
    whole, root, mark = read(artefacts), tmp_path / "copy", MaskStore(artefacts / "masks").fingerprint()
    shutil.copytree(artefacts, root)
    for path in sorted(root.glob("*/layer_00_*.safetensors")):
        data = path.read_bytes()
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
        good = load_file(path)
        for name, tensor in good.items():
            for variant in changed(tensor):
                save_file({**good, name: variant}, path, metadata=metadata)
                if name == "frozen" and variant.dtype == tensor.dtype and torch.equal(variant, tensor.flip(0)):
                    # As many bits elsewhere are other masks, which a run that took these knows by their fingerprint.
                    assert MaskStore(root / "masks").fingerprint() != mark
                    continue
                assert refused_or_same(root, whole), (path.name, name, variant.dtype, variant.shape)
            save_file({k: t for k, t in good.items() if k != name}, path, metadata=metadata)
            assert refused_or_same(root, whole)
            save_file({**good, "extra": tensor.clone()}, path, metadata=metadata)
            assert refused_or_same(root, whole)
        for cut in (0, 4, 8, 40, len(data) - 1):
            path.write_bytes(data[:cut])
            assert refused_or_same(root, whole), (path.name, cut)
        path.write_bytes(data + b"\0")
        assert refused_or_same(root, whole)
        for text in ('{"layers": ["model.layers.9.mlp.down_proj"]}', "{", "[]", "null", "1", '{"layers": 3}'):
            save_file(good, path, metadata={"warp_ds.basis": text, "warp_ds.masks": text})
            assert refused_or_same(root, whole)
        path.write_bytes(data)
        assert not refused_or_same(root, whole)


def changed(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Another dtype, shape or value each."""
    for dtype in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.int8,
        torch.uint8,
        torch.int64,
        torch.bool,
    ):
        if dtype != tensor.dtype:
            yield tensor.to(dtype)
    yield tensor[:-1].contiguous()
    yield torch.cat([tensor, tensor[:1]])
    yield tensor.unsqueeze(0)
    yield tensor.reshape(-1)[:0]
    yield tensor.reshape(-1)[0].clone()
    yield torch.zeros_like(tensor)
    yield tensor.flip(0).contiguous() if not torch.equal(tensor.flip(0), tensor) else tensor + 1
    for value in (float("nan"), float("inf"), -float("inf"), -1.0, 1e30) if tensor.is_floating_point() else (255,):
        other = tensor.clone()
        other.view(-1)[0] = value
        yield other
