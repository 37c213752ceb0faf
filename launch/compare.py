"""Arms side by side: deepspeed launch/compare.py --arms before,full,layers,original,rotated --learning_rates 1e-5,5e-5 …"""

from warp_ds.flags.arguments import CompareArguments
from warp_ds.launch.launcher import launch
from warp_ds.phases.compare import run_compare

if __name__ == "__main__":
    launch(CompareArguments, run_compare, training=True)
