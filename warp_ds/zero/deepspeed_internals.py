"""Every private name of DeepSpeed that this project uses. Checked on deepspeed 0.19.8.

``tests/test_deepspeed_internals.py`` fails loudly when one of them changes.
"""

from __future__ import annotations


def disable_shm_collective() -> None:
    """Keeps DeepSpeed from compiling ops/comm/shm.cpp at the first CPU start (comm/torch.py, ``build_shm_op``)."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
