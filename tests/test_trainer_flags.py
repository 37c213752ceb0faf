"""Every field of TrainingArguments works and shows its effect, or is refused by name before any work."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import multiprocessing
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from phase3_jobs import common, losses, make_model
from ranks import run_ranks
from safetensors.torch import load_file

from warp_ds.errors import ConfigError
from warp_ds.flags import training_arguments
from warp_ds.flags.arguments import (
    BasisArguments,
    EvaluateArguments,
    ImportanceArguments,
    SafetyTuningArguments,
    TrainArguments,
)
from warp_ds.flags.comparison import CompareArguments
from warp_ds.flags.flag import default_of
from warp_ds.flags.parsing import parse_training
from warp_ds.flags.training_arguments import CHANGES_NO_TRAINING, CHANGES_TRAINING, NO_EFFECT, OURS, REFUSED, WORKS, fields
from warp_ds.phases import trainer_arguments, training


def passed(text: str, kind: Any = TrainArguments) -> dict[str, Any]:
    return parse_training(kind, text.split())[1]


def refusal(text: str, kind: Any = TrainArguments) -> str:
    with pytest.raises(ConfigError) as caught:
        passed(text, kind)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- the lists


def test_the_lists_cover_the_installed_training_arguments() -> None:
    lists = [WORKS, REFUSED.keys(), NO_EFFECT.keys()]
    assert set().union(*lists) == set(fields()), "put what is new into a list, with a test, and take out what is gone"
    assert sum(map(len, lists)) == len(fields()), "a field stands in two lists"
    assert not CHANGES_TRAINING & CHANGES_NO_TRAINING


@pytest.mark.parametrize("kind", [SafetyTuningArguments, TrainArguments, CompareArguments])
def test_what_is_refused_is_refused_by_name(kind: Any) -> None:
    own = {f.name for f in dataclasses.fields(kind)}
    for name in (REFUSED | NO_EFFECT).keys() - own:
        default = default_of(training_arguments.fields()[name])
        other = {"do_train": "False", "tf32": "True"}.get(name, str(not default) if isinstance(default, bool) else "7.5")
        said = refusal(f"--{name} {other}", kind)
        if name.endswith("_token"):
            assert said.startswith(f"--{name} holds what looks like a token")
            continue
        assert said.startswith(f"--{name} is ") and (OURS.get(name) or (REFUSED | NO_EFFECT)[name]) in said
        if isinstance(default, bool) and default:
            assert said == refusal(f"--no_{name}", kind)
        if isinstance(default, bool) and not default and name not in OURS and name not in training_arguments._HARMLESS:
            assert said == refusal(f"--{name.replace('_', '-')}", kind)


def test_a_default_written_out_says_nothing() -> None:
    own = {f.name for f in dataclasses.fields(TrainArguments)}  # have defaults of their own
    for name in (REFUSED | NO_EFFECT).keys() - OURS.keys() - training_arguments._HARMLESS.keys() - own:
        default = default_of(training_arguments.fields()[name])
        if default not in ("", []):  # nothing to write
            assert passed(f"--{name} {getattr(default, 'value', default)}") == {}, name
    assert passed("--do_train --tf32 False --save_only_model=false") == {}


def test_a_field_of_a_newer_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fields(), "train_backwards", fields()["use_cpu"])
    assert refusal("--train_backwards True").startswith("--train_backwards was not checked with warp_ds")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lr_scheduler_type foo", "invalid choice: 'foo'"),
        ("--lr_scheduler_type reduce_lr_on_plateau", "reduce_lr_on_plateau is refused: it was not checked"),
        ("--lr_scheduler_type cosine_with_min_lr", "min_lr or min_lr_rate"),
        ("--lr_scheduler_type warmup_stable_decay", "num_decay_steps"),
        ('--lr_scheduler_type cosine --lr_scheduler_kwargs {"min":1}', "unexpected keyword argument 'min'"),
        ("--lr_scheduler_kwargs 0.1", "no JSON mapping"),
        ("--save_strategy best", "--save_strategy best is refused"),
        ("--save_steps 3 --save_strategy epoch", "--save_steps says nothing under --save_strategy epoch"),
        ("--logging_steps 3 --logging_strategy no", "--logging_steps says nothing under --logging_strategy no"),
        ("--logging_first_step --logging_strategy no", "--logging_first_step contradicts"),
        ("--save_steps 1.5", "--save_steps is a number of steps"),
        ("--save_steps 0", "--save_steps is a number"),
        ("--logging_steps 0", "--logging_steps is"),
        ("--logging_steps inf", "--logging_steps is"),
        ("--save_total_limit 0", "at least 1, not 0"),
        ("--max_steps 0", "--max_steps is a number of steps, at least 1"),
        ("--warmup_steps -1", "--warmup_steps is"),
        ("--weight_decay nan", "--weight_decay is at least 0"),
        ("--adam_beta2 1", "--adam_beta2 is at least 0 and below 1"),
        ("--adam_epsilon 0", "--adam_epsilon is above 0"),
        ("--max_grad_norm -1", "--max_grad_norm is at least 0"),
        ("--label_smoothing_factor 1", "below 1"),
        ("--dataloader_num_workers -1", "--dataloader_num_workers is at least 0"),
        ("--dataloader_prefetch_factor 2", "give --dataloader_num_workers"),
        ("--dataloader_persistent_workers", "give --dataloader_num_workers"),
        ("--dataloader_num_workers 1 --dataloader_multiprocessing_context thread", "invalid choice: 'thread'"),
        ("--report_to papyrus", "choose from none, all, azure_ml"),
        ("--report_to none papyrus", "--report_to none: choose"),
        ("--warmup_ratio 0.1", "did you mean --warmup_steps?"),
        ("--weight_decay much", "invalid float value"),
        ("--weight_decay 0.1 0.2", "'0.2' belongs to no flag"),
        ("--eval_strategy steps --push_to_hub", "--push-to-hub: expected one argument"),
        ("--hub_model_id me/x", "a finished run goes to the hub whole, by --push_to_hub OWNER/NAME"),
        ("--eval_steps 3 --eval_strategy epoch", "--eval_steps says nothing under --eval_strategy epoch"),
        ("--eval_steps 0", "--eval_steps is a number of steps"),
    ],
)
def test_wrong_values_are_one_line(words: str, said: str) -> None:
    assert said in refusal(words)


def test_reporters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: ["tensorboard", "wandb"])
    for words in ("tensorboard wandb", "tensorboard,wandb", "tensorboard, wandb,", "all"):
        assert passed(f"--report_to {words} --weight_decay 0.1") == {"report_to": ["tensorboard", "wandb"], "weight_decay": 0.1}
    assert passed("--report_to none") == {"report_to": []}
    assert "flyte: its package is not installed here" in refusal("--report_to flyte")
    assert "mlflow: its package is not installed here" in refusal("--report_to wandb mlflow")


# ---------------------------------------------------------------- what works, works

#: Flag -> words; each makes another model of the same samples than the run without it.
EFFECTS = {
    "max_steps": "--max_steps 3",
    "lr_scheduler_type": "--lr_scheduler_type constant",
    "lr_scheduler_kwargs": '--lr_scheduler_type cosine_with_min_lr --lr_scheduler_kwargs {"min_lr_rate":0.5}',
    "warmup_steps": "--warmup_steps 2",
    "weight_decay": "--weight_decay 0.1",
    "adam_beta1": "--adam_beta1 0.5",
    "adam_beta2": "--adam_beta2 0.5",
    "adam_epsilon": "--adam_epsilon 1e-3",
    "max_grad_norm": "--max_grad_norm 0.01",
    "label_smoothing_factor": "--label_smoothing_factor 0.2",
}
#: None of these changes a bit of the model.
SILENT = (
    "--logging_steps 2 --logging_first_step --log_level error --log_level_replica error --disable_tqdm True "
    "--report_to none --save_steps 1 --save_total_limit 2 --dataloader_num_workers 1 --dataloader_persistent_workers "
    "--dataloader_prefetch_factor 3 --no_dataloader_pin_memory --torch_empty_cache_steps 2 "
    "--logging_nan_inf_filter True --dataloader_multiprocessing_context fork"
)
STEPS = 4  # of 3, 3, 1 and 3 samples


class Trained:
    """One start of phase 3, with what it says of itself."""

    def __init__(self, root: Path, name: str, words: str = "", **more: Any):
        seen: list[Any] = []
        export = training.export

        def keep(trainer: Any, *rest: Any) -> None:
            seen.append(trainer)
            export(trainer, *rest)

        settings = {
            **common(
                root,
                root / "runs",
                utility_data=str(root / "utility_train.jsonl"),
                utility_samples=0,
                epochs=4 / 3,
                learning_rate=2e-3,
                global_batch_size=3,
                masks_dir="none",
                save_minutes=0.0,
                run_name=name,
                layer_type="ffn_down",
            ),
            **more,
        }
        training.export = keep
        try:
            self.run = training.run_training(TrainArguments(**settings), passed(words))
        finally:
            training.export = export
        (self.trainer,) = seen
        self.model = load_file(self.run / "model" / "model.safetensors")
        self.lines = [json.loads(line) for line in (self.run / "metrics.jsonl").read_text().splitlines()]

    def as_good_as(self, other: Trained) -> bool:
        return all(torch.equal(value, other.model[name]) for name, value in self.model.items())


def flags_job(root: Path) -> dict[str, Any]:
    calls: list[int] = []
    clear = transformers.trainer.clear_device_cache
    plain = Trained(root, "plain")
    assert (plain.trainer.state.global_step, [line["step"] for line in plain.lines if "loss" in line]) == (STEPS, [STEPS]), (
        "a run shorter than --logging_steps says no loss"
    )
    assert plain.trainer.args.run_name == "plain", "trackers would not know the run's name"
    told, config = plain.trainer.args.to_dict(), json.loads((plain.run / "config.json").read_text())
    assert told["warp_ds/layer_type"] == "ffn_down" and told["warp_ds/phase"] == "phase3", "trackers would not know the flags"
    for name, fingerprint in config["inputs"].items():
        assert told[f"warp_ds/fingerprint of {name}"] == fingerprint, "trackers would not know what was read"
    for flag, words in EFFECTS.items():
        other = Trained(root, flag, words)
        assert not other.as_good_as(plain), f"{words} has no effect"
        assert other.trainer.state.global_step == (3 if flag == "max_steps" else STEPS)
    transformers.trainer.clear_device_cache = lambda: calls.append(1)
    multiprocessing.current_process()._config["daemon"] = False  # the tests' ranks are, and may have no workers
    try:
        silent = Trained(root, "silent", SILENT)
        verbosity = transformers.logging.get_verbosity()
    finally:
        transformers.trainer.clear_device_cache = clear
        transformers.logging.set_verbosity_warning()
    assert silent.as_good_as(plain)
    loader, bars = silent.trainer.get_train_dataloader(), silent.trainer.callback_handler.callback_list
    assert (loader.num_workers, loader.persistent_workers, loader.prefetch_factor, loader.pin_memory) == (1, True, 3, False)
    assert "ProgressCallback" not in bars and "ProgressCallback" in plain.trainer.callback_handler.callback_list
    assert calls and verbosity == logging.ERROR
    assert [line["step"] for line in silent.lines if "loss" in line] == [1, 2, 4]
    assert sorted(path.name for path in (silent.run / "trainer").iterdir()) == ["checkpoint-3", "checkpoint-4"]
    quiet = Trained(root, "quiet", "--logging_strategy no --save_strategy epoch")
    assert not any("loss" in line for line in quiet.lines) and quiet.as_good_as(plain)
    assert [path.name for path in (quiet.run / "trainer").iterdir()] == ["checkpoint-4"]
    for words in ("", " --logging_nan_inf_filter True"):  # a training that comes apart says so, unless it is told not to
        apart = Trained(root, f"apart{words}", f"--logging_steps 1 --max_grad_norm 0{words}", learning_rate=1e38)
        assert any(math.isnan(loss) for loss in losses(apart.run)) is not bool(words)
    return {}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flags")
    make_model(folder)
    return folder


def test_a_comparison_has_its_own_evaluation() -> None:
    for words in ("--eval_strategy epoch", "--load_best_model_at_end", "--eval_data x", "--early_stopping_patience 2"):
        assert "is decided by the comparison" in refusal(words, CompareArguments)


def test_what_works_shows_its_effect(root: Path) -> None:
    named = {word.removeprefix("--").removeprefix("no_") for word in SILENT.split() if word.startswith("--")}
    assert EFFECTS.keys() == CHANGES_TRAINING and named | {"logging_strategy", "save_strategy"} == CHANGES_NO_TRAINING
    run_ranks(1, flags_job, root)


# ---------------------------------------------------------------- the DeepSpeed configuration beside the flags


def sections_job(root: Path) -> dict[str, str]:
    said = {}
    for name, (config, words) in SECTIONS.items():
        (root / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, **config}))
        arguments = TrainArguments(**common(root, root / "runs", deepspeed=str(root / "ds.json"), global_batch_size=3))
        try:
            trainer_arguments.check_training(arguments, passed(words))
            said[name] = ""
        except ConfigError as error:
            said[name] = str(error)
        if name == "auto":
            compiler, os.environ["CXX"] = os.environ.get("CXX", "c++"), "no-compiler"
            try:
                trainer_arguments.check_training(arguments, passed(words))
            except ConfigError as error:
                said["no compiler"] = str(error)
            finally:
                os.environ["CXX"] = compiler
        assert not transformers.integrations.is_deepspeed_zero3_enabled(), "the model would be loaded otherwise than before"
    return said


def _adamw(**params: Any) -> dict[str, Any]:
    auto = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
    return {"optimizer": {"type": "AdamW", "params": {**auto, **params}}}


def _warmup(**params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": "auto", "warmup_num_steps": "auto", **params}}}


SECTIONS: Mapping[str, tuple[dict[str, Any], str]] = {
    "auto": (_adamw() | _warmup(), "--weight_decay 0.1 --warmup_steps 3"),
    "clipping of the file": ({"gradient_clipping": 0.3}, ""),
    "another rate": (_adamw(lr=1e-2), ""),
    "no decay there": ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "--weight_decay 0.1"),
    "no rate there": ({"optimizer": {"type": "AdamW", "params": {}}}, ""),
    "two schedulers": (_warmup(), "--lr_scheduler_type cosine"),
    "steps of the file": (_warmup(total_num_steps=100), ""),
    "another warmup": (_warmup(warmup_num_steps=5), "--warmup_steps 3"),
    "another clipping": ({"gradient_clipping": 0.3}, "--max_grad_norm 0.5"),
    "batch of the file": ({"train_batch_size": 8}, ""),
    "a scheduler above its rate": ({}, '--lr_scheduler_type polynomial --lr_scheduler_kwargs {"lr_end":0.1}'),
}


def test_a_deepspeed_configuration_that_contradicts_the_flags(root: Path) -> None:
    (said,) = run_ranks(1, sections_job, root)
    fine = {name for name, text in said.items() if not text}
    assert fine == {"auto", "clipping of the file"}, said
    assert "lr=0.01 vs hf learning_rate=5e-05" in said["another rate"] and "max_grad_norm" in said["another clipping"]
    assert "--weight_decay has no effect" in said["no decay there"] and "--learning_rate has no effect" in said["no rate there"]
    assert "--lr_scheduler_type has no effect" in said["two schedulers"]
    assert "total_num_steps to 100" in said["steps of the file"] and "warmup_num_steps to 5" in said["another warmup"]
    assert "optimizer.type AdamW is compiled at its first use" in said["no compiler"]
    assert "sets train_batch_size" in said["batch of the file"] and "lr_end" in said["a scheduler above its rate"]
    assert not any("\n" in text for text in said.values())


@pytest.mark.parametrize(
    "kind", [SafetyTuningArguments, BasisArguments, ImportanceArguments, TrainArguments, EvaluateArguments, CompareArguments]
)
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf")])
def test_no_number_is_negative_or_not_finite(kind: Any, value: float) -> None:
    numbers = {f.name: type(f.default) for f in dataclasses.fields(kind) if type(f.default) in (int, float)}
    numbers.pop("local_rank")
    assert {"seed", "timeout", "batch_size"} <= numbers.keys()
    for name, of in numbers.items():
        if of is float or value == -1:
            with pytest.raises(ConfigError, match=f"--{name} "):
                kind(**{name: of(value)}).check()
    kind().check()


@pytest.mark.parametrize("more", [{"learning_rates": "inf"}, {"learning_rates": "nan"}, {"seeds": "nan"}, {"seeds": "inf"}])
def test_grids_are_finite(more: dict[str, str]) -> None:
    arguments = CompareArguments(**more)
    with pytest.raises(ConfigError, match="finite"):
        print(arguments.seed_list, arguments.rate_list)


def test_accelerate_s_own_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """``accelerate launch --use_parallelism_config`` says so in the environment, which Trainer's accelerator follows."""
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    with pytest.raises(ConfigError, match="accelerate's parallelism .* is refused: training is data-parallel"):
        trainer_arguments.check_training(TrainArguments(device="cpu", dtype="float32"), {})
    assert "sequence parallelism" in training_arguments.REFUSED["parallelism_config"]
