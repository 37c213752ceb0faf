"""The shapes in which people keep their data, and what each becomes (docs/data.md's table); where they may lie."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest

from warp_ds.data.datasets import load_prompts, load_samples
from warp_ds.data.sample import Sample, as_rows
from warp_ds.errors import DataError

SYSTEM = {"role": "system", "content": "S"}
USER, ANSWER = {"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}
MORE = [{"role": "user", "content": "C?"}, {"role": "assistant", "content": "D"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLS = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, ANSWER]
PAIR = Sample([USER, ANSWER])
HH = "\n\nHuman: A?\n\nAssistant: B\n\nHuman: C?\n\nAssistant: D"
SHAPES: dict[str, tuple[dict[str, Any], Sample]] = {
    "messages": ({"messages": [USER, ANSWER]}, PAIR),
    "messages with a system prompt": ({"messages": [SYSTEM, USER, ANSWER]}, Sample([SYSTEM, USER, ANSWER])),
    "messages of several turns": ({"messages": [USER, ANSWER, *MORE]}, Sample([USER, ANSWER, *MORE])),
    "messages with tools": ({"messages": CALLS, "tools": [TOOL]}, Sample(CALLS, [TOOL])),
    "tools and calls as JSON texts": (
        {
            "messages": [USER, {**CALLS[1], "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]}, *CALLS[2:]],
            "tools": json.dumps([TOOL["function"]]),
        },
        Sample(CALLS, [TOOL]),
    ),
    "content in parts": (
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in (USER, ANSWER)]},
        PAIR,
    ),
    "answers marked as not trained": (
        {"messages": [USER, {**ANSWER, "weight": 0}, *MORE]},
        Sample([USER, ANSWER, *MORE], untrained=frozenset({1})),
    ),
    "prompt and completion": ({"prompt": "A?", "completion": "B"}, PAIR),
    "conversational prompt and completion": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        Sample([SYSTEM, USER, ANSWER]),
    ),
    "question and answer": ({"question": "A?", "answer": "B", "topic": "t"}, PAIR),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B"}]}, PAIR),
    "ShareGPT with a system column": (
        {"system": "S", "conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B"}]},
        Sample([SYSTEM, USER, ANSWER]),
    ),
    "ShareGPT with function calls": (
        {
            "conversations": [
                {"from": "human", "value": "A?"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "3"},
                {"from": "gpt", "value": "B"},
            ]
        },
        Sample(CALLS),
    ),
    "Alpaca": ({"instruction": "A", "input": "?", "output": "B"}, Sample.pair("A\n\n?", "B")),
    "Alpaca with system prompt and history": (
        {"instruction": "C?", "input": "", "output": "D", "system": "S", "history": [["A?", "B"]]},
        Sample([SYSTEM, USER, ANSWER, *MORE]),
    ),
    "a prompt with a system column": ({"prompt": "A?", "response": "B", "system_prompt": "S"}, Sample([SYSTEM, USER, ANSWER])),
    "preference pairs": ({"prompt": "A?", "chosen": "B", "rejected": "no"}, PAIR),
    "preference pairs of whole conversations": (
        {"prompt": "A?", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "no"}]},
        PAIR,
    ),
    "preference pairs without a prompt": ({"chosen": [USER, ANSWER, *MORE], "rejected": [USER]}, Sample([USER, ANSWER, *MORE])),
    "preference pairs in Anthropic's form": ({"chosen": HH, "rejected": HH}, Sample([USER, ANSWER, *MORE])),
    "a conversation and its answer in a column": (
        {"messages": [USER, ANSWER, MORE[0]], "response": "D"},
        Sample([USER, ANSWER, *MORE]),
    ),
    "a conversation and its preferred turn": (
        {"conversations": [{"from": "human", "value": "A?"}], "chosen": {"from": "gpt", "value": "B"}},
        PAIR,
    ),
    "a conversation and its first question": ({"prompt": "A?", "messages": [USER, ANSWER]}, PAIR),
    "unpaired preferences": ({"prompt": "A?", "completion": "B", "label": True}, PAIR),
    "text": ({"text": "A? B"}, Sample(text="A? B")),
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".parquet", ".arrow"):
        data = datasets.Dataset.from_list(rows)
        if path.suffix == ".parquet":
            data.to_parquet(path)
        else:
            with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, data.data.schema) as writer:
                writer.write_table(data.data.table)
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_becomes_its_sample(tmp_path: Path, shape: str, suffix: str) -> None:
    row, sample = SHAPES[shape]
    found = load_samples(write(tmp_path / f"d{suffix}", [row, row]))
    assert found == [sample, sample] and [one.row for one in found] == [0, 1]


def test_prompts_without_responses_take_refusals(tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_text("B\n")
    for row in ({"prompt": "A?"}, {"messages": [USER]}, {"prompt": [USER]}):
        assert load_samples(write(tmp_path / "d.jsonl", [row]), refusal_file=tmp_path / "r.txt") == [PAIR]


def test_every_shape_gives_its_prompts(tmp_path: Path) -> None:
    for shape, (row, sample) in SHAPES.items():
        path = write(tmp_path / "d.jsonl", [row])
        if shape != "text":
            assert load_prompts(path) == [sample.asked()], shape
    assert load_prompts(write(tmp_path / "d.jsonl", [{"messages": [SYSTEM, USER]}])) == [Sample([SYSTEM, USER])]


def test_samples_survive_being_written(tmp_path: Path) -> None:
    """What compare writes for its phases: pairs alone, and everything together."""
    every = [sample for _, sample in SHAPES.values()]
    for samples in ([PAIR, PAIR], every):
        assert load_samples(write(tmp_path / "d.jsonl", as_rows(samples))) == samples
        assert [Sample.of(row) for row in as_rows(samples)] == samples


@pytest.mark.parametrize("name", ["d.ndjson", "d.jsonl.gz", "d.arrow", "d.tsv", "d.tsv.gz"])
def test_files(tmp_path: Path, name: str) -> None:
    path, rows = tmp_path / name, [{"prompt": "A?", "response": "a\tb"}, {"prompt": "007", "response": "NA"}]
    if ".tsv" in name:
        plain = tmp_path / "plain.tsv"
        with plain.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "response"], delimiter="\t")
            writer.writeheader()
            writer.writerows(rows)
        path.write_bytes(gzip.compress(plain.read_bytes()) if name.endswith(".gz") else plain.read_bytes())
    else:
        write(path, rows)
    assert as_rows(load_samples(path)) == rows


def test_a_gzip_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl.gz", [{"prompt": "A?", "response": "B"}])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be unpacked as gzip"):
        load_samples(path)


def test_a_folder_is_its_files_of_the_split(tmp_path: Path) -> None:
    for split, prompts in {"train-0": "ab", "train-1": "cd", "test": "e"}.items():
        write(tmp_path / "set" / f"{split}.jsonl", [{"prompt": prompt, "response": "r"} for prompt in prompts])
    assert [sample.prompt for sample in load_samples(tmp_path / "set")] == list("abcd")
    assert [sample.prompt for sample in load_samples(tmp_path / "set", split="test")] == ["e"]
    with pytest.raises(DataError, match="no files of the split 'validation'"):
        load_samples(tmp_path / "set", split="validation")
    write(tmp_path / "set" / "train-1.jsonl", [{"prompt": "c", "response": "r"}, {"prompt": 7, "response": "r"}])
    with pytest.raises(DataError, match=r"row 3 \(train-1.jsonl, row 1 \(line 2\)\): column 'prompt' is the number 7"):
        load_samples(tmp_path / "set")


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    data = datasets.Dataset.from_list([{"messages": [USER, ANSWER]}])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "several")
    for name in ("one", "several"):
        assert load_samples(tmp_path / name) == [PAIR]
    with pytest.raises(DataError, match="no split 'dev': its splits are train, test"):
        load_samples(tmp_path / "several", split="dev")


def test_several_sources_are_mixed_by_weight(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [{"prompt": f"a{i}", "response": "r"} for i in range(4)])
    two = write(tmp_path / "two.jsonl", [{"messages": [{**USER, "content": f"b{i}"}, ANSWER]} for i in range(4)])
    prompts = [sample.prompt for sample in load_samples(f"{one},{two}@0.5")]
    assert sorted(prompts) == ["a0", "a1", "a2", "a3", "b0", "b1"]
    assert sum(prompt.startswith("b") for prompt in prompts[:3]) == 1  # spread evenly
    twice = [sample.prompt for sample in load_samples(f"{two}@2")]
    assert sorted(twice) == sorted([f"b{i}" for i in range(4)] * 2)
    assert len(load_samples(f"{one},{two}", samples=3)) == 3
    for wrong in (f"{one},{two}@0", f"{one},{two}@much", f"{one},"):
        with pytest.raises(DataError, match="is no source: give NAME or NAME@WEIGHT"):
            load_samples(wrong)
    odd = write(tmp_path / "a,b@2.jsonl", [{"prompt": "A?", "response": "B"}])
    assert load_samples(odd) == [PAIR]


def test_turns_after_the_last_answer_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "d.jsonl", [{"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER, MORE[0]]}])
    assert load_samples(path) == [PAIR, PAIR]
    assert "the turns after the last answer of 1 rows (1) are left out" in caplog.text


def test_a_text_that_looks_like_turns_stays_text_where_there_are_lists(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = json.dumps([USER, ANSWER])
    path = write(tmp_path / "d.jsonl", [{"prompt": text, "response": text}])
    assert load_samples(path) == [Sample.pair(text, text)]
    assert "'response' holds texts that look like lists of turns (rows 0), lines 1, and they are read as texts" in caplog.text
    written = tmp_path / "d.csv"
    with written.open("w", newline="") as file:  # which has no lists
        csv.writer(file).writerows([["prompt", "chosen"], [json.dumps([USER]), json.dumps([USER, ANSWER])]])
    assert load_samples(written) == [PAIR]
    written.write_text("""prompt,response\nA?,"[{'role': 'assistant', 'content': 'B'}]"\n""")
    with pytest.raises(DataError, match="row 0 .line 2.: column 'response' is the text .*no JSON .*write it as json.dumps"):
        load_samples(written)


def test_columns_of_a_conversation_and_its_answer_can_be_named(tmp_path: Path) -> None:
    named = {"prompt_column": "messages", "response_column": "mine"}
    assert load_samples(write(tmp_path / "d.jsonl", [{"messages": [USER], "mine": "B"}]), **named) == [PAIR]
    with pytest.raises(DataError, match="the last turn before a response is a user's"):
        load_samples(write(tmp_path / "d.jsonl", [{"messages": [USER, ANSWER], "mine": "B"}]), **named)


@pytest.mark.parametrize("bad", [False, 0, "False"])
def test_responses_that_are_marked_as_bad_are_refused(tmp_path: Path, bad: Any) -> None:
    for row in ({"messages": [USER, ANSWER]}, {"prompt": "A?", "completion": "B"}):
        path = write(tmp_path / "d.jsonl", [{**row, "label": 1 if bad == 0 else True}, {**row, "label": bad}])
        with pytest.raises(DataError, match="'label' is false in 1 rows .rows 1., lines 2"):
            load_samples(path)
        assert len(load_prompts(path)) == 2
    numbers = [{"prompt": "A?", "response": "B", "label": 0}, {"prompt": "A?", "response": "B", "label": 3}]
    assert load_samples(write(tmp_path / "d.jsonl", numbers)) == [PAIR, PAIR]
