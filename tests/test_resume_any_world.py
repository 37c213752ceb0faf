"""A plain Trainer under ZeRO-3, stopped on 2 ranks, goes on on 3 and on 1: states to the bit, losses within rounding."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from masked_artefacts import odd_model
from ranks import run_ranks
from test_protection_trainer import lines, samples
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import warp_ds
from warp_ds.cluster import processes
from warp_ds.errors import ConfigError
from warp_ds.launch.cli import main as warp_ds_command

STEPS, STOP = 5, 2
FREEZE: dict[str, Any] = {"model.embed_tokens.weight": slice(0, 40), "model.norm.weight": [1]}


class States(TrainerCallback):
    """Masters and moments, whole, at the first step of this start and at its saves."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.begun: dict[str, torch.Tensor] = {}
        self.saved: dict[str, torch.Tensor] = {}

    def read(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        engine: Any = self.trainer.deepspeed
        for name, param in engine.module.named_parameters():
            found[name] = safe_get_full_fp32_param(param).to("cpu", copy=True)
            for key in ("exp_avg", "exp_avg_sq"):
                found[f"{name}.{key}"] = safe_get_full_optimizer_state(param, key).to("cpu", copy=True)
        base = engine.optimizer.optimizer
        found["steps"] = torch.tensor(sorted({float(state["step"]) for state in base.state.values() if "step" in state}))
        found["decay"] = torch.tensor([group["weight_decay"] for group in base.param_groups])
        return found

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        if self.trainer.state.global_step:  # before the first step there are no moments
            self.begun = self.read()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == STOP:
            self.saved = self.read()


def make_trainer(folder: str, freeze: bool, **more: Any) -> tuple[Trainer, States]:
    set_seed(0)
    trainer = Trainer(
        model=odd_model(),
        train_dataset=samples(),
        eval_dataset=samples()[:4] if more else None,
        callbacks=[warp_ds.WarpCallback(freeze=FREEZE)] if freeze else [],
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=12 // processes.world_size(),
            max_steps=STEPS,
            learning_rate=1e-2,
            adam_epsilon=1e-4,
            weight_decay=0.1,
            max_grad_norm=0.5,
            lr_scheduler_type="linear",
            logging_steps=1,
            save_steps=STOP,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            deepspeed={
                "zero_optimization": {"stage": 3, "sub_group_size": 300},
                "train_micro_batch_size_per_gpu": "auto",
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "zero_allow_untested_optimizer": True,
            },
            **more,
        ),
    )
    states = States(trainer)
    trainer.add_callback(states)
    return trainer, states


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What goes through a pipe between processes of which one ends."""
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def whole(folder: str, freeze: bool) -> tuple[list[float], dict[str, Any]]:
    """The undisturbed run; its checkpoint is that of a run which was stopped."""
    trainer, states = make_trainer(folder, freeze)
    assert warp_ds.resume_any_world(trainer) is None  # nothing there: training begins
    trainer.train()
    return [line["loss"] for line in lines(trainer)], arrays(states.saved)


def goes_on(folder: str, freeze: bool) -> tuple[list[float], dict[str, Any]]:
    trainer, states = make_trainer(folder, freeze)
    checkpoint = warp_ds.resume_any_world(trainer)
    assert checkpoint is not None and Path(checkpoint).name == f"universal-{STOP}"
    trainer.train(resume_from_checkpoint=checkpoint)
    assert not list(Path(folder).glob("universal-*"))
    again, _ = make_trainer(folder, freeze)
    ready = warp_ds.resume_any_world(again)  # its own checkpoint, an ordinary one
    assert ready is not None and Path(ready).name == "checkpoint-5"
    return [line["loss"] for line in lines(trainer)], arrays(states.begun)


def refused(folder: str) -> None:
    trainer, _ = make_trainer(folder, False, load_best_model_at_end=True, eval_strategy="steps", eval_steps=STOP)
    with pytest.raises(ConfigError, match="load_best_model_at_end: .* was written by 2 ranks, and these are 1"):
        warp_ds.resume_any_world(trainer)


@pytest.mark.parametrize("freeze", [False, True])
def test_goes_on_on_other_ranks(freeze: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses, saved = run_ranks(2, whole, str(tmp_path / "two"), freeze)[0]
    for ranks in (3, 1):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        shutil.copytree(tmp_path / "two" / f"checkpoint-{STOP}", folder / f"checkpoint-{STOP}")
        if ranks == 1:  # converted beforehand
            words = ["convert-checkpoint", str(folder / f"checkpoint-{STOP}"), "--world_size", "1"]
            assert warp_ds_command(words) == 0
            assert capsys.readouterr().out.strip() == str(folder / f"universal-{STOP}")
        found, begun = run_ranks(ranks, goes_on, str(folder), freeze)[0]
        assert begun.keys() == saved.keys()
        for name, value in saved.items():
            assert np.array_equal(value, begun[name]), (ranks, name)
        assert found == pytest.approx(losses, abs=1e-6), ranks
    if not freeze:
        shutil.rmtree(folder / "checkpoint-4"), shutil.rmtree(folder / "checkpoint-5")
        run_ranks(1, refused, str(folder))


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert warp_ds_command(["convert-checkpoint", str(tmp_path), "--world_size", "2"]) == 2
    assert "holds no optimizer states of DeepSpeed's ZeRO-3" in capsys.readouterr().err
    assert warp_ds_command(["convert-checkpoint", str(tmp_path), "--world_size", "0"]) == 2
