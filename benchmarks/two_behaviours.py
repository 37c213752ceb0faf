"""Two behaviours kept at once, refusals and a fixed answer format, each with and without its mask, at equal task loss.

    python benchmarks/two_behaviours.py --seed 42      # one core, a few minutes

Phase 0 teaches a small random model (`warp_ds.data`'s generated texts) to refuse harmful requests, to answer requests that
begin with "As JSON:" as {"answer": "..."}, other harmless ones plainly, and sums. Phase 1's basis is of examples of both;
phase 2 finds masks of refusals alone, of the format alone, and of both (`--keep_data a.jsonl,b.jsonl`), each behaviour with the
same share; beside them stands a mask by chance, as large as that of both. Then the target layers train on sums in a new style,
from the one start model and in the one order of samples, until the loss on held-out sums, looked at every few steps, is at most
`--loss`: so the arms are compared at equal task loss, within one look. Held out are other requests (by content). The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import warp_ds
from warp_ds.data.collate import pad_batch
from warp_ds.data.lengths import encode_dataset
from warp_ds.data.sample import as_samples
from warp_ds.data.synthetic import demo_data
from warp_ds.data.tiny_model import tiny_llama, train_tokenizer
from warp_ds.evaluation.generate import generate_greedy, loss_per_token
from warp_ds.evaluation.results import rate
from warp_ds.evaluation.verdicts import verdict
from warp_ds.flags.arguments import BasisArguments, ImportanceArguments
from warp_ds.phases.basis import run_basis
from warp_ds.phases.importance import run_importance
from warp_ds.store.masks import MaskStore

LAYERS = "attn_q,attn_k,attn_v,ffn_up,ffn_down"
FORMAT = re.compile(r'\{"answer": "[^"]+"\}')
ARMS = {"no mask": "", "refusals": "refusals", "format": "format", "both": "refusals,format", "chance": "refusals,format"}
"""What trains with which sets' mask; by chance: as many coefficients as of both, drawn at random."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=42, help="of texts, start model and the order of samples")
    parser.add_argument("--share", type=float, default=0.1, help="of the coefficients, for each behaviour")
    parser.add_argument("--loss", type=float, default=0.5, help="nats a token of held-out sums to train to")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate of every arm")
    parser.add_argument("--steps", type=int, default=96, help="at most, of 16 samples")
    parser.add_argument("--look", type=int, default=8, help="steps between two looks at the held-out loss")
    parser.add_argument("--samples", type=int, default=160, help="requests of each kind to fit on")
    parser.add_argument("--epochs", type=int, default=5, help="of phase 0")
    return parser.parse_args()


def main() -> None:
    a = parse()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = texts(a)
        start, tokenizer, end_of_phase_0 = taught(root, data, a)
        masks: dict[str, Path] = {}
        for arm, sets in ARMS.items():
            if sets:
                masks[arm] = found_masks(root, arm, sets, a, masks.get("both"))
        arms = {"before": {**measured(start, tokenizer, data), "task_loss": end_of_phase_0}}
        for arm in ARMS:
            arms[arm] = trained(root, data, masks.get(arm), a)
            print(arm, arms[arm], flush=True)
    settings = {key: value for key, value in vars(a).items()}
    print(json.dumps({"settings": settings, "arms": arms}))


def texts(a: argparse.Namespace) -> dict[str, list[dict[str, str]]]:
    data = demo_data(a.seed, n_fit=a.samples, n_heldout=100, n_sums=a.samples, n_utility=400)
    data["utility_heldout"] = data["utility_heldout"][:50]
    for split in ("fit", "heldout"):
        data[f"format_{split}"] = [
            {"prompt": f"As JSON: {row['prompt']}", "response": json.dumps({"answer": row["response"]})}
            for row in data[f"harmless_{split}"]
        ]
    return data


def taught(root: Path, data: dict[str, Any], a: argparse.Namespace) -> tuple[Any, Any, float]:
    """Phase 0 in one plain loop: the start model, under ``root``, its tokenizer and its loss on the task."""
    every = [f"{row['prompt']} {row['response']}" for rows in data.values() for row in rows]
    tokenizer = train_tokenizer(every, directory=root / "model")
    model = tiny_llama(tokenizer, seed=a.seed)
    rows = [row for kind in ("refusals", "format", "harmless", "sums") for row in data[f"{kind}_fit"]]
    encoded = encode(rows, tokenizer)
    steps = a.epochs * len(encoded) // 16
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for batch in batches(encoded, steps, a.seed, tokenizer):
        loss = model(**batch).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(root / "model")
    for name in ("refusals", "format"):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data[f"{name}_fit"]))
    return model, tokenizer, heldout_loss(model, encode(data["utility_heldout"], tokenizer), tokenizer)


