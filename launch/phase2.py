"""Phase 2, importance: deepspeed launch/phase2.py --model_name … (the newest basis under --output_dir is used)."""

from warp_ds.launch.launcher import main

if __name__ == "__main__":
    main("phase2")
