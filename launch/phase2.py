"""Phase 2, importance: deepspeed launch/phase2.py --model_name … (the newest basis under --output_dir is used)."""

from warp_ds.flags.arguments import ImportanceArguments
from warp_ds.launch.launcher import launch
from warp_ds.phases.importance import run_importance

if __name__ == "__main__":
    launch(ImportanceArguments, run_importance)
