"""Small parts that all phases share: the DeepSpeed configuration, and each rank's part of the host's memory."""

from __future__ import annotations

import json
import os
import platform
import resource
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import save_file

from warp_ds import errors
from warp_ds.cluster import memory, peaks, processes
from warp_ds.cluster.peaks import returning_large_pieces
from warp_ds.cluster.processes import rank
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.flags.arguments import BasisArguments
from warp_ds.store import digests
from warp_ds.store.digests import Part
from warp_ds.store.fingerprints import Contents, fingerprint_model
from warp_ds.zero import shared_reading
from warp_ds.zero.settings import zero3_config


@pytest.mark.parametrize("dtype, expected", [("bfloat16", {"grad_accum_dtype": "fp32"}), ("float32", None)])
def test_micro_batches_are_summed_in_fp32(dtype: str, expected: dict[str, str] | None, tmp_path: Path) -> None:
    """DeepSpeed's default is the model's dtype: the sum would depend on how many micro-batches, so on the ranks."""
    assert zero3_config(BasisArguments(dtype=dtype, device="cpu")).get("data_types") == expected
    own = {"zero_optimization": {"stage": 3}, "data_types": {"grad_accum_dtype": "bf16"}}
    (tmp_path / "own.json").write_text(json.dumps(own))
    arguments = BasisArguments(dtype=dtype, device="cpu", deepspeed=str(tmp_path / "own.json"))
    assert zero3_config(arguments)["data_types"] == {"grad_accum_dtype": "bf16"}


def held_beside_large_pieces(given_back: str) -> float:
    """MB that stay when large pieces are freed between small ones that live on, once a larger one has been freed."""

    def resident() -> float:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
        return int(line.split()[1]) / 1e3

    def held() -> float:
        torch.ones(7_000_000)
        before, kept = resident(), []
        for number in range(8):
            for size in (6_000_000, 5_000_000 + 100_000 * number):
                large = torch.ones(size)
                kept.append(torch.ones(50_000))
                del large
        return resident() - before

    if given_back == "within":
        return returning_large_pieces()(held)()
    if given_back == "after":
        with returning_large_pieces():
            torch.ones(7_000_000)
    return held()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library is not glibc")
def test_large_pieces_go_back_to_the_system() -> None:
    # The small ones are 3.2 MB. glibc by itself keeps large ones too: two, 48 MB, or one, 20 MB, where the other
    # one fits into a hole of the heap, which hangs on what was imported before.
    within, after, never = (run_ranks(1, held_beside_large_pieces, when)[0] for when in ("within", "after", "never"))
    assert within < 10 < 15 < min(after, never)


