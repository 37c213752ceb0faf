"""save_sharded against save_pretrained: the same files byte for byte, and nothing lost when saving fails."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, start_ranks
from safetensors.torch import save
from test_zero_load import ds_config
from tiny_models import FAMILIES, batch, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from warp_ds.errors import OtherRankError
from warp_ds.models.transformers_internals import SavedTensor
from warp_ds.store.checkpoint_index import DTYPES
from warp_ds.zero import save as save_module
from warp_ds.zero import saved_directory
from warp_ds.zero.load import load_sharded
from warp_ds.zero.save import _lay_out, save_sharded
from warp_ds.zero.saved_directory import _put_in_place

SHARD = "30KB"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def beside(folder: Path) -> list[str]:
    """What is left around a saved directory."""
    return sorted(p.name for p in folder.parent.iterdir() if p.name.startswith("."))


# The same files ---------------------------------------------------------------------------------------------------


def save_as_transformers_does(model: PreTrainedModel, folder: Path) -> None:
    """A model made in place and one that was loaded order their weights differently: ours are loaded."""
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype)
    shutil.rmtree(folder)
    loaded.save_pretrained(folder, max_shard_size=SHARD)


def write_references(root: Path) -> None:
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            save_as_transformers_does(tiny_model(family, dtype), root / f"{family}-{dtype}")
            tiny_tokenizer().save_pretrained(root / f"{family}-{dtype}")


def save_all(root: Path) -> None:
    """As it was loaded, through an engine, and in another dtype."""
    here = root / f"saved-{dist.get_world_size()}"
    for family in FAMILIES:
        for dtype in (torch.float32, torch.bfloat16):
            reference = root / f"{family}-{dtype}"
            model = load_sharded(reference, ds_config=ds_config(dtype), dtype=dtype, progress=False)
            target = here / f"{family}-{dtype}"
            save_sharded(model, target, tokenizer=tiny_tokenizer(), max_shard_size=SHARD, progress=False)
            if family in ("qwen2", "gemma2"):
                optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
                engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(dtype))
                target = here / f"engine-{family}-{dtype}"
                save_sharded(engine, target, tokenizer=tiny_tokenizer(), max_shard_size=SHARD, progress=False)
                loss = engine(**batch()).loss
                engine.backward(loss)
                engine.step()
                save_sharded(engine, here / f"trained-{family}-{dtype}", max_shard_size=SHARD, progress=False)
                engine.module.eval()
                with torch.no_grad():
                    logits = engine(input_ids=batch()["input_ids"]).logits
                plain = AutoModelForCausalLM.from_pretrained(here / f"trained-{family}-{dtype}", dtype=dtype)
                with torch.no_grad():
                    expected = plain(input_ids=batch()["input_ids"]).logits
                assert torch.equal(logits, expected), (family, dtype)
                engine.destroy()
        model = load_sharded(root / f"{family}-torch.float32", ds_config=None, dtype=torch.float32, progress=False)
        target = here / f"cast-{family}"
        save_sharded(model, target, tokenizer=tiny_tokenizer(), dtype=torch.bfloat16, max_shard_size=SHARD, progress=False)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_files_of_save_pretrained(tmp_path: Path, world_size: int) -> None:
    write_references(tmp_path)
    run_ranks(world_size, save_all, tmp_path)
    here = tmp_path / f"saved-{world_size}"
    assert beside(here / "any") == []
    for family in FAMILIES:
        for dtype in ("torch.float32", "torch.bfloat16"):
            expected = contents(tmp_path / f"{family}-{dtype}")
            prefixes = ["", "engine-"] if family in ("qwen2", "gemma2") else [""]
            for prefix in prefixes:
                found = contents(here / f"{prefix}{family}-{dtype}")
                assert found.pop("README.md").startswith(b"---\nlibrary_name: transformers\n")
                assert found == expected, (prefix, family, dtype)
        cast = contents(here / f"cast-{family}")
        del cast["README.md"]
        assert cast == contents(tmp_path / f"{family}-torch.bfloat16"), family


def test_chat_template_survives(tmp_path: Path) -> None:
    run_ranks(1, save_plain, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    messages = [{"role": "user", "content": "yes"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "yes"
    assert (tmp_path / "model" / "README.md").read_text() == "# mine\n"
    # A model that no engine and no partition has touched is saved as well.
    logits = [
        model(input_ids=batch()["input_ids"]).logits
        for model in (tiny_model("llama").eval(), AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    ]
    assert torch.equal(*logits)


def save_plain(target: Path) -> None:
    save_sharded(tiny_model("llama"), target, tokenizer=tiny_tokenizer(), model_card="# mine\n", progress=False)


def test_layout_of_every_dtype() -> None:
    """Order, offsets and padding of the header are the library's."""
    for count in range(1, len(DTYPES) + 1):
        tensors = {f"ä{-i}": torch.zeros(i, 2, dtype=dtype) for i, dtype in enumerate(list(DTYPES.values())[:count])}
        expected = save(tensors, metadata={"format": "pt"})
        file = _lay_out("f", {name: SavedTensor(tuple(t.shape), t.dtype, []) for name, t in tensors.items()})
        assert file.header == expected[: len(file.header)]
        assert file.size == len(expected)


