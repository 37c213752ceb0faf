"""What the examples start from where no model is given: a tiny Llama, a basis and masks, all made on the spot."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warp_ds.data.synthetic import demo_data
from warp_ds.data.tiny_model import tiny_llama, train_tokenizer
from warp_ds.flags.arguments import BasisArguments, ImportanceArguments


@dataclass
class Start:
    """Where an example's inputs lie, and where it writes."""

    model: str
    masks: str
    task: list[dict[str, str]]
    """Rows of prompt and response."""
    out: Path


def from_command_line(name: str, masks: str = "phase2") -> Start:
    """What the flags name; without them the tiny model under ``--directory`` and the masks of its run ``masks``, made first
    where they are not there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_name", help="model directory")
    parser.add_argument("--masks_dir", help="masks/ of phase 2")
    parser.add_argument("--task", help="jsonl file of prompts and responses")
    parser.add_argument("--directory", type=Path, default=Path("checkpoints/tiny"), help="where the example writes")
    given = parser.parse_args()
    here = given.directory
    if not given.masks_dir and not (here / masks / "finished.json").exists():
        subprocess.run([sys.executable, __file__, str(here)], check=True)  # phases belong into a process of their own
    rows = Path(given.task or here / "task.jsonl").read_text().splitlines()
    return Start(
        given.model_name or str(here / "model"),
        given.masks_dir or str(here / masks / "masks"),
        [json.loads(row) for row in rows],
        here / name,
    )


def world_size() -> int:
    """As launchers say it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def encode(tokenizer: Any, rows: list[dict[str, str]]) -> list[dict[str, list[int]]]:
    """Token ids, and labels that count the response alone."""
    samples = []
    for row in rows:
        prompt = tokenizer(row["prompt"] + "\n")["input_ids"]
        response = tokenizer(row["response"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        samples.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
    return samples


def make(here: Path) -> None:
    """Model, task and safety set under ``here``, then phases 1 and 2: two layers, a tenth of their coefficients frozen,
    and a tenth of their columns."""
    from warp_ds.phases.basis import run_basis
    from warp_ds.phases.importance import run_importance

    data = demo_data(n_fit=24, n_heldout=4, n_sums=4, n_utility=32)
    texts = [f"{row['prompt']} {row['response']}" for rows in data.values() for row in rows]
    tokenizer = train_tokenizer(texts, vocab_size=400, directory=here / "model")
    tiny_llama(tokenizer, hidden_size=48, intermediate_size=96, layers=2, heads=4).save_pretrained(here / "model")
    (here / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data["utility_train"]))
    (here / "safety.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data["refusals_fit"]))
    common: dict[str, Any] = dict(model_name=str(here / "model"), safety_data=str(here / "safety.jsonl"), dtype="float32")
    common.update(device="cpu", output_dir=str(here), log_dir=str(here / "logs"), resume="never", layer_type="ffn_down,attn_q")
    basis = run_basis(BasisArguments(**common, run_name="phase1"))
    masks: dict[str, Any] = dict(common, basis_dir=str(basis / "basis"))
    run_importance(ImportanceArguments(**masks, run_name="phase2"))
    run_importance(ImportanceArguments(**masks, run_name="phase2_columns", mask_unit="column"))  # for adapters


if __name__ == "__main__":
    make(Path(sys.argv[1]))
