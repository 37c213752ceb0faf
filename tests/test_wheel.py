"""What somebody has who installs the wheel: an empty directory, and no checkout.

The wheel is built and unpacked; the packages that it needs are those of this environment. torchrun and deepspeed start the
phases as modules. Another warp_ds that is installed here, editable or not, is not found.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "slurm"))

from chain import flags, make_inputs  # noqa: E402

from warp_ds.cluster.processes import free_port  # noqa: E402
from warp_ds.registry import PHASES  # noqa: E402

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a directory of its own."""
    built, source, site = (tmp_path_factory.mktemp(name) for name in ("built", "source", "site"))
    shutil.copytree(ROOT / "warp_ds", source / "warp_ds", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source], check=True)
    (wheel,) = built.glob("warp_ds-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    return site


def run(site: Path, where: Path, *words: str, status: int = 0) -> str:
    """What a command prints in ``where``, with the wheel alone."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{site / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    done = subprocess.run(words, cwd=where, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_an_empty_directory(site: Path, tmp_path: Path) -> None:
    """init, phases 1 to 3 under torchrun on two ranks, verify and report; phase 1 under deepspeed as well."""
    inputs = make_inputs(tmp_path / "inputs", depth=2)
    here = tmp_path / "empty"
    here.mkdir()
    assert str(site) in run(site, here, sys.executable, "-c", "import warp_ds; print(warp_ds.__file__)")
    run(site, here, "warp-ds", "init")
    assert {path.name for path in here.iterdir()} == {"ds_configs", "slurm"}
    assert len(list((here / "slurm").iterdir())) == sum(bool(phase.hours) for phase in PHASES.values())
    words = flags(inputs, Path("runs"), steps=4)
    for phase in ("phase1", "phase2", "phase3"):
        ranks = ("torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "-m", "warp_ds")
        run(site, here, *ranks, phase, *words[phase], "--run_name", phase, "--deepspeed", "zero3_cpu")
        assert (here / "runs" / phase / "finished.json").is_file()
    ranks = ("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module", "warp_ds")
    run(site, here, *ranks, "phase1", *words["phase1"], "--run_name", "again")
    assert (here / "runs" / "again" / "finished.json").is_file()
    masks = "runs/phase2/masks"
    shown = run(
        site, here, "warp-ds", "verify", "--before", str(inputs / "m"), "--after", "runs/phase3/model", "--masks_dir", masks
    )
    assert "certificate: " in shown and (here / "runs" / "phase3" / "certificate.json").is_file(), shown
    run(site, here, "warp-ds", "report", "runs/phase1", "runs/phase2", "runs/phase3")
    assert (here / "report.html").stat().st_size > 10_000
