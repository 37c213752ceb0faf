"""Where a model's files are (a directory, or a hub name's snapshot), its configuration, its tokenizer: no weights, no ranks."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from warp_ds.errors import ConfigError, DataError
from warp_ds.models.classes import is_language_model
from warp_ds.models.context import embedding_rows
from warp_ds.store.checkpoint_index import CheckpointError, how_to_merge, resolve_checkpoint

_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja", "*.py"]
HEADS = ("SequenceClassification", "TokenClassification", "QuestionAnswering", "MaskedLM", "RewardModel")
"""Of architectures that are no language model, though their configuration would also make one."""


#: What a processor (of pictures, sounds) is saved as, beside the tokenizer.
PROCESSOR = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json", "chat_template.json")


class WithProcessor:
    """A tokenizer that is saved together with the processor of the model that training started from, as it is there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, start: Path) -> None:
        self.tokenizer, self.start = tokenizer, start

    def save_pretrained(self, directory: str | Path) -> None:
        self.tokenizer.save_pretrained(directory)
        for name in PROCESSOR:
            if (self.start / name).is_file() and not (Path(directory) / name).exists():
                shutil.copyfile(self.start / name, Path(directory) / name)


def check_model_dir(directory: Path, flag: str = "--model_name") -> None:
    """ConfigError, naming ``flag``, for what is no causal LM in safetensors that transformers' own code loads: adapters,
    two sets of weights, pickles, remote code, other kinds of models. Reads the configuration and the files' headers."""
    try:
        resolve_checkpoint(directory)
    except CheckpointError as error:
        raise ConfigError(f"{flag}: {error}") from error
    config = read_config(directory, flag)
    for architecture in getattr(config, "architectures", None) or ():
        if any(head in architecture for head in HEADS):
            raise ConfigError(
                f"{flag} {directory} is a {architecture}, not a causal language model: its output layer is "
                "another one; give the model that it was made from"
            )
    if not is_language_model(config):
        raise ConfigError(
            f"{flag} {directory} is a model of type {config.model_type}, which is no causal language model "
            "(decoder only) in transformers: this kind is not supported"
        )


def read_config(directory: Path, flag: str = "--model_name") -> Any:
    """A model directory's configuration; ConfigError, naming ``flag``, where transformers' own code cannot make one."""
    try:
        raw = json.loads((directory / "config.json").read_text())
        kind = raw.get("model_type")
        if kind not in CONFIG_MAPPING:
            if raw.get("auto_map"):
                raise ConfigError(
                    f"{flag} {directory} needs its own modelling code (auto_map, model_type {kind}): that is not "
                    "supported, for warp_ds runs no code that comes with a model; give a model of a type that "
                    "transformers itself has"
                )
            raise ConfigError(
                f"{flag} {directory}: its config.json has model_type {kind!r}, which transformers "
                f"{transformers.__version__} does not know: upgrade transformers if it is a newer one, or give "
                "another model"
            )
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{flag} {directory}: its configuration or tokenizer cannot be read: {error}") from error


def read_tokenizer(directory: Path, config: Any, flag: str = "--model_name") -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory; ConfigError where it needs its own code, or uses ids that the model lacks."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{flag} {directory} needs its own tokenizer code (auto_map): that is not supported, "
                "for warp_ds runs no code that comes with a model"
            ) from error
        raise ConfigError(f"{flag} {directory}: its configuration or tokenizer cannot be read: {error}") from error
    check_special_ids(tokenizer, embedding_rows(config), flag, directory)
    return tokenizer


def check_special_ids(tokenizer: PreTrainedTokenizerBase, rows: int | None, flag: str, directory: Path) -> None:
    """ConfigError for ids beyond the embedding that every text would use: padding, begin, end, and the chat template's.

    Others (added tokens that no text holds) are harmless, and are refused where a sample has one (``check_ids``).
    """
    if rows is None:
        return
    used = {f"{kind} token": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
    template = str(tokenizer.chat_template or "")
    used |= {
        f"token {token!r} of the chat template": token_id
        for token, token_id in tokenizer.get_added_vocab().items()
        if token_id >= rows and token in template
    }
    for what, token_id in used.items():
        if token_id is not None and token_id >= rows:
            raise ConfigError(
                f"{flag} {directory}: the tokenizer's {what} has id {token_id}, but the model has {rows} embeddings (ids 0 to "
                f"{rows - 1}). Take one that it has (for padding: tokenizer.pad_token = tokenizer.eos_token), or give the "
                "model a row for it and train that (model.resize_token_embeddings(len(tokenizer))), and save it again"
            )


def check_ids(samples: Sequence[Any], config: Any) -> None:
    """DataError, naming the row, for a sample (input_ids) with an id beyond the model's embedding."""
    check_largest(((sample.get("row", row), max(sample["input_ids"], default=0)) for row, sample in enumerate(samples)), config)


def check_largest(largest: Iterable[tuple[int, int]], config: Any) -> None:
    """``check_ids`` of (row, largest id) of each sample."""
    rows = embedding_rows(config)
    for row, worst in largest:
        if rows is not None and worst >= rows:
            raise DataError(
                f"row {row} holds the token id {worst}, but the model has {rows} embeddings (ids 0 to "
                f"{rows - 1}): the text has a token that was added to the tokenizer alone; take it out, or resize "
                "the model's embeddings"
            )


def local_model_dir(name: str, flag: str = "--model_name") -> Path | None:
    """The directory of a model of this machine; None for a hub name. No rank meets another.

    Raises ConfigError, naming ``flag``, for a path without a directory, or one without a model.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise ConfigError(
                f"{flag} {name} is an adapter (adapter_config.json without config.json), not a model: merge it "
                f"into its base model first. {how_to_merge(name)}"
            )
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"{flag} {name} is a directory without config.json: give the directory of a model saved by save_pretrained"
            )
        return path
    if name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ConfigError(f"{flag} {name}: no such directory on {socket.gethostname()}")
    return None


def snapshot(name: str, flag: str = "--model_name", files: Sequence[str] = _FILES) -> Path:
    """The snapshot of a hub name in this machine's cache, with ``files``, fetched where needed; raises ConfigError."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    advice = (
        "fetch it where there is internet (hf download " + name + "), then give its directory with --model_name, "
        "or set HF_HUB_OFFLINE=1 with the same HF_HOME"
    )
    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise ConfigError(
            f"{flag} {name} is gated: accept its licence on the hub and log in (hf auth login), or " + advice
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{flag} {name}: no such directory here, and no such model on the hub (or a private "
            "one without login: hf auth login)"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"{flag} {name}: no such directory here, not in the hub's cache, and the hub cannot be reached ({cause}): {advice}"
        ) from error
