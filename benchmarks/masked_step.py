"""Plain ZeRO-3 fine-tuning, the masked step on one side and both, and modules that hold C, U, M: time and memory, in one run.

    python benchmarks/masked_step.py --ranks 2                         # the small case, on the CPU
    python benchmarks/masked_step.py --device cuda --ranks 1 --hidden 4096 --ffn 11008 --layers 1 --dtype bfloat16
    python benchmarks/masked_step.py --ranks 2 --variants plain,masked --basis_placement each    # bytes and time of each
    python benchmarks/masked_step.py --ranks 1 ... --dtype bfloat16 --sheet "NVIDIA H200"    # by its data sheet, nothing is run

Beside each ratio stands what arithmetic makes of it: the plain step's seconds, the rotation's operations, how many products a
way takes for one, and what this machine does of each in a second (one product each is measured); bytes of bases and masks.
Times are medians of the ratios of optimizer steps run in turn (plain, masked, modules, plain, ...). Memory is each
variant's peak alone in fresh processes, over what the process held before the model was built: torch's allocator on a
GPU, the resident set on a CPU. The mask's column profile (share frozen by eigen-direction, from the largest
eigenvalue to the smallest, in 20 bins) was measured on the demo's model. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from processor import processor
from rates import WAYS, best_seconds, measured_rates, sheet_rates, way_of
from ratios import memory_ratio, rotating_seconds, share_within, step_ratio
from step_artefacts import INPUTS, MODULES, make_model, random_basis, random_mask, targets, write_artefacts
from torch import nn

VARIANTS = ("plain", "masked", "both", "modules")
RATIOS = ("time_ratio", "memory_ratio")
BAR = 1.10  # of memory, on one GPU: which share of the bases' bytes it leaves is printed
PLACEMENTS = ("auto", "replicated", "sharded", "owner")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2816)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--kv_heads", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--layer_type", default="attn_q,attn_k,attn_v,ffn_up,ffn_down")
    parser.add_argument("--micro_batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128, help="per sample")
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--keep_ratio", type=float, default=0.1)
    parser.add_argument("--rank_share", type=float, default=1.0, help="stored columns of each basis, as a share of n")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--products",
        default="auto",
        choices=["auto", "exact", "split", "tf32", "each"],
        help="of bf16 models; each: a masked variant for exact, split and tf32, in turn with the others",
    )
    parser.add_argument(
        "--grad_accum_dtype",
        default="fp32",
        choices=["fp32", "bf16"],
        help="what every variant sums micro-batches in; bf16, of bf16 models, is rotated as it is",
    )
    parser.add_argument("--train_scope", default="all", choices=["all", "warp"])
    parser.add_argument(
        "--basis_placement",
        default="auto",
        choices=[*PLACEMENTS, "each"],
        help="each: a masked variant for every placement, in turn with the others",
    )
    parser.add_argument("--steps", type=int, default=9, help="timed optimizer steps of each variant")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--no_memory", action="store_true", help="leave the memory runs out")
    parser.add_argument("--sheet", metavar="GPU", help="print what this GPU's data sheet makes of the shapes, and end")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.basis_placement == "each":
        a.variants = a.variants.replace("masked", ",".join(f"masked:{placement}" for placement in PLACEMENTS[1:]))
    else:
        ways = WAYS if a.products == "each" else (a.products,)
        a.variants = a.variants.replace("masked", ",".join(f"masked:{a.basis_placement}:{way}" for way in ways))
    if a.products != "auto" and a.dtype != "bfloat16":
        parser.error("--products is of bf16 models: give --dtype bfloat16")
    if a.grad_accum_dtype != "fp32" and a.dtype != "bfloat16":
        parser.error("--grad_accum_dtype bf16 is of bf16 models: give --dtype bfloat16")
    if a.products == a.basis_placement == "each":
        parser.error("--products each and --basis_placement each: one of them")
    return a


# ---------------------------------------------------------------- what every variant trains


class RotatedLinear(nn.Module):
    """What the original does: the module holds C, U and M, and forms the weight in every forward."""

    def __init__(self, weight: torch.Tensor, u: torch.Tensor, frozen: torch.Tensor):
        super().__init__()
        self.c = nn.Parameter((weight.float() @ u.float()).to(weight.dtype))
        self.register_buffer("u", u.to(weight.dtype))
        self.register_buffer("mask", frozen)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        c = torch.where(self.mask, self.c.detach(), self.c)
        return nn.functional.linear(x, c @ self.u.T)


class Trainer:
    """One variant's engine and one optimizer step of it."""

    def __init__(self, a: argparse.Namespace, variant: str, root: Path):
        import deepspeed

        import warp_ds

        self.a, self.variant = a, variant
        model = make_model(a)
        if variant == "modules":
            for name, _, i, module in targets(a, model):
                m, n = module.weight.shape
                u, frozen = random_basis(n, n, 7 * i + n, a.device), random_mask(m, n, n, a.keep_ratio, i, a.device)
                model.set_submodule(name, RotatedLinear(module.weight.data, u, frozen))
        if a.train_scope == "warp":
            what = "c" if variant == "modules" else "weight"
            kinds = a.layer_type.split(",")
            wanted = {f"model.layers.{i}.{MODULES[kind]}.{what}" for i in range(a.layers) for kind in kinds}
            for name, p in model.named_parameters():
                p.requires_grad_(name in wanted)
        config = {
            "train_micro_batch_size_per_gpu": a.micro_batch,
            "gradient_accumulation_steps": a.accumulation,
            "gradient_clipping": 1.0,
            "zero_optimization": {"stage": 3, "overlap_comm": a.device == "cuda"},
            "bf16": {"enabled": a.dtype == "bfloat16"},
            "zero_allow_untested_optimizer": True,
            "data_types": {"grad_accum_dtype": a.grad_accum_dtype},
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=a.device == "cuda")
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.protection = None
        kind, placement, way = [*variant.split(":"), "auto", "auto"][:3]
        if kind in ("masked", "both"):
            root = root / kind
            how = {"basis_placement": placement, "products": a.products if way == "auto" and a.products != "each" else way}
            self.protection = warp_ds.protect(self.engine, root / "basis", root / "masks", **how)
        generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
        self.batch = torch.randint(0, a.vocab, (a.micro_batch, a.tokens), generator=generator).to(a.device)

    def step(self) -> float:
        """Seconds of one optimizer step: all micro-batches and the update."""
        synchronize(self.a)
        start = time.perf_counter()
        for _ in range(self.a.accumulation):
            loss = self.engine(input_ids=self.batch, labels=self.batch).loss
            self.engine.backward(loss)
            self.engine.step()
        synchronize(self.a)
        return time.perf_counter() - start


