"""Data as people have them: each wrong one is refused in one line that names the place, the cause and the cure."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from warp_ds.data.datasets import load_samples
from warp_ds.data.sources import files_of
from warp_ds.errors import DataError

GOOD = {"prompt": "q", "response": "a"}
USER, ANSWER = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
CALL = {"function": {"name": "f", "arguments": "{}"}}


def messages(*turns: Any, **more: Any) -> dict[str, Any]:
    return {"messages": turns, **more}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


ROWS = {
    "a part that is a picture": (messages(user([{"type": "image", "url": "x"}]), ANSWER), "row 0 .line 1.*type 'image': texts"),
    "a picture's address": (messages(user([{"type": "image_url"}]), ANSWER), "type 'image_url': texts alone are read; leave"),
    "a column of pictures": (messages(USER, ANSWER, images=["a.png"]), "'images' has content in 1 rows .rows 0., lines 1"),
    "a picture beside a pair": ({**GOOD, "image": "a.png"}, "'image' has content .* texts alone are read: leave"),
    "texts for parts": (messages(user(["a"]), ANSWER), "turn 0 is a list .*give a text, or a list of parts of the type 'text'"),
    "no content": (messages(user(None), ANSWER), "turn 0 has no content: fill it, or leave the row out"),
    "no content and no calls": (messages(USER, {**ANSWER, "content": None, "tool_calls": []}), "turn 1 has no content: fill"),
    "Python for JSON": ({"messages": "[{'role': 'user'}]"}, "which is no JSON .*: write it as json.dumps does"),
    "turns for rows": (USER, "rows are the turns of a conversation .*give a conversation a row"),
    "a question to be trained on": (
        messages({**USER, "train": True}, ANSWER),
        "turn 0 is a turn of the role user marked to be",
    ),
    "half a character in a system prompt": ({**GOOD, "system": "\ud83d"}, "row 0 .line 1.*half a surrogate pair"),
    "half a character in a tool": ({**GOOD, "tools": [{"name": "\ud83d"}]}, "row 0 .line 1.*half a surrogate pair"),
    "half a character in a thought": (
        {"prompt": "q", "completion": [{**ANSWER, "thinking": "\ud83d"}]},
        "column 'completion' holds half a surrogate pair",
    ),
    "an empty text": ({"text": ""}, "column 'text' is empty in 1 of 1 rows"),
}


def refused(source: Any, message: str, **options: Any) -> None:
    with pytest.raises(DataError, match=message) as error:
        load_samples(source, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_are_no_texts(tmp_path: Path, case: str) -> None:
    row, message = ROWS[case]
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    refused(tmp_path / "d.jsonl", message)


def test_a_column_of_pictures_that_is_not_wanted_is_the_users_word(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({**GOOD, "image": "a.png"}))
    assert load_samples(tmp_path / "d.jsonl", prompt_column="prompt")[0].as_row() == GOOD
    (tmp_path / "d.jsonl").write_text(json.dumps({**GOOD, "image": None}))
    assert load_samples(tmp_path / "d.jsonl")[0].as_row() == GOOD


FINE = {
    "two gzip members": ("d.jsonl.gz", gzip.compress(json.dumps(GOOD).encode() + b"\n") * 2, 2),
    "a mark and CRLF": ("d.csv", b"\xef\xbb\xbfprompt,response\r\nq,a\r\n", 1),
    "CR alone": ("d.csv", b"prompt,response\rq,a\r", 1),
    "empty lines": ("d.csv", b"\n\nprompt,response\n\nq,a\n\n", 1),
    "a list on one line": ("d.jsonl", json.dumps([GOOD, GOOD]).encode(), 2),
    "lines, called json": ("d.json", (json.dumps(GOOD) + "\n").encode() * 2, 2),
    "an object over lines": ("d.json", json.dumps(GOOD, indent=2).encode(), 1),
}


@pytest.mark.parametrize("case", FINE)
def test_files_that_can_be_read(tmp_path: Path, case: str) -> None:
    name, data, count = FINE[case]
    (tmp_path / name).write_bytes(data)
    assert [sample.as_row() for sample in load_samples(tmp_path / name)] == [GOOD] * count


def test_calls_without_content_are_turns(tmp_path: Path) -> None:
    row = messages(USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "r"}, ANSWER)
    (tmp_path / "d.jsonl").write_text(json.dumps(row))
    assert [turn["content"] for turn in load_samples(tmp_path / "d.jsonl")[0].messages] == ["u", "", "r", "a"]


def test_files_that_cannot(tmp_path: Path) -> None:
    (tmp_path / "mixed.jsonl").write_text(f"{json.dumps(GOOD)}\n[{json.dumps(GOOD)}]\n")
    refused(tmp_path / "mixed.jsonl", r"row 1 \(line 2\) is a list")
    (tmp_path / "pretty.jsonl").write_text(json.dumps(GOOD, indent=2))
    refused(tmp_path / "pretty.jsonl", r"row 0 \(line 1\).*: write every object on one line \(jq -c \. pretty.jsonl\)")
    (tmp_path / "several.json").write_text(json.dumps(GOOD, indent=2) * 2)
    refused(tmp_path / "several.json", r"Extra data \(line 4, column 2\): give a list of objects, or .*jq -c . several.json")
    os.mkfifo(tmp_path / "pipe.jsonl")
    refused(tmp_path / "pipe.jsonl", "is a device or a pipe: write what comes from it into a file")


def test_names_that_are_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.jsonl").write_text(json.dumps(GOOD))
    for empty in ("", " "):
        refused(empty, "an empty text names no data")  # and not this directory
    refused("https://host/a.jsonl", "is an address, and nothing is fetched from there: fetch the file")
    refused(f"{tmp_path}/*.jsonl", "patterns are not expanded: name the folder")
    for weight in ("0", "-1", "nan", "inf", "two"):
        refused(f"d.jsonl@{weight}", "give NAME or NAME@WEIGHT with a weight above 0")
    refused("d.jsonl,", "'' is no source")


def test_a_source_that_stands_twice_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(GOOD))
    assert len(load_samples(f"{tmp_path / 'd.jsonl'},{tmp_path / 'd.jsonl'}@2")) == 3
    assert "d.jsonl is named more than once, and all its samples are taken as often" in caplog.text


def test_folders_and_saved_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    DatasetDict({"train_sft": Dataset.from_list([GOOD])}).save_to_disk(str(tmp_path / "splits"))
    refused(tmp_path / "splits", "splits has no split 'train': its splits are train_sft")
    assert len(load_samples(tmp_path / "splits", split="train_sft")) == 1
    next((tmp_path / "splits").rglob("*.arrow")).write_bytes(b"x")
    refused(tmp_path / "splits", "cannot be read as what save_to_disk wrote: .*: save it again", split="train_sft")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.jsonl").write_text(json.dumps(GOOD))
    (folder / "b.csv").write_text("prompt,response\nq,a\n")
    (folder / "notes.txt").write_text("x")
    assert len(load_samples(folder)) == 2
    assert "not read" not in caplog.text
    (folder / "d.jsonl.zst").write_text("x")
    assert len(load_samples(folder)) == 2
    assert "folder: d.jsonl.zst are not read: files of a split and .json, " in caplog.text
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "d.jsonl.zst").write_text("x")
    refused(tmp_path / "packed", "packed holds no files that can be read .d.jsonl.zst cannot.: use one of .json, ")
    (tmp_path / "named").mkdir()
    for name in ("test", "train", "extra"):
        (tmp_path / "named" / f"{name}.jsonl").write_text(json.dumps(GOOD))
    assert len(load_samples(tmp_path / "named")) == 1
    assert "named: extra.jsonl are not read" in caplog.text
    (tmp_path / "named" / "train.jsonl").unlink()
    refused(tmp_path / "named", "no files of the split 'train'")
    (folder / "c.json").write_text('{"name": "x"}')
    refused(folder, r"column 'prompt' is missing in 1 of 3 rows \(rows 2\), c.json, row 0 \(line 1\)")

    def denied(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied", "/somewhere/a.jsonl")

    monkeypatch.setattr(Path, "rglob", denied)
    with pytest.raises(DataError, match="cannot be looked through .Permission denied: /somewhere/a.jsonl.: name a folder"):
        files_of(folder, "train")
