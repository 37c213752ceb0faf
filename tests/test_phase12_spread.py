"""How phases 1 and 2 are spread over ranks: selection, delivery, failures on one rank, runs that go on."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import dense_reference as reference
import numpy as np
import pytest
import torch
from phase12_jobs import (
    announced_job,
    basis_arguments,
    basis_job,
    choose_job,
    deliver_job,
    failing_job,
    importance_arguments,
    make_rows,
    masks_job,
    owners_of,
    save_model,
    scores_job,
    stopping_basis_job,
    stopping_masks_job,
    whole_passes_job,
)
from ranks import run_ranks, start_ranks
from safetensors.numpy import load_file

from warp_ds.models.targets import shared_inputs
from warp_ds.store.layers import TargetLayer
from warp_ds.zero.batches import Batch, sample_sums
from warp_ds.zero.collect import REDUCE, SEND, TOKENS, route
from warp_ds.zero.scores import Rows
from warp_ds.zero.walk import HiddenStates

ROWS = make_rows()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def basis(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("basis") / "basis"
    run_ranks(1, basis_job, [(basis_arguments(llama), ROWS, directory)])
    return directory


# ---------------------------------------------------------------- selection


def score_groups() -> list[tuple[list[list[torch.Tensor]], list[int]]]:
    generator = torch.Generator().manual_seed(0)
    spread = [torch.rand(m, n, generator=generator) for m, n in ((7, 5), (2, 9), (11, 3))]
    ties = [torch.randint(0, 3, s.shape, generator=generator).float() for s in spread]
    zeros = [torch.zeros_like(s) for s in spread]
    cases = []
    for blocks in (spread, ties, zeros):
        total = sum(b.numel() for b in blocks)
        for k in (0, 1, 13, 40, total - 1, total):
            cases.append(([blocks], [k]))  # one threshold for all
        cases.append(([[b] for b in blocks], [3, 18, 10]))  # one for each
    return cases


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_selection_is_a_full_sort(ranks: int) -> None:
    cases = score_groups()
    found = run_ranks(ranks, choose_job, cases)
    for number, (groups, wanted) in enumerate(cases):
        for g, (blocks, k) in enumerate(zip(groups, wanted, strict=True)):
            expected = reference.highest([b.numpy() for b in blocks], k)
            taken = [b[e] for b, e in zip(blocks, map(torch.from_numpy, expected), strict=True)]
            lowest = min((float(t.min()) for t in taken if len(t)), default=None)
            for b, mask in enumerate(expected):
                parts = [found[r][number][g][b][0] for r in range(ranks)]
                assert (np.concatenate(parts) == mask).all(), (number, g, b)
                assert found[0][number][g][b][1] == lowest, (number, g, b)


# ---------------------------------------------------------------- inputs on their way to their owner


def test_the_way_of_fewer_bytes() -> None:
    assert route(tokens=999, n=1000, ranks=8, itemsize=2) == TOKENS
    # T n b (W-1) / W against 2 n² (W-1): the break-even is at T = 2 n W / b.
    assert route(tokens=1999, n=1000, ranks=2, itemsize=2) == SEND
    assert route(tokens=2000, n=1000, ranks=2, itemsize=2) == REDUCE
    assert route(tokens=7999, n=1000, ranks=8, itemsize=2) == SEND
    assert route(tokens=5000, n=1000, ranks=1, itemsize=4) == REDUCE  # nothing moves


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("way", [TOKENS, SEND, REDUCE])
def test_delivery(ranks: int, way: str) -> None:
    x = torch.randn(23, 13, generator=torch.Generator().manual_seed(0))
    owner, dtype = ranks - 1, torch.float32 if way == REDUCE else torch.bfloat16
    found = run_ranks(ranks, deliver_job, x, way, owner, dtype)
    low = x.to(dtype)
    assert [f["tokens"] for f in found] == [23] * ranks
    assert [r for r, f in enumerate(found) if "x" in f or "sigma" in f] == [owner]
    assert found[owner]["sent"] == 0
    if way == TOKENS:
        assert (found[owner]["x"] == low.float().numpy()).all()
    else:
        exact = low.double().T @ low.double() / 23
        assert np.abs(found[owner]["sigma"] - exact.numpy()).max() < 1e-6  # 23 fp32 sums of values below 4
    if ranks == 2 and way == REDUCE:
        assert found[0]["sent"] == 13 * 13 * 4
    if ranks == 3 and way != REDUCE:
        assert [f["sent"] for f in found] == [0, 5 * 13 * 2, 0]


def test_what_counts_is_taken_and_what_is_not_finite_is_seen() -> None:
    counted = torch.tensor([[True, False, True], [False, False, False], [False, True, True]])
    batch = Batch([4, 7, 1], counted.long(), counted.long(), counted.long(), counted)
    x = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0))
    for these in (x, x.bfloat16(), x.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(batch.take(these), these[counted])
    assert torch.isfinite(sample_sums((x * 0 + 65000).half())).all()  # the sum of finite fp16 entries is no overflow
    for bad in ([float("nan")], [float("inf")], [float("-inf")], [float("inf"), float("-inf")]):
        spoilt = x.clone()
        spoilt[1].view(-1)[: len(bad)] = torch.tensor(bad)
        assert torch.isfinite(sample_sums(spoilt)).tolist() == [True, False, True], bad


def test_owners_share_the_work() -> None:
    assert owners_of([8.0, 1.0, 1.0, 1.0, 8.0, 1.0], 3) == [0, 1, 2, 1, 2, 1]
    assert owners_of([1.0] * 4, 1) == [0] * 4


def test_rows_cover_every_layer() -> None:
    for m in (1, 2, 7, 12):
        for ranks in (1, 2, 3, 5):
            blocks = [Rows(m, ranks, r).block for r in range(ranks)]
            assert [row for block in blocks for row in block] == list(range(m))


def test_shared_inputs_of_known_architectures() -> None:
    layers = [TargetLayer(f"x.{kind}", 0, kind, 2, 3) for kind in ("attn_v", "attn_q", "ffn_gate", "ffn_down", "attn_o")]
    assert [[x.type for x in group] for group in shared_inputs(layers)] == [
        ["ffn_down"],
        ["ffn_gate"],
        ["attn_q", "attn_v"],
        ["attn_o"],
    ]


def test_hidden_states_go_to_disk_beyond_the_limit(tmp_path: Path) -> None:
    hidden = HiddenStates(tmp_path / "hidden", limit=100)
    small, large = torch.randn(5, 4), torch.randn(7, 9).bfloat16()
    hidden.put("small", small)
    assert not (tmp_path / "hidden").exists()
    hidden.put("large", large)
    assert len(list((tmp_path / "hidden").iterdir())) == 1
    hidden.put("large", 2 * large)
    assert torch.equal(hidden.get("large", "cpu"), 2 * large) and torch.equal(hidden.get("small", "cpu"), small)
    hidden.drop("large")
    assert not list((tmp_path / "hidden").iterdir())
    hidden.close()
    assert not (tmp_path / "hidden").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_hidden_states_stay_on_a_gpu_that_has_room(tmp_path: Path) -> None:
    hidden = HiddenStates(tmp_path / "hidden", limit=0)
    given = torch.randn(5, 4, device="cuda")
    hidden.put("first", given)
    first = given.clone()
    given.fill_(7.0)  # what the model does with it later is its own business
    hidden.gpu_bytes_left = 100
    hidden.put("second", first.bfloat16())
    hidden.put("third", first)
    assert torch.equal(hidden.get("first", "cuda"), first) and torch.equal(hidden.get("third", "cuda"), first)
    assert len(list((tmp_path / "hidden").iterdir())) == 1 and hidden.gpu_bytes_left == 60
    hidden.drop("second")
    hidden.drop("third")
    assert hidden.gpu_bytes_left == 100 and hidden.bytes == 0


# ---------------------------------------------------------------- models that cannot be walked


def test_whole_passes_give_the_same_scores(llama: Path, basis: Path, tmp_path: Path) -> None:
    arguments = importance_arguments(llama)
    run_ranks(2, scores_job, [(arguments, ROWS, basis, tmp_path / "walk")])
    run_ranks(2, whole_passes_job, [(arguments, ROWS, basis, tmp_path / "whole")])
    for r in range(2):
        walked, whole = (load_file(tmp_path / way / f"rank_{r}.safetensors") for way in ("walk", "whole"))
        for name in walked:  # the same products in the same order, but for the head's gradient
            assert np.abs(walked[name] - whole[name]).max() <= 1e-6 * np.abs(walked[name]).max(), name


def test_whole_passes_over_packed_rows_give_the_same_scores(llama: Path, basis: Path, tmp_path: Path) -> None:
    packed = importance_arguments(llama, packing=True, batch_size=2, max_length=40)
    run_ranks(2, scores_job, [(importance_arguments(llama), ROWS, basis, tmp_path / "padded")])
    run_ranks(2, whole_passes_job, [(packed, ROWS, basis, tmp_path / "packed")])
    for r in range(2):
        padded, found = (load_file(tmp_path / way / f"rank_{r}.safetensors") for way in ("padded", "packed"))
        for name in padded:  # fp32 sums over other rows in another order: measured 1e-6
            assert np.abs(padded[name] - found[name]).max() <= 1e-5 * np.abs(padded[name]).max(), name


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("phase,spoil", [("basis", "inputs"), ("masks", "inputs"), ("masks", "gradients")])
def test_what_is_not_finite_stops_every_rank(llama: Path, tmp_path: Path, phase: str, spoil: str) -> None:
    arguments = (basis_arguments if phase == "basis" else importance_arguments)(llama, layer_type="ffn_down,attn_q")
    messages = run_ranks(2, failing_job, phase, spoil, tmp_path / "out", arguments, ROWS)
    assert len(set(messages)) == 1
    assert "model.layers.1.mlp.down_proj are NaN or infinite in sample 6" in messages[0]
    assert "remedy: " in messages[0]
    left = [p.name for p in (tmp_path / "out").rglob("*")] if (tmp_path / "out").exists() else []
    assert not [name for name in left if "layer_01" in name or name == "metadata.json" or name.endswith(".tmp")]


def kill_after(ranks: int, function: Any, *args: Any) -> None:
    """Starts ranks of which one dies, and ends the others as a launcher does."""
    processes, _ = start_ranks(ranks, function, *args)
    try:
        while all(process.is_alive() for process in processes):
            processes[0].join(0.1)
    finally:
        for process in processes:
            process.kill()
            process.join()


def same_files(one: Path, other: Path) -> None:
    names = sorted(p.name for p in one.glob("*.safetensors"))
    assert names == sorted(p.name for p in other.glob("*.safetensors")) and names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    left = sorted(p.name for p in other.iterdir())
    assert left == sorted(p.name for p in one.iterdir()) and "metadata.json" in left


@pytest.fixture(scope="module")
def undisturbed(llama: Path, basis: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    run_ranks(3, basis_job, [(basis_arguments(llama, batch_size=1), ROWS, root / "basis")])
    run_ranks(2, masks_job, [(importance_arguments(llama, batch_size=1), ROWS, basis, root / "masks")])
    return root


@pytest.mark.parametrize("stop_after", [0, 1])
def test_phase_1_goes_on_with_what_is_left(llama: Path, undisturbed: Path, tmp_path: Path, stop_after: int) -> None:
    arguments = basis_arguments(llama, batch_size=1)
    kill_after(3, stopping_basis_job, arguments, ROWS, tmp_path / "killed", stop_after)
    assert not (tmp_path / "killed" / "metadata.json").exists()
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "killed").glob("*.safetensors")}
    assert len(before) >= stop_after
    run_ranks(3, basis_job, [(arguments, ROWS, tmp_path / "killed")])
    same_files(undisturbed / "basis", tmp_path / "killed")
    assert all((tmp_path / "killed" / name).stat().st_mtime_ns == time for name, time in before.items())


@pytest.mark.parametrize("stop_after,ranks_after", [(0, 2), (2, 2), (1, 3)])
def test_phase_2_goes_on_with_what_is_left(
    llama: Path, basis: Path, undisturbed: Path, tmp_path: Path, stop_after: int, ranks_after: int
) -> None:
    arguments = importance_arguments(llama, batch_size=1)  # 5 steps on two ranks
    kill_after(2, stopping_masks_job, arguments, ROWS, basis, tmp_path / "killed" / "masks", stop_after)
    saved = tmp_path / "killed" / "scores"
    assert (saved / "progress.json").exists() == (stop_after > 0)
    (tmp_path / "killed" / "masks").mkdir(exist_ok=True)
    (tmp_path / "killed" / "masks" / ".layer_00_mask.safetensors.1234abcd.warp_ds.tmp").touch()  # as killed in writing
    run_ranks(ranks_after, masks_job, [(arguments, ROWS, basis, tmp_path / "killed" / "masks")])
    assert not saved.exists()
    same_files(undisturbed / "masks", tmp_path / "killed" / "masks")


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["basis", "masks"])
def test_ranks_killed_at_random_moments(llama: Path, basis: Path, undisturbed: Path, tmp_path: Path, phase: str) -> None:
    """Ten jobs, in each of which a rank is killed at random; started again, the files of an undisturbed one."""
    ranks, chance = (3, random.Random(7)) if phase == "basis" else (2, random.Random(8))
    arguments = (basis_arguments if phase == "basis" else importance_arguments)(llama, batch_size=1)

    def job(out: Path) -> tuple[Any, ...]:
        case = (arguments, ROWS, out) if phase == "basis" else (arguments, ROWS, basis, out)
        return announced_job, phase, out.parent / "begun", *case

    (tmp_path / "whole").mkdir()
    length = max(run_ranks(ranks, *job(tmp_path / "whole" / phase)))
    for attempt in range(10):
        out = tmp_path / f"{attempt}" / phase
        out.parent.mkdir()
        processes, _ = start_ranks(ranks, *job(out))
        try:
            while not (out.parent / "begun").exists():
                time.sleep(0.001)
            time.sleep(chance.random() * length)
            processes[chance.randrange(ranks)].kill()
            time.sleep(0.2)  # A launcher takes a while to end the others.
        finally:
            for process in processes:
                process.kill()
                process.join()
        run_ranks(ranks, *job(out))
        same_files(undisturbed / phase, out)
