"""What a model's text decoder can read: its longest context and its token ids, whatever else it reads beside text."""

from __future__ import annotations

from typing import Any


def text_config(config: Any) -> Any:
    """The part of a transformers configuration that describes the text decoder; ``config`` itself where it has no parts."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def context_length(config: Any) -> int | None:
    """Tokens that the model can read at once; None where its configuration does not say."""
    length = getattr(text_config(config), "max_position_embeddings", None)
    return None if length is None else int(length)


def embedding_rows(config: Any) -> int | None:
    """Rows of the input embedding, where the configuration says: the ids below it are those that the model can read."""
    return getattr(text_config(config), "vocab_size", None)