def synchronize(a: argparse.Namespace) -> None:
    from warp_ds.cluster import processes

    if a.device == "cuda":
        torch.cuda.synchronize()
    processes.barrier()


# ---------------------------------------------------------------- workers


def held(a: argparse.Namespace) -> int:
    """Bytes that this process holds now."""
    if a.device == "cuda":
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak(a: argparse.Namespace) -> int:
    if a.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(a: argparse.Namespace, root: Path) -> None:
    from warp_ds.cluster import processes

    processes.init_distributed(a.device, 600)
    if a.worker.startswith("memory:"):
        before = held(a)
        trainer = Trainer(a, a.worker.removeprefix("memory:"), root)
        for _ in range(2):
            trainer.step()
        report = {"bytes": peak(a) - before}
    else:
        names = a.variants.split(",")
        trainers = {name: Trainer(a, name, root) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        masked = {name: trainers[name].protection for name in names if trainers[name].protection is not None}
        rotate: dict[str, list[float]] = {name: [] for name in masked}
        sent: dict[str, list[int]] = {name: [] for name in masked}
        for index in range(a.steps + 2):
            for name in names:
                took = trainers[name].step()
                metrics = masked[name].metrics() if name in masked else None
                if index >= 2:
                    seconds[name].append(took)
                    if metrics is not None:
                        rotate[name].append(metrics.rotate_seconds)
                        sent[name].append(metrics.rotate_bytes)
        rates, bandwidth = measured(a, next(iter(masked.values())).layers) if masked else (None, 0.0)
        report = {
            "seconds": seconds,
            "tokens": a.micro_batch * a.tokens * a.accumulation * processes.world_size(),
            "rotate": {name: statistics.median(values) for name, values in rotate.items()},
            "sent": {name: statistics.median(values) for name, values in sent.items()},
            "bases": {name: bases_held(step.placement) for name, step in masked.items()},
            "predicted": {name: predicted(a, step, rates, bandwidth) for name, step in masked.items()},
            "rates": vars(rates) if rates else {},
        }
    reports = processes.all_gather_object(report)
    if processes.rank() == 0:
        Path(os.environ["BENCHMARK_OUT"]).write_text(json.dumps(reports))
    processes.shutdown()


def bases_held(placement: Any) -> int:
    """Bytes that this rank holds of bases between their uses."""
    if placement.name == "sharded":
        return sum(shard.piece.nbytes for shard in placement.pieces.values())
    return sum(rotation.nbytes for rotation in (placement.own if placement.name == "owner" else placement.whole).values())


def predicted(a: argparse.Namespace, step: Any, rates: Any, bandwidth: float) -> dict[str, Any]:
    """What arithmetic says of ``step``: its placement's cost, at this machine's measured rates."""
    from warp_ds.zero.placement_costs import CPU, GPU, Machine

    cost, placement = step.placement.cost(), step.placement
    rotating = rotating_seconds(cost.multiply_adds, way_of(placement.products, a.dtype, a.device), rates, cost.by_bf16)
    machine = Machine(cost.multiply_adds / rotating, bandwidth, (CPU if a.device == "cpu" else GPU).overlaps)
    masks = sum(layer.target.m * -(-layer.target.n // 8) for layer in step.layers) / placement.world_size
    return {"placement": placement.name, **vars(cost), "seconds": cost.seconds(machine), "masks": masks}


def measured(a: argparse.Namespace, layers: list[Any]) -> tuple[Any, float]:
    """Rates of products of a shard of the largest layer, and bytes a second of all-gathers of such shards, on all ranks at
    once. Collective."""
    from torch import distributed as dist

    from warp_ds.cluster import processes

    ranks = processes.world_size()
    layer = max(layers, key=lambda layer: layer.target.m * layer.target.n)
    shard = torch.randn(-(-layer.target.m // ranks) * layer.target.n, device=a.device)
    whole = shard.new_empty(ranks * shard.numel())
    wait = {"wait": lambda: synchronize(a)}
    sending = best_seconds(lambda: dist.all_gather_into_tensor(whole, shard), **wait)
    rates = measured_rates(a.device, -(-layer.target.m // ranks), layer.target.n, **wait)
    return rates, max(1, ranks - 1) * shard.nbytes / sending


def run_workers(a: argparse.Namespace, what: str, root: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    out = root / "report.json"
    processes = []
    for rank in range(a.ranks):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(a.ranks),
            "MASTER_PORT": str(port),
            "MASTER_ADDR": "127.0.0.1",
            "BENCHMARK_OUT": str(out),
            "BENCHMARK_ROOT": str(root),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // a.ranks))),
        }
        if a.device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        processes.append(
            subprocess.Popen(
                [sys.executable, sys.argv[0], *sys.argv[1:], "--worker", what],
                env=environment,
                stdout=subprocess.DEVNULL if rank else None,
            )
        )
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{what}: ranks ended with {codes}")
    return list(json.loads(out.read_text()))


def median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(x / y for x, y in zip(above, below, strict=True))


def main() -> None:
    a = parse()
    if a.worker:
        worker(a, Path(os.environ["BENCHMARK_ROOT"]))
        return
    if a.sheet:
        by_sheet(a)
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_artefacts(a, root / "masked")
        if "both" in a.variants.split(","):
            write_artefacts(a, root / "both", both=True)
        timings = run_workers(a, "time", root)
        timing = timings[0]
        names = a.variants.split(",")
        memory = (
            {} if a.no_memory else {name: max(r["bytes"] for r in run_workers(a, f"memory:{name}", root)) for name in names}
        )
    seconds = timing["seconds"]
    plain_flops = arithmetic(a) / a.ranks
    result: dict[str, Any] = {
        **processor(),
        **({} if a.device == "cpu" else {"gpu": torch.cuda.get_device_name()}),
        "device": a.device,
        "ranks": a.ranks,
        "hidden": a.hidden,
        "ffn": a.ffn,
        "layers": a.layers,
        "dtype": a.dtype,
        "layer_type": a.layer_type,
        "tokens_per_step": timing["tokens"],
        "keep_ratio": a.keep_ratio,
        "rank_share": a.rank_share,
        "basis_placement": a.basis_placement,
        "products": a.products,
        "grad_accum_dtype": a.grad_accum_dtype,
        "train_scope": a.train_scope,
        "steps": a.steps,
        "plain_seconds": statistics.median(seconds["plain"]),
        "rates": timing["rates"],
    }
    masked = [name for name in names if name.startswith("masked")]
    result["placements"] = {}
    for name in masked:
        about = of_variant(name, timings, plain_flops)
        way = name.split(":")[2] if a.products == "each" else ""
        result["placements"][f"{about.pop('placement')} {way}".strip()] = about
    if "both" in names:
        result["both"] = of_variant("both", timings, plain_flops)
        result["both_time_ratio"] = result["both"]["time_ratio"]
    if memory:
        result["plain_bytes"] = memory["plain"]
    if "both" in memory:
        result["both_memory_ratio"] = memory["both"] / memory["plain"]
    if "modules" in memory:
        result["module_memory_ratio"] = memory["modules"] / memory["plain"]
    for name, found in zip(masked if memory else [], result["placements"].values(), strict=False):
        found["memory_ratio"] = memory[name] / memory["plain"]
        found["memory_ratio_without_basis"] = (memory[name] - found["basis_bytes"]) / memory["plain"]
        found["memory_ratio_predicted"] = memory_ratio(memory["plain"], found["held_bytes_predicted"])
        found["bases_share_within_bar"] = share_within(BAR, found["memory_ratio"], found["memory_ratio_without_basis"])
    if masked:
        # Of the first placement, beside what the other variants have.
        result |= next(iter(result["placements"].values()))
    if "modules" in names:
        result["module_time_ratio"] = median_ratio(seconds["modules"], seconds["plain"])
        if masked:
            result["overhead_share_of_modules"] = (result["time_ratio"] - 1) / (result["module_time_ratio"] - 1)
    for name, found in result["placements"].items():
        said = (f"{key} {found[key]:.3f} (arithmetic {found[f'{key}_predicted']:.3f})" for key in RATIOS if key in found)
        print(f"{name}:", ", ".join(said))
    print(
        f"arithmetic: the rotation is {result.get('rotation_flops_share', math.nan):.3f} of the plain step's operations "
        f"on each rank (2 products of every target layer's shard with its basis, once a step)"
    )
    print(json.dumps(result))


def of_variant(name: str, timings: list[dict[str, Any]], plain_flops: float) -> dict[str, Any]:
    """What a protected variant took, beside what arithmetic says."""
    seconds, costs = timings[0]["seconds"], [r["predicted"][name] for r in timings]
    rotating = max(cost["seconds"] for cost in costs)
    return {
        "placement": costs[0]["placement"],
        "time_ratio": median_ratio(seconds[name], seconds["plain"]),
        "time_ratio_predicted": step_ratio(statistics.median(seconds["plain"]), rotating),
        "rotate_seconds": max(r["rotate"][name] for r in timings),
        "rotate_seconds_predicted": rotating,
        "rotate_bytes": [r["sent"][name] for r in timings],
        "rotate_bytes_predicted": costs[0]["sent"],
        "basis_bytes": max(r["bases"][name] for r in timings),
        "held_bytes_predicted": max(cost["held"] + cost["masks"] for cost in costs),
        "rotation_flops_share": 2 * costs[0]["multiply_adds"] / plain_flops,
    }


def by_sheet(a: argparse.Namespace) -> None:
    """Prints the step's ratio for each way at the rates of a data sheet. Were plain passes and products to reach the same
    share of theirs, whatever that is, the ratio would be this."""
    from warp_ds.method.rotation import Rotation
    from warp_ds.store.layers import TargetLayer
    from warp_ds.zero.placement_costs import FP32, Dtypes
    from warp_ds.zero.placements import place_bases

    with torch.device("meta"):
        model = make_model(argparse.Namespace(**{**vars(a), "device": "meta"}))
    layers, bases = [], {}
    for name, kind, i, module in targets(a, model):
        m, n = module.weight.shape
        layers.append(TargetLayer(name, i, kind, m, n))
        bases[name] = (f"{i} {INPUTS.get(kind, kind)}", Rotation.held_bytes(n, max(1, round(a.rank_share * n))))
    placement, rates = "auto" if a.basis_placement == "each" else a.basis_placement, sheet_rates(a.sheet)
    costs = {
        name: place_bases(placement, layers, bases, a.ranks, dtypes=dtypes)[0].cost()
        for name, dtypes in {"split": FP32, "split, bf16 gradients": Dtypes(torch.bfloat16, torch.bfloat16)}.items()
    }
    plain = arithmetic(a) / a.ranks / (rates.bf16 if a.dtype == "bfloat16" else rates.fp32)
    ratios = {}
    for way in WAYS if a.dtype == "bfloat16" else WAYS[:1]:
        for name, cost in costs.items() if way == "split" else [(way, costs["split"])]:
            rotating = rotating_seconds(cost.multiply_adds, way_of(way, a.dtype, "cuda"), rates, cost.by_bf16)
            ratios[name] = round(step_ratio(plain, rotating), 3)
            print(f"{name}: {ratios[name]} (plain {plain:.4f} s, rotating {rotating:.4f} s)")
    print(json.dumps({"gpu": a.sheet, "rates": vars(rates), "bases_bytes": costs["split"].held, "time_ratio_by_sheet": ratios}))


def arithmetic(a: argparse.Namespace) -> float:
    """Operations of a plain optimizer step over all ranks: 6 a parameter and token in products, attention aside."""
    linear = a.layers * (a.hidden * a.hidden * 2 + 2 * a.hidden * a.hidden * a.kv_heads / a.heads + 3 * a.hidden * a.ffn)
    tokens = a.micro_batch * a.tokens * a.accumulation * a.ranks
    return 6.0 * tokens * (linear + a.hidden * a.vocab)


if __name__ == "__main__":
    main()
