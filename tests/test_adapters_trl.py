"""TRL's SFTTrainer under ZeRO-3: with peft_config and the callback, the certificate and a run that dies and goes on; without
an adapter, with ``freeze``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from phase3_jobs import SAMPLES, make_model, phase12
from ranks import run_ranks
from safetensors.torch import load_file

import warp_ds
from warp_ds import WarpCallback
from warp_ds.cluster import processes
from warp_ds.evaluation.adapter_certificate import certify_adapter

pytest.importorskip("trl")
STEPS = 4
TARGETS = ["q_proj", "up_proj", "down_proj", "o_proj"]
FREEZE: dict[str, Any] = {"model.embed_tokens.weight": slice(3, None), "model.layers.0.mlp.up_proj.weight": [0, 7, 54]}


def sft(
    root: Path,
    out: Path,
    resume: bool = False,
    die_at: int | None = None,
    protected: bool = True,
    freeze: dict[str, Any] | None = None,
) -> list[float]:
    """SFTTrainer as somebody else's script would have it, with an adapter or with ``freeze``; the logged losses."""
    import transformers
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Dies(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == die_at:
                raise KeyboardInterrupt

    transformers.set_seed(0)
    zero = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}
    args = SFTConfig(
        output_dir=str(out),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=3e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        deepspeed={
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
        },
    )
    rows = load_dataset("json", data_files=str(root / "utility_train.jsonl"), split="train", cache_dir=str(out / "cache"))
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(root / "m"),
        train_dataset=rows.rename_column("response", "completion").select_columns(["prompt", "completion"]),
        processing_class=AutoTokenizer.from_pretrained(root / "m"),
        peft_config=None if freeze else LoraConfig(r=3, lora_alpha=8, lora_dropout=0.1, target_modules=TARGETS),
        callbacks=[*([WarpCallback(masks_dir=root / "artefacts" / "phase2_latest")] if protected else []), Dies()],
        args=args,
    )
    if freeze:
        warp_ds.freeze(trainer, freeze)
    try:
        trainer.train(resume_from_checkpoint=resume or None)
    except KeyboardInterrupt:
        trainer.deepspeed.destroy()
        return []
    trainer.save_model()
    if protected:
        assert all("masked_fraction" in line for line in trainer.state.log_history if "loss" in line)
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def on_two(root: Path) -> dict[str, Any]:
    if processes.rank() == 0:
        make_model(root)
    processes.barrier()
    phase12(root, root / "artefacts", mask_unit="column")
    whole = sft(root, root / "whole")
    assert sft(root, root / "killed", die_at=3) == []
    resumed = sft(root, root / "killed", resume=True)
    sft(root, root / "free", protected=False)
    sft(root, root / "frozen", protected=False, freeze=FREEZE)
    return {"whole": whole, "resumed": resumed}


def test_sft_with_peft_under_zero3(tmp_path: Path) -> None:
    found = run_ranks(2, on_two, tmp_path)[0]
    assert len(found["whole"]) == STEPS and found["resumed"] == found["whole"]
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    masks = tmp_path / "artefacts" / "phase2_latest" / "masks"
    kept = certify_adapter(tmp_path / "m", tmp_path / "whole", masks)
    assert kept.outcome == "kept", kept.problems
    assert [part.what for part in kept.not_claimed] == ["adapters of layers without a mask"]
    assert any("adds nothing" in note for note in kept.notes)  # masks of k and v, which have no adapter
    assert certify_adapter(tmp_path / "m", tmp_path / "free", masks).outcome == "broken"
    assert SAMPLES % 4
    expect_frozen(load_file(tmp_path / "m" / "model.safetensors"), load_file(tmp_path / "frozen" / "model.safetensors"))


def expect_frozen(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> None:
    """FREEZE's rows to the bit; every other entry of these weights, and every other weight, has moved (decay is 0: only
    entries whose gradient is 0 would not)."""
    for name, given in FREEZE.items():
        rows = torch.zeros(len(before[name]), dtype=torch.bool)
        rows[given] = True
        moved = before[name].view(torch.int32) != after[name].view(torch.int32)
        assert not moved[rows].any() and moved[~rows].any(dim=1).all(), name
    assert all(not torch.equal(before[name], after[name]) for name in before)
