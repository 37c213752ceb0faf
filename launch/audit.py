"""Which task samples cost safety: deepspeed launch/audit.py --model_name … --utility_data … (the newest masks are used)."""

from warp_ds.launch.launcher import main

if __name__ == "__main__":
    main("audit")
