"""Text stays text in every format, and what is no text, or is missing, is refused by row and column."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from warp_ds.data import datasets
from warp_ds.data.datasets import load_samples
from warp_ds.errors import DataError

TEXTS = [
    "007",
    "10.50",
    "1e5",
    "1_000",
    "NA",
    "None",
    "null",
    "NaN",
    "inf",
    "True",
    "2021-05-03",
    "2020-01-01T10:00:00",
    "12:30",
    "-0",
    "0x1F",
    "+1",
    " a, b ",
    'she said "no"',
    "two\nlines",
    "and\r\nmore",
    "tab\there",
    "\u2028 line\u0085 ends",
    "{'a': 1}",
    "[1, 2]",
    "é ü 日本 🙂",
    "\ufefftext",
]


def load_prompts(path: Path, **options: Any) -> list[str]:
    return [sample.prompt for sample in datasets.load_prompts(path, **options)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as somebody else's program writes them."""
    match path.suffix:
        case ".csv":
            lines = [",".join(rows[0])] + [",".join('"' + v.replace('"', '""') + '"' for v in row.values()) for row in rows]
            path.write_bytes("\r\n".join(lines).encode())
        case ".json":
            path.write_bytes(json.dumps(rows, ensure_ascii=False).encode())
        case ".jsonl":
            path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows).encode())
        case _:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_value_is_read_as_it_is_written(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"d{suffix}", [{"prompt": text, "response": text} for text in TEXTS])
    pairs = load_samples(path)
    assert [sample.prompt for sample in pairs] == [sample.response for sample in pairs] == load_prompts(path) == TEXTS
    for text in TEXTS:  # alone, no other row gives the column a type
        one = write(tmp_path / f"one{suffix}", [{"prompt": text, "response": text}])
        assert [sample.as_row() for sample in load_samples(one)] == [{"prompt": text, "response": text}]


