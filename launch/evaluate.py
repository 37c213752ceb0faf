"""Evaluation: deepspeed launch/evaluate.py --model_name checkpoints/phase3_latest/model --harmless_data …"""

from warp_ds.flags.arguments import EvaluateArguments
from warp_ds.launch.launcher import launch
from warp_ds.phases.evaluate import run_evaluation

if __name__ == "__main__":
    launch(EvaluateArguments, run_evaluation)
