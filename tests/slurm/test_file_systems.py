"""A full disk, a read-only one, artefacts deleted between phases, a signal during a save: clear words, last state intact."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import ROOT, Reference, assert_as_undisturbed, events, flags
from throwaway import PLAIN_GLOO

pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **PLAIN_GLOO}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2.5 MB: room for one of phase 3's checkpoints, not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount a file system here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def start(phase: str, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, f"launch/{phase}.py", *words],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def run(phase: str, *words: str) -> tuple[int, str]:
    process = start(phase, *words)
    text = process.communicate(timeout=600)[0]
    return process.returncode, text


def phase3_words(reference: Reference, output: Path) -> list[str]:
    return [
        *flags(reference.root, output)["phase3"],
        "--masks_dir",
        f"{reference.runs['phase2']}/masks",
        "--run_name",
        "mine",
        "--save_strategy",
        "steps",
        "--save_steps",
        "3",
    ]


def test_full_and_read_only_disk(reference: Reference, small_disk: Path) -> None:
    words = phase3_words(reference, small_disk)
    status, text = run("phase3", *words)
    print(text[-700:])
    whole = sorted(p.parent.name for p in small_disk.glob("mine/trainer/*/whole.json"))
    print("whole checkpoints:", whole, "events:", events(small_disk / "mine"))
    assert status == 1 and "Is there space" in text and "the same command goes on from the last good state" in text
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    status, text = run("phase3", *words)
    print(text[-300:])
    assert status == 2 and "--output_dir" in text and "cannot be written" in text
    subprocess.run(["mount", "-o", "remount,rw,size=100m", str(small_disk)], check=True)
    assert sorted(p.parent.name for p in small_disk.glob("mine/trainer/*/whole.json")) == whole
    status, text = run("phase3", *words)
    assert status == 0, text
    assert not whole or f"going on from {small_disk}/mine/trainer/{whole[-1]}" in text
    print(assert_as_undisturbed(small_disk / "mine", reference))


def test_basis_deleted_between_phases(reference: Reference, tmp_path: Path) -> None:
    status, text = run("phase2", *flags(reference.root, tmp_path)["phase2"], "--basis_dir", str(tmp_path / "phase1_gone"))
    print(text[-400:])
    assert status == 2 and "no basis in" in text and "--basis_dir" in text
    assert text.count("error:") == 1 and "Traceback" not in text


def test_signal_during_a_save(reference: Reference, tmp_path: Path) -> None:
    """TERM and then KILL while a checkpoint is being written: the one before, or this one whole, is gone on from."""
    words = phase3_words(reference, tmp_path)
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = start("phase3", *words)
        # What is there already is not the save that is waited for.
        before = {p.name for p in (tmp_path / "mine" / "trainer").glob("checkpoint-*")}
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            fresh = [p for p in (tmp_path / "mine" / "trainer").glob("checkpoint-*") if p.name not in before]
            if fresh:
                break
            time.sleep(0.001)
        during = not (fresh[0] / "whole.json").exists()
        process.send_signal(number)
        text = process.communicate(timeout=600)[0]
        print(number.name, "during the save" if during else "after the save", process.returncode, text.splitlines()[-1])
        assert process.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL)
    status, text = run("phase3", *words)
    assert status == 0, text
    print(events(tmp_path / "mine"), assert_as_undisturbed(tmp_path / "mine", reference))
