"""Phases 1 and 2 against what the arithmetic says: collection, decomposition, scores, selection, memory, scaling.

    python benchmarks/phase12.py [--sections collect svd scores select memory scaling layer]
                                 [--hidden 1024] [--intermediate 2816] [--layers 4] [--tokens 6144] [--length 256]
                                 [--ranks 1 2 4] [--repeats 5] [--device cpu] [--dtype float32] [--threads 2] [--cpu_clock]
                                 [--products auto|exact|split|tf32|each] [--sheet "NVIDIA H200"]

Models and texts are random: only shapes matter. Ways that are compared take turns in one process, and a ratio is the
median of the ratios of neighbouring runs. ``*_flops_ratio`` is what the operations of the shapes say, ``score*_predicted`` what
those take beside the measured plain passes, by the products of --products at measured rates and with the reading of bases;
--sheet prints the same at the rates of a GPU's data sheet, and nothing is run. The last line is one JSON object.

``layer`` is one layer of 70B shapes end to end (8192 x 28672, 10,000 tokens); it wants a GPU, and is left out without
one. ``--m`` and ``--n`` give it other shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from processor import processor
from rates import WAYS, best_seconds, measured_rates, sheet_rates, way_of

FIVE = "ffn_down,ffn_up,attn_q,attn_k,attn_v"
SECTIONS = ("collect", "svd", "scores", "select", "memory", "scaling", "layer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=6144)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sample")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="in collect and scores")
    parser.add_argument(
        "--products",
        default="auto",
        choices=["auto", *WAYS, "each"],
        help="of bf16 models in scores and layer; each: the three in turn, in scores alone",
    )
    parser.add_argument("--sheet", metavar="GPU", help="print what this GPU's data sheet makes of scores, and end")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--cpu_clock", action="store_true", help="one thread, and its processor time: ratios on a machine that others use too"
    )
    parser.add_argument("--m", type=int, default=8192, help="outputs of the one layer")
    parser.add_argument("--n", type=int, default=28672, help="inputs of the one layer")
    parser.add_argument("--layer_tokens", type=int, default=10_000, help="tokens of the one layer")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.products != "auto" and arguments.dtype != "bfloat16":
        parser.error("--products is of bf16 models: give --dtype bfloat16")
    if arguments.products == "each" and arguments.sections != ["scores"]:
        parser.error("--products each is for --sections scores alone")
    if arguments.sheet:
        scores_by_sheet(arguments)
        return
    if arguments.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if arguments.worker:
        worker(json.loads(arguments.worker))
        return
    if arguments.cpu_clock:
        global clock
        arguments.threads, clock = 1, time.process_time
    torch.set_num_threads(arguments.threads)
    os.environ["OPENBLAS_NUM_THREADS"] = str(arguments.threads)  # SciPy's, which is not loaded yet
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
        "dtype": arguments.dtype,
        **processor(),
        "products": arguments.products,
        "threads": arguments.threads,
        "clock": "processor" if arguments.cpu_clock else "wall",
        "hidden": arguments.hidden,
        "intermediate": arguments.intermediate,
        "layers": arguments.layers,
        "tokens": arguments.tokens,
    }
    for section in arguments.sections:
        if section == "layer" and arguments.device != "cuda" and arguments.n > 4096:
            print("layer: left out without a GPU (give smaller --m and --n)", flush=True)
            continue
        begun = time.perf_counter()
        part = globals()[section](arguments)
        found.update(part)
        print(f"{section} ({time.perf_counter() - begun:.0f} s): {json.dumps(part)}", flush=True)
    print(json.dumps(found))


# ---------------------------------------------------------------- what is measured

clock = time.perf_counter


def take_turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, run in turns, after one run that does not count."""
    for way in ways.values():
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            begun = clock()
            way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(clock() - begun)
    return seconds


def ratio(seconds: dict[str, list[float]], above: str, below: str) -> float:
    return round(statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True)), 3)


def median(values: list[float]) -> float:
    return round(statistics.median(values), 4)