def save_base_names(root: Path) -> None:
    model = load_sharded(root / "base", ds_config=None, dtype=torch.float32, progress=False)
    save_sharded(model, root / "saved", max_shard_size=SHARD, progress=False)
    plain = AutoModelForCausalLM.from_pretrained(root / "base")
    if dist.get_rank() == 0:
        plain.save_pretrained(root / "expected", max_shard_size=SHARD)


def test_renamed_weights(tmp_path: Path) -> None:
    tiny_model("qwen2").model.save_pretrained(tmp_path / "base")
    run_ranks(2, save_base_names, tmp_path)
    found, expected = contents(tmp_path / "saved"), contents(tmp_path / "expected")
    del found["README.md"]
    assert found == expected


def save_other_partitions(root: Path) -> None:
    """Parameters partitioned over a part of the ranks, as MiCS and expert groups do."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    model = tiny_model("llama")
    deepspeed.zero.Init(module=model, data_parallel_group=groups[dist.get_rank()], dtype=torch.float32)
    assert model.lm_head.weight.ds_zero_partition_world_size == 1
    save_sharded(model, root / "saved", max_shard_size=SHARD, progress=False)


def test_other_partitions(tmp_path: Path) -> None:
    run_ranks(2, save_other_partitions, tmp_path)
    tiny_model("llama").save_pretrained(tmp_path / "expected", max_shard_size=SHARD)
    found = contents(tmp_path / "saved")
    del found["README.md"]
    assert found == contents(tmp_path / "expected")


def small_chunks(root: Path) -> None:
    save_module.GATHER_BYTES = 96
    save_all_of_one(root)


def save_all_of_one(root: Path) -> None:
    model = load_sharded(root / "whole", ds_config=None, dtype=torch.float32, progress=False)
    save_sharded(model, root / "saved", max_shard_size=SHARD, progress=False)


def test_parameters_gathered_in_many_chunks(tmp_path: Path) -> None:
    save_as_transformers_does(tiny_model("gemma2"), tmp_path / "whole")
    run_ranks(3, small_chunks, tmp_path)
    found = contents(tmp_path / "saved")
    del found["README.md"]
    assert found == contents(tmp_path / "whole")


# The directory ----------------------------------------------------------------------------------------------------


def replace(root: Path) -> None:
    model = load_sharded(root / "new", ds_config=None, dtype=torch.float32, progress=False)
    save_sharded(model, root / "link", max_shard_size=SHARD, progress=False)
    for wrong, said in ((root / "file", "is a file"), (root / "other", "holds files but no model")):
        with pytest.raises((ValueError, OtherRankError), match=said):
            save_sharded(model, wrong, progress=False)


@pytest.mark.parametrize("atomic", [True, False])
def test_replaces_a_model(tmp_path: Path, atomic: bool) -> None:
    """Old weights go, other files stay, links are followed."""
    tiny_model("llama", seed=0).save_pretrained(tmp_path / "old", max_shard_size="10KB")
    save_as_transformers_does(tiny_model("llama", seed=1), tmp_path / "new")
    (tmp_path / "old" / "notes.txt").write_text("keep")
    (tmp_path / "old" / "runs").mkdir()
    (tmp_path / "old" / "runs" / "events").write_text("keep too")
    (tmp_path / "old" / "README.md").write_text("# old card\n")
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    # Leavings of a killed save.
    (tmp_path / ".old.saving").mkdir()
    (tmp_path / ".old.saving" / "model.safetensors").write_text("half")
    run_ranks(2, replace if atomic else replace_in_two_steps, tmp_path)
    kept = {"notes.txt": b"keep", "runs/events": b"keep too", "README.md": b"# old card\n"}
    assert contents(tmp_path / "old") == {**contents(tmp_path / "new"), **kept}
    assert (tmp_path / "link").is_symlink()
    assert beside(tmp_path / "old") == []
    assert contents(tmp_path / "other") == {"thesis.tex": b""}


def replace_in_two_steps(root: Path) -> None:
    saved_directory._exchange = lambda one, other: False
    replace(root)


def test_killed_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file system cannot exchange, the next save finds the previous model again."""
    monkeypatch.setattr(saved_directory, "_exchange", lambda one, other: False)
    old, aside = tmp_path / "model", tmp_path / ".model.saving"
    tiny_model("llama").save_pretrained(old)
    before = contents(old)
    aside.mkdir()
    rename = Path.rename

    def die(self: Path, target: Path) -> None:
        if self == aside:
            raise KeyboardInterrupt
        rename(self, target)

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        _put_in_place(aside, old)
    assert not old.exists()
    monkeypatch.setattr(Path, "rename", rename)
    saved_directory._prepare(old, aside)
    assert contents(old) == before


