"""Models whose parameters transformers stacks, fuses, splits or transposes from stored tensors: loaded and saved in shards,
bit for bit as from_pretrained and save_pretrained do it, under the names that the hub's files have."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_zero_load import Words, assert_same_model, bytes_asked, ds_config
from test_zero_save import contents
from tiny_models import CONVERTED, SIZES, batch, tiny_converted
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from warp_ds.models.copies import CannotMap, Copies
from warp_ds.models.expert_rows import turnings
from warp_ds.store.checkpoint_index import read_header
from warp_ds.zero.load import load_sharded
from warp_ds.zero.save import save_sharded

SHARD = "60KB"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("converted")
    for family in CONVERTED:
        tiny_converted(family).save_pretrained(root / family, max_shard_size=SHARD)
    return root


def names(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: t.shape for file in folder.glob("*.safetensors") for name, t in read_header(file).items()}


def load_and_save(root: Path, out: Path) -> dict[str, str]:
    """What each family's loading and saving says on rank 0; the files, the model and its logits are compared."""
    said = {}
    for index, family in enumerate(CONVERTED):
        dtype = torch.bfloat16 if index % 2 else torch.float32
        with Words() as words:
            model = load_sharded(root / family, ds_config=ds_config(dtype), dtype=dtype, progress=False)
            save_sharded(model, out / family, max_shard_size=SHARD, progress=False)
        plain = AutoModelForCausalLM.from_pretrained(root / family, dtype=dtype)
        assert_same_model(model, plain, family)
        if dist.get_rank() == 0:
            plain.save_pretrained(out / "expected" / family, max_shard_size=SHARD)
            found, expected = contents(out / family), contents(out / "expected" / family)
            del found["README.md"]
            assert found.keys() == expected.keys(), family
            assert found == expected, family
            assert names(out / family) == names(root / family), family
            again = AutoModelForCausalLM.from_pretrained(out / family, dtype=dtype)
            for either in (plain, again):
                either.set_experts_implementation("eager")  # the default's kernel refuses odd sizes
            with torch.no_grad():
                logits = [m.eval()(input_ids=batch()["input_ids"]).logits for m in (plain, again)]
            assert torch.equal(*logits), family
        said[family] = words.text
    return said


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_as_transformers_loads_and_saves(checkpoints: Path, tmp_path: Path, world_size: int) -> None:
    said = run_ranks(world_size, load_and_save, checkpoints, tmp_path)[0]
    for family, words in said.items():
        assert not any(phrase in words for phrase in ("not in shards", "make them whole", "own names")), (family, words)


def test_every_byte_is_read_once(checkpoints: Path) -> None:
    folder = checkpoints / "qwen3_moe"
    stored = sum(t.nbytes for file in folder.glob("*.safetensors") for t in read_header(file).values())
    asked = run_ranks(3, bytes_asked, folder)
    assert sum(asked) == stored
    assert max(asked) < stored / 3 * 1.01


# Weights in fewer bits --------------------------------------------------------------------------------------------


def in_fp8(folder: Path) -> None:
    """Qwen 3 MoE as its FP8 checkpoints are: every projection as float8 with a scale for each block."""
    tiny_converted("qwen3_moe").to(torch.bfloat16).save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        rows, columns = stored[name].shape
        scale = 0.01 + torch.rand(2, 4)
        blocks = scale.repeat_interleave(rows // 2, 0).repeat_interleave(columns // 4, 1)
        stored[name] = (stored[name] / blocks).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, {"quant_method": "fp8", "weight_block_size": [8, 8], "modules_to_not_convert": ["lm_head"]})


def in_mxfp4(folder: Path) -> None:
    """gpt-oss as it is published: experts as 4-bit numbers with a power of two for every 32 of them."""
    config = AutoConfig.for_model("gpt_oss", **{**SIZES, **CONVERTED["gpt_oss"], "hidden_size": 64, "intermediate_size": 32})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    store_in_mxfp4(folder)


def store_in_mxfp4(folder: Path) -> None:
    """Other experts in place of a gpt-oss model's, of MXFP4."""
    stored = load_file(folder / "model.safetensors")
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = stored.pop(name).shape
        stored[f"{name}_blocks"] = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
        stored[f"{name}_scales"] = torch.randint(120, 126, (experts, outputs, inputs // 32), dtype=torch.uint8)
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})


def edit_config(folder: Path, quantisation: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantisation}))


FEWER_BITS = {"fp8": (in_fp8, FineGrainedFP8Config), "mxfp4": (in_mxfp4, Mxfp4Config)}


def load_dequantised(root: Path) -> None:
    for method, (_, config) in FEWER_BITS.items():
        with Words() as words, redirect_stderr(io.StringIO()) as bar:
            model = load_sharded(root / method, ds_config=ds_config(torch.bfloat16), dtype=torch.bfloat16)
        # MXFP4 is decoded expert by expert, where its rows lie.
        assert ("computed from what is stored" in words.text) == (dist.get_rank() == 0 and method == "fp8"), words.text
        plain = AutoModelForCausalLM.from_pretrained(
            root / method, dtype=torch.bfloat16, quantization_config=config(dequantize=True)
        )
        assert_same_model(model, plain, method)
        if method == "mxfp4" and dist.get_world_size() == 1:  # what is decoded stands in the bar, as what it becomes
            read = sum(p.nbytes for p in load_file(root / method / "model.safetensors").values() if p.dtype != torch.uint8)
            decoded = sum(p.nbytes for name, p in plain.named_parameters() if name.endswith(("gate_up_proj", "down_proj")))
            assert f"/{tqdm.format_sizeof(read + decoded)}" in bar.getvalue(), bar.getvalue()
        save_sharded(model, root / f"{method}-saved", max_shard_size=SHARD, progress=False)
        again = AutoModelForCausalLM.from_pretrained(root / f"{method}-saved", dtype=torch.bfloat16)
        expected = plain.state_dict()
        assert again.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items()), method


