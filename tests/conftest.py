"""For every test process: one thread each, since processes stand beside one another and no result may hang on threads."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