def test_plain_cells_are_text_too(tmp_path: Path) -> None:
    plain = ["007", "10.50", "NA", "None", "null", "2021-05-03", "2020-01-01T10:00:00", "True"]
    (tmp_path / "d.csv").write_text("prompt,response\n" + "".join(f"q,{text}\n" for text in plain))
    assert [sample.response for sample in load_samples(tmp_path / "d.csv")] == plain


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("bom.csv", b"\xef\xbb\xbfprompt,response\nA?,B\n"),
        ("old_mac.csv", b"prompt,response\rA?,B\r"),
        ("index.csv", b",prompt,response\n0,A?,B\n"),
        ("bom.jsonl", b'\xef\xbb\xbf{"prompt": "A?", "response": "B"}\r\n'),
        ("lines.json", b'{"prompt": "A?", "response": "B"}\n{"prompt": "A?", "response": "B"}'),
        ("list.jsonl", b'[{"prompt": "A?", "response": "B"}]'),
        ("one.json", b'{"prompt": "A?", "response": "B"}'),
    ],
)
def test_what_other_programs_write_is_read(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    assert load_samples(tmp_path / name)[0].as_row() == {"prompt": "A?", "response": "B"}


def line_of(**more: Any) -> str:
    return json.dumps({"prompt": "A?", "response": "B", **more})


GOOD = line_of()
REFUSED = {
    "an empty cell": ("d.csv", "prompt,response\nA?,B\nC?,\n", "'response' is empty in 1 of 2 rows .rows 1., lines 3"),
    "an empty cell in quotes": ("d.csv", 'prompt,response\nA?,""\n', "'response' is empty in 1 of 1 rows .rows 0."),
    "null": ("d.jsonl", f"{GOOD}\n\n{line_of(response=None)}\n", "'response' is missing in 1 of 2 rows .rows 1., lines 3"),
    "no key": ("d.jsonl", f'{GOOD}\n{{"prompt": "C?"}}\n', "'response' is missing in 1 of 2 rows .rows 1., lines 2"),
    "a number": ("d.jsonl", f"{GOOD}\n{line_of(response=7)}\n", "row 1 .line 2.: column 'response' is the number 7, not a"),
    "a number as written": ("d.json", '[{"prompt": "A?", "response": 7.10}]', "row 0: .*the number 7.10"),
    "a boolean": ("d.jsonl", line_of(response=True), "row 0 .line 1.: column 'response' is the boolean true"),
    "a list of answers": ("d.jsonl", line_of(response=["Paris", "paris"]), r"'response' is a list .*Paris"),
    "an object": ("d.jsonl", line_of(response={"text": "B"}), "'response' is an object"),
    "half a character": ("d.jsonl", line_of(response="a\ud800b"), "row 0 .line 1.: column 'response' holds half a surrogate"),
    "a key twice": ("d.jsonl", '{"prompt": "A?", "response": "B", "response": "C"}', "row 0 .line 1.*'response' stands twice"),
    "no object": ("d.jsonl", f'{GOOD}\n"text"\n', "row 1 .line 2. is a text .text., not an object"),
    "garbage at the end": ("d.jsonl", f"{GOOD}\n{GOOD}}}\n", "cannot be read as json, one .*row 1 .line 2.: Extra data"),
    "a cut file": ("d.json", f"[{GOOD}, ", "cannot be read as json .*line 1"),
    "rows one level down": ("d.json", f'{{"version": 1, "data": [{GOOD}]}}', "'data' holds a list of 1 objects: .*jq .data"),
    "deep": ("d.jsonl", '{"prompt": ' + "[" * 100_000, "nested too deeply"),
    "semicolons": ("d.csv", "prompt;response\nA?;B\n", "columns are prompt;response .*comma"),
    "a cell too many": ("d.csv", "prompt,response\nA?,B\nC?,D, E\n", "row 1 .line 3. has 3 cells, but the header has 2"),
    "a cell too few": ("d.csv", 'prompt,response\n"A\nB?",C\nD?\n', "row 1 .line 4. has 1 cells"),
    "an open quote": ("d.csv", 'prompt,response\nA?,"B\n', "row 0 .line 2. cannot be read as csv"),
    "two columns of a name": ("d.csv", "prompt,response,response\nA?,B,C\n", "more than one column 'response'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_text_is_refused_by_row(tmp_path: Path, case: str) -> None:
    name, text, message = REFUSED[case]
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as error:
        load_samples(tmp_path / name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            "prompt,response\nA?,caf\u00e9\nB?,C\n".encode("latin-1"),
            "line 2 .row 0 .*0xe9 after 'A.,caf'.*iconv -f WINDOWS-1252",
        ),
        ("prompt,response\nA?,B\n".encode("utf-16"), "line 1 .row 0.* UTF-16 .*byte-order mark.*iconv -f UTF-16"),
        ("prompt,response\nA?,B\n".encode("utf-32"), "UTF-32 .*byte-order mark"),
        ("prompt,response\nA?,B\n".encode("utf-16-le"), "NUL bytes, as in UTF-16 without"),
    ],
)
def test_other_encodings_are_named(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "d.csv").write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_samples(tmp_path / "d.csv")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([7, 8], "row 0: column 'response' is a value of type int .7."),
        ([7.0, 8.0], "value of type float .7.0."),
        ([None, "B"], "'response' is missing in 1 of 2 rows .rows 0."),
        ([{"text": "B"}, {"text": "C"}], "'response' is an object"),
        ([["B"], ["C"]], "'response' is a list"),
        ([b"B", b"C"], "'response' is bytes"),
    ],
)
def test_typed_columns_of_parquet_are_refused(tmp_path: Path, values: list[Any], message: str) -> None:
    path = write(tmp_path / "d.parquet", [{"prompt": "A?", "response": value} for value in values])
    with pytest.raises(DataError, match=message):
        load_samples(path)
    assert load_prompts(path) == ["A?", "A?"]


USER, ANSWER = {"role": "user", "content": "A?"}, {"role": "assistant", "content": "B"}


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": "A?", "completion": [ANSWER]},
        {"messages": [USER, ANSWER]},
        {"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in (USER, ANSWER)]},
        {"conversations": [{"from": "human", "value": "A?"}, {"from": "gpt", "value": "B", "weight": 1.0}]},
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_one_turn_and_its_answer_are_read(tmp_path: Path, line: dict[str, Any], suffix: str) -> None:
    path = write(tmp_path / f"d{suffix}", [line, line])
    assert [sample.as_row() for sample in load_samples(path)] == [{"prompt": "A?", "response": "B"}] * 2
    assert load_prompts(path) == ["A?", "A?"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": [USER], "completion": [USER]}, "'completion' is a conversation of the turns user: a response begins"),
        ({"messages": [USER]}, "'messages' is a conversation of the turns user: an assistant's turn to train"),
        ({"messages": [{"role": "system", "content": "S"}, ANSWER]}, "'messages' .* of the turns system, assistant: a user's"),
        ({"messages": [USER, {**ANSWER, "image": "x"}]}, "'messages' is .* whose turn 1 has 'image' beside its text"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"f": 1}]}]}, ".* whose turn 1 has a tool call that is an object"),
        ({"messages": [{"role": "narrator", "content": "x"}, USER]}, ".* whose turn 0 is of the role 'narrator'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A?"}]}, ANSWER]},
            "'messages' is a conversation whose turn 0 holds a part of the type 'image'",
        ),
        ({"messages": [{"role": "user", "content": None}, ANSWER]}, ".* whose turn 0 has no content"),
        ({"messages": "A?"}, "'messages' is a text .A.., not a list of turns"),
        ({"prompt": [ANSWER], "completion": [USER]}, "'prompt' is a conversation of the turns assistant"),
    ],
)
def test_other_conversations_are_refused_by_name(tmp_path: Path, line: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "d.jsonl", [line])
    with pytest.raises(DataError, match=f"row 0 .line 1.: column {message}"):
        load_samples(path)


