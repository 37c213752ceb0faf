"""Phase 3, training: deepspeed launch/phase3.py --model_name … (any TrainingArguments flag passes through)."""

from warp_ds.launch.launcher import main

if __name__ == "__main__":
    main("phase3")
