"""Phase 2, importance: deepspeed launch/phase2.py --model_name … (the newest basis under --output_dir is used)."""

from warp_ds.config import ImportanceArguments
from warp_ds.phases.importance import run_importance
from warp_ds.phases.launcher import launch

if __name__ == "__main__":
    launch(ImportanceArguments, run_importance)
