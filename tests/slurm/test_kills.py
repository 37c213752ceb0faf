"""kill -9 at thirty random moments: see thirty_kills.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from thirty_kills import run_kills


@pytest.mark.slow
def test_thirty_kills(tmp_path: Path) -> None:
    assert run_kills(tmp_path, 30) == 30
