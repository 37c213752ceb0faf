"""The directory of a saved model: made aside, and put in its place whole."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from warp_ds.cluster.consensus import on_every_rank_or_none
from warp_ds.cluster.processes import rank
from warp_ds.store.held import check_there

WEIGHT_FILE = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")
_MARKS = ("config.json", "adapter_config.json")


@contextmanager
def replaced(target: Path) -> Iterator[Path]:
    """A block that writes a model into the directory it is given, which then becomes ``target``, in one step. Collective.

    Where the block fails, on every rank or none, ``target`` stays as it is.
    """
    aside = target.with_name(f".{target.name}.saving")
    try:
        with on_every_rank_or_none(f"saving to {target}"):
            if rank() == 0:
                _prepare(target, aside)
        yield aside
        with on_every_rank_or_none(f"saving to {target}"):
            if rank() == 0:
                _keep_other_files(target, aside)
                _sync_tree(aside)
                _put_in_place(aside, target)
    except Exception:
        # Every rank is here or none, and none writes any more.
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _prepare(target: Path, aside: Path) -> None:
    check_there(target)
    previous = target.with_name(f".{target.name}.previous")
    if previous.exists():
        # A save was killed between the two renames of _put_in_place.
        if target.exists():
            shutil.rmtree(previous)
        else:
            previous.rename(target)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: give the directory to save the model in.")
    if target.is_dir() and any(target.iterdir()) and not any((target / name).exists() for name in _MARKS):
        raise ValueError(f"{target} holds files but no model (no {' nor '.join(_MARKS)}): give a new or empty directory.")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def check_space(directory: Path, needed: int) -> None:
    """OSError where ``needed`` bytes do not fit."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(
            f"the model takes {needed / 1e9:.3f} GB, but {directory.parent} has {free / 1e9:.3f} GB free: "
            "free some, or save elsewhere. Nothing was replaced."
        )


def _keep_other_files(target: Path, aside: Path) -> None:
    """Bring along, as hard links, what in the old directory is no weight file and has no successor in the new one."""
    if not target.is_dir():
        return
    for entry in target.iterdir():
        if (aside / entry.name).exists() or WEIGHT_FILE.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, aside / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(entry, aside / entry.name)


def _link(source: Any, destination: Any) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _sync_tree(directory: Path) -> None:
    for path in [directory, *directory.rglob("*")]:
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _put_in_place(aside: Path, target: Path) -> None:
    """``aside`` becomes ``target``: in one atomic exchange where the file system has it."""
    if not target.exists():
        aside.rename(target)
    elif _exchange(aside, target):
        shutil.rmtree(aside)
    else:
        previous = target.with_name(f".{target.name}.previous")
        target.rename(previous)
        aside.rename(target)
        shutil.rmtree(previous)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Linux renameat2 with RENAME_EXCHANGE; False where the system or the file system does not know it."""
    at_cwd, exchange = -100, 2
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)
