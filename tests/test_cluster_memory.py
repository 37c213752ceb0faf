"""Memory limits of control groups, of both versions, as kernels and containers lay them out."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from warp_ds.cluster import memory
from warp_ds.cluster.memory import available

GB = 10**9
FREE = 64 * 1024**3
UNLIMITED = 9223372036854771712


def tree(root: Path, own: str, files: dict[str, str]) -> Path:
    """/proc and /sys/fs/cgroup of a process in the group ``own``."""
    everything = {"proc/self/cgroup": own, **{f"sys/fs/cgroup/{name}": text for name, text in files.items()}}
    for name, text in everything.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def v2(where: str, limit: str | int, used: int, cache: int = 0) -> dict[str, str]:
    return {
        f"{where}memory.max": f"{limit}\n",
        f"{where}memory.current": f"{used}\n",
        f"{where}memory.stat": f"anon 5\ninactive_file {cache}\n",
    }


def v1(where: str, limit: int, used: int, cache: int = 0) -> dict[str, str]:
    return {
        f"{where}memory.limit_in_bytes": f"{limit}\n",
        f"{where}memory.usage_in_bytes": f"{used}\n",
        f"{where}memory.stat": f"inactive_file 1\ntotal_inactive_file {cache}\n",
    }


CASES: dict[str, tuple[str, dict[str, str], int]] = {
    "none": ("0::/\n", {}, FREE),
    "no limit": ("0::/a\n", v2("a/", "max", 3 * GB), FREE),
    "of its own": ("0::/a\n", v2("a/", 8 * GB, 3 * GB), 5 * GB),
    "of a group above it": (
        "0::/slurm/job_7/step_0/task_1\n",
        {**v2("slurm/job_7/step_0/task_1/", "max", GB), **v2("slurm/job_7/", 10 * GB, 4 * GB), **v2("slurm/", 90 * GB, 5 * GB)},
        6 * GB,
    ),
    "the machine has less": ("0::/a\n", v2("a/", 900 * GB, GB), FREE),
    "files that were read are given up": ("0::/a\n", v2("a/", 8 * GB, 7 * GB, cache=6 * GB), 7 * GB),
    "passed already": ("0::/a\n", v2("a/", 2 * GB, 3 * GB), 0),
    "a container's root": ("0::/\n", v2("", 8 * GB, 3 * GB), 5 * GB),
    "a container that sees another's path": ("0::/../../kubepods/pod1\n", v2("", 8 * GB, 3 * GB), 5 * GB),
    "version 1": (
        "9:cpu,cpuacct:/x\n4:memory:/slurm/uid_1/job_7\n",
        {**v1("memory/slurm/uid_1/job_7/", 8 * GB, 5 * GB, cache=GB), **v1("memory/", UNLIMITED, 50 * GB)},
        4 * GB,
    ),
    "version 1 in a container": ("4:memory:/docker/abc\n", v1("memory/", 8 * GB, 3 * GB), 5 * GB),
    "version 1 without a limit": ("4:memory:/a\n", v1("memory/a/", UNLIMITED, 3 * GB), FREE),
    "both versions": ("4:memory:/a\n0::/a\n", {**v1("memory/a/", 8 * GB, 3 * GB), **v2("unified/a/", 6 * GB, 3 * GB)}, 3 * GB),
    "nonsense": ("what\n0::/a\n4:memory\n", {"a/memory.max": "many\n"}, FREE),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tightest_limit_counts(tmp_path: Path, case: str) -> None:
    own, files, expected = CASES[case]
    assert available(tree(tmp_path, own, files), FREE) == expected


def test_a_system_without_proc(tmp_path: Path) -> None:
    assert available(tmp_path) > 0 and available(tmp_path, FREE) == FREE


def test_the_machine_is_asked_where_no_group_is_tighter(tmp_path: Path) -> None:
    """Other processes change what psutil says between two calls, but hardly by a twentieth of the machine."""
    before = psutil.virtual_memory()
    assert abs(available(tree(tmp_path, "0::/a\n", v2("a/", "max", 0))) - before.available) < before.total / 20


def test_the_doctor_and_the_checks_at_the_start_see_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    from warp_ds.flags.jobs import DoctorArguments
    from warp_ds.launch.resources import check_resources

    LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8).save_pretrained(tmp_path / "m")
    arguments = DoctorArguments(device="cpu", output_dir=str(tmp_path))
    for name, limit, cure in (("roomy", 60 * GB, False), ("tight", GB // 2, True)):
        root = tree(tmp_path / name, "0::/job\n", v2("job/", limit, 0))
        monkeypatch.setattr(memory, "available", lambda root=root: available(root, FREE))
        (finding,) = [f for f in check_resources(arguments, tmp_path / "m", 1, 1) if f.name == "memory"]
        assert finding.found.startswith(f"{limit / 1e9:.1f} GB") and bool(finding.cure) is cure


def test_the_doctor_knows_when_phase_2_holds_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    from warp_ds.flags.jobs import DoctorArguments
    from warp_ds.launch.planning.fit import estimate_phases
    from warp_ds.launch.planning.job import SHARDINGS, read_shape
    from warp_ds.launch.resources import _job

    LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=8).save_pretrained(tmp_path / "m")
    shape = read_shape(str(tmp_path / "m"), "ffn_down", "all")

    def scores(unit: str, free: int) -> float:
        monkeypatch.setattr(memory, "available", lambda: free)
        asked = DoctorArguments(device="cpu", output_dir=str(tmp_path), mask_unit=unit, gradient_checkpointing=True)
        return estimate_phases(shape, _job(asked, 1, 1, False), SHARDINGS[0])[2].gpu["scores"]

    of_block = 4.0 * 1024 * 4096
    assert scores("column", 60 * GB) == of_block and scores("entry", 60 * GB) == 8 * of_block
    assert scores("column", GB) == 8 * of_block, "hidden states of all blocks do not fit in a quarter of what is left"


def test_a_directory_that_is_not_there_yet_has_the_disk_it_will_be_on(tmp_path: Path) -> None:
    from warp_ds.launch.planning.estimate import Estimate
    from warp_ds.launch.resources import _disk

    for needed, cure in ((1.0, False), (1e18, True)):
        finding = _disk(str(tmp_path / "not" / "yet"), [Estimate("phase 1"), Estimate("phase 3", disk=needed)])
        assert "needed by phase 3" in finding.found and bool(finding.cure) is cure


def test_the_doctor_fails_where_the_phases_would(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from warp_ds.flags.jobs import DoctorArguments
    from warp_ds.launch import machine
    from warp_ds.launch.resources import check_resources

    LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2).save_pretrained(tmp_path / "m")
    contradiction = DoctorArguments(device="cpu", dtype="float32", deepspeed="zero3", output_dir=str(tmp_path))
    (finding,) = check_resources(contradiction, tmp_path / "m", 1, 1)
    assert finding.fatal and "bf16" in finding.found
    (tmp_path / "broken.jsonl").write_text('{"prompt": 3')
    (tmp_path / "whole.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    broken = machine.data("safety_data", str(tmp_path / "broken.jsonl"))
    assert broken.cure and broken.fatal and "broken.jsonl" in broken.found
    assert machine.data("safety_data", str(tmp_path / "whole.jsonl")).found.endswith("1 samples")
