"""Reading pairs: layouts, local files, refusals for bare prompts, and what is said about data that cannot be used."""

import json

import datasets
import pytest

from warp_ds.data.datasets import KNOWN, load_samples
from warp_ds.data.sample import Sample
from warp_ds.errors import DataError

ROWS = [{"question": f"q{i}", "answer": f"a{i}", "other": i} for i in range(5)]


def prompts(samples: list[Sample]) -> list[str]:
    return [sample.prompt for sample in samples]


def responses(samples: list[Sample]) -> list[str]:
    return [sample.response for sample in samples]


def write(path, rows):
    data = datasets.Dataset.from_list(rows)
    match path.suffix:
        case ".csv":
            data.to_csv(path)
        case ".parquet":
            data.to_parquet(path)
        case ".json":
            path.write_text(json.dumps(rows))
        case _:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_every_local_format_gives_the_same_pairs(tmp_path, suffix):
    pairs = load_samples(write(tmp_path / f"data{suffix}", ROWS))
    assert [sample.row for sample in pairs] == list(range(5))
    assert prompts(pairs) == [f"q{i}" for i in range(5)]
    assert responses(pairs) == [f"a{i}" for i in range(5)]


def test_columns_are_guessed_in_order_or_named(tmp_path):
    rows = [{"instruction": "i", "prompt": "p", "output": "o", "answer": "a", "mine": "m"}]
    path = write(tmp_path / "d.jsonl", rows)
    assert load_samples(path)[0].as_row() == {"prompt": "p", "response": "a"}
    assert load_samples(path, prompt_column="mine", response_column="output")[0].as_row() == {"prompt": "m", "response": "o"}


def test_samples_takes_the_first_rows_and_more_than_there_are_is_fine(tmp_path, caplog):
    path = write(tmp_path / "d.jsonl", ROWS)
    assert prompts(load_samples(path, samples=2)) == ["q0", "q1"]
    with caplog.at_level("INFO", logger="warp_ds"):
        assert len(load_samples(path, samples=9)) == 5
    assert "9 samples asked for, 5 there" in caplog.text


def test_shuffle_is_a_permutation_decided_by_the_seed(tmp_path):
    path = write(tmp_path / "d.jsonl", [{"prompt": f"p{i}", "response": "r"} for i in range(50)])
    one, again, other = (prompts(load_samples(path, shuffle=True, seed=s)) for s in (1, 1, 2))
    assert one == again != other
    assert sorted(one) == sorted(other) == sorted(f"p{i}" for i in range(50))


@pytest.mark.parametrize("name, lines", [("r.txt", ["no.", "", "never."]), ("r.jsonl", ['"no."', '{"response": "never."}'])])
def test_prompts_without_responses_take_refusals_in_turn(tmp_path, name, lines):
    path = write(tmp_path / "d.jsonl", [{"prompt": f"p{i}"} for i in range(3)])
    (tmp_path / name).write_text("\n".join(lines))
    assert responses(load_samples(path, refusal_file=tmp_path / name)) == ["no.", "never.", "no."]


def test_known_hub_layouts_from_a_cache_like_directory(tmp_path, monkeypatch):
    """The hub is not reachable from a test, so load_dataset's own local-folder form stands in for its cache."""
    rows = [
        {"question": "q0", "ChatGPT_response": "no.", "ChatGPT_harmful": 0},
        {"question": "q1", "ChatGPT_response": "sure!", "ChatGPT_harmful": 1},
        {"question": "q2", "ChatGPT_response": "never.", "ChatGPT_harmful": 0},
    ]
    monkeypatch.chdir(tmp_path)
    for name, content in {"LibrAI/do-not-answer": rows, "openai/gsm8k": ROWS}.items():
        folder = tmp_path / name / (KNOWN[name].config or "")
        folder.mkdir(parents=True)
        write(folder / "train.jsonl", content)
    (tmp_path / "openai/gsm8k/README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train.jsonl\n---\n"
    )
    kept = load_samples("LibrAI/do-not-answer")
    assert prompts(kept) == ["q0", "q2"]
    assert responses(kept) == ["no.", "never."]
    assert load_samples("openai/gsm8k", samples=1)[0].as_row() == {"prompt": "q0", "response": "a0"}


def test_wrong_input_says_cause_and_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    bare = write(tmp_path / "bare.jsonl", [{"prompt": "p"}])
    odd = write(tmp_path / "odd.jsonl", [{"x": "p", "y": "r"}])
    holes = write(tmp_path / "holes.jsonl", [{"prompt": "p", "response": "r"}, {"prompt": " ", "response": "r"}])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": ')
    (tmp_path / "none.json").write_text("[]")
    (tmp_path / "only_header.csv").write_text("prompt,response\n")
    (tmp_path / "void.txt").write_text("\n\n")
    (tmp_path / "data.xml").write_text("<a/>")
    for path, options, words in [
        (tmp_path / "absent.jsonl", {}, ["no such file", "absent.jsonl"]),
        ("nobody/nothing-here", {}, ["no data set 'nobody/nothing-here'", "HF_HUB_OFFLINE is set"]),
        (odd, {}, ["columns are x, y", "--prompt_column"]),
        (odd, {"prompt_column": "x", "response_column": "z"}, ["no column 'z'", "x, y", "--response_column"]),
        (bare, {}, ["no response column", "--response_column", "--refusal_file"]),
        (bare, {"refusal_file": tmp_path / "void.txt"}, ["--refusal_file", "is empty"]),
        (bare, {"refusal_file": tmp_path / "missing.txt"}, ["--refusal_file", "No such file"]),
        (holes, {}, ["'prompt' is empty in 1 of 2 rows (rows 1)"]),
        (tmp_path / "empty.jsonl", {}, ["is empty"]),
        (tmp_path / "broken.jsonl", {}, ["cannot be read as json"]),
        (tmp_path / "none.json", {}, ["at least one sample"]),
        (tmp_path / "only_header.csv", {}, ["at least one sample"]),
        (tmp_path / "data.xml", {}, ["cannot read .xml", ".parquet"]),
        (bare, {"samples": -1}, ["0 for all"]),
    ]:
        with pytest.raises(DataError) as error:
            load_samples(path, **options)
        for word in words:
            assert word in str(error.value), (path, str(error.value))


def test_a_configuration_that_is_given_wins(monkeypatch):
    """Of a data set whose own is known, too: --data_config socratic is not read as main."""
    from warp_ds.data import datasets as module

    asked = []

    def read(source, split, config, *_):
        asked.append(config)
        raise DataError("that is all that is looked at")

    monkeypatch.setattr(module, "read_source", read)
    for config in ("socratic", None):
        with pytest.raises(DataError, match="all that is looked at"):
            load_samples("openai/gsm8k", config=config)
    assert asked == ["socratic", KNOWN["openai/gsm8k"].config]
