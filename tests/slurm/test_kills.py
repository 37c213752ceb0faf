"""kill -9 at thirty random moments: see thirty_kills.py, which has a process of its own for the environment of its ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_thirty_kills() -> None:
    subprocess.run([sys.executable, str(Path(__file__).with_name("thirty_kills.py"))], check=True)
