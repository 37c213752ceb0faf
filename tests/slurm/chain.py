"""A chain small enough for a throw-away cluster, its undisturbed results, and what must be equal to them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from warp_ds.data.synthetic import demo_data
from warp_ds.data.tiny_model import train_tokenizer
from warp_ds.flags.arguments import BasisArguments, ImportanceArguments, TrainArguments
from warp_ds.flags.parsing import parse_arguments, parse_training
from warp_ds.phases.basis import run_basis
from warp_ds.phases.importance import run_importance
from warp_ds.phases.training import run_training

LAYERS = "ffn_down,ffn_up,attn_q"
SAMPLES = 24
DEPTH = 12
STEPS = 12
ROOT = Path(__file__).parent.parent.parent


@dataclass
class Reference:
    """Model and texts under ``root``, and the runs of an undisturbed chain: phase -> directory."""

    root: Path
    runs: dict[str, str]

    def differences(self, run: Path) -> dict[str, float]:
        phase = json.loads((run / "config.json").read_text())["phase"]
        return differences(run, Path(self.runs[phase]))


def make_inputs(root: Path, depth: int = DEPTH) -> Path:
    """A Llama of odd widths, with ``depth`` blocks, in root/m, and texts beside it."""
    data = demo_data(0)
    tokenizer = train_tokenizer([r["prompt"] + r["response"] for r in data["refusals_fit"][:50]], directory=root / "m")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=42,
            intermediate_size=55,
            num_hidden_layers=depth,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=2,
            bos_token_id=0,
            eos_token_id=1,
        )
    ).save_pretrained(root / "m")
    for name in ("refusals_fit", "utility_train"):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data[name][:SAMPLES]))
    return root


def words_of(**values: Any) -> list[str]:
    """Flags as they stand on a command line."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def flags(root: Path, output: Path, steps: int = STEPS) -> dict[str, list[str]]:
    """The flags of each phase; ``steps`` of training."""
    common = {
        "model_name": root / "m",
        "dtype": "float32",
        "device": "cpu",
        "output_dir": output,
        "log_dir": output / "logs",
        "batch_size": 2,
        "max_length": 120,
        "layer_type": LAYERS,
    }
    safety = {"safety_data": root / "refusals_fit.jsonl", "safety_samples": 0}
    settings: dict[str, dict[str, Any]] = {
        "phase1": {**common, **safety},
        "phase2": {**common, **safety, "keep_ratio": 0.2, "importance_batch_size": 2},
        # A large eps: Adam magnifies the rounding of tiny gradients otherwise.
        "phase3": {
            **common,
            "utility_data": root / "utility_train.jsonl",
            "utility_samples": 0,
            "epochs": steps / 3,
            "learning_rate": 1e-3,
            "global_batch_size": 8,
            "adam_epsilon": 1e-4,
            "logging_steps": 1,
            "lr_scheduler_type": "constant",
        },
    }
    return {phase: words_of(**values) for phase, values in settings.items()}


def undisturbed(root: Path, output: Path, steps: int = STEPS, more: dict[str, list[str]] | None = None) -> dict[str, str]:
    """The three phases one after another on this process's ranks, with ``more`` flags each; phase -> run directory."""
    given = {phase: words + (more or {}).get(phase, []) for phase, words in flags(root, output, steps).items()}
    runs = {
        "phase1": run_basis(parse_arguments(BasisArguments, given["phase1"])),
        "phase2": run_importance(parse_arguments(ImportanceArguments, given["phase2"])),
        "phase3": run_training(*parse_training(TrainArguments, given["phase3"])),
    }
    return {phase: str(run) for phase, run in runs.items()}


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    assert len(found) == len(dict(found)), "a step is logged twice"
    return dict(found)


def events(run: Path) -> list[str]:
    """What happened to a run, in order."""
    return [json.loads(line)["event"] for line in (run / "state.jsonl").read_text().splitlines()]


# Two ranks against one, in fp32: sums in another order. Measured below 2e-6, 0 bits, 5e-6 and 1e-6.
TOLERANCES = {"eigenvalues": 1e-5, "sigma": 1e-5, "mask_bits": 4, "weights": 5e-5, "losses": 1e-5}


def assert_as_undisturbed(run: Path, reference: Reference) -> dict[str, float]:
    found = reference.differences(run)
    assert all(found[kind] <= TOLERANCES[kind] for kind in found), (run, found)
    return found


def differences(run: Path, reference: Path) -> dict[str, float]:
    """How far a run is from the undisturbed one: kind -> size. Missing or superfluous files raise."""
    kind = {"phase1": "basis", "phase2": "masks", "phase3": "model"}[json.loads((run / "config.json").read_text())["phase"]]
    assert (run / "finished.json").is_file(), run
    names = sorted(p.name for p in (run / kind).glob("*.safetensors"))
    assert names == sorted(p.name for p in (reference / kind).glob("*.safetensors")), (run, reference)
    assert not list(run.glob("**/.*.tmp")), "something half written was left"
    found: dict[str, float] = {}
    for name in names:
        mine, theirs = load_file(run / kind / name), load_file(reference / kind / name)
        if kind == "basis":
            s, r = mine["S"], theirs["S"]
            found["eigenvalues"] = max(found.get("eigenvalues", 0.0), float((s - r).abs().max() / r.max()))
            a, b = (x["U"] * x["S"] @ x["U"].T for x in (mine, theirs))
            found["sigma"] = max(found.get("sigma", 0.0), float((a - b).abs().max() / b.abs().max()))
        elif kind == "masks":
            bits = np.unpackbits(mine["frozen"].numpy() ^ theirs["frozen"].numpy()).sum()
            found["mask_bits"] = found.get("mask_bits", 0.0) + float(bits)
        else:
            for key, value in mine.items():
                found["weights"] = max(found.get("weights", 0.0), float((value - theirs[key]).abs().max()))
    if kind == "model":
        mine_, theirs_ = losses(run), losses(reference)
        assert mine_.keys() == theirs_.keys()
        found["losses"] = max(abs(mine_[step] - theirs_[step]) for step in theirs_)
    return found
