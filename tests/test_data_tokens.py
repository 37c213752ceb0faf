"""Tokens are made once, in processes, by content; every rank maps the same files, and none waits for one that has failed."""

from __future__ import annotations

import time
from pathlib import Path

import datasets
import pytest
from ranks import run_ranks

from warp_ds.cluster import consensus
from warp_ds.data import cache, template, tokens
from warp_ds.data.lengths import encode_dataset, fitting
from warp_ds.data.sample import Sample
from warp_ds.data.stored import store
from warp_ds.data.tiny_model import train_tokenizer
from warp_ds.errors import DataError

CALL = {"type": "function", "function": {"name": "f", "arguments": {"b": 1, "a": [None, 1.5]}}}
SAMPLES = [
    Sample.pair("How do I bake?", "Get flour\u2028and \u00e9."),
    Sample.pair("Why?"),
    Sample(text="Once upon a time"),
    Sample([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2, untrained=frozenset([1])),
    Sample(
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        tools=[{"type": "function", "function": {"name": "f", "z": 1, "a": 2}}],
    ),
]
OPTIONS = {"max_length": 60, "train_on": "assistant", "prompt_only": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Question: How do I bake bread?\nAnswer: To bake bread, get flour."] * 5, vocab_size=400)


def made_files() -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in cache.root().rglob("*") if path.suffix == ".arrow"}


def test_stored_samples_are_the_samples():
    stored = store("some-work", iter(SAMPLES))
    assert list(stored) == SAMPLES and stored[1:3] == SAMPLES[1:3] and stored[-1] == SAMPLES[-1] and len(stored) == 5
    assert [sample.untrained for sample in stored] == [sample.untrained for sample in SAMPLES]
    arguments = stored[4].messages[1]["tool_calls"][0]["function"]["arguments"]
    assert list(arguments) == ["b", "a"], "templates write them in the order in which they stand"
    from warp_ds.store.fingerprints import fingerprint_rows

    assert fingerprint_rows(stored) == fingerprint_rows(SAMPLES), "the run's identity is that of the samples"
    assert store("other-work", SAMPLES).directory == stored.directory and len(made_files()) == 1
    assert not [path for path in cache.root().iterdir() if ".making-" in path.name]


@pytest.mark.parametrize("processes", [1, 2])
def test_tokens_on_disk_are_those_in_memory(tokenizer, processes):
    samples = [Sample.pair(f"How {i}?", "So. " * (i % 40)) for i in range(1, 30)]
    directory = tokens.tokens_on_disk(store("w", samples), tokenizer, processes, **OPTIONS)
    assert len(list(directory.glob("tokens*.arrow"))) == processes
    found = fitting(tokens.tokens_from(directory), samples, 60, long_samples="drop")
    assert found.to_list() == encode_dataset(samples, tokenizer, 60, long_samples="drop").to_list()
    assert found.cache_files, "it is mapped, not held in memory"


def test_made_once_by_content(tokenizer, monkeypatch):
    samples = SAMPLES[:1] * 3
    directory = tokens.tokens_on_disk(samples, tokenizer, **OPTIONS)
    before = made_files()
    tokenizer("text", truncation=True, max_length=2)  # use leaves no trace in the name
    tokenizer("text")
    assert tokens.tokens_on_disk(store("w", samples), tokenizer, 1, **OPTIONS) == directory
    assert made_files().items() >= before.items(), "made once"
    other = train_tokenizer(["other words than those"] * 5, vocab_size=300)
    keys = {
        tokens.key(samples, tokenizer, **OPTIONS),
        tokens.key(SAMPLES[:2], tokenizer, **OPTIONS),
        tokens.key(samples, other, **OPTIONS),
        tokens.key(samples, tokenizer, **{**OPTIONS, "max_length": 61}),
        tokens.key(samples, tokenizer, **{**OPTIONS, "train_on": "last"}),
    }
    other.chat_template = "{{ strftime_now('%Y') }}"
    keys.add(tokens.key(samples, other, **OPTIONS))
    monkeypatch.setitem(template._fixed, "date", "2020-01-01")
    keys.add(tokens.key(samples, other, **OPTIONS))
    assert len(keys) == 7 and tokens.key(samples, tokenizer, **OPTIONS) in keys, "the date is only a dated template's"


def test_what_fails_or_is_killed_leaves_nothing(tokenizer):
    bad = [*SAMPLES[:1] * 9, SAMPLES[4]]  # tools, and no chat template
    for processes in (1, 2):
        with pytest.raises(DataError, match="^row 9: tools need a chat template"):
            tokens.tokens_on_disk(bad, tokenizer, processes, **OPTIONS)
    assert not made_files()
    left = cache.root() / f"{tokens.key(SAMPLES[:1], tokenizer, **OPTIONS)}.making-dead"
    left.mkdir()
    (left / "tokens.arrow").write_bytes(b"half")
    tokens.tokens_on_disk(SAMPLES[:1], tokenizer, **OPTIONS)
    assert not left.exists()


@pytest.mark.parametrize("damage", ["edited", "cut", "missing", "added", "unsealed", "facts"])
def test_what_was_damaged_is_said_and_made_again(tokenizer, damage, caplog):
    """Also damage that Arrow reads without a word: an id that is another, a stream that ends between two batches."""
    samples = SAMPLES[:1] * 3
    stored = store("w", samples)
    directory = stored.directory if damage == "facts" else tokens.tokens_on_disk(stored, tokenizer, **OPTIONS)
    expected = {path.name: path.read_bytes() for path in directory.iterdir()}
    (file,) = directory.glob("*.arrow")
    whole = file.read_bytes()
    middle = len(whole) // 2
    {
        "edited": lambda: file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]),
        "cut": lambda: file.write_bytes(whole[:-8]),
        "missing": file.unlink,
        "added": lambda: (directory / "tokens_1.arrow").write_bytes(whole),
        "unsealed": (directory / "whole.json").unlink,
        "facts": lambda: (directory / "facts.json").write_text("{}") if damage == "facts" else None,
    }[damage]()
    again = store("w", samples)
    assert list(again) == samples and again.fingerprint == stored.fingerprint
    assert tokens.tokens_on_disk(again, tokenizer, **OPTIONS) == directory or damage == "facts"
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == expected
    assert f"{directory} is damaged" in caplog.text and "it is made again" in caplog.text
    assert not [path for path in cache.root().iterdir() if path.name.endswith(".tmp")]


