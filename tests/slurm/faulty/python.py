"""Python with a fault in it, for submitit's jobs and the templates: runs `-u -m MODULE ARGUMENTS`."""

import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import faults  # noqa: E402

faults.arm()
at = sys.argv.index("-m")
module, sys.argv = sys.argv[at + 1], sys.argv[at + 1 :]
runpy.run_module(module, run_name="__main__", alter_sys=True)