# What can go wrong ------------------------------------------------------------------------------------------------


class Killer:
    """A tokenizer that brings its process down, in the middle of a save."""

    def save_pretrained(self, directory: Path) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def killed_save(root: Path, when: str) -> None:
    model = load_sharded(root / "new", ds_config=None, dtype=torch.float32, progress=False)
    if when == "before the rename":

        def die(*paths: Path) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        saved_directory._put_in_place = die
    if when == "while writing" and dist.get_rank() == 1:
        pwrite, writes = os.pwrite, []

        def die_at_the_third(*args: Any) -> int:
            writes.append(1)
            if len(writes) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return pwrite(*args)

        os.pwrite = die_at_the_third
    tokenizer = Killer() if when == "while preparing" else None
    save_sharded(model, root / "model", tokenizer=tokenizer, max_shard_size=SHARD, progress=False)


@pytest.mark.parametrize("when", ["while preparing", "while writing", "before the rename"])
def test_killed_save_leaves_the_previous_model(tmp_path: Path, when: str) -> None:
    tiny_model("llama", seed=0).save_pretrained(tmp_path / "model", max_shard_size=SHARD)
    save_as_transformers_does(tiny_model("llama", seed=1), tmp_path / "new")
    before = contents(tmp_path / "model")
    processes, pipes = start_ranks(2, killed_save, tmp_path, when)
    victim = 1 if when == "while writing" else 0
    processes[victim].join(60)
    assert processes[victim].exitcode == -signal.SIGKILL
    processes[1 - victim].join(30)  # It sees its peer go; how it ends is not ours.
    processes[1 - victim].kill()
    processes[1 - victim].join()
    assert contents(tmp_path / "model") == before
    if victim == 0:  # Else rank 0 has cleaned up.
        assert beside(tmp_path / "model") == [".model.saving"]
    run_ranks(2, killed_save, tmp_path, "never")
    found = contents(tmp_path / "model")
    del found["README.md"]
    assert found == contents(tmp_path / "new")
    assert beside(tmp_path / "model") == []


def full_disk(root: Path, target: Path) -> str:
    model = load_sharded(root / "new", ds_config=None, dtype=torch.float32, progress=False)
    with pytest.raises((OSError, OtherRankError)) as caught:
        save_sharded(model, target, max_shard_size=SHARD, progress=False)
    save_sharded(model, root / "elsewhere", max_shard_size=SHARD, progress=False)  # The ranks are still in step.
    return str(caught.value)


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_full_disk_is_seen_beforehand(tmp_path: Path, small_disk: Path) -> None:
    save_as_transformers_does(tiny_model("llama", seed=1), tmp_path / "new")
    model = tiny_model("llama", torch.bfloat16)
    model.save_pretrained(small_disk / "model")
    before = contents(small_disk / "model")
    for message in run_ranks(2, full_disk, tmp_path, small_disk / "model"):
        assert "GB free" in message and "Nothing was replaced" in message
    assert contents(small_disk / "model") == before
    assert beside(small_disk / "model") == []


def disk_fills_up(root: Path, target: Path) -> str:
    saved_directory.check_space = lambda directory, needed: None
    return full_disk(root, target)


def test_disk_that_fills_while_writing(tmp_path: Path, small_disk: Path) -> None:
    save_as_transformers_does(tiny_model("llama", seed=1), tmp_path / "new")
    tiny_model("llama", torch.bfloat16).save_pretrained(small_disk / "model")
    before = contents(small_disk / "model")
    for message in run_ranks(2, disk_fills_up, tmp_path, small_disk / "model"):
        assert os.strerror(errno.ENOSPC) in message and "nothing was replaced" in message
    assert contents(small_disk / "model") == before
    assert beside(small_disk / "model") == []


def one_rank_cannot_write(root: Path) -> str:
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    model = load_sharded(root / "new", ds_config=None, dtype=torch.float32, progress=False)
    with pytest.raises(OSError if dist.get_rank() == 1 else OtherRankError) as caught:
        save_sharded(model, root / "model", max_shard_size=SHARD, progress=False)
    return str(caught.value)


def test_write_that_fails_on_one_rank(tmp_path: Path) -> None:
    save_as_transformers_does(tiny_model("llama", seed=1), tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "model")
    before = contents(tmp_path / "model")
    first, second = run_ranks(2, one_rank_cannot_write, tmp_path)
    assert os.strerror(errno.EFBIG) in second and "model-0000" in second
    assert "rank 1" in first and os.strerror(errno.EFBIG) in first
    assert contents(tmp_path / "model") == before
    assert beside(tmp_path / "model") == []
