"""Plain ZeRO-3 fine-tuning, the masked step, and modules that hold C, U, M: time and memory, in one run.

    python benchmarks/masked_step.py --ranks 2                         # the small case, on the CPU
    python benchmarks/masked_step.py --device cuda --ranks 1 --hidden 4096 --ffn 11008 --layers 1 --dtype bfloat16
    python benchmarks/masked_step.py --ranks 2 --variants plain,masked --basis_placement each    # bytes and time of each

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
import platform
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
from torch import nn

#: Mean over the demo's 20 target layers, keep_ratio 0.1 (phase 2 of `make demo`).
COLUMN_PROFILE = [0.8445, 0.579, 0.2806, 0.1373, 0.0477, 0.0191, 0.0114, 0.0051, 0.0023, 0.0016, 0.0006, 0.0003, 0.0002]
COLUMN_PROFILE += [0.0001] * 3 + [0.0] * 4
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_down": "mlp.down_proj",
    "attn_o": "self_attn.o_proj",
}
INPUTS = {"attn_q": "attn", "attn_k": "attn", "attn_v": "attn", "ffn_up": "ffn", "ffn_gate": "ffn"}
VARIANTS = ("plain", "masked", "modules")
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
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.basis_placement == "each":
        a.variants = a.variants.replace("masked", ",".join(f"masked:{placement}" for placement in PLACEMENTS[1:]))
    else:
        a.variants = a.variants.replace("masked", f"masked:{a.basis_placement}")
    return a


# ---------------------------------------------------------------- what every variant trains


def make_model(a: argparse.Namespace) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=a.vocab,
        hidden_size=a.hidden,
        intermediate_size=a.ffn,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        max_position_embeddings=max(2048, a.tokens),
        tie_word_embeddings=False,
        use_cache=False,
    )
    with torch.device(a.device):
        return LlamaForCausalLM(config).to(getattr(torch, a.dtype))


def targets(a: argparse.Namespace, model: Any) -> list[tuple[str, str, int, nn.Linear]]:
    return [
        (f"model.layers.{i}.{MODULES[kind]}", kind, i, model.get_submodule(f"model.layers.{i}.{MODULES[kind]}"))
        for i in range(a.layers)
        for kind in a.layer_type.split(",")
    ]


def random_basis(n: int, r: int, seed: int, device: str) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, r, generator=generator, device=device))[0]


def random_mask(m: int, n: int, r: int, keep_ratio: float, seed: int, device: str) -> torch.Tensor:
    profile = torch.tensor(COLUMN_PROFILE, device=device)
    share = profile[(torch.arange(n, device=device) * len(COLUMN_PROFILE)) // n] * (keep_ratio / 0.1)
    share[r:] = 0.0
    generator = torch.Generator(device).manual_seed(seed)
    return torch.rand(m, n, generator=generator, device=device) < share.clamp(max=1.0)


def write_artefacts(a: argparse.Namespace, root: Path) -> None:
    from warp_ds.method.mask import pack_bits
    from warp_ds.store.bases import BasisStore
    from warp_ds.store.files import write_json, write_tensors
    from warp_ds.store.layers import TargetLayer
    from warp_ds.store.masks import write_mask
    from warp_ds.store.metadata import BasisMetadata, MasksMetadata, layer_entry, metadata_dict

    with torch.device("meta"):
        shape_of = make_model(argparse.Namespace(**{**vars(a), "device": "meta", "layers": a.layers}))
    unit = getattr(a, "mask_unit", "entry")
    columns = inputs = 0
    basis = BasisMetadata("random", "benchmark", "none", "all", "benchmark", 0)
    masks = MasksMetadata(
        a.keep_ratio, "global", unit, "random", "random", str(root / "basis"), None, "benchmark", "none", "benchmark"
    )
    for name, kind, i, module in targets(a, shape_of):
        m, n = module.weight.shape
        r = max(1, round(a.rank_share * n))
        layer = TargetLayer(name, i, kind, m, n)
        file = f"layer_{i:02d}_{INPUTS.get(kind, kind)}_svd.safetensors"
        if file not in basis.bases:
            write_tensors(root / "basis" / file, {"U": random_basis(n, r, 7 * i + n, a.device), "S": torch.ones(r)})
            basis.bases[file] = {"n": n, "rank": r}
        basis.layers[name] = layer_entry(layer, file)
        frozen = random_mask(m, n, r, a.keep_ratio, i, a.device)
        columns, inputs = columns + int(frozen[0].sum()), inputs + n
        write_mask(root / "masks", layer, pack_bits(frozen))
        masks.layers[name] = layer_entry(layer, layer.mask_file, frozen=int(frozen.sum()), wanted=None, threshold=None)
        masks.frozen, masks.entries = masks.frozen + int(frozen.sum()), masks.entries + m * n
    masks.keep_ratio = columns / inputs if unit == "column" else masks.frozen / masks.entries
    write_json(root / "basis" / "metadata.json", metadata_dict(basis))
    masks.basis_fingerprint = BasisStore(root / "basis").fingerprint()
    write_json(root / "masks" / "metadata.json", metadata_dict(masks))


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
            "data_types": {"grad_accum_dtype": "fp32"},
        }
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=a.device == "cuda")
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        self.protection = None
        kind, _, placement = variant.partition(":")
        if kind == "masked":
            self.protection = warp_ds.protect(self.engine, root / "basis", root / "masks", basis_placement=placement)
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
        masked = {name: trainers[name].protection for name in names if name.startswith("masked")}
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
        report = {
            "seconds": seconds,
            "tokens": a.micro_batch * a.tokens * a.accumulation * processes.world_size(),
            "rotate": {name: statistics.median(values) for name, values in rotate.items()},
            "sent": {name: statistics.median(values) for name, values in sent.items()},
            "bases": {name: bases_held(step.placement) for name, step in masked.items()},
            "predicted": {name: predicted(a, step) for name, step in masked.items()},
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


def predicted(a: argparse.Namespace, step: Any) -> dict[str, Any]:
    """What the cost model says of the placement of ``step``, with this machine's measured figures. Collective."""
    cost = step.placement.cost()
    return {"placement": step.placement.name, **vars(cost), "seconds": cost.seconds(measured_machine(a, step.layers))}


