"""Phase 0, safety tuning (optional): deepspeed launch/phase0.py --model_name … --safety_data …"""

from warp_ds.launch.launcher import main

if __name__ == "__main__":
    main("phase0")
