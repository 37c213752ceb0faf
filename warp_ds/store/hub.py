"""The Hugging Face hub: bases and masks that others made, and repositories for what a run has made.

Tokens are huggingface_hub's own business (`hf auth login`, HF_TOKEN): none is taken, written or logged here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.secrets import redact

T = TypeVar("T")
_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
FILES = ["metadata.json", "scores.json", "*.safetensors"]
"""What is fetched of a basis or masks."""
LEFT_HERE = [".*", "*.tmp", "merged.json"]
"""What is not uploaded of a directory; merged.json says where this machine keeps models."""
LOG_IN = "log in with a token that may write there (hf auth login, or HF_TOKEN)"


def is_hub_name(given: str) -> bool:
    """Whether ``given`` is OWNER/NAME or OWNER/NAME@REVISION, and nothing on this machine's disks."""
    return _NAME.fullmatch(given) is not None and not Path(given).exists() and not Path(given).parent.is_dir()


def fetched(name: str, kind: str) -> Path:
    """The directory in the hub's cache of 'basis' or 'masks' that are a data set on the hub, fetched where needed.

    Raises ArtifactError where it cannot be had, with what to do offline.
    """
    from huggingface_hub import snapshot_download

    match = _NAME.fullmatch(name)
    assert match is not None
    try:
        there = _reached(lambda: snapshot_download(match[1], repo_type="dataset", revision=match[2], allow_patterns=FILES))
    except ConfigError as error:
        raise ArtifactError(
            f"--{kind}_dir {name}: no such directory here, and no data set of the hub that can be fetched ({error}): check the "
            f"name and log in (hf auth login), or fetch it where there is internet (hf download --repo-type dataset {match[1]})"
        ) from error
    if not (Path(there) / "metadata.json").is_file():
        raise ArtifactError(
            f"--{kind}_dir {name}: that data set of the hub has no metadata.json, so it is no {kind} of warp_ds"
        )
    return Path(there)


def make_repository(name: str, repo_type: str, private: bool) -> None:
    """Makes the repository ``name`` ('model' or 'dataset') where there is none. ConfigError where that cannot be done."""
    from huggingface_hub import HfApi

    if not (match := _NAME.fullmatch(name)) or match[2]:
        raise ConfigError(f"--push_to_hub {name}: give a repository of the hub as OWNER/NAME")
    try:
        _reached(lambda: HfApi().create_repo(name, repo_type=repo_type, private=private, exist_ok=True))
    except ConfigError as error:
        raise ConfigError(
            f"--push_to_hub {name}: the hub did not make that repository ({error}): {LOG_IN}, or leave the flag out and push "
            "the finished run from where there is internet (warp-ds push RUN NAME)"
        ) from error


def upload(directory: Path, name: str, repo_type: str, message: str, card: str | None = None) -> str:
    """Uploads every file of ``directory`` as one commit of a repository, and before it ``card``, which is written nowhere else;
    the repository's address. ConfigError where that fails."""
    from huggingface_hub import HfApi

    def send() -> str:
        there: Any = {"repo_id": name, "repo_type": repo_type, "commit_message": message}
        if card is not None:
            HfApi().upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", **there)
        return str(HfApi().upload_folder(folder_path=directory, ignore_patterns=LEFT_HERE, **there).repo_url)

    return _reached(send)


def _reached(work: Callable[[], T]) -> T:
    """``work`` done; ConfigError, one line without secrets, for whatever the hub, the network or the disk says."""
    from huggingface_hub.errors import HfHubHTTPError

    failures: Any = (*HfHubHTTPError.__bases__, ValueError, RuntimeError)  # OSError, and what its HTTP library raises
    try:
        return work()
    except failures as error:
        lines = str(error).strip().splitlines()
        raise ConfigError(redact(lines[0] if lines else type(error).__name__)) from error
