"""A million short samples: seconds from the start to the first optimizer step, and host memory a rank.

    python benchmarks/million.py                                 # this checkout, two CPU ranks and a tiny model
    python benchmarks/million.py --before ../another_checkout    # and another one, in turn

Phase 3 without a mask for one step, as a job starts it. `first` is a start that has nothing cached, `again` one that finds the
tokens. `seconds` run from the start of the processes to the first line of metrics.jsonl with a loss. Of every rank: `peak_mb`
is the kernel's own peak of what was resident, which counts mapped files; `private_mb` the peak of what was its own (RssAnon,
looked at ten times a second), which cannot be given back to anyone. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--before", help="another checkout of warp_ds to measure too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    a = parse()
    if a.worker:
        work(Path(a.worker))
        return
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root, a.samples)
        here = Path(__file__).parent.parent
        found: dict[str, Any] = {"samples": a.samples, "ranks": a.ranks, "cores": os.cpu_count()}
        found["now"] = {start: measured(a.ranks, here, root, f"now-{start}") for start in ("first", "again")}
        if a.before:
            found["before"] = {"first": measured(a.ranks, Path(a.before).resolve(), root, "before-first")}
    print(json.dumps(found))


def prepare(root: Path, samples: int) -> None:
    """A model of two small layers, its tokenizer, and the texts, under `root`."""
    from warp_ds.data.tiny_model import tiny_llama, train_tokenizer

    with open(root / "texts.jsonl", "w") as file:
        for i in range(samples):
            row = {"prompt": f"What is {i} plus {i % 97}?", "response": f"{i} plus {i % 97} is {i + i % 97}."}
            file.write(json.dumps(row) + "\n")
    tokenizer = train_tokenizer(
        [f"What is {i} plus {i}? {i} plus {i} is {i + i}." for i in range(100)], directory=root / "model"
    )
    tiny_llama(tokenizer, hidden_size=24, intermediate_size=32, layers=2, heads=2, kv_heads=1).save_pretrained(root / "model")


def measured(ranks: int, checkout: Path, root: Path, name: str) -> dict[str, Any]:
    """One start of the given checkout's code, on all ranks."""
    port = free_port()
    known = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(checkout)}
    known |= {"HF_DATASETS_CACHE": str(root / "cache"), "DS_ACCELERATOR": "cpu", "MILLION_NAME": name, "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--worker", str(root)],
            env={**os.environ, **known, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=root,
        )
        for rank in range(ranks)
    ]
    metrics = root / name / "run" / "metrics.jsonl"
    seconds = None
    while any(process.poll() is None for process in processes):
        if seconds is None and metrics.is_file() and '"loss"' in metrics.read_text():
            seconds = round(time.monotonic() - begun, 1)
        time.sleep(0.1)
    if any(process.returncode for process in processes) or seconds is None:
        raise SystemExit(f"{name}: a rank ended with {[process.returncode for process in processes]}")
    print(f"{name}: {seconds} s", file=sys.stderr)
    return {"seconds": seconds, "ranks": [json.loads((root / f"{name}-{rank}.json").read_text()) for rank in range(ranks)]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def work(root: Path) -> None:
    """One rank: a step of phase 3, and the memory that it took."""
    private = [0]

    def watch() -> None:
        while True:
            private[0] = max(private[0], anonymous_mb())
            time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()
    from warp_ds.flags.arguments import TrainArguments
    from warp_ds.phases.training import run_training

    name = os.environ["MILLION_NAME"]
    arguments: dict[str, Any] = {"model_name": str(root / "model"), "utility_data": str(root / "texts.jsonl")}
    arguments |= {"utility_samples": 0, "device": "cpu", "dtype": "float32", "masks_dir": "none", "train_scope": "all"}
    arguments |= {"output_dir": str(root / name), "log_dir": str(root / name / "logs"), "run_name": "run", "max_length": 64}
    run_training(TrainArguments(**arguments, timeout=14_400), {"max_steps": 1, "logging_steps": 1})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    said = {"peak_mb": peak, "private_mb": private[0]}
    (root / f"{name}-{os.environ['RANK']}.json").write_text(json.dumps(said))
    os._exit(0)


def anonymous_mb() -> int:
    """Memory of this process that is backed by no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024


if __name__ == "__main__":
    main()
