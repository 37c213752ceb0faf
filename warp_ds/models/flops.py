"""What a token costs a model in operations, and what a device can do at most."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from warp_ds.models.targets import beside_text

PEAKS = {
    r"\bGB200\b": 2500e12,
    r"\bB200\b": 2250e12,
    r"\bH100 PCIe\b": 756e12,
    r"\bH[12]00\b(?! NVL)": 989e12,
    r"\bA100\b": 312e12,
    r"\bA40\b": 149.7e12,
    r"\bA10\b": 125e12,
    r"\bL40S\b": 362e12,
    r"\bL40\b": 181e12,
    r"\bL4\b": 121e12,
    r"\bMI300X\b": 1307e12,
}
"""Name of a device, as torch has it -> operations a second of dense bf16 products; fp16 is as fast on all of them. The first
that matches counts.

By data sheets as others quote them, half of the figure with sparsity where that alone is given: NVIDIA's of A100, A10, A40,
L4, L40, L40S, H100 (SXM, PCIe) and H200, its Blackwell data sheet (5 and 4.5 PFLOPS with sparsity for GB200's and HGX's
B200); AMD's of CDNA 3 (304 units, 2048 operations a clock, 2.1 GHz). What could not be confirmed is left out: H100 NVL,
H200 NVL, GH200, B100, B300, A30, the export versions (A800, H800, H20), MI325X.
"""


def device_peak(dtype: torch.dtype, name: str | None = None) -> float | None:
    """Operations a second of this rank's GPU at most; None on a CPU, for an unknown GPU or a part of one, and in fp32."""
    if name is None:
        name = torch.cuda.get_device_name() if torch.cuda.is_initialized() else ""
    if dtype not in (torch.bfloat16, torch.float16) or "MIG" in name:
        return None
    return next((peak for pattern, peak in PEAKS.items() if re.search(pattern, name)), None)


def active_parameters(model: nn.Module) -> int:
    """N: the parameters that one token of text is multiplied with.

    All but a look-up table of input embeddings (tied ones count: they make the logits) and what a model has beside its text
    decoder, and of the experts of a mixture the share that a token is routed to. ZeRO-3 partitions count whole.
    """
    routed, experts = routing(model.config)
    share, beside = routed / experts, beside_text(model)
    embeddings = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    head = model.get_output_embeddings()  # type: ignore[operator]
    looked_up = None if head is None or head.weight is embeddings else embeddings
    total = 0.0
    for name, param in model.named_parameters():  # a tied one comes once
        if param is not looked_up and name not in beside:
            total += getattr(param, "ds_numel", param.numel()) * (share if ".experts." in name else 1.0)
    return round(total)


def routing(config: Any) -> tuple[int, int]:
    """(experts that a token is routed to, experts of a block) of a model's configuration; (1, 1) where it has none."""
    text = config.get_text_config()
    experts = next((n for name in _EXPERTS if (n := _of(text, name))), 1)
    return min(experts, next((n for name in _ROUTED if (n := _of(text, name))), 1)), experts


#: What transformers' configurations call the two numbers, in 5.23.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_ROUTED = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k")


def _of(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None


def training_flops(parameters: int, tokens: int) -> float:
    """6 N a token (Kaplan et al. 2020): 2 N forward, 4 N backward. Attention's own products, the rotation, padding and what
    gradient checkpointing computes again are not in it, and parameters that do not train count as if they did."""
    return 6.0 * parameters * tokens
