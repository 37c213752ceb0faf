"""What a protected run costs by arithmetic: products counted by running them, and the figures that docs/gpu.md has."""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from warp_ds.method import products as module
from warp_ds.method.importance import importance_flops, importance_seconds
from warp_ds.method.products import EXACT, Rates, products

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
with pytest.MonkeyPatch.context() as _patch:
    _patch.syspath_prepend(BENCHMARKS)
    device_rates = importlib.import_module("rates").device_rates
    _ratios = importlib.import_module("ratios")
memory_ratio, rotating_seconds, scores_ratio = _ratios.memory_ratio, _ratios.rotating_seconds, _ratios.scores_ratio
share_within, step_ratio = _ratios.share_within, _ratios.step_ratio
SPLIT, TF32 = products("split", torch.bfloat16, "cpu"), products("tf32", torch.bfloat16, "cpu")
H200 = device_rates("NVIDIA H200")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("a", DTYPES)
@pytest.mark.parametrize("b", DTYPES)
def test_split_says_how_many_products_it_takes(a: torch.dtype, b: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    inner = module.add_bf16
    monkeypatch.setattr(module, "add_bf16", lambda *given: (taken.append(given), inner(*given)))
    SPLIT.mm(torch.randn(3, 4).to(a), torch.randn(4, 5).to(b))
    assert len(taken) == SPLIT.number(a, b)
    assert EXACT.number(a, b) == TF32.number(a, b) == 1


def test_seconds_are_at_the_rate_of_what_is_multiplied() -> None:
    rates = Rates(bf16=8.0, tf32=4.0, fp32=1.0)
    assert (EXACT.seconds(8, rates), TF32.seconds(8, rates), SPLIT.seconds(8, rates)) == (8, 2, 3)
    assert SPLIT.seconds(8, rates, torch.bfloat16) == 2
    # 6 multiply-adds in two rotations: 6 operations each, of three products or of two.
    assert rotating_seconds(6, EXACT, rates) == 12
    assert rotating_seconds(6, SPLIT, rates, by_bf16=3, share=0.5) == 0.5 * 6 * (2 + 3) / 8


@pytest.mark.parametrize(("tokens", "split"), [(100, 2), (2000, None)])
def test_seconds_of_scores(tokens: int, split: int | None) -> None:
    """Of bf16 inputs: two products each where tokens are rotated; else one for g x and three for its product with U."""
    rates, shape = Rates(bf16=2.0, tf32=2.0, fp32=2.0), (tokens, 1, [1000], 1000, 1000)
    operations = importance_flops(*shape)
    assert importance_seconds(*shape, torch.bfloat16, EXACT, rates) == operations / 2
    expected = split * operations / 2 if split else (tokens + 3 * 1000) * 1000 * 1000
    assert importance_seconds(*shape, torch.bfloat16, SPLIT, rates) == expected
    assert scores_ratio(plain=4.0, passes=0.7, products=[1.0, 2.0], reading=0.4) == pytest.approx(0.7 + 3.4 / 4)


def test_rates_of_a_named_device() -> None:
    assert Rates(989e12, 494.5e12, 67e12) == H200
    assert device_rates("NVIDIA H200 NVL") is device_rates("NVIDIA B200") is device_rates("cpu") is None


def test_what_the_docs_say_of_the_h200() -> None:
    """docs/gpu.md, "Against the bars": one 8B block, dense bases, 32,768 tokens, a step of 0.133 s, TF32 at 245 TFLOP/s."""
    q, kv, ffn = 4096 * 4096**2, 1024 * 4096**2, 14336 * 4096**2 + 4096 * 14336**2
    multiply_adds, plain = 2 * (q + 2 * kv + ffn), 0.133
    assert 2 * multiply_adds == pytest.approx(4.7e12, rel=0.01)
    reached = Rates(bf16=490e12, tf32=245e12, fp32=41e12)

    def ratio(way: Any, rates: Rates = reached, **more: Any) -> float:
        return round(step_ratio(plain, rotating_seconds(multiply_adds, way, rates, **more)), 3)

    assert (ratio(TF32), ratio(SPLIT), ratio(SPLIT, by_bf16=multiply_adds / 2)) == (1.146, 1.218, 1.182)
    assert H200 is not None
    assert ratio(TF32, H200) == 1.072, "at the peak of TF32: no card of this make meets 1.06 with dense bases"
    assert ratio(TF32, share=0.61) == 1.089
    assert ratio(TF32, share=0.29) == 1.042 and ratio(SPLIT, share=0.29) == 1.063
    assert share_within(1.06, 1.145) == pytest.approx(0.41, abs=0.005)
    assert memory_ratio(4.9, 0.96, 1.043) == pytest.approx(1.239, abs=0.001)
    assert share_within(1.10, 1.238, 1.043) == pytest.approx(0.29, abs=0.005)
    assert memory_ratio(4.9, 0.96, 1.043, share=0.61) == pytest.approx(1.16, abs=0.005)
    assert (share_within(1.1, 1.05), share_within(1.0, 1.2, 1.1)) == (1.0, 0.0)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, from which benchmarks import each other as they do when started."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return BENCHMARKS


def test_benchmarks_say_what_operations_say_where_all_rates_are_one(
    benchmarks: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One product at one rate for all: the ratio of seconds is that of operations. By a data sheet, split takes its number."""
    masked_step, phase12 = importlib.import_module("masked_step"), importlib.import_module("phase12")
    one = Rates(2.0, 2.0, 2.0)
    given = Namespace(hidden=64, intermediate=160, layers=3, tokens=512, length=32, batch_size=4, sheet="", device="cpu")
    for dtype, way, types in (("float32", "auto", phase12.FIVE), ("bfloat16", "tf32", "ffn_down")):
        given.dtype = dtype
        _, plain, ratio = phase12.score_operations(given, types)
        assert phase12.scores_predicted(given, types, way, one, plain / 2.0) == round(ratio, 3)
        assert phase12.scores_predicted(given, types, way, one, plain / 2.0, reading=plain) == pytest.approx(
            ratio + 2, abs=1e-3
        )
    shapes = "--ranks 1 --hidden 64 --ffn 160 --heads 4 --kv_heads 2 --layers 2 --vocab 64 --dtype bfloat16 --sheet H200"
    monkeypatch.setattr("sys.argv", ["masked_step.py", *shapes.split()])
    masked_step.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    over = {way: ratio - 1 for way, ratio in found["time_ratio_by_sheet"].items()}
    products = 2 * 2 * 2 * ((64 + 32 + 32 + 160) * 64**2 + 64 * 160**2)  # two blocks, there and back
    plain = 6 * 2048 * (2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160) + 64 * 64)
    assert over["tf32"] == pytest.approx(2 * products / plain, abs=1e-3)
    assert over["split"] == pytest.approx(1.5 * over["tf32"], abs=2e-3)
    assert found["bases_bytes"] == 2 * 4 * (2 * 64**2 + 160**2)
