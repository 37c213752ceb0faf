"""Runs every phase on CPU ranks and compares what it took with what ``warp-ds plan`` says it takes.

    python benchmarks/plan_check.py [--ranks 2] [--hidden 1024] [--layers 12] [--write]

``--write`` records predicted over measured in warp_ds/launch/plan_checked.json, which the plan's table shows. On CPUs a
rank has one memory: the plan's GPU and host parts are added up and compared with the growth of RssAnon. Bytes sent are
counted where ranks call torch.distributed, as a ring would move them; bytes read where they are asked of the files;
bytes written by the system's own count. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

SAMPLES, EPOCHS, GLOBAL_BATCH = 16, 1, 4
LAYERS = "ffn_down,attn_q,attn_k,attn_v"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--phases", type=int, nargs="+", default=[0, 1, 2, 3], help="phase 3 needs 2, and 2 needs 1")
    parser.add_argument("--adapter", default="none", choices=["none", "lora"], help="what phase 3 trains; lora is not recorded")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="not recorded either")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(Path(arguments.worker))
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    from load_save import start

    # Else glibc keeps what was freed, up to as much again as is in use, and what a phase needs cannot be seen.
    os.environ.update(MALLOC_MMAP_THRESHOLD_=str(1 << 18), MALLOC_ARENA_MAX="2")
    with tempfile.TemporaryDirectory(prefix="plan_check_") as folder:
        root = Path(folder)
        tokens = make(root, arguments.hidden, arguments.layers)
        asked = {"adapter": arguments.adapter, "gradient_checkpointing": arguments.gradient_checkpointing}
        (root / "asked.json").write_text(json.dumps(asked))
        measured: dict[str, dict[str, float]] = {}
        for phase in (f"phase {number}" for number in arguments.phases):
            (root / "phase").write_text(phase)
            ranks = start(arguments.ranks, str(root), root, script=__file__)
            measured[phase] = {
                "memory": max(rank["memory"] for rank in ranks),
                "read": sum(rank["read"] for rank in ranks) / len(ranks),
                "sent": sum(rank["sent"] for rank in ranks) / len(ranks),
                "written": sum(rank["written"] for rank in ranks),
                "disk": max(rank["disk"] for rank in ranks),
            }
        ratios = judge(root, measured, tokens, arguments)
    if arguments.write and arguments.adapter == "none" and not arguments.gradient_checkpointing:
        path = ROOT / "warp_ds" / "launch" / "plan_checked.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(dict(sorted({**before, **ratios}.items())), indent=2) + "\n")
    print(json.dumps(ratios))


def judge(
    root: Path, measured: dict[str, dict[str, float]], tokens: dict[str, int], arguments: argparse.Namespace
) -> dict[str, Any]:
    from warp_ds.launch.planning.fit import estimate_phases
    from warp_ds.launch.planning.job import SHARDINGS, Job, read_shape
    from warp_ds.launch.planning.training import TRAINER_SAVES

    ratios: dict[str, Any] = {}
    for phase, of_run in measured.items():
        job = Job(
            nodes=1,
            gpus_per_node=arguments.ranks,
            tokens=tokens["utility" if phase == "phase 3" else "safety"],
            layer_type=LAYERS,
            basis_samples=SAMPLES,
            importance_samples=SAMPLES,
            utility_samples=SAMPLES,
            batch_size=2,
            train_batch_size=2,
            global_batch_size=GLOBAL_BATCH,
            epochs=EPOCHS,
            gradient_checkpointing=arguments.gradient_checkpointing,
            on_gpu=False,
        )
        if arguments.adapter != "none" and phase in ("phase 2", "phase 3"):
            job = replace(job, adapter=arguments.adapter)
        if phase == "phase 3":  # whose bases come from the safety set
            job = replace(job, max_rank=SAMPLES * tokens["safety"])
        shape = read_shape(str(root / "model"), job.layer_type, job.target_layers)
        needed = next(n for n in estimate_phases(shape, job, SHARDINGS[0]) if n.phase == phase)
        predicted = {
            "memory": needed.gpu_total + needed.host_total,
            "read": needed.read,
            "sent": needed.sent,
            # The run saves twice.
            "written": needed.written + (1 if job.adapter == "lora" else TRAINER_SAVES) * needed.checkpoint,
            "disk": needed.disk,
        }
        for figure, value in predicted.items():
            print(f"{phase} {figure}: predicted {value / 1e6:.1f} MB, measured {of_run[figure] / 1e6:.1f} MB")
        print({**needed.gpu, **needed.host})
        ratios[phase] = {figure: round(value / of_run[figure], 3) for figure, value in predicted.items()}
        ratios[phase]["where"] = f"{shape.parameters / 1e9:.2f} B parameters, {arguments.ranks} CPU ranks"
    return ratios


def make(root: Path, hidden: int, layers: int) -> dict[str, int]:
    """Model and data; returns mean tokens of a sample."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from warp_ds.data.datasets import load_samples
    from warp_ds.data.lengths import encode_dataset
    from warp_ds.data.synthetic import demo_data
    from warp_ds.data.tiny_model import train_tokenizer

    data = demo_data(0)
    texts = [row["prompt"] + row["response"] for row in data["refusals_fit"]]
    tokenizer = train_tokenizer(texts, directory=root / "model")
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=round(2.75 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=512,
        pad_token_id=2,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(root / "model")
    torch.set_default_dtype(torch.float32)
    tokens = {}
    for kind, name in (("safety", "refusals_fit"), ("utility", "utility_train")):
        rows = data[name][:SAMPLES]
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        pairs = load_samples(str(root / f"{kind}.jsonl"), split="train", samples=0, prompt_column=None, response_column=None)
        encoded = encode_dataset(pairs, tokenizer, 256, 512)
        tokens[kind] = round(sum(len(row["input_ids"]) for row in encoded) / len(rows))
    return tokens


# A rank -----------------------------------------------------------------------------------------------------------


class Sent:
    """Bytes that this rank's collectives send to others, as a ring would."""

    def __init__(self) -> None:
        self.bytes = 0.0
        self._inside = threading.local()

    def count(self, module: Any) -> None:
        def of_gather(world: int, args: dict[str, Any]) -> float:  # its own piece goes round
            return size(args.get("input_tensor", args.get("tensor"))) * (world - 1)

        def of_scatter(world: int, args: dict[str, Any]) -> float:
            return size(args.get("input", args.get("input_list"))) * (world - 1) / world

        def once(world: int, args: dict[str, Any]) -> float:
            return size(args.get("tensor", args.get("input"))) * (world - 1) / world

        ways: dict[str, Callable[[int, dict[str, Any]], float]] = {
            "all_gather_into_tensor": of_gather,
            "all_gather_single": of_gather,
            "all_gather": of_gather,
            "reduce_scatter_tensor": of_scatter,
            "reduce_scatter_single": of_scatter,
            "reduce_scatter": of_scatter,
            "all_reduce": lambda world, args: 2 * once(world, args),
            "broadcast": once,
            "reduce": once,
            "gather": once,
            "all_to_all_single": once,
            "send": lambda world, args: size(args["tensor"]),
        }
        for name, way in ways.items():
            if hasattr(module, name):
                setattr(module, name, self._counting(getattr(module, name), way, module))

    def _counting(self, original: Any, way: Callable[[int, dict[str, Any]], float], module: Any) -> Any:
        import functools
        import inspect

        signature = inspect.signature(original)

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._inside, "now", False):  # one collective made of another
                return original(*args, **kwargs)
            self._inside.now = True
            try:
                self.bytes += way(module.get_world_size(), signature.bind(*args, **kwargs).arguments)
                return original(*args, **kwargs)
            finally:
                self._inside.now = False

        return counted


