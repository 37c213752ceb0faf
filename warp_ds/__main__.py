"""``python -m warp_ds``, for launchers: torchrun -m warp_ds phase3 …, deepspeed --module warp_ds phase3 …"""

import sys

from warp_ds.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
