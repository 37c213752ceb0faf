"""Evaluation: deepspeed launch/evaluate.py --model_name checkpoints/phase3_latest/model --harmless_data …"""

from warp_ds.config import EvaluateArguments
from warp_ds.phases.evaluate import run_evaluation
from warp_ds.phases.launcher import launch

if __name__ == "__main__":
    launch(EvaluateArguments, run_evaluation)
