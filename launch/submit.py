"""Queues phases one after another: python launch/submit.py --phases 1,2,3 --nodes 4 --gpus_per_node 8 --model_name …"""

import sys

from warp_ds.launch.submit import main

if __name__ == "__main__":
    sys.exit(main())
