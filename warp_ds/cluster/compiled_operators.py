"""Private parts of PyTorch and DeepSpeed where operators are compiled or loaded, each in one place.

Loading a compiled operator (DeepSpeed's, on CPUs and with offload) takes a lock that is a file's existence: a process
killed meanwhile leaves it, and every later run on that machine, or of that home directory, waits for it without end.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
import uuid
from typing import Any

from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

logger = logging.getLogger(__name__)
WARN_SECONDS = 60.0


class MortalBaton(FileBaton):
    """The same lock, so that other programs respect it; one of ours, of this host, whose maker is dead is taken away."""

    def try_acquire(self) -> bool:
        """Makes the lock's file, already flocked; False while another process holds it."""
        aside = f"{self.lock_file_path}.{uuid.uuid4().hex}"  # process ids repeat among hosts and containers
        fd = os.open(aside, os.O_CREAT | os.O_RDWR | os.O_TRUNC)
        try:
            os.write(fd, _ours())
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.ftruncate(fd, 0)  # no flock here: then nobody can tell whether this process is dead
            self._remove_dead()
            os.link(aside, self.lock_file_path)
            self.fd = fd  # type: ignore[assignment]  # torch declares None
            return True
        except FileExistsError:
            os.close(fd)
            return False
        finally:
            os.unlink(aside)

    def wait(self) -> None:
        """Returns once the holder has released the lock, or has died; another program's death cannot be told."""
        deadline = time.monotonic() + WARN_SECONDS
        while os.path.exists(self.lock_file_path):
            self._remove_dead()
            if time.monotonic() > deadline:
                deadline = float("inf")
                logger.warning(
                    "still waiting for %s: an operator of DeepSpeed is being compiled, which takes minutes once a machine. "
                    "Remove that file only if no program does so (top shows none): it was killed then",
                    self.lock_file_path,
                )
            time.sleep(self.wait_seconds)

    def _remove_dead(self) -> None:
        try:
            fd = os.open(self.lock_file_path, os.O_RDWR)
        except FileNotFoundError:
            return
        try:
            if os.read(fd, 1024) == _ours():
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_ino == os.stat(self.lock_file_path).st_ino:
                    os.unlink(self.lock_file_path)
        except (BlockingIOError, FileNotFoundError):
            pass  # its holder lives, or somebody else has taken it away
        finally:
            os.close(fd)


def _ours() -> bytes:
    """What this host's locks say. flock may not reach another's, so whether that one lives cannot be told."""
    return f"held by a warp_ds process of {socket.gethostname()} as long as it is flocked\n".encode()


def survive_kills_while_loading_operators() -> None:
    """Operators that are compiled or loaded from now on are locked by MortalBaton."""
    module: Any = cpp_extension
    if not issubclass(module.FileBaton, FileBaton):
        raise RuntimeError("torch.utils.cpp_extension.FileBaton is no longer torch.utils.file_baton.FileBaton")
    module.FileBaton = MortalBaton


def disable_shm_collective() -> None:
    """Keeps DeepSpeed from compiling ops/comm/shm.cpp at the first CPU start (comm/torch.py, ``build_shm_op``)."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
