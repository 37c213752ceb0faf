"""Phase 1, basis: deepspeed launch/phase1.py --model_name … --safety_data … (or torchrun, srun, plain python)."""

from warp_ds.flags.arguments import BasisArguments
from warp_ds.launch.launcher import launch
from warp_ds.phases.basis import run_basis

if __name__ == "__main__":
    launch(BasisArguments, run_basis)