def test_damage_and_a_cache_that_cannot_be_written_are_said(tokenizer, tmp_path, monkeypatch):
    directory = tokens.tokens_on_disk(SAMPLES[:1], tokenizer, **OPTIONS)
    next(directory.glob("*.arrow")).write_bytes(b"nothing")
    with pytest.raises(DataError, match="is damaged .*: remove it, and it is made again"):
        tokens.tokens_from(directory)
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be written .*: set HF_DATASETS_CACHE to a directory that can"):
        store("w", SAMPLES)


def _steps(directory: str) -> list[str]:
    """On each rank: what a long step of rank 1 was to it, and what its failure was."""
    consensus.BEAT_SECONDS = 0.05
    said = []
    from warp_ds.cluster.processes import rank

    meetings = []
    real = consensus.all_reduce_sum
    consensus.all_reduce_sum = lambda tensor: meetings.append(1) or real(tensor)
    with consensus.long_step("waiting"):
        if rank() == 1:
            time.sleep(0.5)
            Path(directory, "done").touch()
    said.append(f"{Path(directory, 'done').exists()} {len(meetings) > 3}")
    try:
        with consensus.long_step("tokenising"):
            if rank() == 1:
                raise DataError("row 3: no")
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
    return said


def test_ranks_meet_while_one_works_and_learn_of_its_failure(tmp_path):
    first, second = run_ranks(2, _steps, str(tmp_path))
    assert first == ["True True", "OtherRankError: tokenising failed on rank 1: DataError: row 3: no"]
    assert second == ["True True", "DataError: row 3: no"]
