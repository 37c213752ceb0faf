"""Sources are read some rows at a time, no further than the samples that are asked for; all chunks are read in one way."""

from __future__ import annotations

import csv
import gzip
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from warp_ds.data import datasets, readers, sources
from warp_ds.data.datasets import load_prompts, load_samples, read_samples
from warp_ds.data.table import Table
from warp_ds.errors import DataError

GOOD = [{"prompt": f"q{i}", "response": f"a{i}"} for i in range(400)]
BROKEN_AT = 150
"""The row that no reader can pass, 100 beyond the 50 samples that are asked for."""


def jsonl(path: Path) -> None:
    lines = [json.dumps(row) for row in GOOD]
    lines[BROKEN_AT] = "{broken"
    path.write_text("\n".join(lines))


def packed(path: Path) -> None:
    noise = random.Random(0).randbytes(200_000).hex()
    rows = [*GOOD[:BROKEN_AT], {"prompt": noise, "response": "a"}]
    data = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    path.write_bytes(data[:-20])  # cut: all of it cannot be unpacked


def comma(path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "response"])
        writer.writerows([list(row.values()) + ["too many"] * (i == BROKEN_AT) for i, row in enumerate(GOOD)])


def latin(path: Path) -> None:
    lines = [json.dumps(row).encode() for row in GOOD]
    lines[BROKEN_AT] = b'{"prompt": "\xe9", "response": "x"}'
    path.write_bytes(b"\n".join(lines) + b"\n" + b" " * 100_000)


def parquet(path: Path) -> None:
    rows = pyarrow.Table.from_pylist(GOOD)
    pyarrow.parquet.write_table(rows, path, row_group_size=100, compression=None, use_dictionary=False)
    data = bytearray(path.read_bytes())
    at = data.index(b"q250")
    data[at - 200 : at + 200] = b"\xff" * 400
    path.write_bytes(data)


def number(path: Path) -> None:
    rows: list[Any] = [dict(row) for row in GOOD]
    rows[BROKEN_AT]["response"] = 7
    path.write_text("\n".join(map(json.dumps, rows)))


