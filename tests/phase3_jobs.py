"""What the ranks of the end-to-end tests run: phases 1, 2 and 3 as launch/*.py run them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from warp_ds.cluster import processes
from warp_ds.data.synthetic import demo_data
from warp_ds.data.tiny_model import train_tokenizer
from warp_ds.flags.arguments import BasisArguments, EvaluateArguments, ImportanceArguments, TrainArguments
from warp_ds.phases.basis import run_basis
from warp_ds.phases.evaluate import run_evaluation
from warp_ds.phases.importance import run_importance
from warp_ds.phases.trainer import MetricsFile
from warp_ds.phases.training import run_training

LAYERS = "ffn_down,ffn_up,attn_q,attn_k,attn_v"
SAMPLES = 7  # divides by no number of ranks or micro-batches used here
TRAINER = {"weight_decay": 0.1, "max_grad_norm": 0.5, "adam_epsilon": 1e-4, "lr_scheduler_type": "constant", "logging_steps": 1}


def odd_llama(vocabulary: int) -> PreTrainedModel:
    # Three query heads on one key head, widths that neither 2 nor 3 ranks divide.
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=42,
            intermediate_size=55,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=2,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def make_model(root: Path, build: Callable[[int], PreTrainedModel] = odd_llama) -> Path:
    """A Llama of odd sizes (or what ``build`` makes of a vocabulary) with a tokenizer, and the texts, under ``root``."""
    data = demo_data(0)
    tokenizer = train_tokenizer([r["prompt"] + r["response"] for r in data["refusals_fit"][:50]], directory=root / "m")
    torch.manual_seed(0)
    build(len(tokenizer)).save_pretrained(root / "m")
    for name in ("refusals_fit", "harmless_heldout", "utility_train"):
        rows = data[name][:SAMPLES]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root / "m"


def common(root: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model_name": str(root / "m"),
        "dtype": "float32",
        "device": "cpu",
        "output_dir": str(output),
        "log_dir": str(output / "logs"),
        "batch_size": 2,
        "max_length": 200,
        **more,
    }


def phase12(root: Path, output: Path, layers: str = LAYERS, expert_basis: str = "block", **more: Any) -> None:
    shared = common(root, output, layer_type=layers, safety_data=str(root / "refusals_fit.jsonl"), safety_samples=0)
    run_basis(BasisArguments(**shared, expert_basis=expert_basis))
    phase2(root, output, layers, **more)


def phase2(root: Path, output: Path, layers: str, **more: Any) -> None:
    """On the newest basis, or that of ``basis_dir``."""
    safety = {"safety_data": str(root / "refusals_fit.jsonl"), "safety_samples": 0}
    masks = {"keep_ratio": 0.2, "importance_batch_size": 3}
    run_importance(ImportanceArguments(**{**common(root, output, layer_type=layers), **safety, **masks, **more}))


def phase3(root: Path, artefacts: Path, output: Path, passed: dict[str, Any] | None = None, **more: Any) -> Path:
    """Five full-batch steps of the masked layers."""
    settings = common(
        root,
        output,
        utility_data=str(root / "utility_train.jsonl"),
        utility_samples=0,
        epochs=5,
        learning_rate=2e-3,
        global_batch_size=SAMPLES,
        masks_dir=str(artefacts / "phase2_latest"),
    )
    return run_training(TrainArguments(**{**settings, **more}), {**TRAINER, **(passed or {})})


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def whole_job(root: Path, artefacts: Path, output: Path) -> dict[str, Any]:
    """Phases 1 and 2 of this world size, phase 3 on the given artefacts, and an evaluation."""
    if processes.rank() == 0 and not (root / "m").is_dir():
        make_model(root)
    processes.barrier()
    phase12(root, output)
    runs = {scope: phase3(root, artefacts, output / scope, train_scope=scope) for scope in ("warp", "all")}
    runs["identity"] = run_identity(root, output)
    runs["checkpointing"] = phase3(root, artefacts, output / "checkpointing", gradient_checkpointing=True)
    evaluation = run_evaluation(
        EvaluateArguments(
            **common(root, output)
            | {
                "model_name": str(runs["warp"] / "model"),
                "batch_size": 3,
                "harmful_data": str(root / "refusals_fit.jsonl"),
                "harmless_data": str(root / "harmless_heldout.jsonl"),
                "utility_data": str(root / "utility_train.jsonl"),
                "max_new_tokens": 8,
                "utility_samples": 0,
            }
        )
    )
    return {
        "runs": {k: str(v) for k, v in runs.items()},
        "losses": {k: losses(v) for k, v in runs.items()},
        "evaluation": json.loads((evaluation / "metrics.json").read_text()),
        "answers": (evaluation / "answers.jsonl").read_text(),
    }


def family_jobs(
    layers: dict[str, str], roots: dict[str, Path], world: int, apart: Sequence[str] = ()
) -> dict[str, list[float]]:
    """Phases 1, 2 and 3 on each family's model under its root, on the layers that are named; the losses.

    ``apart``: the families whose experts have bases of their own.
    """
    found = {}
    for family, root in roots.items():
        output = root / f"world{world}"
        phase12(root, output, layers[family], "expert" if family in apart else "block")
        found[family] = losses(phase3(root, output, output))
    return found


def run_identity(root: Path, output: Path) -> Path:
    """Original-space masking: the identity basis, global threshold."""
    shared = common(
        root, output / "identity", layer_type="ffn_down", safety_data=str(root / "refusals_fit.jsonl"), safety_samples=5
    )
    run_importance(ImportanceArguments(**shared, basis="identity", mask_scope="global"))
    return phase3(root, output / "identity", output / "identity")


class Interrupted(Exception):
    pass


@contextmanager
def dies(owner: Any, name: str, when: Callable[..., bool], instead: bool = False) -> Iterator[None]:
    """The block dies in the first call of ``owner.name`` for whose arguments ``when`` holds: after it, or ``instead``."""
    real = getattr(owner, name)

    def dying(*args: Any, **kwargs: Any) -> Any:
        result = None if instead else real(*args, **kwargs)
        if when(*args, **kwargs):
            raise Interrupted
        return result

    setattr(owner, name, dying)
    try:
        yield
        raise AssertionError("was not interrupted")
    except Interrupted:
        processes.barrier()
    finally:
        setattr(owner, name, real)


def dies_at(step: int, key: str = "loss") -> AbstractContextManager[None]:
    """The training of the block dies once it has logged the line of this step that has ``key``."""

    def when(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> bool:
        return state.global_step == step and key in kwargs["logs"]

    return dies(MetricsFile, "on_log", when)


def interrupted_and_resumed(root: Path, artefacts: Path, output: Path, save_steps: int = 2, **more: Any) -> dict[str, Any]:
    """An undisturbed run, and one that dies at step 4 after its checkpoint of step 2, if any, and is started again."""
    saving = {"save_strategy": "steps", "save_steps": save_steps}
    whole = phase3(root, artefacts, output / "whole", saving, **more)
    start = partial(phase3, root, artefacts, output / "resumed", saving, **more)
    with dies_at(4):
        start()
    resumed = start()
    return {
        "whole": losses(whole),
        "resumed": losses(resumed),
        "runs": len(list((output / "resumed").glob("phase3_2*"))),
        "model": [str(whole / "model"), str(resumed / "model")],
    }


def flattened(metrics: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Metrics with the nested ones under 'outer.inner', which approx can compare."""
    flat: dict[str, Any] = {}
    for name, value in metrics.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
