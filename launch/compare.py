"""Arms side by side: deepspeed launch/compare.py --arms before,full,layers,original,rotated --learning_rates 1e-5,5e-5 …"""

from warp_ds.launch.launcher import main

if __name__ == "__main__":
    main("compare")