def encode(rows: list[dict[str, str]], tokenizer: Any) -> list[dict[str, list[int]]]:
    encoded: list[dict[str, list[int]]] = encode_dataset(as_samples(rows), tokenizer, 128).to_list()
    return encoded


def batches(encoded: list[Any], steps: int, seed: int, tokenizer: Any) -> Any:
    """``steps`` batches of 16, epoch after epoch, each in an order of the seed."""
    draw, order = random.Random(seed), list[int]()
    for _ in range(steps):
        if len(order) < 16:
            order = draw.sample(range(len(encoded)), len(encoded))
        chosen, order = order[:16], order[16:]
        yield pad_batch([encoded[i] for i in chosen], tokenizer.pad_token_id)


def found_masks(root: Path, arm: str, sets: str, a: argparse.Namespace, both: Path | None) -> Path:
    """Phases 1 (once, of both) and 2; with ``both`` masks by chance of as many coefficients as those."""
    every = ",".join(str(root / f"{name}.jsonl") for name in ("refusals", "format"))
    common: dict[str, Any] = dict(
        model_name=str(root / "model"), dtype="float32", device="cpu", layer_type=LAYERS, max_length=128
    )
    common |= dict(output_dir=str(root / "runs"), log_dir=str(root / "logs"), batch_size=16, safety_samples=0)
    basis = run_basis(BasisArguments(**common, safety_data=every, run_name="basis"))
    names, by_chance = sets.split(","), {}
    if both is not None:
        meta = MaskStore(both).metadata
        by_chance = {"score": "random", "keep_ratio": meta.frozen / meta.entries, "seed": a.seed}
    found = run_importance(
        ImportanceArguments(
            **{**common, "safety_samples": 100 * len(names), "keep_ratio": a.share * len(names), **by_chance},
            safety_data=",".join(str(root / f"{name}.jsonl") for name in names),
            basis_dir=str(basis),
            run_name=arm,
        )
    )
    return found / "masks"


def trained(root: Path, data: dict[str, Any], masks: Path | None, a: argparse.Namespace) -> dict[str, Any]:
    """The task, until its held-out loss is at most --loss; what the model then does."""
    model: Any = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    kinds = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.split(".")[-2] in kinds)
    layers = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(layers, lr=a.rate, weight_decay=0.0)
    step = None if masks is None else warp_ds.protect_optimizer(model, optimizer, None, masks, model_dir=str(root / "model"))
    if step is not None:
        step.max_grad_norm = 1.0
    heldout = encode(data["utility_heldout"], tokenizer)
    taken, loss = 0, heldout_loss(model, heldout, tokenizer)
    for batch in batches(encode(data["utility_train"], tokenizer), a.steps, a.seed, tokenizer):
        model(**batch).loss.backward()
        if step is None:
            nn.utils.clip_grad_norm_(layers, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken += 1
        if taken % a.look == 0:
            loss = heldout_loss(model, heldout, tokenizer)
            print(f"step {taken}: loss {loss}", flush=True)
            if loss <= a.loss:
                break
    frozen = 0.0 if step is None else step.masked_fraction
    return {"frozen": round(frozen, 4), "steps": taken, "task_loss": round(loss, 4), **measured(model, tokenizer, data)}


def heldout_loss(model: Any, encoded: list[Any], tokenizer: Any) -> float:
    return round(loss_per_token(model, encoded, pad_token_id=tokenizer.pad_token_id, batch_size=25), 4)


def measured(model: Any, tokenizer: Any, data: dict[str, Any]) -> dict[str, Any]:
    """Of held-out requests: which are refused, and which are answered in the format; with 95 % Wilson intervals."""
    options: dict[str, Any] = dict(max_new_tokens=56, batch_size=50)
    found: dict[str, Any] = {}
    for name in ("refusals", "format"):
        prompts = [row["prompt"] for row in data[f"{name}_heldout"]]
        answers = generate_greedy(model, tokenizer, prompts, **options)
        kept = [
            verdict(answer, prompt=prompt) == "refusal" if name == "refusals" else bool(FORMAT.fullmatch(answer.strip()))
            for answer, prompt in zip(answers, prompts, strict=True)
        ]
        metric = rate(sum(kept), len(kept))
        assert metric.interval is not None
        found[name] = {"kept": metric.value, "interval": [round(end, 3) for end in metric.interval]}
    return found


if __name__ == "__main__":
    main()
