"""What a data flag may name: a file, a folder, what `save_to_disk` wrote, a data set of the hub, or several with weights."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import datasets

from warp_ds.data.readers import READERS, Table, read_file, suffix_of, without_holes
from warp_ds.errors import DataError


def sources_of(text: str) -> list[tuple[str, float]]:
    """(source, weight) of each part of 'a.jsonl,b.jsonl@0.5,hub/name@2'; a weight of 2 takes every sample twice.

    A path that is there is one source, whatever characters it has. Raises `DataError` for a weight that is none.
    """
    if Path(text).expanduser().exists():
        return [(text, 1.0)]
    found = []
    for part in [part.strip() for part in text.split(",")]:
        name, mark, weight = part.rpartition("@")
        if not mark or Path(part).expanduser().exists():
            name, weight = part, "1"
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not name or not 0 < value < math.inf:
            raise DataError(f"{text!r}: {part!r} is no source: give NAME or NAME@WEIGHT with a weight above 0, by commas")
        found.append((name, value))
    return found


def check_source(text: str) -> None:
    """DataError for a local source of `text` that is missing or cannot be read; the hub's are left to `read_source`."""
    for source, _ in sources_of(text):
        local_path(source)


def local_path(source: str) -> Path | None:
    """The file or directory that `source` names; None for a data set of the hub. DataError where it cannot be read."""
    path = Path(source).expanduser()
    if path.is_file():
        if suffix_of(path) not in READERS:
            raise DataError(
                f"{source}: cannot read {path.suffix or 'a file without extension'}; use one of {', '.join(READERS)}"
            )
        if path.stat().st_size == 0:
            raise DataError(f"{source} is empty: give a file with at least one sample")
        return path
    if path.is_dir() and (saved_kind(path) is not None or files_of(path, "train")[0]):
        return path
    if suffix_of(path) in READERS or source.startswith(("/", "./", "../", "~")) and not path.is_dir():
        raise DataError(f"no such file: {source}")
    return None


def read_source(source: str, split: str, config: str | None = None) -> Table:
    """The rows of one source. Raises `DataError`."""
    path = local_path(source)
    if path is None or (path.is_dir() and saved_kind(path) is None and _has_card(path)):
        return _read_hub(source, split, config)
    if path.is_file():
        return read_file(path, source)
    return _read_saved(path, source, split) if saved_kind(path) else _read_folder(path, source, split)


# ---------------------------------------------------------------- directories


def saved_kind(path: Path) -> str | None:
    """'dataset' or 'splits' for what `save_to_disk` of a Dataset or DatasetDict wrote, else None."""
    if (path / "dataset_dict.json").is_file():
        return "splits"
    return "dataset" if (path / "state.json").is_file() and (path / "dataset_info.json").is_file() else None


def _read_saved(path: Path, source: str, split: str) -> Table:
    try:
        if saved_kind(path) == "splits":
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            if split not in splits:
                raise DataError(f"{source} has no split {split!r}: its splits are {', '.join(splits)}")
            path = path / split
        return _table(datasets.load_from_disk(str(path)), source, split)
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source} cannot be read as what save_to_disk wrote: {_cause(error)}") from error


def _has_card(path: Path) -> bool:
    """Whether a folder says itself which files are which split (the hub's own layout)."""
    card = path / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    return text.startswith("---") and "configs:" in text


def files_of(path: Path, split: str) -> tuple[list[Path], bool]:
    """The data files of a folder, of one kind each and in order, and whether their names say the split.

    Files or folders named by a split (`train.jsonl`, `train-00000-of-00002.parquet`, `train/…`) are that split's alone.
    """
    files = sorted(
        file
        for file in path.rglob("*")
        if file.is_file() and suffix_of(file) in READERS and "/." not in f"/{file.relative_to(path)}"
    )
    data = [file for file in files if file.name not in ("dataset_infos.json", "dataset_info.json", "state.json", "config.json")]
    named = {file: _split_of(file.relative_to(path)) for file in data}
    if any(named.values()):
        return [file for file in data if named[file] == split], True
    return data, False


SPLITS = {
    "train": "train",
    "test": "test",
    "eval": "test",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
"""How a file's or folder's name begins, and the split that it is of."""


def _split_of(file: Path) -> str | None:
    words = [*file.parts[:-1], file.name.split(".")[0]]
    return next((SPLITS[key] for word in words if (key := word.lower().split("-")[0].split("_")[0]) in SPLITS), None)


def _read_folder(path: Path, source: str, split: str) -> Table:
    files, named = files_of(path, split)
    if not files:
        raise DataError(f"{source} has no files of the split {split!r}" if named else f"{source} holds no data files")
    tables = [read_file(file, str(file)) for file in files]
    if len(tables) == 1:
        return tables[0]
    columns = list(dict.fromkeys(name for table in tables for name in table.columns))
    ends = list(accumulate(map(len, tables)))

    def where(row: int) -> str:
        number = bisect_right(ends, row)
        return f"{files[number].name}, {tables[number].place(row - ends[number] + len(tables[number]))}"

    return Table(source, columns, [row for table in tables for row in table.rows], where=where)


# ---------------------------------------------------------------- the hub


def _read_hub(source: str, split: str, config: str | None) -> Table:
    try:
        data = datasets.load_dataset(source, config, split=split)
    except Exception as error:
        offline = "HF_HUB_OFFLINE is set, so only the local cache was searched; " if datasets.config.HF_HUB_OFFLINE else ""
        raise DataError(
            f"no data set {source!r} (split {split!r}): {offline}give the path of a local "
            f"{', '.join(READERS)} file, or fetch the data set into the cache where there is internet. "
            f"Cause: {_cause(error)}"
        ) from error
    return _table(data, source, split)


def _table(data: Any, source: str, split: str) -> Table:
    if len(data) == 0:
        raise DataError(f"{source} ({split}) has no rows: give a data set or file with at least one sample")
    rows: list[Mapping[str, Any]] = [without_holes(row) for row in data.to_list()]
    return Table(source, list(data.column_names), rows)


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