BROKEN = {
    "d.jsonl": (jsonl, "row 150 .line 151.: "),
    "d.jsonl.gz": (packed, "cannot be unpacked as gzip"),
    "d.csv": (comma, "row 150 .line 152. has 3 cells"),
    "latin.jsonl": (latin, "line 151 .row 150 .*0xe9 after"),
    "d.parquet": (parquet, "cannot be read as parquet|is no text|UTF-8"),
    "number.jsonl": (number, "row 150 .line 151.: column 'response' is the number 7"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_no_more_is_read_than_asked_for(tmp_path: Path, name: str) -> None:
    write, message = BROKEN[name]
    write(tmp_path / name)
    found = load_samples(tmp_path / name, samples=50)
    assert [sample.as_row() for sample in found] == GOOD[:50] and [sample.row for sample in found] == list(range(50))
    assert len(load_prompts(tmp_path / name, samples=50)) == 50
    with pytest.raises(DataError, match=message):
        load_samples(tmp_path / name)


def test_usable_rows_are_counted_not_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a set half of whose responses are harmful, 60 samples are the first 60 others, of the first 120 rows."""
    asked = []

    def read(source: str, split: str, config: Any, size: int, streaming: bool) -> Any:
        for first in range(0, 400, size):
            asked.append(first)
            rows = [
                {"question": f"q{i}", "ChatGPT_response": "no", "ChatGPT_harmful": str(i % 2)}
                for i in range(first, min(first + size, 400))
            ]
            yield Table(source, list(rows[0]), rows, numbers=range(first, first + size))

    monkeypatch.setattr(datasets, "read_source", read)
    found = load_samples("LibrAI/do-not-answer", samples=60)
    assert [sample.row for sample in found] == list(range(0, 120, 2)) and asked == [0, 60]


def test_chunks_are_one_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "context": "c", "system": "s" if i > 20 else ""} for i, row in enumerate(GOOD[:25])]
    for name in ("d.jsonl", "d.csv", "d.parquet", "d.arrow"):
        write_rows(tmp_path / name, rows)
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "folder").mkdir()
    for part in (0, 1, 2):
        write_rows(tmp_path / "folder" / f"part-{part}.jsonl", rows[part * 10 : part * 10 + 10])
    for source in ("d.jsonl", "d.csv", "d.parquet", "d.arrow", "saved", "folder"):
        whole = load_samples(tmp_path / source)
        caplog.clear()
        monkeypatch.setattr(datasets, "CHUNK", 4)
        monkeypatch.setattr(sources, "CHUNK", 4)
        assert load_samples(tmp_path / source) == whole and len(whole) == 25, source
        assert sum("'context' is not part of the prompt" in record.message for record in caplog.records) == 1, "said once"
        assert [len(sample.messages) for sample in whole] == [2] * 21 + [3] * 4, "a system prompt that only later rows have"
        monkeypatch.undo()


def test_what_a_later_chunk_says_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CHUNK", 3)
    monkeypatch.setattr(sources, "CHUNK", 3)
    first = [{"question": "q", "answer": "a"}] * 3
    cases = {
        "the prompts' column is 'question' in the rows before row 3 .line 4., and 'prompt' from there": {
            "prompt": "p",
            "answer": "a",
        },
        "the responses' column is 'answer' in the rows before row 3 .line 4., and 'response' from there": {
            "question": "p",
            "response": "a",
        },
        "column 'question' is missing in 1 of 4 rows .rows 3., lines 4": {"answer": "a"},
    }
    for message, row in cases.items():
        write_rows(tmp_path / "d.jsonl", [*first, row])
        with pytest.raises(DataError, match=message):
            load_samples(tmp_path / "d.jsonl")
    tools = [{**row, "tools": [{"name": "f"}]} for row in first]
    write_rows(tmp_path / "d.jsonl", [*tools, {**first[0], "tools": [7]}])
    with pytest.raises(DataError, match="whether the column 'tools' is read is True in the rows before row 3"):
        load_samples(tmp_path / "d.jsonl")


def test_a_hub_set_in_a_stream_is_the_set(tmp_path: Path) -> None:
    """A folder with the hub's own layout goes through the loader of `datasets`, as a name of the hub does."""
    write_rows(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: a.jsonl\n---\n")
    streamed = load_samples(tmp_path, streaming=True)
    assert streamed == load_samples(tmp_path) and len(streamed) == 400
    assert load_samples(tmp_path, streaming=True, samples=7) == streamed[:7]
    with pytest.raises(DataError, match="no data set .*split 'test'"):
        load_samples(tmp_path, streaming=True, split="test")


def test_weights_mix_what_is_held_elsewhere(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", GOOD[:6])
    write_rows(tmp_path / "b.jsonl", GOOD[6:9])
    held = []

    def hold(samples: Any) -> Any:
        held.append(tuple(samples))
        return held[-1]

    text = f"{tmp_path / 'a.jsonl'}@0.5,{tmp_path / 'b.jsonl'}@2"
    found = list(read_samples(text, hold=hold))
    assert [len(part) for part in held] == [6, 3] and found == load_samples(text)
    assert [sample.row for sample in found] == list(range(9)) and load_samples(text, samples=4) == found[:4]
    with pytest.raises(DataError, match="a.jsonl@0.05 takes none of its 6 samples: give a higher weight"):
        load_samples(f"{tmp_path / 'a.jsonl'}@0.05")


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_file_is_read_as_far_as_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOOD * 500))
    with readers.opened(tmp_path / "d.jsonl", "d", "\n") as text:
        rows = readers._values_of_lines(text, tmp_path, "d")
        for _ in range(100):
            next(rows)
        assert text.buffer.tell() < (tmp_path / "d.jsonl").stat().st_size / 100, "bytes, not the file"
