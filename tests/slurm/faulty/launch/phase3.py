"""launch/phase3.py with a fault in it, for the templates: WARP_DS_ROOT names this directory's parent."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import faults  # noqa: E402

faults.arm()
runpy.run_path(str(Path(__file__).parents[4] / "launch" / "phase3.py"), run_name="__main__")
