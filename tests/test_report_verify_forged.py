"""Forged pairs: what the certificate says of each (docs/certificate.md has the same table, with what it said before)."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forged_pairs import FORGERIES, Forge, Pair
from masked_artefacts import Artefacts, odd_model, token_batches, write_artefacts
from safetensors.torch import load_file, save_file
from tiny_models import tiny_tokenizer

import warp_ds
from warp_ds.errors import ArtifactError
from warp_ds.evaluation.certificate import certify, still_describes
from warp_ds.evaluation.certificate_output import print_certificate, write_certificate
from warp_ds.evaluation.movement import frozen_drift, movement
from warp_ds.launch.cli import main
from warp_ds.models.directory import ModelDirectory
from warp_ds.store.fingerprints import fingerprint_model
from warp_ds.store.layers import TargetLayer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DOCS = Path(__file__).parents[1] / "docs" / "certificate.md"


def train(
    folder: Path, artefacts: Artefacts | None, dtype: torch.dtype, lr: float = 1e-3, seed: int = 0, steps: int = 10
) -> Path:
    """AdamW steps in ``dtype`` with fp32 masters as the ZeRO step has them, or without where no mask needs them."""
    model = odd_model(torch.float32)
    if dtype != torch.float32:
        model = model.to(dtype).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    if artefacts is not None:
        warp_ds.protect_optimizer(model, optimizer, None, artefacts.masks)
    for ids in token_batches(steps + seed)[seed:]:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(dtype).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def honest(folder: Path, dtype: torch.dtype, **options: Any) -> Artefacts:
    odd_model().to(dtype).save_pretrained(folder / "before")
    tiny_tokenizer().save_pretrained(folder / "before")
    artefacts = write_artefacts(folder, odd_model(), model_fingerprint=fingerprint_model(folder / "before"))
    train(folder / "after", artefacts, dtype, **options)
    return artefacts


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("forged")
    slow = root / "slow"
    honest(slow, torch.bfloat16)
    # About a unit in the last place of the smaller weights.
    train(slow / "after", None, torch.bfloat16, lr=2e-6, steps=4)
    found: dict[str, Any] = {}
    for name, dtype in DTYPES.items():
        honest(root / name, dtype)
        train(root / f"plain_{name}", None, dtype)
        certificate = certify(root / name / "before", root / name / "after", root / name / "masks")
        assert certificate.outcome == "kept", certificate.problems
        found[name] = (root / name, {c.layer: c.allowed_max for c in certificate.layers}, root / f"plain_{name}", slow)
    return found


def outcome(pair: Pair) -> str:
    try:
        certificate = certify(pair.before, pair.after, pair.root / "masks", pair.root / "basis")
    except ArtifactError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return "refused"
    json.dumps(certificate.values(), allow_nan=False)
    assert certificate.kept is (certificate.outcome == "kept")
    return str(certificate.outcome)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("what", "expected", "forge"), FORGERIES, ids=[f.__name__.strip("_") for _, _, f in FORGERIES])
def test_forged(pairs: dict[str, Any], what: str, expected: str, forge: Forge, dtype: str, tmp_path: Path) -> None:
    source, allowed, plain, slow = pairs[dtype]
    shutil.copytree(source, tmp_path / "pair")
    pair = Pair(tmp_path / "pair", allowed, plain, slow)
    forge(pair)
    assert outcome(pair) == expected


def test_the_documents_table_is_this_one() -> None:
    """Every shape has a line, and the line says what the tests say."""
    lines = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", DOCS.read_text(), re.MULTILINE)
    assert [(what, now) for _, what, _, now in lines] == [(what, expected) for what, expected, _ in FORGERIES]
    assert len(lines) >= 40


@pytest.mark.parametrize("lr", [1e-2, 1e-3, 1e-4])
def test_honest_pairs_are_never_broken(lr: float, tmp_path: Path) -> None:
    for name, dtype in (*DTYPES.items(), ("float16", torch.float16)):
        for seed in range(2):
            folder = tmp_path / f"{name}_{seed}"
            honest(folder, dtype, lr=lr, seed=3 * seed, steps=4)
            found = certify(folder / "before", folder / "after", folder / "masks")
            assert found.outcome in ("kept", "cannot tell"), (name, seed, found.problems)
            assert found.outcome == "kept" or dtype != torch.float32


def test_what_is_not_claimed_is_listed(pairs: dict[str, Any], tmp_path: Path) -> None:
    source, allowed, plain, slow = pairs["float32"]
    shutil.copytree(source, tmp_path / "pair")
    pair = Pair(tmp_path / "pair", allowed, plain, slow)

    def listed() -> dict[str, tuple[str, str]]:
        found = certify(pair.before, pair.after, pair.root / "masks", pair.root / "basis")
        return {part.what: (part.state, part.detail) for part in found.not_claimed}

    untouched = listed()
    assert untouched["tokenizer"][0] == untouched["config.json"][0] == "the same"
    forgeries = {forge.__name__: forge for _, _, forge in FORGERIES}
    for name in ("_bias", "_config", "_tokenizer"):
        forgeries[name](pair)
    found = listed()
    assert found["biases"] == ("changed", "1 of 1: model.layers.0.mlp.down_proj.bias (only after)")
    assert found["config.json"] == ("changed", "rms_norm_eps, rope_theta, tie_word_embeddings")
    assert found["tokenizer"][0] == found["chat template"][0] == "changed"


def test_it_reads_what_from_pretrained_loads(pairs: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    source, allowed, _, _ = pairs["bfloat16"]
    loaded = AutoModelForCausalLM.from_pretrained(source / "after", dtype="auto").state_dict()
    model = ModelDirectory.of(source / "after")
    assert all(torch.equal(model.read(f"{name}.weight"), loaded[f"{name}.weight"]) for name in allowed)


def test_exit_status_and_json(pairs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, allowed, plain, slow = pairs["float32"]
    forgeries = {forge.__name__: forge for _, _, forge in FORGERIES}
    for name, status, word in ((None, 0, "KEPT"), ("_nan", 1, "BROKEN"), ("_same_twice", 3, "CANNOT TELL"), ("_zeroed", 2, "")):
        shutil.copytree(source, tmp_path / str(name))
        pair = Pair(tmp_path / str(name), allowed, plain, slow)
        if name is not None:
            forgeries[name](pair)
        output = pair.root / "certificate.json"
        assert (
            main(
                [
                    "verify",
                    "--before",
                    str(pair.before),
                    "--after",
                    str(pair.after),
                    "--masks_dir",
                    str(pair.root / "masks"),
                    "--basis_dir",
                    str(pair.root / "basis"),
                    "--output",
                    str(output),
                ]
            )
            == status
        )
        printed = capsys.readouterr()
        assert f"{word}: " in printed.out if word else printed.err.startswith("error: ") and not printed.out
        assert ("KEPT" in printed.out) is (word == "KEPT")
        if word:
            assert json.loads(output.read_text(), parse_constant=pytest.fail)["version"] == 2


def test_a_certificate_is_of_the_model_that_lies_there(pairs: dict[str, Any], tmp_path: Path) -> None:
    source, *_ = pairs["float32"]
    found = certify(source / "before", source / "after", source / "masks")
    write_certificate(found, tmp_path / "certificate.json")
    certificate = json.loads((tmp_path / "certificate.json").read_text())
    shutil.copytree(source / "after", tmp_path / "model")
    assert still_describes(certificate, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"].view(torch.int32)[0] ^= 1
    save_file(tensors, path)
    assert not still_describes(certificate, tmp_path / "model")
    for other in (None, [], {}, {"version": 2}, certificate | {"version": 1}, certificate | {"outcome": "fine"}):
        assert not still_describes(other, source / "after")


def test_it_reads_names_as_from_pretrained_maps_them(pairs: dict[str, Any], tmp_path: Path) -> None:
    """Without the base model's prefix, and of a model whose stored names are not its parameters'."""
    from transformers import AutoModelForCausalLM, Gemma3Config

    source, allowed, plain, slow = pairs["float32"]
    shutil.copytree(source, tmp_path / "pair")
    pair = Pair(tmp_path / "pair", allowed, plain, slow)
    {forge.__name__: forge for _, _, forge in FORGERIES}["_no_prefix_at_all"](pair)
    sizes = {"hidden_size": 20, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**sizes, "num_key_value_heads": 1, "head_dim": 10, "vocab_size": 96, "sliding_window": 8},
        vision_config={**sizes, "hidden_size": 16, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=1,
        image_token_index=90,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gemma")
    for folder, names in (
        (pair.after, list(allowed)),
        (
            tmp_path / "gemma",
            [f"model.language_model.layers.{i}.{kind}" for i in (0, 1) for kind in ("mlp.down_proj", "self_attn.q_proj")],
        ),
    ):
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
        targets = [TargetLayer(name, 0, "ffn_down", *loaded[f"{name}.weight"].shape) for name in names]
        stored = set(load_file(folder / "model.safetensors"))
        assert not stored & {f"{name}.weight" for name in names}, "else this shows nothing"
        model = ModelDirectory.of(folder, targets)
        assert len(model.tensors) == len(stored)
        assert all(torch.equal(model.weight(target), loaded[f"{target.name}.weight"]) for target in targets)
        with pytest.raises(ArtifactError, match="no readable weight"):
            model.weight(TargetLayer("model.layers.9.mlp.down_proj", 9, "ffn_down", 3, 3))


def test_pickles_beside_the_safetensors_stop_no_measurement(pairs: dict[str, Any], tmp_path: Path) -> None:
    """The hub has both of many models, and evaluate and compare measure by what from_pretrained loads."""
    source, *_ = pairs["float32"]
    shutil.copytree(source, tmp_path / "pair")
    before, after, masks, basis = (tmp_path / "pair" / name for name in ("before", "after", "masks", "basis"))
    without = frozen_drift(before, after, masks, basis), movement(before, after, basis)
    (before / "pytorch_model.bin").write_bytes(b"x")
    assert any("pytorch_model.bin" in note for note in certify(before, after, masks, basis).notes)
    (after / "pytorch_model.bin").write_bytes(b"x")
    assert (frozen_drift(before, after, masks, basis), movement(before, after, basis)) == without


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_coefficients_lost_under_huge_free_ones_are_not_kept(pairs: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    """The rounding of free parts 1e7 times as large hides whether the frozen ones are there at all."""
    source, allowed, plain, slow = pairs[dtype]
    shutil.copytree(source, tmp_path / "pair")
    pair = Pair(tmp_path / "pair", allowed, plain, slow)
    for name in allowed:

        def huge(tensors: dict[str, torch.Tensor], name: str = name) -> None:
            w = tensors[f"{name}.weight"]
            u, frozen = pair.complete(name, w.shape[1]), pair.frozen(name, w.shape[1])
            c = w.double() @ u
            c[frozen] = 0.0
            generator = torch.Generator().manual_seed(0)
            c[~frozen] += 1e7 * torch.randn(int((~frozen).sum()), generator=generator, dtype=torch.float64)
            tensors[f"{name}.weight"] = (c @ u.T).to(w.dtype)

        pair.edit("after", huge)
    assert outcome(pair) in ("cannot tell", "broken")


@pytest.mark.parametrize(
    "name",
    ["evil.safetensors", "tf_model.h5", "flax_model.msgpack", "pytorch_model.bin.index.json", "adapter_model.safetensors"],
)
def test_a_second_set_of_weights_of_any_name_is_refused(pairs: dict[str, Any], name: str, tmp_path: Path) -> None:
    source, allowed, plain, slow = pairs["float32"]
    shutil.copytree(source, tmp_path / "pair")
    (tmp_path / "pair" / "after" / "optimizer.pt").touch()  # what Trainer leaves beside a model
    pair = Pair(tmp_path / "pair", allowed, plain, slow)
    assert outcome(pair) == "kept"
    (tmp_path / "pair" / "after" / name).write_bytes(b"{}")
    assert outcome(pair) == "refused"


def test_what_a_file_calls_itself_does_not_write_to_the_terminal(
    pairs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, allowed, plain, slow = pairs["float32"]
    shutil.copytree(source, tmp_path / "pair")
    pair = Pair(tmp_path / "pair", allowed, plain, slow)
    pair.edit("after", lambda tensors: tensors.update({"\x1b[2J\nKEPT: [bold]all is well[/]": torch.ones(2)}))
    print_certificate(certify(pair.before, pair.after, pair.root / "masks", pair.root / "basis"))
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown and "\nKEPT: [bold]" not in shown and "[bold]all is well[/]" in shown


def test_a_number_of_thousands_of_digits_is_no_traceback(pairs: dict[str, Any], tmp_path: Path) -> None:
    source, allowed, plain, slow = pairs["float32"]
    shutil.copytree(source, tmp_path / "pair")
    (tmp_path / "pair" / "after" / "config.json").write_text('{"a": ' + "9" * 5000 + "}")
    assert outcome(Pair(tmp_path / "pair", allowed, plain, slow)) == "refused"
