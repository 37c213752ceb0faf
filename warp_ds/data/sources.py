"""What a data flag may name: a file, a folder, what `save_to_disk` wrote, a data set of the hub, or several with weights."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from warp_ds.data.prompt_sets import named, prompts_of
from warp_ds.data.readers import CHUNK, READERS, read_chunks, suffix_of, without_holes
from warp_ds.data.table import Settled, Table, few, regrouped
from warp_ds.errors import DataError

log = logging.getLogger(__name__)


def sources_of(text: str) -> list[tuple[str, float]]:
    """(source, weight) of each part of 'a.jsonl,b.jsonl@0.5,hub/name@2'; a weight of 2 takes every sample twice.

    A path that is there is one source, whatever characters it has. Raises `DataError` for a weight that is none.
    """
    if not text.strip():
        raise DataError("an empty text names no data: give a file, a folder, or a data set of the hub")
    if Path(text).expanduser().exists():
        return [(text, 1.0)]
    sources = []
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
        sources.append((name, value))
    for name in sorted({name for name, _ in sources if sum(name == other for other, _ in sources) > 1}):
        log.warning("%s is named more than once, and all its samples are taken as often: a weight says so in one word", name)
    return sources


def check_source(text: str) -> None:
    """DataError for a local source of `text` that is missing or cannot be read; the hub's are left to `read_source`."""
    for source, _ in sources_of(text):
        known = named(source)
        if known is None or known[1] is not None:
            local_path(source if known is None else str(known[1]))


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
    if path.is_dir() and (saved_kind(path) is not None or any(files_of(path, "train"))):
        return path
    if path.is_dir() and source.startswith(("/", "./", "../", "~")) and not _has_card(path):
        there = f" ({few(_not_read(path))} cannot)" if _not_read(path) else ""
        raise DataError(f"{source} holds no files that can be read{there}: use one of {', '.join(READERS)}, each also as .gz")
    if path.exists() and not path.is_dir():
        raise DataError(f"{source} is a device or a pipe: write what comes from it into a file, and name that")
    if "://" in source:
        raise DataError(f"{source} is an address, and nothing is fetched from there: fetch the file and name it")
    if "*" in source:
        raise DataError(f"no such file: {source}; patterns are not expanded: name the folder, or the files by commas")
    if suffix_of(path) in READERS or source.startswith(("/", "./", "../", "~")) and not path.is_dir():
        raise DataError(f"no such file: {source}")
    return None


def read_source(
    source: str, split: str, config: str | None = None, size: int = CHUNK, streaming: bool = False
) -> Iterator[Table]:
    """The rows of one source, about `size` at a time and no further than is asked for; `streaming` keeps no copy of what the
    hub has. Of a set known by name (`prompt_sets`) its prompts. Raises `DataError`."""
    if (known := named(source)) is not None:
        prompt_set, place = known
        where = (prompt_set.hub, prompt_set.split, prompt_set.config) if place is None else (place, split, config)
        yield from prompts_of(read_source(*where, size, streaming), prompt_set)
        return
    path = local_path(source)
    settled = Settled()
    columns: dict[str, None] = {}
    start = 0
    if path is None or (path.is_dir() and saved_kind(path) is None and _has_card(path)):
        tables = _read_hub(source, split, config, size, streaming)
    elif path.is_file():
        tables = read_chunks(path, source, size)
    else:
        tables = _read_saved(path, source, split, size) if saved_kind(path) else _read_folder(path, source, split, size)
    for table in tables:
        columns |= dict.fromkeys(table.columns)
        numbers = range(start, start + len(table))
        yield replace(table, columns=list(columns), numbers=numbers, settled=settled)
        start += len(table)


# ---------------------------------------------------------------- directories


def saved_kind(path: Path) -> str | None:
    """'dataset' or 'splits' for what `save_to_disk` of a Dataset or DatasetDict wrote, else None."""
    if (path / "dataset_dict.json").is_file():
        return "splits"
    return "dataset" if (path / "state.json").is_file() and (path / "dataset_info.json").is_file() else None


def _read_saved(path: Path, source: str, split: str, size: int) -> Iterator[Table]:
    try:
        if saved_kind(path) == "splits":
            splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
            if split not in splits:
                raise DataError(f"{source} has no split {split!r}: its splits are {', '.join(splits)}")
            path = path / split
        data = datasets.load_from_disk(str(path))
    except DataError:
        raise
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source} cannot be read as what save_to_disk wrote: {_cause(error)}: save it again") from error
    return _tables(data, source, split, size)


def _has_card(path: Path) -> bool:
    """Whether a folder says itself which files are which split (the hub's own layout)."""
    card = path / "README.md"
    text = card.read_text(errors="replace") if card.is_file() else ""
    return text.startswith("---") and "configs:" in text


