"""Ablations: deepspeed launch/sweep.py --keep_ratios 0.01,0.1,0.4 --bases identity,random --learning_rates 1e-5 …"""

from warp_ds.launch.launcher import launch
from warp_ds.phases.sweep import SweepArguments, run_sweep

if __name__ == "__main__":
    launch(SweepArguments, run_sweep, training=True)
