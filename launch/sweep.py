"""Ablations: deepspeed launch/sweep.py --keep_ratios 0.01,0.1,0.4 --bases identity,random --learning_rates 1e-5 …"""

from warp_ds.launch.launcher import main

if __name__ == "__main__":
    main("sweep")
