"""Model directories that phases 0 to 3 and evaluate take, and those that they refuse by name before a weight is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SIZES, tiny_model, tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3Config, LlamaForSequenceClassification, T5Config

from warp_ds.errors import ConfigError, DataError
from warp_ds.flags.arguments import EvaluateArguments
from warp_ds.launch.inputs import check_inputs
from warp_ds.models.source import check_ids, check_model_dir, local_model_dir, read_config, read_tokenizer
from warp_ds.models.targets import find_targets
from warp_ds.models.transformers_internals import weights_as_loaded


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    tiny_model("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def edited(model_dir: Path, to: Path, **change: Any) -> Path:
    folder = shutil.copytree(model_dir, to)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    return folder


def test_an_ordinary_model_is_taken(model_dir: Path) -> None:
    check_model_dir(model_dir)
    assert read_tokenizer(model_dir, read_config(model_dir)).pad_token_id == 0


@pytest.mark.parametrize(
    "change,says",
    [
        (
            {"model_type": "mynet", "auto_map": {"AutoConfig": "a.B", "AutoModelForCausalLM": "m.M"}},
            "needs its own modelling code.*not supported, for warp_ds runs no code",
        ),
        ({"model_type": "mynet"}, "model_type 'mynet', which transformers .* does not know: upgrade"),
        ({"model_type": None}, "model_type None"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "is a LlamaForSequenceClassification, not a causal"),
        ({"transformers_weights": "other.safetensors"}, "names its weight files itself"),
    ],
)
def test_other_kinds_are_named(model_dir: Path, tmp_path: Path, change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"--reference_model.*{says}") as caught:
        check_model_dir(edited(model_dir, tmp_path / "m", **change), "--reference_model")
    assert "trust_remote_code" not in str(caught.value)


def test_code_that_is_not_needed_is_no_obstacle(model_dir: Path, tmp_path: Path) -> None:
    """Many models of a type that transformers has carry their first code along."""
    check_model_dir(edited(model_dir, tmp_path / "m", auto_map={"AutoModelForCausalLM": "modeling_llama.Llama"}))


def test_encoder_decoders_and_classifiers(tmp_path: Path) -> None:
    small = tiny_model("llama").config
    LlamaForSequenceClassification(small).save_pretrained(tmp_path / "classifier")
    with pytest.raises(ConfigError, match="LlamaForSequenceClassification, not a causal language model"):
        check_model_dir(tmp_path / "classifier")
    shutil.copytree(tmp_path / "classifier", tmp_path / "t5")
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ConfigError, match="model of type t5, which is no causal"):
        check_model_dir(tmp_path / "t5")


def test_an_adapter_says_that_it_is_one(model_dir: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(r=2, target_modules=["down_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="--model_name .*is an adapter.*merge_and_unload"):
        local_model_dir(str(tmp_path / "adapter"))
    both = shutil.copytree(model_dir, tmp_path / "both")
    for path in (tmp_path / "adapter").glob("adapter_*"):
        shutil.copy(path, both)
    with pytest.raises(ConfigError, match="holds a model and an adapter"):
        check_model_dir(both)


@pytest.mark.parametrize("kind", ["pad", "bos", "eos"])
def test_special_tokens_beyond_the_embedding(model_dir: Path, tmp_path: Path, kind: str) -> None:
    folder = edited(model_dir, tmp_path / "m", vocab_size=6)  # as many as the tokenizer has
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({f"{kind}_token": "[NEW]"})
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match=rf"{kind} token has id 6, but the model has 6 embeddings \(ids 0 to 5\)"):
        read_tokenizer(folder, read_config(folder))


def test_added_tokens_are_refused_where_a_text_has_them(model_dir: Path, tmp_path: Path) -> None:
    folder = edited(model_dir, tmp_path / "m", vocab_size=6)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    config = read_config(folder)
    used = read_tokenizer(folder, config)
    check_ids([{"input_ids": used("yes no")["input_ids"]}], config)
    with pytest.raises(DataError, match="row 1 holds the token id 6, but the model has 6 embeddings"):
        check_ids([{"input_ids": used(text)["input_ids"]} for text in ("yes", "yes <extra>")], config)
    tokenizer.chat_template = "<extra>{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="token '<extra>' of the chat template has id 6"):
        read_tokenizer(folder, config)


@pytest.mark.parametrize("vision_depth", [2, 3])
def test_the_text_layers_of_a_multimodal_model(vision_depth: int) -> None:
    """The vision tower has q_proj layers too, and may be as deep as the text model."""
    config = Gemma3Config(
        text_config={**SIZES, "head_dim": 10},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": vision_depth,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        mm_tokens_per_image=1,
        image_token_index=90,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert [t.name for t in find_targets(model, "all", "attn_q,ffn_down")] == [
        f"model.language_model.layers.{i}.{kind}" for i in (0, 1) for kind in ("mlp.down_proj", "self_attn.q_proj")
    ]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_weights_as_loaded_are_the_loaded_weights(tmp_path: Path, family: str) -> None:
    """By the model's names, wherever they are stored under the base model's."""
    base = tiny_model(family).model if family == "qwen2" else tiny_model(family)
    base.save_pretrained(tmp_path, max_shard_size="30KB")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).model_type == family
    found = weights_as_loaded(tmp_path)
    named = dict(loaded.named_parameters())
    assert set(found) == set(named)
    for name, weight in found.items():
        location = weight.location
        with open(location.path, "rb") as file:
            file.seek(location.offset)
            stored = torch.frombuffer(bytearray(file.read(location.nbytes)), dtype=location.dtype)
        assert torch.equal(stored, named[name].detach().flatten()), name


@pytest.mark.parametrize("flag", ["model_name", "reference_model", "judge_model"])
def test_code_is_not_asked_about_at_the_start(model_dir: Path, tmp_path: Path, flag: str) -> None:
    """transformers would ask on the terminal whether to run it, or advise an option that no phase has."""
    own = edited(model_dir, tmp_path / "m", model_type="mynet", auto_map={"AutoConfig": "a.B"})
    with pytest.raises(ConfigError, match=f"--{flag} .* needs its own modelling code"):
        check_inputs(EvaluateArguments(**{"model_name": str(model_dir), flag: str(own)}))
