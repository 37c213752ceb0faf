"""Evaluation: deepspeed launch/evaluate.py --model_name checkpoints/phase3_latest/model --harmless_data …"""

from warp_ds.launch.launcher import main

if __name__ == "__main__":
    main("evaluate")
