"""What a figure was measured on: it goes into a benchmark's last line, since ratios differ by make."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

#: By which products run at another rate.
INSTRUCTIONS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve", "sve_bf16")


def processor() -> dict[str, Any]:
    """The processor's make, its instruction sets that matter to products, and cores, under keys of their own."""
    known: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "processor": str(known.get("cpu_name") or platform.processor() or platform.machine()).strip(),
        "instructions": [name for name in INSTRUCTIONS if known.get(name)],
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