def size(tensors: Any) -> int:
    if isinstance(tensors, (list, tuple)):
        return sum(size(tensor) for tensor in tensors)
    return tensors.numel() * tensors.element_size()


class DiskUse:
    """The most that the files under a folder have taken."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.peak, self._done = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> DiskUse:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self._look()

    def _look(self) -> None:
        found = 0
        for folder, _, names in os.walk(self.folder):
            for name in names:
                try:
                    found += os.lstat(os.path.join(folder, name)).st_size
                except OSError:
                    pass  # Renamed or removed meanwhile.
        self.peak = max(self.peak, found)


def worker(root: Path) -> None:
    import torch.distributed as dist

    sent = Sent()
    sent.count(dist)  # Before DeepSpeed takes the functions.
    from load_save import AnonymousMemory

    from warp_ds.cluster import processes
    from warp_ds.flags.arguments import BasisArguments, ImportanceArguments, SafetyTuningArguments, TrainArguments
    from warp_ds.phases.basis import run_basis
    from warp_ds.phases.importance import run_importance
    from warp_ds.phases.training import run_safety_tuning, run_training
    from warp_ds.store import bases

    processes.init_distributed("cpu")
    phase = (root / "phase").read_text()
    output, asked = root / "out" / phase.replace(" ", ""), json.loads((root / "asked.json").read_text())
    columns_alone = {"mask_unit": "column"} if asked["adapter"] != "none" else {}
    read = 0
    preadv, columns, chosen = os.preadv, bases.BasisStore.columns, bases.BasisStore.chosen

    def counted_preadv(descriptor: int, buffers: list[Any], offset: int) -> int:
        nonlocal read
        read += sum(memoryview(buffer).nbytes for buffer in buffers)
        return preadv(descriptor, buffers, offset)

    def counted_columns(self: Any, name: str) -> Any:
        nonlocal read
        found = columns(self, name)
        read += size(list(found))
        return found

    def counted_chosen(self: Any, name: str, wanted: Any) -> Any:  # every page of the file is touched
        nonlocal read
        found = chosen(self, name, wanted)
        read += 4 * found.shape[0] * len(wanted)
        return found

    os.preadv = counted_preadv
    bases.BasisStore.columns = counted_columns  # type: ignore[method-assign]
    bases.BasisStore.chosen = counted_chosen  # type: ignore[method-assign]
    common: dict[str, Any] = {
        "model_name": str(root / "model"),
        "dtype": "bfloat16",
        "device": "cpu",
        "output_dir": str(output),
        "log_dir": str(output / "logs"),
        "batch_size": 2,
        "max_length": 256,
        "resume": "never",
        "gradient_checkpointing": asked["gradient_checkpointing"],
    }
    safety = {"safety_data": str(root / "safety.jsonl"), "safety_samples": 0}
    tuning = {"epochs": EPOCHS, "global_batch_size": GLOBAL_BATCH, "learning_rate": 1e-5, "save_minutes": 0}
    twice = {"save_strategy": "steps", "save_steps": SAMPLES * EPOCHS // GLOBAL_BATCH // 2}
    jobs: dict[str, Callable[[], Any]] = {
        "phase 0": lambda: run_safety_tuning(SafetyTuningArguments(**common, **safety, **tuning), twice),
        "phase 1": lambda: run_basis(BasisArguments(**common, **safety, layer_type=LAYERS)),
        "phase 2": lambda: run_importance(
            ImportanceArguments(
                **common, **safety, layer_type=LAYERS, basis_dir=latest(root, "phase1", "basis"), **columns_alone
            )
        ),
        "phase 3": lambda: run_training(
            TrainArguments(
                **common,
                **tuning,
                utility_data=str(root / "utility.jsonl"),
                utility_samples=0,
                masks_dir=latest(root, "phase2", "masks"),
                adapter=asked["adapter"],
            ),
            twice,
        ),
    }
    before, sent.bytes = written(), 0.0
    processes.barrier()
    with AnonymousMemory() as memory, DiskUse(output) as disk:
        jobs[phase]()
    result = {
        "memory": memory.grown_mb * 1e6,
        "read": read,
        "sent": sent.bytes,
        "written": written() - before,
        "disk": disk.peak,
    }
    (root / f"result-{processes.rank()}.json").write_text(json.dumps(result))
    processes.shutdown()
    os._exit(0)


def latest(root: Path, phase: str, kind: str) -> str:
    return str(next((root / "out" / phase).glob(f"{phase}_2*")) / kind)


def written() -> int:
    """Bytes of file pages that this process has made dirty (what it has sent through sockets is not among them)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("write_bytes")).split()[1])


if __name__ == "__main__":
    main()