def test_alpaca_has_its_input_in_the_prompt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"instruction": "Past tense.", "input": "She walks.", "output": "She walked."},
        {"instruction": "Name a colour.", "input": "", "output": "Blue."},
        {"instruction": "Hi", "output": "Ho"},
    ]
    path = write(tmp_path / "d.jsonl", rows)
    with caplog.at_level("INFO"):
        prompts = [sample.prompt for sample in load_samples(path)]
        assert prompts == load_prompts(path) == ["Past tense.\n\nShe walks.", "Name a colour.", "Hi"]
    assert "'instruction' and, where it is not empty, 'input'" in caplog.text
    assert load_samples(path, prompt_column="instruction")[0].prompt == "Past tense."
    assert "column 'input' is not part of the prompt, which is 'instruction'" in caplog.text
    with pytest.raises(DataError, match="row 0 .*'input' is a list"):
        load_samples(write(tmp_path / "e.jsonl", [{"instruction": "a", "input": ["x"], "output": "b"}]))


@pytest.mark.parametrize("extra", ["context", "system", "choices", "history", "passage", "documents", "instruction"])
def test_what_looks_like_a_part_of_the_prompt_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture, extra: str) -> None:
    rows = [{"question": "A?", "answer": "B", extra: ["x"], "topic": "t", "output": "C"}]
    assert [sample.as_row() for sample in load_samples(write(tmp_path / "d.jsonl", rows))] == [
        {"prompt": "A?", "response": "B"}
    ]
    assert f"column '{extra}' is not part of the prompt, which is 'question'" in caplog.text
    assert "the response is 'answer'; column 'output' is not used" in caplog.text and "topic" not in caplog.text
    caplog.clear()
    load_prompts(write(tmp_path / "e.jsonl", [{"question": "A?", extra: None}, {"question": "B?", extra: ""}]))
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("r.txt", "\ufeffno.\r\nnull\n\n007\n", ["no.", "null", "007"]),
        ("r.txt", "one\u2028and the same\n", ["one\u2028and the same"]),
        ("r.csv", "response\n007\nNA\n", ["007", "NA"]),
        ("r.json", '["no.", {"refusal": "2021-05-03"}]', ["no.", "2021-05-03"]),
        ("r.jsonl", '{"messages": 1, "output": "no."}\n', ["no."]),
    ],
)
def test_refusals_are_text_in_every_format(tmp_path: Path, name: str, text: str, found: list[str]) -> None:
    (tmp_path / name).write_text(text)
    path = write(tmp_path / "d.jsonl", [{"prompt": f"p{i}"} for i in range(len(found))])
    assert [sample.response for sample in load_samples(path, refusal_file=tmp_path / name)] == found


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.jsonl", '"no."\n7\n', "--refusal_file .*row 1 .line 2. is the number 7"),
        ("r.jsonl", '{"text": ["no."]}\n', "--refusal_file .*'response' is a list|'text' is a list"),
        ("r.csv", "a,b\nx,y\n", "--refusal_file .*none of the columns response.*its columns are a, b"),
    ],
)
def test_refusals_that_are_no_text_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        load_samples(write(tmp_path / "d.jsonl", [{"prompt": "p"}]), refusal_file=tmp_path / name)


def test_what_is_marked_as_not_to_be_trained_on_is_refused(tmp_path: Path) -> None:
    for mark, words in (
        ({"weight": 0}, "marks every answer"),
        ({"train": False}, "marks every answer"),
        ({"weight": 0.5}, "turn 1 has 'weight' beside its text, which is the number 0.5"),
    ):
        turns = [{"role": "User", "content": "q"}, {"role": "Assistant", "content": "a", **mark}]
        with pytest.raises(DataError, match=words):
            load_samples(write(tmp_path / "d.jsonl", [{"messages": turns}]))
    with pytest.raises(DataError, match="'label' is false in 1 rows"):
        load_samples(
            write(
                tmp_path / "d.jsonl",
                [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "b", "label": False}],
            )
        )


def test_prompts_alone_may_have_answers_or_not(tmp_path: Path) -> None:
    one, two = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    assert load_prompts(write(tmp_path / "d.jsonl", [{"messages": [one]}, {"messages": [one, two]}])) == ["q", "q"]
    with pytest.raises(DataError, match="-1 samples"):
        load_prompts(write(tmp_path / "d.jsonl", [{"prompt": "q"}]), samples=-1)


def test_one_column_is_not_both_prompt_and_response(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="would be both prompt and response"):
        load_samples(write(tmp_path / "d.jsonl", [{"prompt": "q", "response": "a"}]), prompt_column="response")
