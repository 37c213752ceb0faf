"""Which tests may run side by side (pytest-xdist): files may, but what one throw-away Slurm runs stays in one process."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # processes beside one another; results may not hang on the number of threads


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A file's tests share models and process groups, those on Slurm a cluster: each is one group (--dist loadgroup)."""
    for item in items:
        room = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group("slurm" if room == "slurm" else item.path.name))
