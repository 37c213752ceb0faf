"""Who may write into a run directory: the first, the next after its death, never two."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from warp_ds.errors import ConfigError
from warp_ds.store.lock import RunLock, alive

HOLD = """
import sys, time
from pathlib import Path
from warp_ds.store.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(1000)
"""


NO_FLOCK = """
import fcntl
def flock(fd, kind): raise OSError({number}, "no flock")
fcntl.flock = flock
"""
"""A file system without flock, as a process sees it: there is none to mount here without being root."""


def other_host(directory: Path, beat: int) -> None:
    """What a process of another host leaves in ``directory``."""
    owner = {"host": f"not-{socket.gethostname()}", "pid": 1, "token": "theirs", "beat": beat, "job": "77"}
    (directory / "owner.aside").write_text(json.dumps(owner))
    (directory / "owner.aside").replace(directory / "owner.json")  # whole at any moment, as a run writes it


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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP])
def test_without_flock_the_heartbeat_decides_on_one_host_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    script = NO_FLOCK.format(number=number) + HOLD.replace("(Path(sys.argv[1]))", "(Path(sys.argv[1]), beat_seconds=0.1)")

    def flock(fd: int, kind: int) -> None:
        raise OSError(number, "no flock")

    monkeypatch.setattr(fcntl, "flock", flock)
    holder = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"in use by process {holder.pid} on {socket.gethostname()}"):
            RunLock(tmp_path, dead_seconds=60.0).acquire()
    finally:
        holder.kill()
        holder.wait()
    assert not alive(tmp_path)
    lock = RunLock(tmp_path, dead_seconds=1.0)
    lock.acquire()
    lock.release()
    assert not (tmp_path / "owner.json").exists()


def test_a_look_in_passing_turns_nobody_away(tmp_path: Path) -> None:
    looking = os.open(tmp_path / ".lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(looking, fcntl.LOCK_SH)  # what ``alive`` holds for a moment
    assert not alive(tmp_path)
    threading.Timer(0.3, os.close, [looking]).start()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert alive(tmp_path)
    lock.release()
    assert not alive(tmp_path)


def test_an_owner_that_was_taken_for_dead_leaves(tmp_path: Path) -> None:
    script = HOLD.replace("RunLock(Path(sys.argv[1]))", "RunLock(Path(sys.argv[1]), beat_seconds=0.05)")
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
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
