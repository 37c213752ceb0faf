"""Published controls in phase 3, each against its formula on one dense process, and gone on with after an interruption."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dense_training import DenseAdamW, encoded, train
from phase3_jobs import SAMPLES, TRAINER, Interrupted, losses, make_model, phase3
from ranks import run_ranks
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from warp_ds.cluster import processes
from warp_ds.errors import ConfigError, WarpError
from warp_ds.flags.arguments import TrainArguments
from warp_ds.flags.parsing import parse_training
from warp_ds.phases import training
from warp_ds.phases.controls import Controls
from warp_ds.phases.replay import Replay
from warp_ds.phases.start_model import remove_kept
from warp_ds.zero.deepspeed_internals import shard

STEPS = 5
ALPHA, BETA, DECAY = 20.0, 0.5, 0.6
"""So large an alpha that the distance, a mean over the vocabulary, counts."""
Rows = list[tuple[list[int], list[int]]]


def plain(root: Path, output: Path, **more: Any) -> Path:
    """Five full-batch steps of every parameter, without a mask."""
    return phase3(root, root, output, masks_dir="none", train_scope="all", **more)


def der(root: Path, **more: Any) -> dict[str, Any]:
    return {"objective": "der", "replay_data": str(root / "refusals_fit.jsonl"), "der_alpha": ALPHA, **more}


def runs(root: Path, output: Path) -> dict[str, Any]:
    """What each control makes of the model; the last: samples fewer than a step takes, and fewer than there are."""
    made = {
        "ema": plain(root, output / "ema", ema_decay=DECAY),
        "der": plain(root, output / "der", **der(root)),
        "der++": plain(root, output / "der++", **der(root, der_beta=BETA)),
        "constrained": plain(root, output / "constrained", objective="constrained"),
        "few": plain(root, output / "few", **der(root, replay_batch_size=3), ema_decay=DECAY, batch_size=1),
    }
    return {name: (losses(run), str(run / "model" / "model.safetensors")) for name, run in made.items()}


class Kill(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise Interrupted


def stopped(root: Path, output: Path) -> None:
    """Dies after the checkpoint of step 2."""
    made = training.find_checkpoint
    arrange = training._arrange_reporters

    def arranged(trainer: Any, *rest: Any) -> None:
        arrange(trainer, *rest)
        trainer.add_callback(Kill())

    training._arrange_reporters = arranged  # type: ignore[assignment]
    try:
        few(root, output)
    except Interrupted:
        pass
    finally:
        training._arrange_reporters, training.find_checkpoint = arrange, made


def stopped_and_robbed(root: Path, output: Path) -> list[str]:
    """What is said of a run whose start logits were removed, and of one in which a file of them was cut, before it goes on."""
    stopped(root, output)
    (run,) = (path.parent for path in output.glob("*/start_logits"))
    said = []
    for rob in (lambda path: path.write_bytes(b""), lambda path: shutil.rmtree(path.parent)):
        if processes.rank() == 0:
            rob(min((run / "start_logits").glob("sample_*")))
        processes.barrier()
        try:
            few(root, output)
        except WarpError as error:
            said.append(str(error))
    return said


def few(root: Path, output: Path) -> str:
    saving = {"save_strategy": "steps", "save_steps": 2}
    more = der(root, replay_batch_size=3)
    run = phase3(root, root, output, saving, masks_dir="none", train_scope="all", **more, ema_decay=DECAY, batch_size=1)
    return str(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("controls")
    make_model(path)
    return path


@pytest.fixture(scope="module")
def made(root: Path) -> dict[int, dict[str, Any]]:
    return {world: run_ranks(world, runs, root, root / f"world{world}")[0] for world in (1, 2)}


def reference(root: Path, loss: Callable[..., torch.Tensor]) -> tuple[list[float], list[dict[str, torch.Tensor]]]:
    """Losses, and weights at the start and after each step, in fp64; ``loss`` of (model, start model, task, safety)."""
    tokenizer = AutoTokenizer.from_pretrained(root / "m")
    model, start = (AutoModelForCausalLM.from_pretrained(root / "m", dtype=torch.float64) for _ in range(2))
    task, safety = (encoded(root / f"{name}.jsonl", tokenizer) for name in ("utility_train", "refusals_fit"))
    trained = {name: p.detach().clone() for name, p in model.named_parameters()}
    decay = {name: 0.0 if "norm" in name else TRAINER["weight_decay"] for name in trained}
    clip: Any = TRAINER["max_grad_norm"]
    optimizer = DenseAdamW(trained, {}, {}, lr=2e-3, eps=1e-4, decay=decay, clip=clip)  # type: ignore[arg-type]
    seen = [optimizer.weights()]

    def step(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(optimizer.weights())
        return loss(model, start, task, safety)

    said = train(model, list(trained), [torch.zeros(0)] * STEPS, optimizer, step)
    return said, [*seen[1:], optimizer.weights()]


def logits(model: torch.nn.Module, rows: Rows) -> list[torch.Tensor]:
    """Of each row's response tokens, one row at a time, without padding."""
    return [model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1] for before, after in rows]


