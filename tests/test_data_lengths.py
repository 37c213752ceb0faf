"""Samples beyond --max_length are refused, cut or dropped, never silently; and what `warp-ds data` shows of a file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from warp_ds.data.formats import IGNORE, encode_sample
from warp_ds.data.inspect import examine, first_samples
from warp_ds.data.lengths import encode_dataset
from warp_ds.data.sample import Sample
from warp_ds.data.tiny_model import tiny_llama, train_tokenizer
from warp_ds.errors import DataError
from warp_ds.launch.cli import main

TEXTS = ["Question: How do I bake bread?\nAnswer: To bake bread, get flour."] * 5
LONG = "How do I bake bread? " * 40
SAMPLES = [Sample.pair("How?", "So."), Sample.pair(LONG, "So."), Sample.pair("How?", LONG), Sample.pair("Why?", "So.")]
LIMIT = 60


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=400)


def test_one_that_is_too_long_is_named(tokenizer):
    many = [SAMPLES[0]] * 999
    with pytest.raises(DataError, match=r"1 of 1000 prompts \(row 7: \d+ tokens\) leave no room.*--long_samples drop"):
        encode_dataset([*many[:7], SAMPLES[1], *many[7:]], tokenizer, LIMIT)


def test_dropped_samples_are_counted_and_named(tokenizer, caplog):
    kept = encode_dataset(SAMPLES, tokenizer, LIMIT, long_samples="drop")
    assert [list(row) for row in kept["input_ids"]] == [encode_sample(SAMPLES[i], tokenizer)[0]["input_ids"] for i in (0, 3)]
    assert kept["row"] == [0, 3], "what is wrong with one later is told by its row in the file"
    assert "2 of 4 samples are longer than --max_length 60 and are dropped (row 1: " in caplog.text and "row 2: " in caplog.text
    with pytest.raises(DataError, match="every one of 2 samples is longer"):
        encode_dataset(SAMPLES[1:3], tokenizer, LIMIT, long_samples="drop")


def test_cut_samples_are_counted_and_keep_something_to_learn(tokenizer, caplog):
    cut = encode_dataset(SAMPLES, tokenizer, LIMIT, long_samples="truncate")
    assert "1 of 4 prompts lose their beginning at --max_length 60 (row 1: " in caplog.text
    assert "1 of 4 responses are cut at --max_length 60, and their end is not learned (rows 2)" in caplog.text
    whole = [encode_sample(sample, tokenizer)[0] for sample in SAMPLES]
    assert [len(row) for row in cut["input_ids"]] == [min(LIMIT, len(tokens["input_ids"])) for tokens in whole]
    assert cut[1]["input_ids"] == whole[1]["input_ids"][-LIMIT:]  # the answer whole, after the prompt's end
    assert cut[2]["input_ids"] == whole[2]["input_ids"][:LIMIT]
    both = encode_dataset([Sample.pair(LONG, LONG)], tokenizer, LIMIT, long_samples="truncate")[0]
    assert sum(label != IGNORE for label in both["labels"]) == LIMIT // 2
    alone = encode_dataset(SAMPLES[1:2], tokenizer, LIMIT, long_samples="truncate", prompt_only=True)[0]
    assert alone["input_ids"] == whole[1]["input_ids"][: len(whole[1]["labels"]) - len(_answer(whole[1]))][-LIMIT:]


def _answer(tokens):
    return [label for label in tokens["labels"] if label != IGNORE]


def test_a_conversation_is_cut_after_its_first_answers(tokenizer, caplog):
    turns = [turn for i in range(6) for turn in Sample.pair(f"How {i}?", "To bake bread, get flour.").messages]
    row = encode_dataset([Sample(turns)], tokenizer, LIMIT)[0]  # what fits is trained
    assert row["labels"] == encode_sample(Sample(turns), tokenizer)[0]["labels"][:LIMIT]
    assert 0 < len(_answer(row)) < len(_answer(encode_sample(Sample(turns), tokenizer)[0]))
    assert "1 of 1 responses are cut" in caplog.text
    with pytest.raises(DataError, match="1 of 1 prompts .row 0: .* leave no room"):
        encode_dataset([Sample(turns)], tokenizer, LIMIT, train_on="last")


def test_what_is_shown_of_samples(tokenizer):
    lines = examine(
        [*SAMPLES, SAMPLES[0], Sample([{"role": "tool", "content": "x"}, *SAMPLES[0].messages])], tokenizer, LIMIT, "last"
    )
    text = "\n".join(lines)
    assert "Answer:⟦ So.</s>⟧" in lines[0] and lines[1].endswith("⟦ So.</s>⟧'")
    assert "cannot be written: 1 of 6 samples: row 5: tools need a chat template" in text
    assert "--max_length 60: 2 samples are longer; of 1 nothing trained would be left (rows 1), of 1 the end is cut" in text
    assert "duplicates: 1 samples are there already, 2 prompts are" in text
    assert first_samples(encode_dataset(SAMPLES[:1], tokenizer, LIMIT), tokenizer) == lines[:1]


def test_the_command_loads_no_model(tmp_path: Path, capsys):
    """The weights are not even there."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=400, directory=tmp_path / "model")
    tiny_llama(tokenizer, seed=0).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(sample.as_row()) + "\n" for sample in SAMPLES))
    words = ["data", str(tmp_path / "d.jsonl"), "--model_name", str(tmp_path / "model")]
    assert main([*words, "--max_length", str(LIMIT), "--samples", "3"]) == 0
    out = capsys.readouterr().out
    assert "Answer:⟦ So.</s>⟧" in out and "3 samples, " in out and "2 samples are longer" in out
    assert main([*words, "--prompt_column", "none"]) == 2
    assert "error: " in capsys.readouterr().err
    assert main([*words, "--no_such_flag", "1"]) == 2
