"""Prompt sets known by name: from the hub by its columns, split and configuration, and from files of their authors' shape."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset

from warp_ds.data.datasets import load_prompts
from warp_ds.data.prompt_sets import SETS
from warp_ds.data.sources import check_source
from warp_ds.errors import DataError

#: (hub, configuration, split) -> rows as they lie there.
HUB: dict[tuple[str, str | None, str], list[dict[str, Any]]] = {
    ("walledai/AdvBench", None, "train"): [{"prompt": "p1", "target": "Sure"}],
    ("walledai/HarmBench", "standard", "train"): [{"prompt": "p1", "category": "illegal"}],
    ("walledai/HarmBench", "contextual", "train"): [{"prompt": "p1", "context": " about \n", "category": "illegal"}],
    ("walledai/StrongREJECT", None, "train"): [{"prompt": "p1", "category": "c", "source": "s"}],
    ("walledai/XSTest", None, "test"): [
        {"prompt": "p1", "focus": "f", "type": "t", "note": "", "label": "safe"},
        {"prompt": "p2", "focus": "f", "type": "contrast_t", "note": "", "label": "unsafe"},
    ],
    ("bench-llm/or-bench", "or-bench-hard-1k", "train"): [{"prompt": "p1", "category": "c"}],
    ("bench-llm/or-bench", "or-bench-toxic", "train"): [{"prompt": "p2", "category": "c"}],
    ("sorry-bench/sorry-bench-202503", None, "train"): [
        {"question_id": 1, "category": "1", "turns": ["p0"], "prompt_style": "slang"},
        {"question_id": 1, "category": "1", "turns": ["p1"], "prompt_style": "base"},
    ],
    ("LibrAI/do-not-answer", None, "train"): [{"id": 0, "question": "p1", "GPT4_response": "No."}],
}
HARMBENCH = "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
#: Set -> its authors' file, and the prompts in it.
FILES = {
    "advbench": ("harmful_behaviors.csv", 'goal,target\n"p1, of two",Sure\np2,Sure\n', ["p1, of two", "p2"]),
    "harmbench": ("h.csv", f"{HARMBENCH}p1,standard,s,,,a\np2,contextual,s,context,about,b\np3,copyright,s,,,c\n", ["p1"]),
    "harmbench-contextual": ("h.csv", f"{HARMBENCH}p1,standard,s,,,a\np2,contextual,s,context,about,b\n", ["about\n\np2"]),
    "strongreject": ("strongreject_dataset.csv", "category,source,forbidden_prompt\nc,s,p1\n", ["p1"]),
    "xstest-safe": ("xstest.csv", "id,prompt,type,label,focus,note\n1,p1,t,safe,f,\n2,p2,contrast_t,unsafe,f,\n", ["p1"]),
    "xstest-unsafe": ("xstest.csv", "id,prompt,type,label,focus,note\n1,p1,t,safe,f,\n2,p2,contrast_t,unsafe,f,\n", ["p2"]),
    "or-bench-hard": ("or-bench-hard-1k.csv", "prompt,category\np1,c\n", ["p1"]),
    "or-bench-toxic": ("or-bench-toxic.csv", "prompt,category\np1,c\n", ["p1"]),
    "sorry-bench": (
        "question.jsonl",
        json.dumps({"question_id": 1, "category": "1", "turns": ["p1"], "prompt_style": "base"}) + "\n",
        ["p1"],
    ),
    "do-not-answer": ("data_en.csv", "id,risk_area,types_of_harm,specific_harms,question\n0,r,t,s,p1\n", ["p1"]),
}


def test_every_set_has_a_case() -> None:
    assert FILES.keys() == SETS.keys() and {(s.hub, s.config, s.split) for s in SETS.values()} == HUB.keys()


@pytest.mark.parametrize("name", SETS)
def test_from_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: str, config: str | None, split: str, streaming: bool) -> Dataset:
        return Dataset.from_list(HUB[path, config, split])

    monkeypatch.setattr(datasets, "load_dataset", load)
    expected = {"xstest-unsafe": "p2", "or-bench-toxic": "p2", "harmbench-contextual": "about\n\np1"}.get(name, "p1")
    for spelled in (name, name.upper()):  # a column that the other sets have says nothing of this one
        assert [s.prompt for s in load_prompts(spelled, split="train", prompt_column="q")] == [expected]
    check_source(name)


@pytest.mark.parametrize("name", SETS)
def test_from_its_authors_file(name: str, tmp_path: Path) -> None:
    file, text, prompts = FILES[name]
    (tmp_path / file).write_text(text)
    assert [sample.prompt for sample in load_prompts(f"{name}:{tmp_path / file}")] == prompts
    check_source(f"{name}:{tmp_path / file}")
    both = load_prompts(f"{name}:{tmp_path / file},{name}:{tmp_path / file}@2")
    assert len(both) == 3 * len(prompts)


def test_rows_keep_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,prompt,label\n1,p1,safe\n2,p2,unsafe\n3,p3,safe\n4,p4,safe\n")
    found = load_prompts(f"xstest-safe:{tmp_path / 'x.csv'}", samples=2)
    assert [(sample.row, sample.prompt) for sample in found] == [(0, "p1"), (2, "p3")]
    (tmp_path / "x.csv").write_text("id,prompt,label\n1,p1,unsafe\n2,,safe\n")
    with pytest.raises(DataError, match=r"\(rows 1\), lines 3"):
        load_prompts(f"xstest-safe:{tmp_path / 'x.csv'}")


@pytest.mark.parametrize(
    "source, message",
    [
        ("advbench:", "names no file: give advbench:FILE, or advbench alone"),
        ("advbench:missing.csv", "no such file: missing.csv"),
        ("advbench:other.csv", "none of the columns prompt, goal of walledai/AdvBench; its columns are a, b"),
        ("xstest-safe:labels.csv", "no row of walledai/XSTest has label safe"),
    ],
)
def test_what_is_no_such_set_is_refused(source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "labels.csv").write_text("prompt,label\np,unsafe\n")
    with pytest.raises(DataError, match=message):
        load_prompts(source)


def test_a_file_of_that_name_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "advbench").mkdir()
    (tmp_path / "advbench" / "train.jsonl").write_text('{"prompt": "mine"}\n')
    assert [sample.prompt for sample in load_prompts("advbench")] == ["mine"]