def faults_of_passes() -> tuple[int, int]:
    """Page faults of ten rounds that take and free twelve pieces of 3.2 MB, within the block and after it."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            held = [torch.ones(800_000) for _ in range(12)]
            del held
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with returning_large_pieces():
        filler = [torch.ones(800_000) for _ in range(60)]  # whatever holes the heap had, the rounds are at its end
        within = faults()
    after = faults()
    del filler
    return within, after


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library is not glibc")
def test_what_follows_phase_1_keeps_the_heap_it_has_freed() -> None:
    # 9,400 pages a round: within, the heap's end goes back each time, since the library's care for it ended with the limit.
    # In a process of its own: the heap of one that has run other tests has room in its middle.
    source = "from test_runtime import faults_of_passes; print(*faults_of_passes())"
    here = Path(__file__).parent
    printed = subprocess.run([sys.executable, "-c", source], cwd=here, stdout=subprocess.PIPE, text=True, check=True).stdout
    within, after = map(int, printed.split()[-2:])
    assert after < 15_000 < 40_000 < within


def touched_peaks(nothing_is_forgotten: bool) -> list[dict[str, Any]]:
    """Peaks of four blocks, in MB: one in which rank 1 holds 256 MB more than the others, one that holds little after it,
    and an inner one of 128 MB in an outer one of 64 MB before."""
    if nothing_is_forgotten:
        peaks._forget_peaks = lambda: False  # type: ignore[assignment]
    found = []
    with peaks.peak_memory() as first:
        held = torch.ones(((256 if rank() == 1 else 0) << 20) // 4 + 1)
        found.append(first.of_all_ranks())
    del held
    with peaks.peak_memory() as second:
        found.append(second.of_all_ranks())
    with peaks.peak_memory() as outer:
        held = torch.ones((64 << 20) // 4)
        del held
        with peaks.peak_memory() as inner:
            held = torch.ones((128 << 20) // 4)
            del held
            found.append(inner.of_all_ranks())
        with peaks.peak_memory():
            pass
        found.append(outer.of_all_ranks())
    return found


@pytest.mark.skipif(not peaks._forget_peaks(), reason="this system does not let peaks begin anew")
@pytest.mark.parametrize("ranks", [1, 2])
def test_peaks_are_of_the_block_and_of_the_rank_that_held_most(ranks: int) -> None:
    first, second, inner, outer = run_ranks(ranks, touched_peaks, False)[0]
    assert not any(peak["of_process"] for peak in (first, second, inner, outer))
    mb = 1 << 20
    large = 256 * mb if ranks == 2 else 0
    # Beside the tensors a few MB come and go: collectives' buffers, code that is used for the first time, pages that the
    # system takes back. 50 MB is well above that, and well below the tensors.
    assert abs(first["host"] - second["host"] - large) < 50 * mb
    assert abs(inner["host"] - second["host"] - 128 * mb) < 50 * mb
    assert outer["host"] >= inner["host"], "what the inner block held counts, though a third began anew since"


def test_peaks_of_the_whole_process_are_called_that() -> None:
    peaks = run_ranks(2, touched_peaks, True)[0]
    assert all(peak["of_process"] for peak in peaks)
    assert [peak["host"] for peak in peaks] == sorted(peak["host"] for peak in peaks), "peaks fell without beginning anew"


def memory_of_this_rank() -> tuple[int, int]:
    return memory.host_memory(), min(memory.left_in_groups(), default=1 << 60)


def read_by_this_rank(model: Path) -> dict[str, Any]:
    """The parts that this rank reads for the model's fingerprint, and for a second one; what a file cut short raises."""
    seen: list[Part] = []
    own = digests._digest
    digests._digest = lambda part, within: (seen.append(part), own(part, within))[1]  # type: ignore[func-returns-value]
    digests.SETTLED_SECONDS, shared_reading.ROUND_BYTES = -60.0, 3000  # just written; three turns a rank
    os.environ["XDG_CACHE_HOME"] = str(model / f"cache{rank()}")
    mark, first = shared_reading.model_fingerprint(model), list(seen)
    again = fingerprint_model(model)
    second, error = seen[len(first) :], ""
    short = Part(str(model / "model.safetensors"), 0, 1 << 30)
    try:
        shared_reading.read_together(lambda: [Contents("", {"short": short})], "reading")
    except (ArtifactError, errors.OtherRankError) as caught:
        error = str(caught)
    return {"mark": mark, "again": again, "first": first, "second": second, "error": error}


def memory_and_reading(model: Path) -> tuple[tuple[int, int], dict[str, Any]]:
    return memory_of_this_rank(), read_by_this_rank(model)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    model = tmp_path_factory.mktemp("model")
    (model / "config.json").write_text("{}")
    save_file({f"w{i}": torch.full((256 + i,), float(i)) for i in range(12)}, model / "model.safetensors")
    return model, run_ranks(2, memory_and_reading, model)


def test_ranks_of_one_machine_share_its_memory(two_ranks: tuple[Path, list[Any]]) -> None:
    total = psutil.virtual_memory().total
    assert all(0 < mine <= min(total, group) / 2 for (mine, group), _ in two_ranks[1])


def test_every_byte_is_read_once_by_one_rank(two_ranks: tuple[Path, list[Any]]) -> None:
    model, found = two_ranks
    ranks = [of_rank for _, of_rank in found]
    with digests.afresh():
        whole = fingerprint_model(model)
    assert all(of_rank["mark"] == of_rank["again"] == whole for of_rank in ranks)
    read = [part for of_rank in ranks for part in of_rank["first"]]
    assert len(read) == len(set(read)) == 12 and all(len(of_rank["first"]) == 6 for of_rank in ranks)
    assert not any(of_rank["second"] for of_rank in ranks), "what another rank has read is known"
    assert all("ended early" in of_rank["error"] for of_rank in ranks), "a file that one rank cannot read stops all"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("MASTER_PORT", "taken", "is taken by another program"),
        ("MASTER_PORT", "x", "MASTER_PORT is 'x', no number"),
        ("MASTER_PORT", "70000", "MASTER_PORT below 65536"),
        ("RANK", "two", "RANK is 'two', no number"),
        ("WORLD_SIZE", "0", "RANK is below WORLD_SIZE"),
        ("WORLD_SIZE", "-1", "no number"),
        ("LOCAL_RANK", "", "no number"),
    ],
)
def test_a_meeting_place_that_cannot_be(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    for key, usual in {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(processes.free_port()),
    }.items():
        monkeypatch.setenv(key, usual)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        monkeypatch.setenv(name, str(other.getsockname()[1]) if value == "taken" else value)
        with pytest.raises(ConfigError, match=said):
            processes.init_distributed("cpu")
