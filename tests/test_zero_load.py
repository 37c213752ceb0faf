"""load_sharded against from_pretrained: bit for bit the same model, and the same words when something is wrong."""

from __future__ import annotations

import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, SIZES, batch, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from warp_ds.errors import CheckpointError, OtherRankError
from warp_ds.store import checkpoint_index
from warp_ds.store.checkpoint_index import RangeReader, ReadAhead, TensorLocation, read_header
from warp_ds.zero import partitioned_param
from warp_ds.zero.load import load_sharded
from warp_ds.zero.partitioned_param import Partitioner, check_layout, own_range, why_not_by_hand

WORLDS = [1, 2, 3, 4]
# stored dtype, loaded dtype
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
CASES = list(itertools.product(FAMILIES, DTYPES))


def ds_config(dtype: torch.dtype, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, **zero},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }


def assert_same_model(sharded: PreTrainedModel, plain: PreTrainedModel, what: object) -> None:
    """Parameters, ties, buffers and state are equal to the bit."""
    named, expected = dict(sharded.named_parameters()), dict(plain.named_parameters())
    assert list(named) == list(expected), what
    for name, param in named.items():
        place = own_range(param)
        assert param.ds_tensor.numel() == place.length, (what, name)
        assert not param.ds_tensor[place.stop - place.start :].any(), f"{what} {name}: padding is not 0"
        with deepspeed.zero.GatheredParameters([param]):
            assert param.dtype == expected[name].dtype, (what, name)
            assert torch.equal(param, expected[name]), (what, name)
    buffers, expected_buffers = dict(sharded.named_buffers()), dict(plain.named_buffers())
    assert list(buffers) == list(expected_buffers), what
    for name, buffer in buffers.items():
        assert buffer.dtype == expected_buffers[name].dtype, (what, name)
        assert torch.equal(buffer, expected_buffers[name]), (what, name)
    assert sharded.all_tied_weights_keys == plain.all_tied_weights_keys, what
    assert sharded.training == plain.training, what
    assert sharded.config.to_dict() == plain.config.to_dict(), what
    assert sharded.generation_config.to_dict() == plain.generation_config.to_dict(), what


def losses(model: PreTrainedModel, config: dict[str, Any], steps: int) -> list[float]:
    """Before the first and after each optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    found = [engine(**batch()).loss]
    for _ in range(steps):
        engine.backward(found[-1])
        engine.step()
        found.append(engine(**batch()).loss)
    engine.destroy()
    return [loss.item() for loss in found]


def write_checkpoints(root: Path) -> None:
    for family, (stored, _) in CASES:
        folder = root / f"{family}-{stored}"
        if not folder.exists():
            tiny_model(family, stored).save_pretrained(folder, max_shard_size="30KB")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    write_checkpoints(root)
    return root


# Equality ---------------------------------------------------------------------------------------------------------


def compare_all(root: Path) -> None:
    for family, (stored, dtype) in CASES:
        folder = root / f"{family}-{stored}"
        sharded = load_sharded(folder, ds_config=ds_config(dtype), dtype=dtype, progress=False)
        assert_same_model(sharded, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), (family, stored, dtype))


def compare_losses(root: Path) -> None:
    for family, (stored, dtype) in CASES:
        folder, config = root / f"{family}-{stored}", ds_config(dtype)
        steps = int((family, stored) == ("gemma2", torch.float32))  # Steps take most of the time.
        sharded = losses(load_sharded(folder, ds_config=config, dtype=dtype, progress=False), config, steps)
        seen = HfDeepSpeedConfig(config)
        theirs = losses(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), config, steps)
        del seen
        assert sharded == theirs, (family, stored, dtype)


@pytest.mark.parametrize("world_size", WORLDS)
def test_equals_from_pretrained(checkpoints: Path, world_size: int) -> None:
    run_ranks(world_size, compare_all, checkpoints)


@pytest.mark.parametrize("world_size", WORLDS)
def test_same_losses_as_from_pretrained_under_zero3(checkpoints: Path, world_size: int) -> None:
    run_ranks(world_size, compare_losses, checkpoints)


def test_sharded_checkpoints_are_sharded(checkpoints: Path) -> None:
    assert len(list((checkpoints / "llama-torch.float32").glob("model-*.safetensors"))) > 2


# Parameters made by hand ------------------------------------------------------------------------------------------


def layouts(break_it: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for zero in ({}, {"offload_param": {"device": "cpu"}}, {"stage3_prefetch_bucket_size": "auto"}):
            partitioner = Partitioner(ds_config(dtype, **zero), dtype)
            check_layout(partitioner)
    # The stock linear would keep every gathered weight alive until the backward pass.
    assert nn.functional.linear is zero3_linear_wrap
    if break_it:
        partitioned_param.free_param = lambda param: None
        with pytest.raises(RuntimeError, match="another way"):
            check_layout(partitioner)


@pytest.mark.parametrize("world_size", [1, 3])
def test_made_by_hand_as_deepspeed_makes_them(world_size: int) -> None:
    """Fails loudly when a DeepSpeed version sets other attributes."""
    run_ranks(world_size, layouts, True)


@pytest.mark.parametrize(
    "config",
    [
        {"zero_optimization": {"offload_param": {"device": "nvme"}}},
        {"zero_optimization": {"zero_hpz_partition_size": 8}},
        {"zero_optimization": {"zero_quantized_weights": True}},
        {"zero_optimization": {"mics_shard_size": 8}},
        {"tensor_parallel": {"autotp_size": 2}},
    ],
)
def test_settings_left_to_deepspeed(config: dict[str, Any]) -> None:
    assert why_not_by_hand(config)
    assert why_not_by_hand(ds_config(torch.bfloat16, offload_param={"device": "cpu"})) is None


# Kinds of checkpoints ---------------------------------------------------------------------------------------------


class Words(logging.Handler):
    """What was logged inside the block."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"

    def __enter__(self) -> Words:
        for name in ("transformers", "warp_ds"):
            logging.getLogger(name).addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        for name in ("transformers", "warp_ds"):
            logging.getLogger(name).removeHandler(self)


