"""One throw-away cluster for all tests here; they are skipped, by name, where Slurm is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from chain import Reference, make_inputs, undisturbed  # noqa: E402
from ranks import run_ranks  # noqa: E402
from throwaway import ThrowAwaySlurm, missing_programs  # noqa: E402


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThrowAwaySlurm]:
    missing = missing_programs()
    if missing:
        pytest.skip(f"Slurm is not installed ({', '.join(missing)}): apt-get install slurm-wlm munge")
    with ThrowAwaySlurm(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def reference(slurm: ThrowAwaySlurm, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The inputs, and what an undisturbed chain makes of them in one process without Slurm."""
    root = make_inputs(tmp_path_factory.mktemp("chain"))
    return Reference(root, run_ranks(1, undisturbed, root, root / "undisturbed")[0])
