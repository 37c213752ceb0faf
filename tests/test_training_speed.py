"""Tokens, padding, operations and seconds on logged lines: of the whole job, on any number of ranks, and across resumes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from phase3_jobs import dies_at, make_model, phase3, phase12
from ranks import run_ranks
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from warp_ds.data.collate import count_tokens, empty_sample, pad_batch
from warp_ds.data.lengths import encode_dataset
from warp_ds.data.packing import pack_batch
from warp_ds.models.flops import active_parameters, device_peak
from warp_ds.phases import run

PASSED = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 3}


def trained(root: Path, output: Path) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """Lines, finished.json and card of a run of 5 epochs of 3 + 3 + 1 samples."""
    made = phase3(root, root / "artefacts", output, PASSED, global_batch_size=3)
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    return lines, json.loads((made / "finished.json").read_text())["training"], (made / "model" / "README.md").read_text()


def jobs(root: Path, output: Path) -> Any:
    """A whole run, and one that dies after a line (step 8) that is later than its last checkpoint (step 6)."""
    whole = trained(root, output / "whole")
    with dies_at(8):
        trained(root, output / "resumed")
    return whole, trained(root, output / "resumed")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("speed")
    make_model(path)
    run_ranks(1, phase12, path, path / "artefacts")
    return path


@pytest.mark.parametrize("world", [1, 2])
def test_counts_are_of_the_whole_job(root: Path, world: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / "m")
    rows = [json.loads(line) for line in (root / "utility_train.jsonl").read_text().splitlines()]
    texts = [f"Question: {row['prompt']}\nAnswer: {row['response']}" for row in rows]
    epoch = sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)  # and the end of text
    parameters = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(root / "m").parameters())  # tied
    for lines, finished, card in run_ranks(world, jobs, root, root / f"world{world}")[0]:
        assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6, 8, 10, 12, 14, 15]
        for line in lines:
            if "loss" in line and line["step"] % 3 == 0:
                assert line["num_tokens"] == epoch * line["step"] // 3
            # Of 6 steps' 3, 3 and 1 samples, twos on a rank: at least a fifth of the places holds nothing.
            assert 0.1 < line["padding_share"] < 0.9
            assert line["total_flos"] == 6 * parameters * line["num_tokens"]
            assert line["tokens_per_second"] == pytest.approx(world * line["tokens_per_second_per_rank"])
            assert "mfu" not in line  # of a CPU no peak is known
            if "loss" in line:
                assert 0 < line["rotate_share"] < 1 and (line["seconds_left"] > 0) == (line["step"] < 15)
        assert finished["num_tokens"] == 5 * epoch and finished["parameters"] == parameters
        assert finished["total_flos"] == 6 * parameters * 5 * epoch
        assert finished["tokens_per_second"] == pytest.approx(5 * epoch / finished["train_seconds"], rel=1e-2)
        assert f"{6 * parameters * 5 * epoch:.3g} FLOPs" in card and f"{5 * epoch:,} tokens" in card


def test_empty_samples_and_padding_are_no_tokens() -> None:
    samples = [{"input_ids": [5] * n, "labels": [5] * n} for n in (4, 2)]
    assert count_tokens(pad_batch([*samples, empty_sample(1)], 0)).tolist() == [6, 12]
    packed = {"labels": [[-100, 5, -100, 5, 5, -100], [-100] * 6], "position_ids": [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]}
    assert count_tokens({name: torch.tensor(rows) for name, rows in packed.items()}).tolist() == [5, 12]
    rows = [[{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [5, 6], "labels": [-100, -100]}], [samples[0]]]
    for trained_only in (False, True):
        assert count_tokens(pack_batch(rows, 0, empty_sample(1), trained_only)).tolist() == [7, 10]
    assert count_tokens(pack_batch([[]], 0, empty_sample(1), trained_only=True)).tolist() == [0, 1]
    for rows in ([samples[:1], [], samples[1:]], [[empty_sample(1)]]):
        whole, kept = (count_tokens(pack_batch(rows, 0, empty_sample(1), few)).tolist() for few in (False, True))
        assert whole == kept


def test_parameters_that_a_token_is_multiplied_with() -> None:
    sizes: Any = dict(hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    tied = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))
    untied = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
    assert active_parameters(tied) == active_parameters(untied) == sum(p.numel() for p in tied.parameters())
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))
    whole = sum(p.numel() for name, p in mixture.named_parameters() if "embed_tokens" not in name)
    assert active_parameters(mixture) == whole - 2 * 3 * 8 * 12, "half of the experts' parameters"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("NVIDIA GeForce RTX 2080", None),
        ("", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert device_peak(torch.bfloat16, name) == peak
    assert device_peak(torch.float32, name) is None


def logged_job(root: Path, output: Path) -> None:
    run.log_to_terminal()
    phase12(root, output)


def test_phases_1_and_2_say_tokens_a_second(root: Path) -> None:
    run_ranks(2, logged_job, root, root / "logged")
    for phase, what in (("phase1", "bases"), ("phase2", "importance")):
        text = "".join(path.read_text() for path in (root / "logged" / "logs").glob(f"{phase}_*[0-9].log"))
        found = re.search(rf"{what}: (\d+) tokens in [\d.]+ s, (\d+) tokens/s \((\d+) a rank\)", text)
        assert found is not None and int(found[1]) == sum(root_lengths(root)), text
        assert int(found[2]) == pytest.approx(2 * int(found[3]), abs=2)


def root_lengths(root: Path) -> list[int]:
    """Tokens of each safety sample: as the phases' own tokenisation has them."""
    rows = [json.loads(line) for line in (root / "refusals_fit.jsonl").read_text().splitlines()]
    return [len(row["input_ids"]) for row in encode_dataset(rows, AutoTokenizer.from_pretrained(root / "m"), 200)]
