"""Prompt sets that safety evaluations know by name: where each lies on the hub, and how its rows are read, there and in its
authors' file (`advbench`, or `advbench:harmful_behaviors.csv`). None of them is shipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from warp_ds.data.table import Table
from warp_ds.errors import DataError


@dataclass(frozen=True)
class PromptSet:
    """Where prompts lie, and which of the rows they are."""

    hub: str
    prompts: tuple[str, ...]
    """The column of the prompts: the hub's, then that of the authors' file; of a list the first text."""
    split: str = "train"
    config: str | None = None
    contexts: tuple[str, ...] = ()
    """The column of what a prompt is about, which goes before it."""
    rows: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """(columns, values): the rows that count; a file without any of the columns counts whole."""


_HARMBENCH = ("FunctionalCategory", "functional_category")
SETS = {
    "advbench": PromptSet("walledai/AdvBench", ("prompt", "goal")),
    "harmbench": PromptSet("walledai/HarmBench", ("prompt", "Behavior"), config="standard", rows=(_HARMBENCH, ("standard",))),
    "harmbench-contextual": PromptSet(
        "walledai/HarmBench",
        ("prompt", "Behavior"),
        config="contextual",
        contexts=("context", "ContextString"),
        rows=(_HARMBENCH, ("contextual",)),
    ),
    "strongreject": PromptSet("walledai/StrongREJECT", ("prompt", "forbidden_prompt")),
    "xstest-safe": PromptSet("walledai/XSTest", ("prompt",), split="test", rows=(("label",), ("safe",))),
    "xstest-unsafe": PromptSet("walledai/XSTest", ("prompt",), split="test", rows=(("label",), ("unsafe",))),
    "or-bench-hard": PromptSet("bench-llm/or-bench", ("prompt",), config="or-bench-hard-1k"),
    "or-bench-toxic": PromptSet("bench-llm/or-bench", ("prompt",), config="or-bench-toxic"),
    "sorry-bench": PromptSet("sorry-bench/sorry-bench-202503", ("turns",), rows=(("prompt_style",), ("base",))),
    "do-not-answer": PromptSet("LibrAI/do-not-answer", ("question",)),
}
"""Name -> set. XSTest and SORRY-Bench are gated on the hub: accept their terms there, and give HF_TOKEN."""


def named(source: str) -> tuple[PromptSet, str | None] | None:
    """The set that a source names, and the file or folder that holds it (None: the hub); None for any other source.

    Raises `DataError` for a set's name before a colon with nothing after it.
    """
    if Path(source).expanduser().exists():
        return None
    name, mark, place = source.partition(":")
    prompt_set = SETS.get(name.strip().lower())
    if prompt_set is None:
        return None
    if mark and not place.strip():
        raise DataError(f"{source!r} names no file: give {name}:FILE, or {name} alone for the hub's {prompt_set.hub}")
    return prompt_set, place.strip() or None


def prompts_of(tables: Iterable[Table], prompt_set: PromptSet) -> Iterator[Table]:
    """The set's rows, of one column, `prompt`. Raises `DataError` for a table without its columns."""
    some = False
    for table in tables:
        column = _first(prompt_set.prompts, table.columns)
        if column is None:
            raise DataError(
                f"{table.source} has none of the columns {', '.join(prompt_set.prompts)} of {prompt_set.hub}; its columns are "
                f"{', '.join(map(str, table.columns))}: name its file alone, and its column with --prompt_column"
            )
        kept = table.only([i for i, row in enumerate(table.rows) if _counts(row, prompt_set, table)])
        context = _first(prompt_set.contexts, table.columns)
        rows = [{"prompt": _prompt(row[column], row.get(context) if context else None)} for row in kept.rows]
        some = some or bool(rows)
        if rows:
            yield replace(kept, columns=["prompt"], rows=rows)
    if not some and prompt_set.rows is not None:
        raise DataError(f"no row of {prompt_set.hub} has {' or '.join(prompt_set.rows[0])} {' or '.join(prompt_set.rows[1])}")


def _first(names: Iterable[str], columns: Iterable[str]) -> str | None:
    there = set(columns)
    return next((name for name in names if name in there), None)


def _counts(row: Mapping[str, Any], prompt_set: PromptSet, table: Table) -> bool:
    if prompt_set.rows is None or (column := _first(prompt_set.rows[0], table.columns)) is None:
        return True
    return str(row.get(column)).strip().lower() in prompt_set.rows[1]


def _prompt(value: Any, context: Any) -> Any:
    """A text, or what is none as it is: who reads it says so, with its place."""
    text = value[0] if isinstance(value, list) and value else value
    return f"{context.strip()}\n\n{text}" if isinstance(context, str) and context.strip() and isinstance(text, str) else text
