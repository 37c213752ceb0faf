"""Loads a model for phases 1 and 2: ZeRO-3 partitioned parameters, no engine, no optimizer."""

from __future__ import annotations

import gc
import logging
import socket
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from warp_ds.config import ConfigError, RunArguments
from warp_ds.data import template
from warp_ds.data.formats import check_length
from warp_ds.zero.load import load_sharded
from warp_ds.zero.runtime import on_every_rank_or_none, on_rank_0

logger = logging.getLogger(__name__)
_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.py"]


def resolve_model_dir(name: str, flag: str = "--model_name") -> Path:
    """The local directory of a model: ``name`` itself, or its snapshot in the hub's cache, fetched where needed.

    Every rank calls it. Raises ConfigError, naming ``flag``, for a missing or gated model, with what to do offline.
    """
    local = local_model_dir(name, flag)
    if local is not None:
        return local
    on_rank_0(lambda: str(snapshot(name, flag)), f"fetching {name}")
    with on_every_rank_or_none(f"finding {name}"):
        return snapshot(name, flag)


def local_model_dir(name: str, flag: str = "--model_name") -> Path | None:
    """The directory of a model of this machine; None for a hub name. No rank meets another.

    Raises ConfigError, naming ``flag``, for a path without a directory, or one without a model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{flag} {name} is a directory without config.json: give the directory of a model "
                              "saved by save_pretrained")
        return path
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ConfigError(f"{flag} {name}: no such directory on {socket.gethostname()}")
    return None


def snapshot(name: str, flag: str = "--model_name", files: Sequence[str] = _FILES) -> Path:
    """The snapshot of a hub name in the cache of this machine, with ``files``, fetched where needed; raises ConfigError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    advice = ("fetch it where there is internet (hf download " + name + "), then give its directory with --model_name, "
              "or set HF_HUB_OFFLINE=1 with the same HF_HOME")
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise ConfigError(f"{flag} {name} is gated: accept its licence on the hub and log in (hf auth login), or "
                          + advice) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(f"{flag} {name}: no such directory here, and no such model on the hub (or a private "
                          "one without login: hf auth login)") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{flag} {name}: no such directory here, not in the hub's cache, and the hub cannot be "
                          f"reached ({cause}): {advice}") from error


def load_tokenizer(arguments: RunArguments) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model's configuration and tokenizer, without its weights; --template_date is what its template writes from now on.

    Every rank calls it. Raises ConfigError for what is missing, broken, or too short for ``--max_length``.
    """
    directory = resolve_model_dir(arguments.model_name)
    with on_every_rank_or_none(f"reading the configuration of {arguments.model_name}"):
        try:
            config = AutoConfig.from_pretrained(directory)
            tokenizer = AutoTokenizer.from_pretrained(directory)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"--model_name {arguments.model_name}: its configuration or tokenizer cannot be read: "
                              f"{error}") from error
        check_length(arguments.max_length, context_length(config))
        template.fix_date(arguments.template_date)
        if template.writes_date(tokenizer):
            _say_date(arguments.model_name, arguments.template_date)
    return config, tokenizer


@cache
def _say_date(name: str, date: str) -> None:
    """Once a process."""
    logger.info("the chat template of %s writes today's date: here it is %s on every day (--template_date)", name, date)


def load_model(arguments: RunArguments, ds_config: dict[str, Any]) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model with ZeRO-3 partitioned parameters in evaluation mode, and its tokenizer.

    Every rank calls it, after ``init_distributed``. Raises ConfigError for a model that is missing, broken or too
    short for ``--max_length``, before any weight is read.
    """
    directory = resolve_model_dir(arguments.model_name)
    _, tokenizer = load_tokenizer(arguments)
    gc.collect()  # engines that have ended are cycles: none may stay while the next model comes
    model = load_sharded(directory, ds_config=ds_config, dtype=arguments.torch_dtype, device=arguments.resolved_device)
    model.eval()
    return model, tokenizer


def context_length(config: Any) -> int | None:
    """Tokens that the model can read, where its configuration says so."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "max_position_embeddings", None)
