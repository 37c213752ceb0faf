"""Tokens per second of phase 3, packed and padded, with and without the mask, and of TRL's SFTTrainer, in turn.

    python benchmarks/throughput.py                                     # a small model on two CPU ranks
    python benchmarks/throughput.py --device cuda --ranks 8 --hidden 4096 --ffn 14336 --heads 32 --kv_heads 8 --layers 2 \\
        --dtype bfloat16 --micro_batch 16 --global_batch 512 --steps 8  # a block of an 8B

A Llama of random weights trains on GSM8K with a real tokenizer: every parameter, ZeRO-3, AdamW. Padded micro-batches are of
--micro_batch samples, packed ones of as many tokens with their padding. Every variant trains on the same samples in the same
order, TRL packed on its own packing of them. A token counts where it is a sample's, not padding; time runs from the first
step's beginning to the last one's end. Ratios are medians of the ratios of neighbouring runs, ranks are started once.

`padding_ratio` is padded over real tokens of the whole set, in micro-batches as they come; `packed_over_padded`, `over_trl` and
`masked_over_trl` are tokens per second of phase 3 packed against phase 3 padded, TRL packed, and with the mask against TRL
packed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from processor import processor

TOKENIZER = "HuggingFaceTB/SmolLM2-135M-Instruct"
VARIANTS = ("padded", "packed", "masked", "trl_padded", "trl_packed")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="openai/gsm8k", help="hub name or file, as --utility_data")
    parser.add_argument("--tokenizer", default=TOKENIZER, help="hub name or directory")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--ffn", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv_heads", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--micro_batch", type=int, default=8, help="samples of a padded micro-batch, per rank")
    parser.add_argument("--global_batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layer_type", default="ffn_down")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    a = parse()
    if a.worker:
        work(a, Path(a.worker))
        return
    with tempfile.TemporaryDirectory(prefix="throughput_") as folder:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(a.ranks)]
        threads = max(1, (os.cpu_count() or 1) // a.ranks)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        environment |= {"DS_ACCELERATOR": "cpu"} if a.device == "cpu" else {}
        subprocess.run([*command, __file__, *sys.argv[1:], "--worker", folder], env=environment, check=True)
        print((Path(folder) / "result.json").read_text())


def shared(a: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Flags of every phase."""
    return {
        "model_name": str(root / "model"),
        "dtype": a.dtype,
        "device": a.device,
        "max_length": a.max_length,
        "output_dir": str(root / "out"),
        "log_dir": str(root / "logs"),
        "layer_type": a.layer_type,
    }


def prepare(a: argparse.Namespace, root: Path) -> None:
    """Rank 0's: the model, and the samples as tokens."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from warp_ds.data.datasets import load_samples
    from warp_ds.data.lengths import encode_dataset

    tokenizer = AutoTokenizer.from_pretrained(a.tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=a.hidden,
        intermediate_size=a.ffn,
        num_hidden_layers=a.layers,
        num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).to(getattr(torch, a.dtype)).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    samples = load_samples(a.data, split="train", samples=0)
    encode_dataset(samples, tokenizer, a.max_length, long_samples="drop").save_to_disk(root / "tokens")


def mask(a: argparse.Namespace, root: Path) -> None:
    """Random bases and masks, by phases 1 and 2."""
    from warp_ds.flags.arguments import BasisArguments, ImportanceArguments
    from warp_ds.phases.basis import run_basis
    from warp_ds.phases.importance import run_importance

    texts = root / "texts.jsonl"
    texts.write_text(json.dumps({"prompt": "How?", "response": "No."}) + "\n")
    flags = {**shared(a, root), "safety_data": str(texts), "safety_samples": 0}
    run_basis(BasisArguments(**flags, basis="random"))
    run_importance(ImportanceArguments(**flags, score="random"))


def work(a: argparse.Namespace, root: Path) -> None:
    """One rank: every variant in turn, and rank 0's result."""
    from datasets import load_from_disk

    from warp_ds.cluster import processes

    processes.init_distributed(a.device)
    if processes.rank() == 0:
        prepare(a, root)
    processes.barrier()
    variants = a.variants.split(",")
    if "masked" in variants:
        mask(a, root)
    samples = load_from_disk(str(root / "tokens"))
    speeds: dict[str, list[float]] = {variant: [] for variant in variants}
    for number in range(a.rounds):
        for variant in variants[:: -1 if number % 2 else 1]:  # there and back: who comes first, and drifts, even out
            tokens, seconds = (run_trl if "trl" in variant else run_phase)(a, root, samples, variant, number)
            speeds[variant].append(tokens / seconds)
            if processes.rank() == 0:
                print(f"{variant:11} {tokens:7} tokens in {seconds:6.1f} s: {tokens / seconds:8.1f} tokens/s", flush=True)
    if processes.rank() == 0:
        (root / "result.json").write_text(json.dumps(result(a, samples, speeds)))
    processes.shutdown()


class Timer:
    """Seconds of a training from the beginning of its first step, and real tokens of all ranks."""

    def __new__(cls) -> Any:
        import torch
        from transformers import TrainerCallback

        class Made(TrainerCallback):
            def wait(self) -> float:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                return time.perf_counter()

            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                from warp_ds.cluster import processes

                processes.barrier()
                self.begun = self.wait()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                self.seconds = self.wait() - self.begun

        return Made()


