"""Who may write into a run directory: the first, the next after its death, never two."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from warp_ds.config import ConfigError
from warp_ds.phases.lock import RunLock, alive

HOLD = """
import sys, time
from pathlib import Path
from warp_ds.phases.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(1000)
"""


def other_host(directory: Path, beat: int) -> None:
    """What a process of another host leaves in ``directory``."""
    (directory / "owner.json").write_text(json.dumps(
        {"host": f"not-{socket.gethostname()}", "pid": 1, "token": "theirs", "beat": beat, "job": "77"}))


def test_a_living_process_is_respected_and_a_dead_one_followed(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert alive(tmp_path)
        with pytest.raises(ConfigError, match=f"in use by process {holder.pid} on {socket.gethostname()}"):
            RunLock(tmp_path).acquire()
    finally:
        holder.kill()
        holder.wait()
    assert (tmp_path / "owner.json").is_file() and not alive(tmp_path)
    begun = time.monotonic()
    lock = RunLock(tmp_path, dead_seconds=1000.0)
    lock.acquire()  # of this host: no heartbeat is waited for
    lock.release()
    assert not (tmp_path / "owner.json").exists()
    assert time.monotonic() - begun < 500  # far below dead_seconds; no speed is asserted


def test_another_hosts_heartbeat_decides(tmp_path: Path) -> None:
    other_host(tmp_path, 0)
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(0.1):
            number += 1
            other_host(tmp_path, number)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(ConfigError, match=r"not-.* \(Slurm job 77\), which still runs"):
            RunLock(tmp_path, dead_seconds=30.0).acquire()
    finally:
        stop.set()
        beating.join()
    lock = RunLock(tmp_path, beat_seconds=0.05, dead_seconds=1.0)
    lock.acquire()  # it stands still now
    before = json.loads((tmp_path / "owner.json").read_text())
    assert before["host"] == socket.gethostname()
    deadline = time.monotonic() + 60
    while json.loads((tmp_path / "owner.json").read_text())["beat"] == before["beat"] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert json.loads((tmp_path / "owner.json").read_text())["beat"] > before["beat"]
    lock.release()


def test_an_owner_that_was_taken_for_dead_leaves(tmp_path: Path) -> None:
    script = HOLD.replace("RunLock(Path(sys.argv[1]))", "RunLock(Path(sys.argv[1]), beat_seconds=0.05)")
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        deadline = time.monotonic() + 60
        while holder.poll() is None and time.monotonic() < deadline:
            other_host(tmp_path, 0)  # again, where its own beat came between
            time.sleep(0.02)
        assert holder.returncode == 1
        assert holder.stderr is not None and "was taken over by process 1 on not-" in holder.stderr.read()
    finally:
        holder.kill()
        holder.wait()
