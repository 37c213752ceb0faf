"""``python -m warp_ds.cli`` of version 0.1: now ``python -m warp_ds``."""

from __future__ import annotations

import sys

from warp_ds.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