@pytest.mark.parametrize("world_size", [1, 3])
def test_weights_in_fewer_bits_are_made_whole(tmp_path: Path, world_size: int) -> None:
    for method, (make, _) in FEWER_BITS.items():
        make(tmp_path / method)
    run_ranks(world_size, load_dequantised, tmp_path)
    # The hub's own names, without the scales.
    tiny_converted("qwen3_moe").save_pretrained(tmp_path / "plain")
    assert names(tmp_path / "fp8-saved") == names(tmp_path / "plain")


def load_in_rows(root: Path) -> None:
    """gpt-oss, as it is and from MXFP4: the same values held row by row, the same logits, the same files."""
    for folder, dtype, more in (
        ("plain", torch.float32, {}),
        ("mxfp4", torch.bfloat16, {"quantization_config": Mxfp4Config(dequantize=True)}),
    ):
        model = load_sharded(root / folder, ds_config=ds_config(dtype), dtype=dtype, experts_in_rows=True, progress=False)
        plain = AutoModelForCausalLM.from_pretrained(root / folder, dtype=dtype, **more).eval()
        whole = dict(plain.named_parameters())
        turned = turnings(model)
        assert len(turned) == 2 * len(plain.model.layers)
        parameters = list(model.parameters())
        with deepspeed.zero.GatheredParameters(parameters):
            for name, param in model.named_parameters():
                wanted = whole[name]
                if name in turned:  # independent of the code that turns it
                    wanted = wanted.transpose(1, 2)
                    if "gate_up" in name:
                        wanted = torch.cat([wanted[:, 0::2], wanted[:, 1::2]], dim=1)
                assert torch.equal(param, wanted), name
            for either in (plain, model.eval()):
                either.set_experts_implementation("eager")
            with torch.no_grad():
                logits = [m(input_ids=batch()["input_ids"], use_cache=False).logits for m in (plain, model)]
            assert torch.allclose(*logits, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
        save_sharded(model, root / f"{folder}-in-rows", max_shard_size=SHARD, progress=False)
        again = AutoModelForCausalLM.from_pretrained(root / f"{folder}-in-rows", dtype=dtype).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in plain.state_dict().items()), folder


@pytest.mark.parametrize("world_size", [1, 3])
def test_experts_that_are_stored_transposed_are_held_row_by_row(tmp_path: Path, world_size: int) -> None:
    tiny_converted("gpt_oss").save_pretrained(tmp_path / "plain", max_shard_size=SHARD)
    in_mxfp4(tmp_path / "mxfp4")
    run_ranks(world_size, load_in_rows, tmp_path)
    assert names(tmp_path / "plain-in-rows") == names(tmp_path / "plain")


# Following copies -------------------------------------------------------------------------------------------------


def gather(tensor: torch.Tensor, copies: Copies[Any], values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The tensor put together from the pieces that it is said to be made of."""
    found = torch.full((tensor.numel(),), -1.0)
    for piece in copies.pieces(tensor):
        found[piece.begin : piece.end] = values[piece.origin].reshape(-1)[piece.first : piece.first + piece.length]
    return found.view(tensor.shape)


def stack_gate_up(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.stack([t["a"], t["b"]]), torch.stack([t["c"], t["d"]])], dim=1)


def interleave(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return t["a"].reshape(2, 3, 5).transpose(0, 1).reshape(6, 5).contiguous()


def split_again(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return stack_gate_up(t).chunk(2, dim=1)[1].contiguous().chunk(2)[1].squeeze(0)[1:4]


def columns(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t["a"], t["b"]], dim=-1)


def transposed(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return t["a"].t().contiguous()


def with_empty(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t["a"], torch.empty(0, device=t["a"].device), t["b"]])


def view(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return t["a"][2:5].view(5, 3)


MOVES = [stack_gate_up, interleave, split_again, columns, transposed, with_empty, view]


@pytest.mark.parametrize("move", MOVES)
def test_copies_are_followed(move: Any) -> None:
    values = {name: torch.arange(30.0).view(6, 5) + 100 * i for i, name in enumerate("abcd")}
    copies: Copies[str] = Copies()
    metas = {name: torch.empty(6, 5, device="meta") for name in values}
    for name, tensor in metas.items():
        copies.add(tensor, name)
    with copies:
        moved = move(metas)
    assert torch.equal(gather(moved, copies, values), move(values))


def computed(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t["a"] * 2, t["b"]])


def overwritten(t: dict[str, torch.Tensor]) -> torch.Tensor:
    whole = torch.cat([t["a"], t["b"]])
    whole[0] = t["b"][0]
    return whole


def rounded(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return t["a"].to(torch.bfloat16).to(torch.float32)


def padded(t: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t["a"], torch.zeros(1, 5, device=t["a"].device)])


@pytest.mark.parametrize("change", [computed, overwritten, rounded, padded])
def test_what_is_no_copy_is_not_taken_for_one(change: Any) -> None:
    copies: Copies[str] = Copies()
    metas = {name: torch.empty(6, 5, device="meta") for name in "ab"}
    for name, tensor in metas.items():
        copies.add(tensor, name)
    with copies:
        changed = change(metas)
    with pytest.raises(CannotMap):
        copies.pieces(changed)


def test_a_large_transposed_tensor_is_no_list_of_ranges() -> None:
    copies: Copies[str] = Copies()
    tensor = torch.empty(300, 300, device="meta")
    copies.add(tensor, "a")
    with copies:
        moved = tensor.t().contiguous()
    with pytest.raises(CannotMap, match="transposed"):
        copies.pieces(moved)
