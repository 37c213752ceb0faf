"""Packing: the samples of a padded global batch, in fewer tokens; the same training on any number of ranks."""

from __future__ import annotations

import json
import random
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from dense_training import phase3_reference
from phase3_jobs import common, interrupted_and_resumed, losses, make_model, phase3, phase12
from phase12_jobs import Tokenizer, basis_arguments, importance_arguments, load, make_rows
from ranks import run_ranks
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from warp_ds.cluster import processes
from warp_ds.data.collate import EMPTY, GlobalBatchSampler, empty_sample, pad_batch
from warp_ds.data.formats import IGNORE
from warp_ds.data.packing import Packed, PackedBatchSampler, best_fit, pack_batch, seen_of_another, spread
from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import SafetyTuningArguments, TrainArguments
from warp_ds.models.packable import check_packable
from warp_ds.models.transformers_internals import keeps_logits
from warp_ds.phases.basis import run_basis
from warp_ds.phases.importance import run_importance
from warp_ds.phases.packing import _refuse_leaks, check_apart
from warp_ds.phases.training import run_safety_tuning
from warp_ds.zero.batches import Samples
from warp_ds.zero.importance_steps import importance_batches, plan_steps

WORLDS = (1, 2, 3)
LENGTHS = random.Random(0).choices(range(2, 61), k=50)
PAIRS = [{"prompt": "Say it.", "response": "No."}]


def test_best_fit_puts_a_sample_where_it_leaves_the_least_room():
    assert best_fit([5, 7, 3, 3, 2], 10) == [[1, 2], [0, 3, 4]]
    assert best_fit([6, 4, 5, 5], 10) == [[0, 1], [2, 3]]
    assert best_fit([], 10) == []
    with pytest.raises(ValueError, match="sample 1 has 11 tokens, more than the 10 of a row"):
        best_fit([1, 11], 10)


def test_spread_makes_rows_of_even_length():
    assert spread([4, 3, 3, 2], 2) == [[0, 3], [1, 2]]
    assert spread([4], 3) == [[0], [], []]
    loads = [sum(LENGTHS[i] for i in row) for row in spread(LENGTHS, 8)]
    assert loads == sorted(loads, reverse=True) and loads[0] - loads[-1] <= 4


@pytest.mark.parametrize("size, rows, capacity", [(8, 2, 64), (16, 1, 150), (7, 3, 60), (3, 4, 100)])
def test_every_world_size_packs_the_samples_of_the_padded_global_batch(size, rows, capacity):
    for world in WORLDS:
        padded = GlobalBatchSampler(len(LENGTHS), size, 2, world, shuffle=True, seed=3)
        packed = PackedBatchSampler(LENGTHS, size, rows, capacity, world, shuffle=True, seed=3, epochs=3)
        for epoch in range(3):
            padded.set_epoch(epoch)
            packed.set_epoch(epoch)
            micro = list(packed)
            assert len(micro) == len(packed) == packed.steps * packed.accumulation_steps * world
            assert {len(batch) for batch in micro} == {rows}
            assert all(sum(LENGTHS[i] for i in row) <= capacity for batch in micro for row in batch)
            step = packed.accumulation_steps * world
            for number, wanted in enumerate(padded.global_batches()):
                mine = micro[number * step : (number + 1) * step]
                assert sorted(i for batch in mine for row in batch for i in row) == sorted(wanted)


def test_best_fit_where_even_rows_do_not_fit() -> None:
    """Longest first to the shortest row makes 7 and 5 of these."""
    assert list(PackedBatchSampler([3, 3, 2, 2, 2], 5, 1, 6, 2)) == [[(0, 1)], [(2, 3, 4)]]