def measured_machine(a: argparse.Namespace, layers: list[Any]) -> Any:
    """Products of a shard of the largest layer, and all-gathers of such shards, on all ranks at once: the best of three."""
    from torch import distributed as dist

    from warp_ds.cluster import processes
    from warp_ds.zero.placements import CPU, GPU, Machine, matmul_precision

    default, ranks = CPU if a.device == "cpu" else GPU, processes.world_size()
    layer = max(layers, key=lambda layer: layer.target.m * layer.target.n)
    rows = torch.randn(-(-layer.target.m // ranks), layer.target.n, device=a.device)
    square, whole = torch.randn(layer.target.n, layer.target.n, device=a.device), rows.new_empty(ranks * rows.numel())

    def best_seconds(work: Any) -> float:
        took = []
        for _ in range(3):
            synchronize(a)
            start = time.perf_counter()
            work()
            if a.device == "cuda":
                torch.cuda.synchronize()
            took.append(time.perf_counter() - start)
        return min(took)

    with matmul_precision(layer.param.dtype):
        multiplying = best_seconds(lambda: rows @ square)
    sending = best_seconds(lambda: dist.all_gather_into_tensor(whole, rows.flatten()))
    return Machine(rows.numel() * layer.target.n / multiplying, max(1, ranks - 1) * rows.nbytes / sending, default.overlaps)


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
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_artefacts(a, root)
        timings = run_workers(a, "time", root)
        timing = timings[0]
        names = a.variants.split(",")
        memory = (
            {} if a.no_memory else {name: max(r["bytes"] for r in run_workers(a, f"memory:{name}", root)) for name in names}
        )
    seconds = timing["seconds"]
    plain_flops = arithmetic(a) / a.ranks
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores" if a.device == "cpu" else torch.cuda.get_device_name(),
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
        "train_scope": a.train_scope,
        "steps": a.steps,
        "plain_seconds": statistics.median(seconds["plain"]),
    }
    masked = [name for name in names if name.startswith("masked")]
    result["placements"] = {}
    for name in masked:
        costs = [r["predicted"][name] for r in timings]
        result["placements"][costs[0]["placement"]] = {
            "time_ratio": median_ratio(seconds[name], seconds["plain"]),
            "rotate_seconds": max(r["rotate"][name] for r in timings),
            "rotate_seconds_predicted": max(cost["seconds"] for cost in costs),
            "rotate_bytes": [r["sent"][name] for r in timings],
            "rotate_bytes_predicted": costs[0]["sent"],
            "basis_bytes": max(r["bases"][name] for r in timings),
            "held_bytes_predicted": costs[0]["held"],
            "rotation_flops_share": 2 * costs[0]["multiply_adds"] / plain_flops,
        }
    if memory:
        result["plain_bytes"] = memory["plain"]
    if "modules" in memory:
        result["module_memory_ratio"] = memory["modules"] / memory["plain"]
    for name, found in zip(masked if memory else [], result["placements"].values(), strict=False):
        found["memory_ratio"] = memory[name] / memory["plain"]
        found["memory_ratio_without_basis"] = (memory[name] - found["basis_bytes"]) / memory["plain"]
    if masked:
        # Of the first placement, beside what the other variants have.
        result |= next(iter(result["placements"].values()))
    if "modules" in names:
        result["module_time_ratio"] = median_ratio(seconds["modules"], seconds["plain"])
        if masked:
            result["overhead_share_of_modules"] = (result["time_ratio"] - 1) / (result["module_time_ratio"] - 1)
    print(
        f"arithmetic: the rotation is {result.get('rotation_flops_share', math.nan):.3f} of the plain step's operations "
        f"on each rank (2 products of every target layer's shard with its basis, once a step)"
    )
    print(json.dumps(result))


def arithmetic(a: argparse.Namespace) -> float:
    """Operations of a plain optimizer step over all ranks: 6 a parameter and token in products, attention aside."""
    linear = a.layers * (a.hidden * a.hidden * 2 + 2 * a.hidden * a.hidden * a.kv_heads / a.heads + 3 * a.hidden * a.ffn)
    tokens = a.micro_batch * a.tokens * a.accumulation * a.ranks
    return 6.0 * tokens * (linear + a.hidden * a.vocab)


if __name__ == "__main__":
    main()
