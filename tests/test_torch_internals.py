"""A process killed while it loads a compiled operator must not keep every later one from loading it."""

from __future__ import annotations

import inspect
import socket
import subprocess
import sys
import threading
from pathlib import Path

from torch.utils import cpp_extension
from torch.utils.file_baton import FileBaton

from warp_ds.cluster.compiled_operators import MortalBaton, survive_kills_while_loading_operators

HOLD = """
import sys, time
from warp_ds.cluster.compiled_operators import MortalBaton
print(MortalBaton(sys.argv[1]).try_acquire(), flush=True)
time.sleep(1000)
"""


def test_a_dead_holders_lock_is_taken_away(tmp_path: Path) -> None:
    lock = str(tmp_path / "lock")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "True\n"
        assert not MortalBaton(lock).try_acquire() and not FileBaton(lock).try_acquire()
        waiting = threading.Thread(target=MortalBaton(lock).wait)
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
    finally:
        holder.kill()
        holder.wait()
    waiting.join(60)
    assert not waiting.is_alive()
    mine = MortalBaton(lock)
    assert mine.try_acquire() and not MortalBaton(lock).try_acquire()
    mine.release()
    assert not list(tmp_path.iterdir())


def test_another_programs_lock_is_respected(tmp_path: Path) -> None:
    other = FileBaton(str(tmp_path / "lock"))
    assert other.try_acquire()
    assert not MortalBaton(str(tmp_path / "lock")).try_acquire()
    other.release()
    assert MortalBaton(str(tmp_path / "lock")).try_acquire()


def test_another_hosts_lock_is_respected(tmp_path: Path) -> None:
    """A home directory that hosts share, whose flock does not reach beyond each: to this one it looks free."""
    mine = MortalBaton(str(tmp_path / "mine"))
    assert mine.try_acquire()
    words = (tmp_path / "mine").read_text()
    mine.release()
    host = socket.gethostname()
    (tmp_path / "lock").write_text(words)
    assert MortalBaton(str(tmp_path / "lock")).try_acquire()  # this host's, and not flocked: its maker is dead
    (tmp_path / "lock").write_text(words.replace(host, f"not-{host}"))
    assert not MortalBaton(str(tmp_path / "lock")).try_acquire()


def test_torch_loads_operators_under_this_lock() -> None:
    assert "FileBaton(" in inspect.getsource(cpp_extension._jit_compile)
    survive_kills_while_loading_operators()
    assert cpp_extension.FileBaton is MortalBaton  # type: ignore[attr-defined]