def make_model(arguments: Any, layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = max(1, arguments.hidden // 64)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        use_cache=False,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval().to(arguments.device, getattr(torch, arguments.dtype))


def make_rows(tokens: int, length: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(max(1, tokens // length)):
        ids = torch.randint(3, 1024, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return rows


class Tokenizer:
    eos_token_id = 2
    pad_token_id = 0


def block_weights(arguments: Any) -> int:
    """Weights of the linear layers of one block (as many key and value heads as query heads)."""
    return 4 * arguments.hidden**2 + 3 * arguments.hidden * arguments.intermediate


def widths(arguments: Any, types: str) -> list[int]:
    """Of the distinct inputs of ``types`` in one block."""
    kinds = types.split(",")
    found = [arguments.intermediate] if "ffn_down" in kinds else []
    found += [arguments.hidden] if {"ffn_up", "ffn_gate"} & set(kinds) else []
    found += [arguments.hidden] if {"attn_q", "attn_k", "attn_v"} & set(kinds) else []
    return found


# ---------------------------------------------------------------- phase 1: collection


def collect(arguments: Any) -> dict[str, Any]:
    """Covariances of all blocks against the same forward passes without them."""
    from warp_ds.cluster.peaks import returning_large_pieces
    from warp_ds.method.covariance import covariance_flops
    from warp_ds.models.targets import find_blocks, find_targets
    from warp_ds.zero.batches import Samples
    from warp_ds.zero.collect import Traffic, collect_by_walk, deliver
    from warp_ds.zero.walk import BlockWalk

    model = make_model(arguments, arguments.layers)
    samples = Samples(make_rows(arguments.tokens, arguments.length), Tokenizer(), arguments.device)
    walk = BlockWalk(model, list(find_blocks(model)[1]))
    assert walk.why_not(samples.few(), find_targets(model, "all", FIVE)) is None
    scratch, dtype = Path(tempfile.mkdtemp()), getattr(torch, arguments.dtype)

    def collecting(types: str) -> Callable[[], None]:
        layers = find_targets(model, "all", types)

        @returning_large_pieces()  # as phase 1 does, and is charged for
        def run() -> None:
            for found in collect_by_walk(walk, layers, samples, arguments.batch_size, scratch, dtype.itemsize):
                deliver(found, 0, dtype, Traffic())

        return run

    @torch.no_grad()
    def forward_alone() -> None:
        batches = [samples.batch(part) for part in samples.deal(arguments.batch_size, 1, 0)]
        hidden = [walk.embed(batch) for batch in batches]
        for index in range(arguments.layers):
            hidden = [walk.run(index, h, batch) for h, batch in zip(hidden, batches, strict=True)]

    seconds = take_turns(
        {"forward": forward_alone, "five": collecting(FIVE), "down": collecting("ffn_down")}, arguments.repeats
    )
    before = sum(walk.fetches)
    collecting("ffn_down")()
    forward = 2.0 * samples.tokens * block_weights(arguments)
    said = {
        types: 1 + sum(covariance_flops(samples.tokens, n) for n in widths(arguments, types)) / forward
        for types in (FIVE, "ffn_down")
    }
    return {
        "forward_s": median(seconds["forward"]),
        "collect_ratio": ratio(seconds, "five", "forward"),
        "collect_flops_ratio": round(said[FIVE], 3),
        "collect_down_ratio": ratio(seconds, "down", "forward"),
        "collect_down_flops_ratio": round(said["ffn_down"], 3),
        "layer_fetches": (sum(walk.fetches) - before) / arguments.layers,
    }


# ---------------------------------------------------------------- phase 1: decomposition


def activations(tokens: int, n: int, device: str, seed: int = 0) -> torch.Tensor:
    """[tokens, n] with eigenvalues over four decades."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(n, n, generator=generator))[0]
    return ((torch.randn(tokens, n, generator=generator) * torch.logspace(0, -2, n)) @ mixing).to(device)


def svd(arguments: Any) -> dict[str, Any]:
    """The decompositions of one block's five layer types, as the original does them and as phase 1 does."""
    from warp_ds.method.eigenbasis import covariance_basis, token_basis

    originals = [arguments.intermediate] + [arguments.hidden] * 4
    ours = widths(arguments, FIVE)
    found: dict[str, Any] = {}
    for name, tokens_of in (("many", lambda n: 2 * n), ("few", lambda n: n // 4)):
        inputs = {n: activations(tokens_of(n), n, arguments.device) for n in set(originals)}
        sigmas = {n: x.T @ x / len(x) for n, x in inputs.items()}

        def as_the_original(sigmas: dict[int, torch.Tensor] = sigmas) -> None:
            for n in originals:
                torch.linalg.svd(sigmas[n])

        def as_phase_1(name: str = name, inputs: Any = inputs, sigmas: Any = sigmas) -> list[Any]:
            return [covariance_basis(sigmas[n]) if name == "many" else token_basis(inputs[n]) for n in ours]

        seconds = take_turns({"original": as_the_original, "ours": as_phase_1}, max(3, arguments.repeats // 2))
        bases = as_phase_1()
        exact = [
            (sigmas[n].double() @ b.columns.double() - b.columns.double() * b.values.double()).norm()
            / sigmas[n].double().norm()
            for n, b in zip(ours, bases, strict=True)
        ]
        found |= {
            f"svd_ratio_{name}": ratio(seconds, "original", "ours"),
            f"svd_original_{name}_s": median(seconds["original"]),
            f"svd_ours_{name}_s": median(seconds["ours"]),
            f"svd_{name}_orthogonality": max(b.orthogonality_error for b in bases),
            f"svd_{name}_residual": float(max(exact)),
            f"svd_{name}_ranks": [b.rank for b in bases],
        }
    return {"svd_ratio": found["svd_ratio_many"], **found}


# ---------------------------------------------------------------- phase 2: scores


def scores(arguments: Any) -> dict[str, Any]:
    """Phase 2's passes against forward and backward passes of plain training on the same batches."""
    from warp_ds.models.targets import find_targets
    from warp_ds.phases.importance import importance_scores

    model = make_model(arguments, arguments.layers)
    rows = make_rows(arguments.tokens // 2, arguments.length)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        stores = {
            types: make_basis(arguments, model, types, Path(folder) / str(i)) for i, types in enumerate((FIVE, "ffn_down"))
        }

        def plain_training() -> None:
            model.requires_grad_(True)
            for first in range(0, len(rows), arguments.batch_size):
                batch = rows[first : first + arguments.batch_size]
                ids, labels = (torch.tensor([r[k] for r in batch], device=arguments.device) for k in ("input_ids", "labels"))
                model(input_ids=ids, labels=labels).loss.backward()
                model.zero_grad(set_to_none=True)

        def scoring(types: str, way: str, recompute: bool = False) -> Callable[[], None]:
            layers = find_targets(model, "all", types)
            flags = importance_flags(arguments, types, way, recompute)
            return lambda: importance_scores(model, Tokenizer(), layers, rows, stores[types], flags, [], Path(folder)) and None

        ways = WAYS if arguments.products == "each" else (arguments.products,)
        tried = {"plain": plain_training, **{f"five {way}": scoring(FIVE, way) for way in ways}}
        tried |= {f"down {way}": scoring("ffn_down", way) for way in ways}
        seconds = take_turns({**tried, "recomputing": scoring(FIVE, ways[0], True)}, arguments.repeats)
        reading = {types: reading_seconds(arguments, model, store, types) for types, store in stores.items()}
    rates = measured_rates(arguments.device, arguments.batch_size * arguments.length, arguments.intermediate, clock=clock)
    plain, found["rates"] = median(seconds["plain"]), vars(rates)
    for types, name, suffix in ((FIVE, "five", ""), ("ffn_down", "down", "_down")):
        found[f"score{suffix}_flops_ratio"] = round(score_operations(arguments, types)[2], 3)
        found[f"score{suffix}_reading_s"] = round(reading[types], 4)
        for way in ways:
            key = f"score{suffix}" + (f"_{way}" if len(ways) > 1 else "")
            found[f"{key}_ratio"] = ratio(seconds, f"{name} {way}", "plain")
            found[f"{key}_ratio_predicted"] = scores_predicted(arguments, types, way, rates, plain, reading[types])
    passes, plain_operations, _ = score_operations(arguments, FIVE)
    recomputed = 2.0 * tokens_scored(arguments) * arguments.layers * block_weights(arguments) / plain_operations
    found["score_recomputing_ratio"] = ratio(seconds, "recomputing", "plain")
    found["score_recomputing_flops_ratio"] = round(found["score_flops_ratio"] + recomputed, 3)
    return {"plain_training_s": plain, **found}


def tokens_scored(arguments: Any) -> int:
    return int(max(1, arguments.tokens // 2 // arguments.length)) * int(arguments.length)


def shapes_scored(arguments: Any, types: str) -> list[tuple[list[int], int]]:
    """(rows of each layer, inputs) of one block's layers by the input that they share."""
    h, i = arguments.hidden, arguments.intermediate
    return [([h], i)] if types == "ffn_down" else [([h], i), ([i], h), ([h, h, h], h)]


def score_operations(arguments: Any, types: str) -> tuple[float, float, float]:
    """(operations of phase 2's passes over those of plain training, the latter, all of phase 2's over the latter)."""
    from warp_ds.method.importance import importance_flops

    tokens, batch_tokens = tokens_scored(arguments), arguments.batch_size * arguments.length
    weights, head = arguments.layers * block_weights(arguments), arguments.hidden * 1024
    plain = 6.0 * tokens * (weights + head)
    passes = 4.0 * tokens * (weights + head * (1 - (arguments.length // 3) / arguments.length)) / plain
    extra = sum(importance_flops(batch_tokens, 1, rows, n, n) for rows, n in shapes_scored(arguments, types))
    return passes, plain, passes + tokens / batch_tokens * arguments.layers * extra / plain


def scores_predicted(arguments: Any, types: str, way: str, rates: Any, plain: float, reading: float = 0.0) -> float:
    """Phase 2's seconds over ``plain``, those of plain passes, where products take what they take at ``rates``."""
    from ratios import scores_ratio

    from warp_ds.method.importance import importance_seconds

    dtype, batch_tokens = getattr(torch, arguments.dtype), arguments.batch_size * arguments.length
    taken = way_of(way, arguments.dtype, "cuda" if arguments.sheet else arguments.device)
    times = tokens_scored(arguments) / batch_tokens * arguments.layers
    seconds = [
        times * importance_seconds(batch_tokens, 1, rows, n, n, dtype, taken, rates)
        for rows, n in shapes_scored(arguments, types)
    ]
    return round(scores_ratio(plain, score_operations(arguments, types)[0], seconds, reading), 3)


def scores_by_sheet(arguments: Any) -> None:
    """Prints phase 2's ratio for each way at the rates of a data sheet, were passes and products to reach the same share."""
    rates = sheet_rates(arguments.sheet)
    half = arguments.dtype == "bfloat16"
    plain = score_operations(arguments, FIVE)[1] / (rates.bf16 if half else rates.fp32)
    said = {way: scores_predicted(arguments, FIVE, way, rates, plain) for way in (WAYS if half else WAYS[:1])}
    print(json.dumps({"gpu": arguments.sheet, "rates": vars(rates), "plain_s": round(plain, 4), "score_ratio_by_sheet": said}))


def reading_seconds(arguments: Any, model: Any, store: Any, types: str) -> float:
    """From the files of ``types``' bases to the device, each once."""
    from warp_ds.models.targets import find_targets
    from warp_ds.phases.columns import Columns

    def read() -> None:
        columns, seen = Columns(store, arguments.device), set()
        for layer in find_targets(model, "all", types):
            file = store.metadata.layers[layer.name]["file"]
            if file not in seen:
                columns.get(layer.name)
                seen.add(file)

    return best_seconds(read, clock=clock)


def importance_flags(arguments: Any, types: str, way: str = "auto", recompute: bool = False) -> Any:
    from warp_ds.flags.arguments import ImportanceArguments

    return ImportanceArguments(
        dtype=arguments.dtype,
        device=arguments.device,
        layer_type=types,
        products=way,
        gradient_checkpointing=recompute,
        batch_size=arguments.batch_size,
        importance_batch_size=arguments.batch_size,
    )


def make_basis(arguments: Any, model: Any, types: str, directory: Path) -> Any:
    """A random full-rank basis of every layer: phase 2's work depends on its shape alone."""
    from warp_ds.flags.arguments import BasisArguments
    from warp_ds.models.targets import find_targets
    from warp_ds.phases.basis import compute_basis
    from warp_ds.store.bases import BasisStore

    flags = BasisArguments(dtype=arguments.dtype, device=arguments.device, layer_type=types, basis="random")
    compute_basis(
        model, Tokenizer(), find_targets(model, "all", types), make_rows(8, 8), flags, directory, {"model": "m", "data": "d"}
    )
    return BasisStore(directory)


# ---------------------------------------------------------------- phase 2: selection


def select(arguments: Any) -> dict[str, Any]:
    """The highest tenth by layer and over all layers, against each other and against a full sort."""
    from warp_ds.zero.select import choose

    generator = torch.Generator().manual_seed(0)
    shape = (arguments.hidden, arguments.intermediate)
    blocks = [
        (torch.randn(shape, generator=generator).abs() * 10.0 ** -(b % 3)).to(arguments.device)
        for b in range(2 * arguments.layers)
    ]
    tied = [(b * 4).round() / 4 for b in blocks]  # by the hundred thousand
    tenth = blocks[0].numel() // 10

    def by_layer(blocks: list[torch.Tensor] = blocks) -> list[torch.Tensor]:
        chosen = choose([[b] for b in blocks], [tenth] * len(blocks))
        return [c[0].mask(b) for c, b in zip(chosen, blocks, strict=True)]

    def over_all(blocks: list[torch.Tensor] = blocks) -> list[torch.Tensor]:
        (chosen,) = choose([blocks], [tenth * len(blocks)])
        return [c.mask(b) for c, b in zip(chosen, blocks, strict=True)]

    def by_sorting(blocks: list[torch.Tensor] = blocks) -> list[torch.Tensor]:
        return [sorted_mask(b.view(-1), tenth) for b in blocks]

    # A sort leaves cold caches and memory given back, for which the next in turn would pay.
    seconds = take_turns({"layer": by_layer, "global": over_all}, arguments.repeats)
    seconds |= take_turns({"sort": by_sorting}, arguments.repeats)
    exact = {}
    for name, case in (("spread", blocks), ("tied", tied)):
        whole = sorted_mask(torch.cat([b.view(-1) for b in case]), tenth * len(case))
        exact[name] = torch.equal(torch.cat([m.view(-1) for m in over_all(case)]), whole) and all(
            torch.equal(a.view(-1), b) for a, b in zip(by_layer(case), by_sorting(case), strict=True)
        )
    return {
        "select_global_over_layer": ratio(seconds, "global", "layer"),
        "select_layer_s": median(seconds["layer"]),
        "select_sort_s": median(seconds["sort"]),
        "select_scores": len(blocks) * blocks[0].numel(),
        "select_exact": exact,
    }


def sorted_mask(flat: torch.Tensor, count: int) -> torch.Tensor:
    mask = torch.zeros(flat.numel(), dtype=torch.bool, device=flat.device)
    mask[torch.sort(flat, descending=True, stable=True).indices[:count]] = True
    return mask & (flat > 0)


# ---------------------------------------------------------------- fresh processes: memory and scaling


def memory(arguments: Any) -> dict[str, Any]:
    """Peak memory of phase 1 beyond the loaded model, by number of layers, layer by layer and all at once.

    Medians of fresh processes: a peak depends on how the decomposition in the background falls beside the walk.
    """
    found: dict[str, Any] = {}
    peaks: dict[str, list[float]] = {}
    for _ in range(3):
        for way in ("walk", "hooks"):
            for layers in (4, 16):
                (result,) = ranks_of(arguments, 1, {"job": "memory", "collect": way, "layers": layers})
                peaks.setdefault(f"memory_{way}_{layers}_mb", []).append(result["peak_mb"])
    found |= {name: median(values) for name, values in peaks.items()} | {"memory_peaks_mb": peaks}
    found["memory_walk_growth"] = round(found["memory_walk_16_mb"] / found["memory_walk_4_mb"], 3)
    found["memory_hooks_growth"] = round(found["memory_hooks_16_mb"] / found["memory_hooks_4_mb"], 3)
    return found


def scaling(arguments: Any) -> dict[str, Any]:
    """Both phases on several ranks of one thread each: seconds, bytes sent for the phase's own work, peak memory.

    ``says``: seconds of the fewest ranks shared out evenly, as far as there are cores; memory as ``warp-ds plan`` has it.
    """
    found: dict[str, Any] = {}
    fewest = min(arguments.ranks)
    for ranks in sorted(arguments.ranks):
        results = ranks_of(arguments, ranks, {"job": "scaling", "layers": arguments.layers})
        memory_says = planned_memory(arguments, ranks)
        for phase in ("basis", "importance"):
            key = f"{phase}_{ranks}"
            found[f"{key}_s"] = round(max(r[phase]["seconds"] for r in results), 2)
            shared = max(1.0, min(ranks, os.cpu_count() or 1) / fewest)
            found[f"{key}_says_s"] = round(found[f"{phase}_{fewest}_s"] / shared, 2)
            found[f"{key}_peak_says_mb"] = round(memory_says[phase] / 1e6, 1)
            found[f"{key}_sent_mb"] = round(sum(r[phase]["sent_mb"] for r in results), 1)
            found[f"{key}_sent_says_mb"] = round(sum(r[phase]["says_mb"] for r in results), 1)
            found[f"{key}_peak_mb"] = round(max(r[phase]["peak_mb"] for r in results), 1)
        found[f"scores_{ranks}_mb_a_rank"] = round(max(r["scores_mb"] for r in results), 1)
    return found


def planned_memory(arguments: Any, ranks: int) -> dict[str, float]:
    """Bytes that a rank needs beyond its shard of the weights, by phase."""
    from warp_ds.launch.planning.fit import estimate_phases
    from warp_ds.launch.planning.job import SHARDINGS, Job, read_shape

    with tempfile.TemporaryDirectory() as folder:
        make_model(argparse.Namespace(**{**vars(arguments), "device": "cpu"}), arguments.layers).config.save_pretrained(folder)
        shape = read_shape(folder, FIVE, "all")
    samples = max(1, arguments.tokens // arguments.length)
    job = Job(
        nodes=1,
        gpus_per_node=ranks,
        dtype="float32",
        layer_type=FIVE,
        tokens=arguments.length,
        basis_samples=samples,
        importance_samples=samples,
        batch_size=arguments.batch_size,
        importance_batch_size=arguments.batch_size,
        on_gpu=arguments.device == "cuda",
    )
    _, basis, importance, _ = estimate_phases(shape, job, SHARDINGS[0])
    return {
        name: need.gpu_total + need.host_total - need.gpu["weights"]
        for name, need in (("basis", basis), ("importance", importance))
    }


def ranks_of(arguments: Any, ranks: int, job: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of ``ranks`` fresh processes reports of a job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shapes = {k: v for k, v in vars(arguments).items() if k not in ("sections", "worker", "ranks")} | {"dtype": "float32"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", json.dumps({**shapes, **job, "folder": folder})]
        env = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                command,
                env={**env, "RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for r in range(ranks)
        ]
        results = []
        for process in processes:
            out, err = process.communicate()
            if process.returncode:
                raise SystemExit(f"a rank failed: {err[-3000:]}")
            results.append(json.loads(out.strip().splitlines()[-1]))
    return results


class Sent:
    """Counts the bytes that this rank gives to collectives, other than the fetching of parameters."""

    def __init__(self) -> None:
        self.bytes = 0

    def __enter__(self) -> Sent:
        import torch.distributed as dist

        self.originals = {
            name: getattr(dist, name) for name in ("reduce", "send", "all_gather", "all_to_all_single", "all_reduce", "gather")
        }
        position = {"all_gather": 1, "all_to_all_single": 1}
        for name, original in self.originals.items():

            def counted(
                *args: Any, original: Any = original, at: int = position.get(name, 0), name: str = name, **more: Any
            ) -> Any:
                tensor, world = args[at], dist.get_world_size()
                size = tensor.numel() * tensor.element_size()
                if name == "all_to_all_single":
                    size -= args[3][dist.get_rank()] * tensor.element_size()  # its own part stays
                elif name == "all_gather":
                    size *= world - 1
                elif more.get("dst") == dist.get_rank():
                    size = 0
                self.bytes += size if size > 4096 else 0  # not the notes between ranks
                return original(*args, **more)

            setattr(dist, name, counted)
        return self

    def __exit__(self, *_: Any) -> None:
        import torch.distributed as dist

        for name, original in self.originals.items():
            setattr(dist, name, original)


def worker(job: dict[str, Any]) -> None:
    import contextlib

    from warp_ds.cluster import compiled_operators, processes

    arguments = argparse.Namespace(**job)
    if runtime_world() > (os.cpu_count() or 1):
        compiled_operators.disable_shm_collective()
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(sys.stderr):
        processes.init_distributed(arguments.device)
        result = {"memory": memory_job, "scaling": scaling_job}[job["job"]](arguments)
        processes.shutdown()
    print(json.dumps(result))


def runtime_world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def basis_flags(arguments: Any, types: str, collect: str = "auto") -> Any:
    from warp_ds.flags.arguments import BasisArguments

    return BasisArguments(
        dtype=arguments.dtype, device=arguments.device, layer_type=types, collect=collect, batch_size=arguments.batch_size
    )


def load_spread(arguments: Any) -> Any:
    """The model in ZeRO-3 partitions."""
    from warp_ds.cluster.consensus import on_rank_0
    from warp_ds.zero.load import load_sharded

    folder = Path(arguments.folder) / "model"
    on_rank_0(
        lambda: make_model(argparse.Namespace(**{**vars(arguments), "device": "cpu"}), arguments.layers).save_pretrained(
            folder
        ),
        "making the model",
    )
    return load_sharded(
        folder,
        ds_config={"zero_optimization": {"stage": 3}},
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
        progress=False,
    ).eval()


class Peak:
    """Peak memory of this process beyond what it held before: resident set, or the GPU's allocator."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.before = self._status("VmRSS")

    def mb(self) -> float:
        peak = torch.cuda.max_memory_allocated() if self.cuda else self._status("VmHWM")
        return round((peak - self.before) / 1e6, 1)

    def _status(self, name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def memory_job(arguments: Any) -> dict[str, Any]:
    from warp_ds.cluster.peaks import return_freed_memory
    from warp_ds.models.targets import find_targets
    from warp_ds.phases.basis import compute_basis

    model = load_spread(arguments)
    rows = make_rows(arguments.intermediate + arguments.length, arguments.length)
    flags = basis_flags(arguments, "ffn_down", arguments.collect)
    warm_up()
    return_freed_memory()  # what loading has left would be counted as held before, and be used again
    peak = Peak(arguments.device)
    compute_basis(
        model,
        Tokenizer(),
        find_targets(model, "all", "ffn_down"),
        rows,
        flags,
        Path(arguments.folder) / "basis",
        {"model": "m", "data": "d"},
    )
    return {"peak_mb": peak.mb()}


def warm_up(device: str = "cpu") -> None:
    """Libraries take their buffers at first use."""
    x = torch.randn(64, 64, device=device)
    torch.linalg.eigh(x @ x.T)


def scaling_job(arguments: Any) -> dict[str, Any]:
    from warp_ds.cluster import processes
    from warp_ds.method.covariance import kept_entries
    from warp_ds.models.targets import find_targets
    from warp_ds.phases.basis import compute_basis
    from warp_ds.phases.importance import importance_scores
    from warp_ds.store.bases import BasisStore
    from warp_ds.zero.collect import TOKENS, route

    model = load_spread(arguments)
    layers = find_targets(model, "all", FIVE)
    rows = make_rows(arguments.tokens, arguments.length)
    directory = Path(arguments.folder) / "basis"
    world, rank = processes.world_size(), processes.rank()
    result: dict[str, Any] = {}
    tokens = len(rows) * arguments.length

    warm_up()
    processes.barrier()
    peak, begun = Peak(arguments.device), time.perf_counter()
    with Sent() as sent:
        compute_basis(model, Tokenizer(), layers, rows, basis_flags(arguments, FIVE), directory, {"model": "m", "data": "d"})
    says = 0.0
    for n in widths(arguments, FIVE):  # of one block, over all ranks; each rank reports its share
        reduced = route(tokens, n, world, 4) == "reduce"
        sent_entries = kept_entries(n, arguments.device) if reduced else tokens * n / world
        says += 4 * sent_entries * (world - 1) / world
    assert route(tokens, arguments.hidden, world, 4) != TOKENS
    result["basis"] = {
        "seconds": time.perf_counter() - begun,
        "sent_mb": sent.bytes / 1e6,
        "peak_mb": peak.mb(),
        "says_mb": says * arguments.layers / 1e6,
    }

    store = BasisStore(directory)
    processes.barrier()
    peak, begun = Peak(arguments.device), time.perf_counter()
    with Sent() as sent:
        found = importance_scores(model, Tokenizer(), layers, rows, store, importance_flags(arguments, FIVE), [], directory)
    h, i = arguments.hidden, arguments.intermediate
    # Each token's inputs go to every other rank, and its output gradients but for the rank's own rows.
    bytes_a_token = 4 * (2 * h + i) * (world - 1) + 4 * (4 * h + i) * (world - 1) / world
    result["importance"] = {
        "seconds": time.perf_counter() - begun,
        "sent_mb": sent.bytes / 1e6,
        "peak_mb": peak.mb(),
        "says_mb": bytes_a_token * tokens / world * arguments.layers / 1e6,
    }
    result["scores_mb"] = sum(t.numel() * t.element_size() for t in found.values()) / 1e6
    result["rank"], result["max_rss_mb"] = rank, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return result


# ---------------------------------------------------------------- one layer of 70B shapes


def layer(arguments: Any) -> dict[str, Any]:
    """Covariance or Gram matrix, decomposition, scores of one importance batch, and mask, of one m x n layer."""
    from warp_ds.launch.planning.estimate import decomposition_peak
    from warp_ds.method.covariance import Covariance, covariance_flops
    from warp_ds.method.eigenbasis import covariance_basis, token_basis
    from warp_ds.method.importance import add_importance, importance_flops
    from warp_ds.method.mask import pack_bits
    from warp_ds.method.products import products
    from warp_ds.zero.collect import REDUCE
    from warp_ds.zero.select import choose

    m, n, tokens, device = arguments.m, arguments.n, arguments.layer_tokens, arguments.device
    generator = torch.Generator(device=device).manual_seed(0)
    x = torch.randn(tokens, n, generator=generator, device=device, dtype=torch.bfloat16)
    found: dict[str, Any] = {"layer_shape": [m, n], "layer_tokens": tokens}
    warm_up(device)
    peak = Peak(device)

    def timed(name: str, work: Callable[[], Any]) -> Any:
        if device == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        value = work()
        if device == "cuda":
            torch.cuda.synchronize()
        found[f"layer_{name}_s"] = round(time.perf_counter() - begun, 3)
        return value

    def covariance() -> torch.Tensor:
        total = Covariance(n, device)
        for piece in x.split(2048):
            total.add(piece)
        return total.result()

    sigma = timed("covariance", covariance)
    found["layer_covariance_tflop"] = round(covariance_flops(tokens, n) / 1e12, 2)
    few = tokens < n  # phase 1 chooses so
    decompose = partial(token_basis, x) if few else partial(covariance_basis, sigma)
    del sigma
    basis = timed("basis", decompose)
    found["layer_basis_from"] = "tokens" if few else "covariance"
    batch = min(4 * 256, tokens)
    g = torch.randn(batch, m, generator=generator, device=device, dtype=torch.bfloat16)
    total = torch.zeros(m, basis.rank, device=device)
    taken = products(arguments.products, x.dtype, device)
    timed("scores", lambda: add_importance(total, g, taken.mm(x[:batch], basis.columns), products=taken))
    found["layer_scores_tflop"] = round(importance_flops(batch, 1, [m], n, basis.rank) / 1e12, 2)

    def mask() -> torch.Tensor:
        ((chosen,),) = choose([[total]], [m * n // 10])
        return pack_bits(torch.nn.functional.pad(chosen.mask(total), (0, n - basis.rank)))

    timed("mask", mask)
    says = max(decomposition_peak(tokens, n, basis.rank, 2, REDUCE) - few * x.nbytes, 4.0 * n * n)  # x was there before
    return {
        **found,
        "layer_rank": basis.rank,
        "layer_orthogonality": basis.orthogonality_error,
        "layer_residual": basis.residual,
        "layer_peak_mb": peak.mb(),
        "layer_peak_says_mb": round(says / 1e6, 1),
    }


if __name__ == "__main__":
    main()
