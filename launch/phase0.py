"""Phase 0, safety tuning (optional): deepspeed launch/phase0.py --model_name … --safety_data …"""

from warp_ds.flags.arguments import SafetyTuningArguments
from warp_ds.launch.launcher import launch
from warp_ds.phases.training import run_safety_tuning

if __name__ == "__main__":
    launch(SafetyTuningArguments, run_safety_tuning, training=True)
