"""Phase 3, training: deepspeed launch/phase3.py --model_name … (any TrainingArguments flag passes through)."""

from warp_ds.flags.arguments import TrainArguments
from warp_ds.launch.launcher import launch
from warp_ds.phases.training import run_training

if __name__ == "__main__":
    launch(TrainArguments, run_training, training=True)
