"""One process at a time in a run directory, on any number of hosts.

On one host, and on file systems whose flock reaches all hosts, the kernel decides: a dead process holds nothing. Elsewhere
the owner's heartbeat does: a number in owner.json that grows every few seconds. No clocks are compared.

fcntl's flock and not filelock's, which where flock is missing makes a lock of a file's existence: that outlives kill -9.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from warp_ds.errors import ArtifactError, ConfigError, DirectoryGoneError
from warp_ds.store.files import read_json, write_json
from warp_ds.store.written import is_owner

logger = logging.getLogger(__name__)
BEAT_SECONDS = 10.0
DEAD_SECONDS = 45.0
"""A heartbeat of another host that stands still for this long is a dead process's."""
NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""How a file system says that it has no flock, or that its lock server does not answer."""


class RunLock:
    """``acquire`` raises ConfigError while another process lives in ``directory``."""

    def __init__(self, directory: Path, beat_seconds: float = BEAT_SECONDS, dead_seconds: float = DEAD_SECONDS):
        self.directory, self.owner_file = directory, directory / "owner.json"
        self.beat_seconds, self.dead_seconds = beat_seconds, dead_seconds
        self.token = uuid.uuid4().hex
        self._fd: int | None = None
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the directory; over from an owner that is dead. Waits ``dead_seconds`` to tell, where flock does not."""
        if self.owner_file.is_symlink() or (self.owner_file.exists() and not self.owner_file.is_file()):
            raise ConfigError(f"{self.owner_file} is no file: remove it, or use another --run_name")
        try:
            self._fd = os.open(self.directory / ".lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        except OSError as error:
            raise ConfigError(
                f"{self.directory} cannot be locked ({error.strerror}): {self.directory / '.lock'} must be a "
                "file that this user may write, or be missing"
            ) from error
        free = _flock(self._fd, fcntl.LOCK_EX)
        deadline = time.monotonic() + 1.0  # ``alive`` holds it for a moment
        while free is False and time.monotonic() < deadline:
            time.sleep(0.05)
            free = _flock(self._fd, fcntl.LOCK_EX)
        if free is False:
            self._unlock()
            raise ConfigError(self._in_use(self._owner()))
        owner = self._owner()
        if owner is not None:
            if (free is None or owner.get("host") != socket.gethostname()) and self._beats(owner):
                self._unlock()
                raise ConfigError(self._in_use(owner))
            logger.info(
                "taking over %s from process %s on %s, which is dead", self.directory, owner.get("pid"), owner.get("host")
            )
        self._beat(0)
        self._beating = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)
        self._beating.start()

    def release(self) -> None:
        if self._beating is not None:
            self._stop.set()
            self._beating.join()
            self._beating = None
            if (self._owner() or {}).get("token") == self.token:
                self.owner_file.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _beats(self, owner: dict[str, Any]) -> bool:
        """Whether that owner still lives; False once its heartbeat has stood still long enough."""
        logger.info(
            "%s was left by process %s on %s without a word: watching its heartbeat for %.0f s",
            self.directory,
            owner.get("pid"),
            owner.get("host"),
            self.dead_seconds,
        )
        deadline = time.monotonic() + self.dead_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.dead_seconds / 10))
            now = self._owner()
            if now is None:
                return False
            if now != owner:
                return True
        return False

    def _keep_beating(self) -> None:
        beat = 0
        while not self._stop.wait(self.beat_seconds):
            owner = self._owner()
            if owner is not None and owner.get("token") != self.token:
                # This process stood still (suspended, or its host was cut off) and was taken for dead. Two must not write.
                text = f"{self.directory} was taken over by process {owner.get('pid')} on {owner.get('host')}: leaving it"
                logger.error(text)
                print(f"error: {text}", file=sys.stderr, flush=True)
                os._exit(1)
            beat += 1
            try:
                self._beat(beat)
            except DirectoryGoneError as error:
                # This rank may wait in a collective, or compute for hours: what it makes has no place any more.
                logger.error("%s", error)
                print(f"error: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            except OSError as error:
                logger.warning("the heartbeat in %s could not be written: %s", self.owner_file, error)

    def _beat(self, beat: int) -> None:
        write_json(
            self.owner_file,
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "token": self.token,
                "beat": beat,
                "job": os.environ.get("SLURM_JOB_ID"),
            },
        )

    def _owner(self) -> dict[str, Any] | None:
        try:
            owner = read_json(self.owner_file)
            return owner if is_owner(owner) else None  # written whole, by this program alone
        except ArtifactError:
            return None

    def _in_use(self, owner: dict[str, Any] | None) -> str:
        who = "another process"
        if owner is not None:
            who = f"process {owner.get('pid')} on {owner.get('host')}"
            who += f" (Slurm job {owner['job']})" if owner.get("job") else ""
        return f"{self.directory} is in use by {who}, which still runs: wait for it, end it, or use another --run_name"


def alive(directory: Path) -> bool:
    """Whether some process holds ``directory`` now, as far as flock reaches. Waits for nothing."""
    try:
        fd = os.open(directory / ".lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False  # nobody has ever locked it
    try:
        return _flock(fd, fcntl.LOCK_SH) is False  # shared: two that look do not take each other for an owner
    finally:
        os.close(fd)


def _flock(fd: int, kind: int) -> bool | None:
    """Whether the lock was free, and is held now until ``fd`` is closed; None where this file system has no flock."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
        return True
    except OSError as error:
        if error.errno in NO_FLOCK:
            return None
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
