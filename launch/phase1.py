"""Phase 1, basis: deepspeed launch/phase1.py --model_name … --safety_data … (or torchrun, srun, plain python)."""

from warp_ds.launch.launcher import main

if __name__ == "__main__":
    main("phase1")