def run_phase(a: argparse.Namespace, root: Path, samples: Any, variant: str, seed: int) -> tuple[int, float]:
    """Phase 3's training, without reading the data anew and writing the model."""
    from warp_ds.flags.arguments import TrainArguments
    from warp_ds.phases.packing import attention_of, make_sampler, sample_lengths
    from warp_ds.phases.training import fit
    from warp_ds.phases.watching import Watched
    from warp_ds.protection import WarpCallback
    from warp_ds.zero import settings
    from warp_ds.zero.deepspeed_internals import end_engine
    from warp_ds.zero.model import load_model

    lengths = sample_lengths(samples)
    packing = {} if variant == "padded" else {"packing": True, "tokens_per_batch": padded_tokens(a, lengths)}
    arguments = TrainArguments(
        **shared(a, root), **packing, batch_size=a.micro_batch, global_batch_size=a.global_batch, train_scope="all", seed=seed
    )
    model, tokenizer = load_model(arguments, settings.zero3_config(arguments), attention_of(arguments))
    timer, callbacks = Timer(), []
    if variant == "masked":
        out = root / "out"
        basis, masks = ((out / f"phase{i}_latest" / kind).resolve() for i, kind in ((1, "basis"), (2, "masks")))
        callbacks.append(WarpCallback(basis, masks, str(root / "model")))
    passed = {"max_steps": a.steps, "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no"}
    trainer = fit(
        model, tokenizer, samples, arguments, root / "run", None, [*callbacks, timer], passed, watched=Watched(), facts={}
    )
    end_engine(trainer.deepspeed)
    order = list(make_sampler(samples, arguments, a.steps).global_batches())[: a.steps]
    return sum(lengths[i] for batch in order for i in batch), timer.seconds


def run_trl(a: argparse.Namespace, root: Path, samples: Any, variant: str, seed: int) -> tuple[int, float]:
    """TRL's SFTTrainer under the same ZeRO-3 configuration."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from warp_ds.cluster import processes
    from warp_ds.flags.arguments import TrainArguments
    from warp_ds.phases.packing import attention_of, sample_lengths
    from warp_ds.zero import settings
    from warp_ds.zero.deepspeed_internals import end_engine

    packing = variant == "trl_packed"
    flags = TrainArguments(**shared(a, root), packing=packing)
    rows = max(1, round(padded_tokens(a, sample_lengths(samples)) / a.max_length)) if packing else a.micro_batch
    deepspeed = settings.zero3_config(flags, for_trainer=True) | {"zero_allow_untested_optimizer": True}
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"):
        deepspeed[key] = "auto"
    config = SFTConfig(
        output_dir=str(root / "trl"),
        deepspeed=deepspeed,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=max(1, a.global_batch // (a.micro_batch * processes.world_size())),
        max_length=a.max_length,
        packing=packing,
        max_steps=a.steps,
        learning_rate=5e-5,
        seed=seed,
        bf16=a.dtype == "bfloat16",
        use_cpu=a.device == "cpu",
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    model = AutoModelForCausalLM.from_pretrained(
        root / "model", dtype=getattr(torch, a.dtype), attn_implementation=attention_of(flags)
    )
    timer = Timer()
    tokens = [0]

    class Counting(SFTTrainer):
        def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
            batches, items = super().get_batch_samples(*args, **kwargs)
            for batch in batches:
                tokens[0] += int(batch["attention_mask"].sum() if "attention_mask" in batch else batch["input_ids"].numel())
            return batches, items

    trainer = Counting(
        model=model,
        args=config,
        train_dataset=samples.select_columns(["input_ids", "labels"]),
        processing_class=AutoTokenizer.from_pretrained(root / "model"),
        callbacks=[timer],
    )
    trainer.train()
    end_engine(trainer.deepspeed)
    return sum(processes.all_gather_object(tokens[0])), timer.seconds


def padded_tokens(a: argparse.Namespace, lengths: list[int]) -> int:
    """Tokens of a padded micro-batch, padding too, in the mean over the set as it comes."""
    micro = [lengths[first : first + a.micro_batch] for first in range(0, len(lengths), a.micro_batch)]
    return max(a.max_length, round(sum(max(batch) * len(batch) for batch in micro) / len(lengths) * a.micro_batch))


def result(a: argparse.Namespace, samples: Any, speeds: dict[str, list[float]]) -> dict[str, Any]:
    from warp_ds.phases.packing import sample_lengths

    lengths = sample_lengths(samples)

    def over(one: str, other: str) -> float | None:
        pairs = zip(speeds.get(one, ()), speeds.get(other, ()), strict=False)
        ratios = [x / y for x, y in pairs]
        return round(statistics.median(ratios), 3) if ratios else None

    return {
        "padding_ratio": round(padded_tokens(a, lengths) / a.micro_batch * len(lengths) / sum(lengths), 3),
        "packed_over_padded": over("packed", "padded"),
        "over_trl": over("packed", "trl_packed"),
        "masked_over_trl": over("masked", "trl_packed"),
        "padded_over_trl_padded": over("padded", "trl_padded"),
        "tokens_per_second": {variant: round(statistics.median(found), 1) for variant, found in speeds.items()},
        "samples": len(lengths),
        **processor(),
        "settings": {key: value for key, value in vars(a).items() if key != "worker"},
    }


if __name__ == "__main__":
    main()
