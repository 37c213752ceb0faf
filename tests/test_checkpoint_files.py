"""Which files of a directory hold a model's weights: as from_pretrained finds them, or refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from warp_ds.errors import CheckpointError, PickledCheckpoint
from warp_ds.store.checkpoint_index import resolve_checkpoint

INDEX = "model.safetensors.index.json"
NAME = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    tiny_model("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model("llama").save_pretrained(folder, max_shard_size="30KB")
    return folder


def edit_json(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def file_of(folder: Path, name: str = NAME) -> str:
    return json.loads((folder / INDEX).read_text())["weight_map"][name]


def other_file(folder: Path) -> str:
    return next(p.name for p in sorted(folder.glob("model-*")) if p.name != file_of(folder))


def check_bytes(folder: Path) -> None:
    for name, location in resolve_checkpoint(folder).items():
        with safe_open(location.path, framework="pt") as file:
            stored = file.get_tensor(name)
        with open(location.path, "rb") as raw:
            raw.seek(location.offset)
            read = torch.frombuffer(bytearray(raw.read(location.nbytes)), dtype=location.dtype)
        assert torch.equal(stored.flatten(), read), name


def test_one_file_and_many_hold_the_same_tensors(whole: Path, sharded: Path) -> None:
    one, many = resolve_checkpoint(whole), resolve_checkpoint(sharded)
    assert set(one) == set(many) == set(tiny_model("llama").state_dict())
    assert len({location.path for location in many.values()}) > 2
    check_bytes(whole)
    check_bytes(sharded)


def test_safetensors_come_before_pickles_and_unlisted_tensors_count(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded, tmp_path / "m")
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    edit_json(folder / INDEX, lambda index: index["weight_map"].pop(NAME))
    assert set(resolve_checkpoint(folder)) == set(resolve_checkpoint(sharded))


def twice(folder: Path) -> None:
    tensors = load_file(folder / file_of(folder))
    other = load_file(folder / other_file(folder))
    save_file({**other, NAME: tensors[NAME]}, folder / other_file(folder), metadata={"format": "pt"})


def both_layouts(folder: Path) -> None:
    shutil.copy(folder / file_of(folder), folder / "model.safetensors")


def index_names_another_file(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({NAME: other_file(folder)}))


def index_names_what_is_nowhere(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"model.extra": file_of(folder)}))


def index_leaves_the_directory(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({NAME: "../x.safetensors"}))


def index_of_lists(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index.update(weight_map=[1]))


def index_without_metadata(folder: Path) -> None:
    edit_json(folder / INDEX, lambda index: index.pop("metadata"))


def index_twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    entry = json.dumps(NAME) + ": "
    (folder / INDEX).write_text(text.replace(entry, f'{entry}"{other_file(folder)}", {entry}', 1))


def index_not_json(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def missing_shard(folder: Path) -> None:
    (folder / file_of(folder)).unlink()


def no_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


def variant(folder: Path) -> None:
    no_weights(folder)
    save_file({"a": torch.zeros(2)}, folder / "model.fp16.safetensors")


def gguf(folder: Path) -> None:
    no_weights(folder)
    (folder / "model-q4.gguf").touch()


def consolidated(folder: Path) -> None:
    no_weights(folder)
    (folder / "consolidated.safetensors").touch()


def shards_without_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def weights_below(folder: Path) -> None:
    no_weights(folder)
    (folder / "text").mkdir()
    (folder / "text" / "model.safetensors").touch()


def pickled(folder: Path) -> None:
    no_weights(folder)
    (folder / "pytorch_model.bin").touch()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def adapter_alone(folder: Path) -> None:
    no_weights(folder)
    no_config(folder)
    (folder / "adapter_config.json").write_text("{}")


def adapter_beside(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def explicit_file(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(transformers_weights="other.safetensors"))


def explicit_file_within(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config.update(text_config={"transformers_weights": "x.safetensors"}))


SAYS = {
    twice: rf"{NAME} is stored twice, in model-.* and in model-.*save the model again",
    both_layouts: "has both model.safetensors and model.safetensors.index.json.*remove the one",
    index_names_another_file: rf"puts {NAME} into model-.*which holds no such tensor \(it is in model-",
    index_names_what_is_nowhere: "puts model.extra into model-.*which holds no such tensor: index and files",
    index_leaves_the_directory: "names '../x.safetensors', which is no safetensors file beside it",
    index_of_lists: "has no weight_map",
    index_without_metadata: "has no metadata, without which from_pretrained",
    index_twice: rf"{NAME}' stands twice",
    index_not_json: "is not JSON",
    missing_shard: "is missing, though its checkpoint names it",
    no_weights: "has no weights that from_pretrained loads.*download it again",
    variant: "but model.fp16.safetensors: a variant is not what from_pretrained loads",
    gguf: "but model-q4.gguf: GGUF is not supported",
    consolidated: "but consolidated.safetensors: these are its maker's own format",
    shards_without_index: "but model-00001.* and .* more: from_pretrained loads model.safetensors, or what",
    weights_below: "but text/model.safetensors: a directory below holds weights",
    pickled: r"has pickled weights \(pytorch_model.bin\).*Convert them once.*save_pretrained",
    no_config: "has no config.json",
    adapter_alone: r"is an adapter \(adapter_config.json without config.json\).*merge_and_unload",
    adapter_beside: "holds a model and an adapter.*merge_and_unload",
    explicit_file: r"names its weight files itself \(transformers_weights\)",
    explicit_file_within: r"names its weight files itself \(transformers_weights\)",
}


@pytest.mark.parametrize("change", SAYS, ids=lambda change: change.__name__)
def test_what_readers_could_understand_in_two_ways_is_refused(change: Any, sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded, tmp_path / "m")
    change(folder)
    with pytest.raises(PickledCheckpoint if change is pickled else CheckpointError, match="(?s)" + SAYS[change]):
        resolve_checkpoint(folder)
