"""A Trainer under ZeRO-3, stopped on 2 ranks, goes on on 3 and on 1: states to the bit, losses within rounding.

Plain, in fp32 and in bf16, with ``freeze``, and with masks in the coordinates of bases: the masters are then the rotated
coefficients.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from masked_artefacts import odd_model, read_artefacts, write_artefacts
from ranks import run_ranks
from test_protection_trainer import lines, samples
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import warp_ds
from warp_ds.cluster import processes
from warp_ds.errors import ConfigError
from warp_ds.launch.cli import main as warp_ds_command
from warp_ds.resuming import convert_checkpoint
from warp_ds.zero import universal

STEPS, STOP = 5, 2
FREEZE: dict[str, Any] = {"model.embed_tokens.weight": slice(0, 40), "model.norm.weight": [1]}
KINDS = ["plain", "freeze", "masks", "bf16"]
LOSS = {"bf16": 5e-4}
"""Of fp32's 1e-6. In bf16 the ranks' gradients are rounded to 8 bits before they are added, and in another order on another
number of them: measured 4e-5, where one step changes the loss by 4e-2."""


class States(TrainerCallback):
    """Masters and moments, whole, at the first step of this start, at its saves and at its end."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.begun: dict[str, torch.Tensor] = {}
        self.saved: dict[str, torch.Tensor] = {}
        self.ended: dict[str, torch.Tensor] = {}

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

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.ended = self.read()


def callbacks(root: Path, kind: str) -> list[TrainerCallback]:
    if kind == "masks":
        return [warp_ds.WarpCallback(basis_dir=root / "artefacts" / "basis", masks_dir=root / "artefacts" / "masks")]
    return [warp_ds.WarpCallback(freeze=FREEZE)] if kind == "freeze" else []


def make_trainer(root: Path, folder: Path, kind: str, **more: Any) -> tuple[Trainer, States]:
    set_seed(0)
    bf16 = kind == "bf16"
    trainer = Trainer(
        model=odd_model(torch.bfloat16 if bf16 else torch.float32),
        train_dataset=samples(),
        eval_dataset=samples()[:4] if more else None,
        callbacks=callbacks(root, kind),
        args=TrainingArguments(
            output_dir=str(folder),
            bf16=bf16,
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
                "bf16": {"enabled": bf16},
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


def whole(root: Path) -> dict[str, tuple[list[float], dict[str, Any]]]:
    """The undisturbed runs; their checkpoints are those of runs which were stopped."""
    found = {}
    for kind in KINDS:
        trainer, states = make_trainer(root, root / "2" / kind, kind)
        assert warp_ds.resume_any_world(trainer) is None  # nothing there: training begins
        trainer.train()
        found[kind] = [line["loss"] for line in lines(trainer)], arrays(states.saved)
        trainer.deepspeed.destroy()
    return found


def go_on(root: Path) -> dict[str, tuple[list[float], dict[str, Any], dict[str, Any]]]:
    found = {}
    for kind in KINDS:
        folder = root / str(processes.world_size()) / kind
        trainer, states = make_trainer(root, folder, kind)
        checkpoint = warp_ds.resume_any_world(trainer)
        assert checkpoint is not None and Path(checkpoint).name == f"universal-{STOP}"
        trainer.train(resume_from_checkpoint=checkpoint)
        assert not list(folder.glob("universal-*"))
        again, _ = make_trainer(root, folder, kind)
        ready = warp_ds.resume_any_world(again)  # its own checkpoint, an ordinary one
        assert ready is not None and Path(ready).name == "checkpoint-5"
        found[kind] = [line["loss"] for line in lines(trainer)], arrays(states.begun), arrays(states.ended)
        trainer.deepspeed.destroy()
    if processes.world_size() == 1:
        refused(root)
    return found


def refused(root: Path) -> None:
    for step in (4, 5):
        shutil.rmtree(root / "1" / "plain" / f"checkpoint-{step}")
    more = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": STOP}
    trainer, _ = make_trainer(root, root / "1" / "plain", "plain", **more)
    with pytest.raises(ConfigError, match="load_best_model_at_end: .* was written by 2 ranks, and these are 1"):
        warp_ds.resume_any_world(trainer)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Checkpoints of 2 ranks for 3 and for 1, some of them converted once for both; what the runs that wrote them held then."""
    root = tmp_path_factory.mktemp("stopped")
    write_artefacts(root / "artefacts", odd_model())
    found = run_ranks(2, whole, root)[0]
    for kind in KINDS:
        folders = [root / "2" / kind / f"checkpoint-{STOP}"]
        if kind in ("freeze", "bf16"):
            folders.append(convert_checkpoint(folders[0], 3))
        for folder in folders:
            for ranks in ("3", "1"):
                shutil.copytree(folder, root / ranks / kind / folder.name)
    return root, found


@pytest.mark.parametrize("ranks", [3, 1])
def test_goes_on_on_other_ranks(ranks: int, stopped: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    root, before = stopped
    if ranks == 1:  # by command, before the job
        words = ["convert-checkpoint", str(root / "1" / "plain" / f"checkpoint-{STOP}"), "--world_size", "1"]
        assert warp_ds_command(words) == 0
        assert capsys.readouterr().out.strip() == str(root / "1" / "plain" / f"universal-{STOP}")
    frozen = read_artefacts(root / "artefacts").frozen
    for kind, (found, begun, ended) in run_ranks(ranks, go_on, root)[0].items():
        losses, saved = before[kind]
        assert begun.keys() == saved.keys(), kind
        for name, value in saved.items():
            assert np.array_equal(value, begun[name]), (ranks, kind, name)
        assert found == pytest.approx(losses, abs=LOSS.get(kind, 1e-6)), (ranks, kind)
        for name, mask in frozen.items() if kind == "masks" else ():
            moved = begun[name] != ended[name]
            assert not moved[mask].any() and moved[~mask].any(), (ranks, name)


def test_what_is_no_checkpoint_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert warp_ds_command(["convert-checkpoint", str(tmp_path), "--world_size", "2"]) == 2
    assert "holds no optimizer states of DeepSpeed's ZeRO-3" in capsys.readouterr().err
    assert warp_ds_command(["convert-checkpoint", str(tmp_path), "--world_size", "0"]) == 2


def test_tensor_parallelism_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files named as DeepSpeed names those of AutoTP with ZeRO-3: two data ranks of two model ranks each."""
    checkpoint = tmp_path / "checkpoint-2"
    (checkpoint / "global_step2").mkdir(parents=True)
    (checkpoint / "latest").write_text("global_step2")
    for data in (0, 1):
        for model in ("00", "01"):
            torch.save({}, checkpoint / "global_step2" / f"zero_pp_rank_{data}_mp_rank_{model}_optim_states.pt")
    assert universal.world_size_of(checkpoint) == 4  # so that four ranks take it as it is
    assert warp_ds_command(["convert-checkpoint", str(checkpoint), "--world_size", "2"]) == 2
    assert "tensor_parallel cuts parameters before ZeRO does" in capsys.readouterr().err
    for file in checkpoint.glob("global_step2/*_01_*"):
        file.unlink()
    with pytest.raises(ConfigError, match="was written by 2 ranks, and these are 1; it cannot be converted: tensor_parallel"):
        universal.convert(checkpoint, {"tensor_parallel": {"autotp_size": 2}}, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
