"""A LoRA adapter trained under ZeRO-3, plain and kept out of frozen directions: time and memory of a step, in one run.

    python benchmarks/adapter_step.py --ranks 2                        # the small case, on the CPU
    python benchmarks/adapter_step.py --device cuda --ranks 1 --hidden 4096 --ffn 14336 --layers 2 --dtype bfloat16

As benchmarks/masked_step.py measures: medians of the ratios of optimizer steps run in turn, peaks of fresh processes over what
they held before the model was built. A tenth of the columns of each layer is frozen. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import masked_step as base
import step_artefacts as artefacts
import torch
from processor import processor


def parse() -> argparse.Namespace:
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument("--lora_r", type=int, default=16)
    own.add_argument("--lora_alpha", type=int, default=32)
    own.add_argument("--lora_dropout", type=float, default=0.0)
    lora, rest = own.parse_known_args()
    given, sys.argv = sys.argv, [sys.argv[0], "--variants", "plain,masked", *rest]
    a = base.parse()
    sys.argv = given
    a.mask_unit = "column"
    return argparse.Namespace(**vars(a), **vars(lora))


def leading_columns(m: int, n: int, r: int, keep_ratio: float, seed: int, device: str) -> torch.Tensor:
    """The mask [m, n] that freezes the first tenth of the columns."""
    return (torch.arange(n, device=device) < round(keep_ratio * n)).expand(m, n)


class AdapterTrainer(base.Trainer):
    """One variant's engine: LoRA on the target layers, with or without the constraint."""

    def __init__(self, a: argparse.Namespace, variant: str, root: Path):
        import deepspeed
        from peft import LoraConfig, get_peft_model

        import warp_ds

        self.a, self.variant, self.protection = a, variant, None
        model = artefacts.make_model(a)
        names = [name for name, *_ in artefacts.targets(a, model)]
        lora = LoraConfig(r=a.lora_r, lora_alpha=a.lora_alpha, lora_dropout=a.lora_dropout, target_modules=names)
        adapted: Any = get_peft_model(model, lora, autocast_adapter_dtype=False)
        trained = [p for p in adapted.parameters() if p.requires_grad]
        config = {
            "train_micro_batch_size_per_gpu": a.micro_batch,
            "gradient_accumulation_steps": a.accumulation,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 3, "overlap_comm": a.device == "cuda"},
            "bf16": {"enabled": a.dtype == "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=a.device == "cuda")
        self.engine, *_ = deepspeed.initialize(model=adapted, optimizer=optimizer, config=config)
        kind, _, placement = variant.partition(":")
        if kind == "masked":
            self.protection = warp_ds.protect(self.engine, root / "basis", root / "masks", basis_placement=placement)
        generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
        self.batch = torch.randint(0, a.vocab, (a.micro_batch, a.tokens), generator=generator).to(a.device)


base.Trainer, artefacts.random_mask = AdapterTrainer, leading_columns


def main() -> None:
    a = parse()
    if a.worker:
        base.worker(a, Path(os.environ["BENCHMARK_ROOT"]))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        artefacts.write_artefacts(a, root)
        timings = base.run_workers(a, "time", root)
        names = a.variants.split(",")
        memory = {} if a.no_memory else {n: max(r["bytes"] for r in base.run_workers(a, f"memory:{n}", root)) for n in names}
    seconds, (plain, masked) = timings[0]["seconds"], names
    costs = [r["predicted"][masked] for r in timings]
    result: dict[str, Any] = {
        **processor(),
        **({} if a.device == "cpu" else {"gpu": torch.cuda.get_device_name()}),
        **{name: getattr(a, name) for name in ("device", "ranks", "hidden", "ffn", "layers", "dtype", "layer_type", "lora_r")},
        **{name: getattr(a, name) for name in ("micro_batch", "tokens", "accumulation", "keep_ratio", "steps")},
        "basis_placement": costs[0]["placement"],
        "plain_seconds": statistics.median(seconds[plain]),
        "time_ratio": base.median_ratio(seconds[masked], seconds[plain]),
        "rotate_seconds": max(r["rotate"][masked] for r in timings),
        "rotate_bytes": [r["sent"][masked] for r in timings],
        "rotate_bytes_predicted": costs[0]["sent"],
        "basis_bytes": max(r["bases"][masked] for r in timings),
        "held_bytes_predicted": costs[0]["held"],
    }
    if memory:
        result |= {"plain_bytes": memory[plain], "masked_bytes": memory[masked]}
        result["memory_ratio"] = memory[masked] / memory[plain]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