def test_fewer_micro_batches_of_even_length():
    """50 samples of 31 tokens in the mean and 60 at most: 8 to a micro-batch padded are 7 micro-batches."""
    packed = PackedBatchSampler(LENGTHS, 50, 4, 64, 2)
    assert packed.accumulation_steps * 2 < -(-50 // 4)
    for first, second in zip(*(list(packed.rank_batches(rank)) for rank in (0, 1)), strict=True):
        of = [sum(LENGTHS[i] for row in batch for i in row) for batch in (first, second)]
        assert max(of) < 1.1 * min(of)


@pytest.mark.parametrize("world", WORLDS)
def test_accelerate_deals_the_packed_batches(world):
    for rank in range(world):
        sampler = PackedBatchSampler(LENGTHS, 8, 2, 64, world, shuffle=True, epochs=2)
        data = Packed(list(range(len(LENGTHS))), None, sampler)
        loader: Any = DataLoader(data, batch_sampler=sampler, collate_fn=lambda rows: [tuple(row) for row in rows])
        loader = prepare_data_loader(loader, num_processes=world, process_index=rank, put_on_device=False)
        for epoch in (0, 1):
            loader.set_epoch(epoch)
            mine = list(loader)
            sampler.set_epoch(epoch)
            assert mine == list(sampler.rank_batches(rank))
            sampler.set_epoch(0)
            resumed = skip_first_batches(loader, 1)
            resumed.set_epoch(epoch)
            assert list(resumed) == mine[1:]


def sample(*ids: int) -> dict[str, list[int]]:
    return {"input_ids": list(ids), "attention_mask": [1] * len(ids), "labels": list(ids)}


def test_a_packed_batch():
    batch = pack_batch([[sample(7, 8, 9), sample(5, 6)], [], [sample(4, 3)]], 0, empty_sample(2))
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[7, 8, 9, 5, 6], [4, 3, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
        "labels": [[IGNORE, 8, 9, IGNORE, 6], [IGNORE, 3, IGNORE, IGNORE, IGNORE]],
    }
    kept = pack_batch([[sample(7, 8, 9), sample(5, 6)], [sample(4)]], 0, empty_sample(2), trained_only=True)
    assert kept["logits_to_keep"].tolist() == [[True, True, False, True, False], [False] * 5]
    assert kept["labels"].tolist() == kept["shift_labels"].tolist() == [8, 9, 6]
    nothing = pack_batch([[], []], 0, empty_sample(2))
    assert nothing["input_ids"].tolist() == [[2]] and nothing["labels"].tolist() == [[IGNORE]]
    # Of no logits at all there would be no loss, and a rank without a backward pass.
    nothing = pack_batch([[], []], 0, empty_sample(2), trained_only=True)
    assert nothing["logits_to_keep"].tolist() == [[True]] and nothing["labels"].tolist() == [IGNORE]
    prompt = pack_batch([[{**sample(7, 8, 9), "labels": [IGNORE, IGNORE, 9]}]], 0, empty_sample(2), trained_only=True)
    assert prompt["logits_to_keep"].tolist() == [[True, True, False]] and prompt["labels"].tolist() == [IGNORE, 9]


KINDS = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3", "qwen3_moe", "gpt2"]


def tiny(kind: str) -> Any:
    small = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    small |= {"sliding_window": 3} if kind in ("mistral", "gemma2", "gemma3_text") else {}
    small |= {"num_experts": 2, "num_experts_per_tok": 2} if "moe" in kind else {}
    small |= {"num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 3} if kind == "gpt_oss" else {}
    config = CONFIG_MAPPING[kind](**small, use_cache=False)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return config


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_samples_see_nothing_of_each_other(kind: str, attention: str) -> None:
    if (kind, attention) == ("gemma2", "sdpa"):
        pytest.skip("Gemma 2 has no SDPA")
    config = tiny(kind)
    check_packable(config, kind)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    samples = [sample(*random.Random(n).choices(range(3, 40), k=n)) for n in (9, 5, 7, 2)]

    def gradient(batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
        model.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    padded = gradient(pad_batch(samples, 0))
    assert keeps_logits(model)
    for trained_only in (False, True):
        packed = gradient(pack_batch([samples[:2], [], samples[2:]], 0, empty_sample(2), trained_only))
        assert packed[0] == pytest.approx(padded[0], rel=1e-6)
        torch.testing.assert_close(packed[1], padded[1], rtol=1e-4, atol=1e-6)


def test_samples_that_see_each_other_are_found_by_trying() -> None:
    """gpt-oss, refused by name, makes its masks without the position ids."""
    seen = {}
    for kind in ("llama", "gpt_oss"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny(kind), attn_implementation="eager").eval()
        seen[kind] = seen_of_another(model, range(3, 12), range(20, 30), "cpu")
    assert seen["llama"] < 1e-5 and seen["gpt_oss"] > 0.1


def test_the_rows_of_phases_1_and_2() -> None:
    """Every sample once, in rows that hold no more than they may; importance batches whole where one fits."""
    samples = Samples(make_rows(), Tokenizer(), "cpu", capacity=40)
    batches, _ = importance_batches(samples, 2)
    for rows, ranks in [(1, 1), (2, 1), (1, 2), (2, 3)]:
        dealt = [i for rank in range(ranks) for batch in samples.deal(rows, ranks, rank) for i in batch if i != EMPTY]
        assert sorted(dealt) == list(range(len(samples)))
        assert len({len(samples.deal(rows, ranks, rank)) for rank in range(ranks)}) == 1
        steps = plan_steps(batches, samples, rows, ranks)
        assert [i for step in steps for part in step.parts for i in part if i != EMPTY] == [i for b in batches for i in b]
        for step in steps:
            assert all(len(samples.packed(part)) <= rows for part in step.parts)
            assert all(samples.length(row) <= 40 for part in step.parts for row in samples.packed(part))
            assert all(last for _, _, last in step.segments)  # no two samples of these have more than 40 tokens
    assert len(plan_steps(batches, samples, 2, 1)) < len(batches)
    short = plan_steps(batches, Samples(make_rows(), Tokenizer(), "cpu", capacity=21), 1, 1)
    assert {last for step in short for *_, last in step.segments} == {True, False}


def test_a_packed_batch_of_phases_1_and_2() -> None:
    samples = Samples(make_rows(), Tokenizer(), "cpu", "response", capacity=40)
    batch = samples.batch([6, 0, EMPTY, 3, 9])
    assert batch.samples == [6, 0, 3, 9] and batch.sequence is not None and len(batch.input_ids) == 2
    labels = [label for i in batch.samples for label in samples.rows[i]["labels"] if label != IGNORE]
    assert batch.take(batch.input_ids.unsqueeze(-1)).flatten().tolist() == labels
    x = torch.zeros(*batch.labels.shape, 3)
    x[tuple((batch.sequence == 2).nonzero()[1])] = float("inf")
    assert torch.isfinite(batch.sums(x)).tolist() == [True, True, False, True]
    assert samples.batch([EMPTY]).counted.sum() == 0


@pytest.mark.parametrize("seen, leaks", [(0.0, False), (0.049, False), (0.05, True), (float("nan"), True)])
def test_how_much_samples_may_see_of_each_other(seen: float, leaks: bool) -> None:
    with pytest.raises(ConfigError, match="samples of one row see each other") if leaks else nullcontext():
        _refuse_leaks(seen)


def apart_job(*names: str) -> list[str]:
    """What phases 1 and 2 say of models that are packed, whether they are known to mix samples or not."""
    said = []
    for name in names:
        arguments = basis_arguments(Path(name), packing=True, layer_type="attn_o")
        model, _ = load(arguments)
        try:
            check_apart(arguments, model, [{"input_ids": list(range(3, 12))}, {"input_ids": list(range(20, 30))}])
            said.append("")
        except ConfigError as error:
            said.append(str(error))
    return said


def test_samples_that_see_each_other_are_found_before_phases_1_and_2(tmp_path: Path) -> None:
    for kind in ("llama", "gpt_oss"):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny(kind), attn_implementation="eager").save_pretrained(tmp_path / kind)
    fine, mixed = run_ranks(2, apart_job, str(tmp_path / "llama"), str(tmp_path / "gpt_oss"))[0]
    assert not fine and "samples of one row see each other" in mixed
    refused: Any = pytest.raises(ConfigError, match="--packing cannot be used with .*, a model of type gpt_oss")
    with refused:
        run_basis(basis_arguments(tmp_path / "gpt_oss", packing=True, layer_type="attn_o"), PAIRS)
    with refused:
        run_importance(importance_arguments(tmp_path / "gpt_oss", packing=True, layer_type="attn_o", basis="identity"), PAIRS)


MIXING = "mamba mamba2 jamba bamba zamba2 falcon_h1 lfm2 qwen3_next nemotron_h recurrent_gemma rwkv"
MIXING += " llama4_text bloom gpt_oss opt"


@pytest.mark.parametrize("kind", MIXING.split())
def test_models_that_mix_packed_samples_are_refused_by_name(kind: str) -> None:
    config = CONFIG_MAPPING[kind]()
    if kind == "lfm2":
        config.layer_types = ["conv", "full_attention"]
    with pytest.raises(ConfigError, match=f"cannot be used with models/x, a model of type {kind}: its? .*leave --packing"):
        check_packable(config, "models/x")


@pytest.mark.parametrize("flags, message", [
    ({"tokens_per_batch": 4096}, "give --packing too"),
    ({"tokens_per_batch": 100, "packing": True}, "100 is less than --max_length 512"),
])  # fmt: skip
def test_flags_that_contradict_each_other(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainArguments(**flags).check()


#: Of three samples a step: steps of one epoch and of the next, and a last batch that is short.
SOME: dict[str, Any] = {"global_batch_size": 3, "train_scope": "all"}
PACKED: dict[str, Any] = {"packing": True, "batch_size": 1, "tokens_per_batch": 400}


def job(root: Path, artefacts: Path, output: Path) -> dict[str, str]:
    """Runs by name: five full-batch steps; steps of three samples, packed in two shapes, and padded; phase 0."""
    short, world = {"max_steps": 4}, processes.world_size()
    safety = common(root, output / "phase0", safety_data=str(root / "refusals_fit.jsonl"), safety_samples=0, epochs=1)
    safety |= {"global_batch_size": 4, "learning_rate": 2e-3}
    runs = {
        "full": phase3(root, artefacts, output / "full", packing=True),
        "packed": phase3(root, artefacts, output / "packed", short, **SOME, packing=True),
        "tokens": phase3(root, artefacts, output / "tokens", short, **SOME, **PACKED),
    }
    if world == 1:
        runs["padded"] = phase3(root, artefacts, output / "padded", short, **SOME)
        for name, more in (("smoothed", {}), ("smoothed packed", PACKED)):
            runs[name] = phase3(root, artefacts, output / name, {**short, "label_smoothing_factor": 0.2}, **{**SOME, **more})
    if world == 2:
        for name, packing in (("phase0", True), ("phase0 padded", False)):
            tuning = SafetyTuningArguments(**safety, packing=packing, resume="never")
            runs[name] = run_safety_tuning(tuning, {"logging_steps": 1})
    return {name: str(run) for name, run in runs.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packing")
    make_model(path)
    run_ranks(1, phase12, path, path / "artefacts")
    return path


@pytest.fixture(scope="module")
def jobs(root: Path) -> dict[int, dict[str, Path]]:
    found = {}
    for world in WORLDS:
        runs = run_ranks(world, job, root, root / "artefacts", root / f"world{world}")[0]
        found[world] = {name: Path(run) for name, run in runs.items()}
    return found


def norms(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["grad_norm"] for line in lines if "grad_norm" in line]


def furthest(a: Path, b: Path) -> float:
    """The greatest difference of two runs' weights."""
    one, other = (load_file(run / "model" / "model.safetensors") for run in (a, b))
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize("name, world", [*((name, world) for name in ("packed", "tokens") for world in WORLDS), ("phase0", 2)])
def test_packed_training_equals_padded_training(jobs: Any, name: str, world: int) -> None:
    packed, reference = jobs[world][name], jobs[2]["phase0 padded"] if name == "phase0" else jobs[1]["padded"]
    assert losses(packed) == pytest.approx(losses(reference), abs=1e-6) and len(losses(packed)) >= 2
    assert norms(packed) == pytest.approx(norms(reference), rel=1e-5)
    # Sums in another order, at an Adam eps of 1e-4 and 1e-8: the latter makes much of a gradient near 0.
    assert furthest(packed, reference) < (1e-4 if name == "phase0" else 1e-5)


def test_label_smoothing_of_packed_rows(jobs: Any) -> None:
    smoothed, packed = jobs[1]["smoothed"], jobs[1]["smoothed packed"]
    assert losses(packed) == pytest.approx(losses(smoothed), abs=1e-6)
    assert losses(packed) != pytest.approx(losses(jobs[1]["padded"]), abs=1e-3)
    assert furthest(packed, smoothed) < 1e-5


@pytest.mark.parametrize("world", WORLDS)
def test_packed_training_equals_the_dense_reference(root: Path, jobs: Any, world: int) -> None:
    wanted, weights = phase3_reference(root, root / "artefacts", "warp")
    run = jobs[world]["full"]
    assert losses(run) == pytest.approx(wanted, abs=1e-6)
    trained = load_file(run / "model" / "model.safetensors")
    assert max(float((trained[name].double() - weights[name]).abs().max()) for name in weights) < 1e-5


def test_an_interrupted_packed_run_goes_on_as_if_nothing_had_happened(root: Path) -> None:
    work = partial(interrupted_and_resumed, global_batch_size=3, epochs=2, packing=True)
    found = run_ranks(2, work, root, root / "artefacts", root / "resume")[0]
    assert found["runs"] == 1
    assert found["resumed"] == found["whole"] and len(found["whole"]) == 6
    assert furthest(*(Path(path).parent for path in found["model"])) == 0.0