def files_of(path: Path, split: str) -> tuple[list[Path], bool]:
    """The data files of a folder, of one kind each and in order, and whether their names say the split.

    Files or folders named by a split (`train.jsonl`, `train-00000-of-00002.parquet`, `train/…`) are that split's alone.
    """
    try:
        files = sorted(
            file
            for file in path.rglob("*")
            if suffix_of(file) in READERS and file.is_file() and "/." not in f"/{file.relative_to(path)}"
        )
    except OSError as error:
        raise DataError(
            f"{path} cannot be looked through ({error.strerror}: {error.filename}): name a folder of data"
        ) from error
    data = [file for file in files if file.name not in _FACTS]
    named = {file: _split_of(file.relative_to(path)) for file in data}
    if any(named.values()):
        return [file for file in data if named[file] == split], True
    return data, False


_FACTS = ("dataset_infos.json", "dataset_info.json", "state.json", "config.json")
"""Files of a folder of data that hold none."""
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


NOT_READ = (".zst", ".xz", ".bz2", ".lz4", ".zip", ".tar", ".tgz", ".7z", ".xlsx", ".xls", ".ods", ".feather", ".orc", ".avro")
"""What data may lie in that is not read."""


def _not_read(path: Path) -> list[str]:
    """Files of a folder that may hold data, and are of a kind that is not read."""
    files = (file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in NOT_READ)
    return sorted(str(file) for file in files if "/." not in f"/{file}")


def _say_left_out(path: Path, source: str, files: Sequence[Path], named: bool) -> None:
    """Warns of files that may hold data, and are not read: of no split where others name one, or of no known kind."""
    others = [file for file in path.rglob("*") if suffix_of(file) in READERS and file.name not in _FACTS] if named else []
    without = [file.relative_to(path) for file in others if file not in files]
    out = sorted(str(file) for file in without if _split_of(file) is None and "/." not in f"/{file}") + _not_read(path)
    if out:
        log.warning("%s: %s are not read: %s", source, few(out), f"files of a split and {', '.join(READERS)} (.gz) are")


def _split_of(file: Path) -> str | None:
    words = [*file.parts[:-1], file.name.split(".")[0]]
    return next((SPLITS[key] for word in words if (key := word.lower().split("-")[0].split("_")[0]) in SPLITS), None)


def _read_folder(path: Path, source: str, split: str, size: int) -> Iterator[Table]:
    files, named = files_of(path, split)
    if not files:
        raise DataError(f"{source} has no files of the split {split!r}" if named else f"{source} holds no data files")
    _say_left_out(path, source, files, named)
    if len(files) == 1:
        return read_chunks(files[0], str(files[0]), size)
    return _read_files(path, source, files, size)


def _read_files(path: Path, source: str, files: Sequence[Path], size: int) -> Iterator[Table]:
    def of_files() -> Iterator[Table]:
        for file in files:
            start = 0
            for table in read_chunks(file, str(file), size):
                numbers = range(start, start := start + len(table))
                yield replace(table, source=str(file.relative_to(path)), numbers=numbers)

    for table in regrouped(of_files(), size, where=True):
        yield replace(table, source=source)


# ---------------------------------------------------------------- the hub


def _read_hub(source: str, split: str, config: str | None, size: int, streaming: bool) -> Iterator[Table]:
    try:
        data: Any = datasets.load_dataset(source, config, split=split, streaming=streaming)
    except Exception as error:
        raise _no_data_set(source, split, error) from error
    return _streamed(data, source, split, size) if streaming else _tables(data, source, split, size)


def _no_data_set(source: str, split: str, error: Exception) -> DataError:
    offline = "HF_HUB_OFFLINE is set, so only the local cache was searched; " if datasets.config.HF_HUB_OFFLINE else ""
    return DataError(
        f"no data set {source!r} (split {split!r}): {offline}give the path of a local "
        f"{', '.join(READERS)} file, or fetch the data set into the cache where there is internet. "
        f"Cause: {_cause(error)}"
    )


def _streamed(data: Any, source: str, split: str, size: int) -> Iterator[Table]:
    """The rows of an IterableDataset."""
    rows = iter(data)
    some = False
    while True:
        try:
            chunk = [without_holes(row) for row in islice(rows, size)]
        except Exception as error:
            raise _no_data_set(source, split, error) from error
        if not chunk:
            break
        some = True
        yield Table(source, list(dict.fromkeys(name for row in chunk for name in row)), chunk)
    if not some:
        raise _no_rows(source, split)


def _tables(data: Any, source: str, split: str, size: int) -> Iterator[Table]:
    """The rows of a Dataset, which lies on disk."""
    if len(data) == 0:
        raise _no_rows(source, split)
    for first in range(0, len(data), size):
        some = data.select(range(first, min(first + size, len(data))))
        yield Table(source, list(data.column_names), [without_holes(row) for row in some.to_list()])


def _no_rows(source: str, split: str) -> DataError:
    return DataError(f"{source} ({split}) has no rows: give a data set or file with at least one sample")


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
