"""Phase 1, basis: deepspeed launch/phase1.py --model_name … --safety_data … (or torchrun, srun, plain python)."""

from warp_ds.config import BasisArguments
from warp_ds.phases.basis import run_basis
from warp_ds.phases.launcher import launch

if __name__ == "__main__":
    launch(BasisArguments, run_basis)