def entropy(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    answers = torch.cat([torch.tensor(after) for _, after in rows])
    return functional.cross_entropy(torch.cat(logits(model, rows)), answers)


def replayed(alpha: float, beta: float) -> Callable[..., torch.Tensor]:
    def loss(model: torch.nn.Module, start: torch.nn.Module, task: Rows, safety: Rows) -> torch.Tensor:
        with torch.no_grad():
            before = torch.cat(logits(start, safety))
        distance = ((torch.cat(logits(model, safety)) - before) ** 2).mean()
        return entropy(model, task) + alpha * distance + beta * entropy(model, safety)

    return loss


def assert_same(path: str, weights: dict[str, torch.Tensor]) -> None:
    found = load_file(path)
    # fp32 against fp64 at an Adam eps of 1e-4, as in test_phase3_reference.
    for name, value in weights.items():
        assert (found[name].double() - value).abs().max() < 1e-5, name


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name, beta", [("der", 0.0), ("der++", BETA)])
def test_replay_is_the_papers_loss(root: Path, made: Any, world: int, name: str, beta: float) -> None:
    said, weights = reference(root, replayed(ALPHA, beta))
    found, path = made[world][name]
    assert found == pytest.approx(said, abs=2e-6)
    assert_same(path, weights[-1])
    without, _ = reference(root, replayed(0.0, beta))
    assert abs(without[-1] - said[-1]) > 1e-3, "alpha counts for nothing: this test would see nothing"


def constrained(model: torch.nn.Module, start: torch.nn.Module, task: Rows, safety: Rows) -> torch.Tensor:
    """-(2 / beta_t) log sigmoid(beta_t log(pi / pi_start)), beta 0.5, 2, 2, 2, 2, 0.1, ..., a mean over all tokens."""
    losses = []
    with torch.no_grad():
        before = logits(start, task)
    for (_, after), now, then in zip(task, logits(model, task), before, strict=True):
        for t, token in enumerate(after, 1):
            beta = 0.5 if t == 1 else 2.0 if t <= 5 else 0.1
            ratio = now[t - 1].softmax(-1)[token] / then[t - 1].softmax(-1)[token]
            losses.append(-2 / beta * torch.log(1 / (1 + ratio ** (-beta))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("world", [1, 2])
def test_constrained_is_the_papers_loss(root: Path, made: Any, world: int) -> None:
    said, weights = reference(root, constrained)
    found, path = made[world]["constrained"]
    assert found == pytest.approx(said, abs=1e-5)  # -(2 / 0.1) log sigmoid is 14 nats at the start
    assert_same(path, weights[-1])
    _, without = reference(root, lambda model, start, task, safety: entropy(model, task))
    assert max(float((without[-1][name] - weights[-1][name]).abs().max()) for name in weights[-1]) > 1e-4


@pytest.mark.parametrize("world", [1, 2])
def test_ema_is_the_exponential_average_of_the_steps_weights(root: Path, made: Any, world: int) -> None:
    said, weights = reference(root, lambda model, start, task, safety: entropy(model, task))
    found, path = made[world]["ema"]
    assert found == pytest.approx(said, abs=1e-6)
    share = [DECAY**STEPS] + [(1 - DECAY) * DECAY ** (STEPS - t) for t in range(1, STEPS + 1)]
    average = {name: sum(s * w[name] for s, w in zip(share, weights, strict=True)) for name in weights[0]}
    assert_same(path, average)
    assert max(float((average[name] - weights[-1][name]).abs().max()) for name in average) > 1e-3


def test_any_number_of_ranks_replays_the_same_samples(made: Any) -> None:
    one, two = (made[world]["few"] for world in (1, 2))
    assert one[0] == pytest.approx(two[0], abs=1e-6)
    a, b = load_file(one[1]), load_file(two[1])
    assert all((a[name] - b[name]).abs().max() < 1e-5 for name in a)


@pytest.mark.parametrize("first, second", [(1, 2), (2, 1)])
def test_a_run_goes_on_with_its_average_and_the_start_models_logits(
    root: Path, made: Any, tmp_path: Path, first: int, second: int
) -> None:
    run_ranks(first, stopped, root, tmp_path)
    found = load_file(run_ranks(second, few, root, tmp_path)[0])
    expected = load_file(made[1]["few"][1])
    assert all((found[name] - expected[name]).abs().max() < 1e-5 for name in expected)


def test_start_logits_are_never_made_of_trained_weights(root: Path, tmp_path: Path) -> None:
    first, second = run_ranks(2, stopped_and_robbed, root, tmp_path)
    assert len(first) == len(second) == 2
    assert "sample_000000.safetensors was changed" in first[0] and "it is missing" in first[1]
    assert all("The weights of checkpoint-2 are no start model's" in text for text in first)


def test_a_finished_run_keeps_no_start_logits(made: Any) -> None:
    for name in ("der", "constrained", "few"):
        run = Path(made[2][name][1]).parents[1]
        assert (run / "finished.json").is_file() and not (run / "start_logits").exists()


def test_start_logits_that_were_never_finished_are_made_again(tmp_path: Path) -> None:
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=2)
    held = Replay([{"labels": [2]}], TrainArguments(device="cpu"), tokenizer, tmp_path / "held", 1)
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "somebody's").touch()
    remove_kept(tmp_path / "held")
    assert (tmp_path / "held" / "somebody's").is_file(), "not begun by this program"
    shutil.rmtree(tmp_path / "held")
    assert held._is_made() is False
    held.keep(0, torch.ones(2, 3), torch.zeros(2))
    assert held._is_made() is False and not list((tmp_path / "held").glob("sample_*"))


class Steps(TrainerCallback):
    """Keeps the adapter's weights, whole, before the first step and after each."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = {name: p for name, p in kwargs["model"].named_parameters() if p.requires_grad}
        shards = {name: processes.all_gather_object(shard(p).clone()) for name, p in named.items()}
        self.seen.append({n: torch.cat(shards[n])[: p.ds_numel].view(p.ds_shape).double() for n, p in named.items()})

    on_step_end = on_train_begin


def averaged_adapter(root: Path, output: Path) -> tuple[str, list[dict[str, Any]]]:
    steps, arrange = Steps(), training._arrange_reporters

    def arranged(trainer: Any, *rest: Any) -> None:
        arrange(trainer, *rest)
        trainer.add_callback(steps)

    training._arrange_reporters = arranged  # type: ignore[assignment]
    try:
        lora: dict[str, Any] = {"adapter": "lora", "lora_r": 3, "lora_dropout": 0.0}
        run = phase3(root, root, output, masks_dir="none", ema_decay=DECAY, **lora)
    finally:
        training._arrange_reporters = arrange
    return str(run / "adapter" / "adapter_model.safetensors"), [{n: w.numpy() for n, w in step.items()} for step in steps.seen]


def test_an_adapter_that_is_averaged_is_written_averaged(root: Path, tmp_path: Path) -> None:
    """DeepSpeed keeps A and B whole on every rank, beside their partitions."""
    path, steps = run_ranks(2, averaged_adapter, root, tmp_path)[0]
    weights = [{name: torch.from_numpy(value) for name, value in step.items()} for step in steps]
    found, average = load_file(path), weights[0]
    for step in weights[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * step[name] for name in average}
    assert len(weights) == STEPS + 1 and len(found) == len(average)
    for name, value in average.items():
        assert (found[name.replace(".default", "")].double() - value).abs().max() < 1e-6, name
    assert max(float((average[name] - weights[-1][name]).abs().max()) for name in average) > 1e-3


def test_every_objective_can_be_asked_for() -> None:
    for words in (["task"], ["constrained"], ["der", "--replay_data", "x.jsonl"]):
        assert parse_training(TrainArguments, ["--objective", *words])[0].objective == words[0]


@pytest.mark.parametrize("flags, message", [
    ({"objective": "der"}, "--replay_data goes with der"),
    ({"replay_data": "x.jsonl"}, "--replay_data goes with der"),
    ({"objective": "der", "replay_data": "x.jsonl", "packing": True}, "leave --packing out"),
    ({"ema_decay": 1.0}, "--ema_decay is at least 0 and below 1"),
    ({"der_alpha": 2.0}, "--der_alpha is of --objective der, and says nothing of task"),
    ({"objective": "constrained", "replay_batch_size": 3}, "--replay_batch_size is of --objective der"),
])  # fmt: skip
def test_flags_that_contradict_each_other_are_refused(flags: dict[str, Any], message: str) -> None:
    assert SAMPLES
    with pytest.raises(ConfigError, match=message):
        TrainArguments(**flags).check()


def test_a_loss_that_is_not_the_tasks_takes_no_smoothing_of_it() -> None:
    with pytest.raises(ConfigError, match="leave --label_smoothing_factor out"):
        Controls.read(TrainArguments(objective="constrained"), {"label_smoothing_factor": 0.1})
    Controls.read(TrainArguments(), {"label_smoothing_factor": 0.1})
