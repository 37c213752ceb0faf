"""For every test process: one thread each, since processes stand beside one another and no result may hang on threads; and
tokens are cached where they end with the tests."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

if "HF_DATASETS_CACHE" not in os.environ:
    os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="tokens-")
    atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def no_group_is_left() -> Iterator[None]:
    """What a file's tests start in this process ends with them: other files' tests begin without a process group."""
    yield
    import deepspeed.comm.comm as comm
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        comm.cdb = None