def compare_kind(folder: Path, said: list[str], dtype: torch.dtype, zero: dict[str, Any]) -> None:
    torch.manual_seed(dist.get_rank())  # Ranks that initialise a missing weight each for themselves would differ.
    with Words() as words:
        sharded = load_sharded(folder, ds_config=ds_config(dtype, **zero), dtype=dtype, progress=False)
    if dist.get_rank() == 0:
        assert all(phrase in words.text for phrase in said), words.text
        assert bool(words.text) == bool(said), words.text
    torch.manual_seed(0)  # As rank 0, whose values are the ones that count.
    assert_same_model(sharded, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), folder.name)


def edit(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def single_file(folder: Path) -> list[str]:
    tiny_model("llama").save_pretrained(folder)
    return []


def unexpected(folder: Path) -> list[str]:
    tiny_model("llama").save_pretrained(folder)
    edit(folder, lambda tensors: tensors.update({"model.layers.0.extra": torch.ones(3)}))
    return ["model.layers.0.extra", "UNEXPECTED"]


def base_model_names(folder: Path) -> list[str]:
    """No "model." before the names, as an AutoModel saves them; the output embedding is the input embedding."""
    tiny_model("qwen2").model.save_pretrained(folder)
    return []


def tied_twice_equal(folder: Path) -> list[str]:
    tiny_model("qwen2").save_pretrained(folder)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    return []


def tied_twice_different(folder: Path) -> list[str]:
    tiny_model("qwen2").save_pretrained(folder)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    return ["NOT tied"]


def tied_under_the_other_name(folder: Path) -> list[str]:
    tiny_model("qwen2").save_pretrained(folder)
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    return []


def pickled(folder: Path) -> list[str]:
    model = tiny_model("llama")
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return ["pytorch_model.bin is pickled"]


def fused(folder: Path) -> list[str]:
    config = AutoConfig.for_model("mixtral", **SIZES, num_local_experts=3, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return []


KINDS = [
    single_file,
    unexpected,
    base_model_names,
    tied_twice_equal,
    tied_twice_different,
    tied_under_the_other_name,
    pickled,
    fused,
]


def compare_kinds(jobs: list[tuple[Path, list[str]]]) -> None:
    for folder, said in jobs:
        compare_kind(folder, said, torch.float32, {})
    compare_kind(jobs[0][0], [], torch.bfloat16, {"offload_param": {"device": "cpu", "pin_memory": False}})
    compare_kind(jobs[0][0], [], torch.bfloat16, {"stage3_param_persistence_threshold": "auto"})


@pytest.mark.parametrize("world_size", [1, 2])
def test_kinds_of_checkpoints(tmp_path: Path, world_size: int) -> None:
    jobs = []
    for make in KINDS:
        folder = tmp_path / make.__name__
        folder.mkdir()
        jobs.append((folder, make(folder)))
    run_ranks(world_size, compare_kinds, jobs)


class BufferedConfig(LlamaConfig):
    model_type = "buffered"


class BufferedModel(LlamaForCausalLM):
    """With a buffer that checkpoints hold, which none of the supported families has."""

    config_class = BufferedConfig

    def __init__(self, config: BufferedConfig) -> None:
        super().__init__(config)
        self.register_buffer("scale", torch.zeros(5))
        self.post_init()


def load_buffered(folder: Path) -> None:
    AutoConfig.register("buffered", BufferedConfig)
    AutoModelForCausalLM.register(BufferedConfig, BufferedModel)
    for dtype in (torch.float32, torch.bfloat16):
        sharded = load_sharded(folder, ds_config=None, dtype=dtype, progress=False)
        assert sharded.scale.any()
        assert_same_model(sharded, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), dtype)


def test_buffers_in_the_checkpoint(tmp_path: Path) -> None:
    model = BufferedModel(BufferedConfig(**SIZES))
    model.scale.copy_(torch.arange(5.0) / 3)
    model.save_pretrained(tmp_path)
    run_ranks(2, load_buffered, tmp_path)


def test_hub_name_from_the_cache(tmp_path: Path) -> None:
    """Offline, as on a compute node; in a process of its own, since the hub's settings are read on import."""
    repository = tmp_path / "models--someone--tiny"
    snapshot = repository / "snapshots" / "0123abcd"
    tiny_model("llama").save_pretrained(snapshot, max_shard_size="30KB")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    code = (
        "import torch, sys; sys.path.insert(0, 'tests')\n"
        "from warp_ds.cluster import processes; processes.init_distributed('cpu')\n"
        "from test_zero_load import assert_same_model, load_sharded, AutoModelForCausalLM\n"
        "model = load_sharded('someone/tiny', ds_config=None, dtype=torch.float32)\n"
        "assert_same_model(model, AutoModelForCausalLM.from_pretrained('someone/tiny', dtype=torch.float32), 'hub')\n"
        "processes.shutdown()\n"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Loading rank 0's shard: 100%" in done.stderr and "B/s" in done.stderr


# What is asked of the files ---------------------------------------------------------------------------------------


def bytes_asked(folder: Path) -> int:
    asked = 0
    preadv = os.preadv

    def counting(descriptor: int, buffers: list, offset: int) -> int:
        nonlocal asked
        asked += sum(len(memoryview(buffer)) for buffer in buffers)
        return preadv(descriptor, buffers, offset)

    os.preadv = counting
    load_sharded(folder, ds_config=None, dtype=torch.bfloat16, progress=False)
    return asked


def test_every_byte_is_read_once(checkpoints: Path) -> None:
    folder = checkpoints / "gemma2-torch.float32"
    stored = sum(t.nbytes for file in folder.glob("*.safetensors") for t in read_header(file).values())
    assert sum(run_ranks(3, bytes_asked, folder)) == stored


@pytest.mark.parametrize("budget", [1 << 30, 20])
@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no posix_fadvise on this system")
def test_reads_ahead_what_its_rank_will_ask_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    save_file({"a": torch.zeros(7, 5, dtype=torch.bfloat16), "b": torch.zeros(2), "c": torch.zeros(0)}, tmp_path / "f")
    tensors = read_header(tmp_path / "f")
    monkeypatch.setattr(checkpoint_index, "READ_AHEAD_BYTES", budget)
    monkeypatch.setattr(checkpoint_index, "ADVICE_BYTES", 16)
    advise, asked = os.posix_fadvise, []

    def recording(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        asked.append((offset, length))
        advise(descriptor, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", recording)

    def own(tensor: TensorLocation, rank: int) -> tuple[int, int]:
        piece = -(-tensor.numel // 3)
        first, end = min(rank * piece, tensor.numel), min((rank + 1) * piece, tensor.numel)
        size = tensor.dtype.itemsize
        return tensor.offset + first * size, (end - first) * size

    for rank in range(3):
        asked.clear()
        future = ReadAhead(rank, 3).start(tensors.values())
        assert future is not None
        future.result()
        # 35 and 2 elements in threes: the third rank has short pieces, or none.
        wanted = [own(tensor, rank) for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset)]
        if budget == 20:
            assert 0 < sum(length for _, length in asked) <= budget
            continue
        # In calls of at most 16 bytes, none of which Linux would cut.
        assert all(0 < length <= 16 for _, length in asked)
        assert [b for o, n in asked for b in range(o, o + n)] == [b for o, n in wanted for b in range(o, o + n)]


def test_reader_converts_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range longer than the buffer, from the middle of a tensor."""
    monkeypatch.setattr("warp_ds.store.checkpoint_index.READ_BUFFER_BYTES", 64)
    values = torch.randn(40, 7)
    save_file({"a": torch.zeros(3), "w": values}, tmp_path / "f.safetensors")
    location = read_header(tmp_path / "f.safetensors")["w"]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.empty(201, dtype=dtype)
        with RangeReader() as reader:
            reader.read(location, 53, out)
        assert torch.equal(out, values.view(-1)[53:254].to(dtype))
        assert reader.bytes_requested == 201 * 4


# What can be wrong ------------------------------------------------------------------------------------------------


def truncate(folder: Path) -> str:
    file = sorted(folder.glob("model-*"))[1]
    os.truncate(file, file.stat().st_size - 10)
    return f"{file.name} is not a whole safetensors file"


def truncate_header(folder: Path) -> str:
    file = sorted(folder.glob("model-*"))[0]
    os.truncate(file, 20)
    return f"{file.name} is not a whole safetensors file"


def remove_file(folder: Path) -> str:
    file = sorted(folder.glob("model-*"))[1]
    file.unlink()
    return f"{file.name} is missing, though its checkpoint names it"


def edit_header(folder: Path, old: bytes, new: bytes) -> Path:
    for file in folder.glob("model-*"):
        content = file.read_bytes()
        if old in content:
            file.write_bytes(content.replace(old, new, 1))
            return file
    raise AssertionError(f"{old!r} is in no file")


def wrong_width(folder: Path) -> str:
    return f"{edit_header(folder, b'F32', b'F64').name} is not a whole safetensors file"


def unknown_dtype(folder: Path) -> str:
    return f"{edit_header(folder, b'F32', b'X32').name} is not a whole safetensors file"


def integers(folder: Path) -> str:
    edit_header(folder, b'"dtype":"F32"', b'"dtype":"I32"')
    return "is stored as torch.int32"


def other_shape(folder: Path) -> str:
    edit_header(folder, b"[131,40]", b"[40,131]")
    return "model.embed_tokens.weight is [40, 131] in the checkpoint"


def no_json(folder: Path) -> str:
    return f"{edit_header(folder, b'data_offsets', bytes(12)).name} is not a whole safetensors file"


def edit_all(folder: Path, change: Any) -> None:
    """``change`` the tensors' names of every file: old name -> new name, or None to drop it."""
    for file in folder.glob("model-*.safetensors"):
        tensors = {change(name): tensor for name, tensor in load_file(file).items()}
        tensors.pop(None, None)
        save_file(tensors, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {change(name): file for name, file in index["weight_map"].items() if change(name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def compiled(folder: Path) -> str:
    edit_all(folder, lambda name: f"_orig_mod.{name}")
    return "are MISSING in its files (lm_head.weight, model.embed_tokens.weight"


def wrapped(folder: Path) -> str:
    edit_all(folder, lambda name: f"module.{name}")
    return "The stored names begin with 'module.', as a compiled or wrapped model's do: save the inner model"


def headless(folder: Path) -> str:
    edit_all(folder, lambda name: None if name == "lm_head.weight" else name)
    return "(lm_head.weight). from_pretrained would fill them with random numbers. If the output embedding is the input"


def headless_base_names(folder: Path) -> str:
    edit_all(folder, lambda name: None if name == "lm_head.weight" else name.removeprefix("model."))
    return "1 of the 21 weights of LlamaForCausalLM are MISSING in its files (lm_head.weight)"


def a_layer_too_few(folder: Path) -> str:
    edit_all(folder, lambda name: None if ".layers.1." in name else name)
    return "9 of the 21 weights of LlamaForCausalLM are MISSING in its files (model.layers.1."


def two_names(folder: Path) -> str:
    name = "model.norm.weight"
    for file in folder.glob("model-*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            save_file({**tensors, "norm.weight": tensors[name] + 1}, file, metadata={"format": "pt"})
    return "stores norm.weight and model.norm.weight (1 such pairs), which are one weight"


def pickled_headless(folder: Path) -> str:
    """Not read in shards, but by from_pretrained."""
    state = {name: tensor for file in folder.glob("model-*.safetensors") for name, tensor in load_file(file).items()}
    state.pop("lm_head.weight")
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return "are MISSING in its files (lm_head.weight)"


FAULTS = [
    truncate,
    truncate_header,
    remove_file,
    wrong_width,
    unknown_dtype,
    integers,
    other_shape,
    no_json,
    compiled,
    wrapped,
    headless,
    headless_base_names,
    a_layer_too_few,
    two_names,
    pickled_headless,
]


def load_faulty(jobs: list[tuple[Path, str]]) -> list[str]:
    for folder, said in jobs:
        with pytest.raises((CheckpointError, ValueError, RuntimeError)) as caught:
            load_sharded(folder, ds_config=None, dtype=torch.float32, progress=False)
        assert said in str(caught.value), (folder.name, str(caught.value))
    # One rank alone finds the fault, as with files on each node's own disk.
    folder, said = jobs[0]
    if dist.get_rank() != 1:
        folder = folder.parent / "whole"
    with pytest.raises(CheckpointError if dist.get_rank() == 1 else OtherRankError) as caught:
        load_sharded(folder, ds_config=None, dtype=torch.float32, progress=False)
    assert said in str(caught.value) and ("rank 1" in str(caught.value) or dist.get_rank() == 1)
    with pytest.raises(ValueError, match="stage 2"):
        load_sharded(folder, ds_config={"zero_optimization": {"stage": 2}}, dtype=torch.float32)
    with pytest.raises(ValueError, match="DS_ACCELERATOR=cuda"):
        load_sharded(folder, ds_config=None, dtype=torch.float32, device="cuda")
    # And the ranks are still in step.
    assert_same_model(
        load_sharded(jobs[0][0].parent / "whole", ds_config=None, dtype=torch.float32, progress=False),
        AutoModelForCausalLM.from_pretrained(jobs[0][0].parent / "whole"),
        "whole",
    )
    return [folder.name for folder, _ in jobs]


def test_faults_are_told_on_every_rank(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "whole", max_shard_size="30KB")
    jobs = []
    for fault in FAULTS:
        folder = tmp_path / fault.__name__
        shutil.copytree(tmp_path / "whole", folder)
        jobs.append((folder, fault(folder)))
    assert run_ranks(2, load_faulty, jobs) == [[fault.__name__ for fault in FAULTS]] * 2


def load_quantised(folder: Path) -> None:
    with Words() as words, pytest.raises(ImportError):
        load_sharded(folder, ds_config=None, dtype=torch.bfloat16, progress=False)
    assert "it is quantised (bitsandbytes)" in words.text


def test_quantised_is_left_to_from_pretrained(tmp_path: Path) -> None:
    """Its library is not installed here, and transformers says so."""
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    run_ranks(1, load_quantised, tmp_path)


def test_file_that_shrinks_while_read(tmp_path: Path) -> None:
    save_file({"w": torch.randn(100)}, tmp_path / "f.safetensors")
    location = read_header(tmp_path / "f.safetensors")["w"]
    os.truncate(tmp_path / "f.safetensors", location.offset + 100)
    with pytest.raises(CheckpointError, match="ended inside tensor w"), RangeReader() as reader:
        reader.read(location, 0, torch.empty(100))


def hidden_config(folder: Path) -> None:
    """A live HfDeepSpeedConfig, as the Trainer keeps, neither disturbs the loading nor is disturbed by it."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    alive = HfDeepSpeedConfig(ds_config(torch.float32))
    with Words() as words:
        sharded = load_sharded(folder, ds_config=ds_config(torch.float32), dtype=torch.float32, progress=False)
    assert not words.text  # No word of a detour through from_pretrained.
    assert is_deepspeed_zero3_enabled()
    del alive
    assert_same_model(sharded, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), "hidden")
    assert isinstance(sharded.lm_head.weight, nn.Parameter)


def test_beside_a_live_deepspeed_config(checkpoints: Path) -> None:
    run_ranks(2, hidden_config, checkpoints / "llama-torch.float32")
