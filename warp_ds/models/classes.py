"""Which of transformers' classes a model is loaded by: that which holds all of its checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def auto_class(config: Any) -> Any:
    """AutoModelForCausalLM, or AutoModelForImageTextToText for a model that reads pictures too: a class of its text part
    alone, where there is one, would leave out what else the checkpoint holds.

    A configuration that names its class (``architectures``) says which of the two was saved.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText  # bring torch

    text, whole = (_classes(auto, config) for auto in (AutoModelForCausalLM, AutoModelForImageTextToText))
    named = set(getattr(config, "architectures", None) or ())
    return AutoModelForImageTextToText if whole and (not text or named & whole - text) else AutoModelForCausalLM


def auto_class_of(name: str | os.PathLike, given: Mapping[str, Any]) -> Any:
    """``auto_class`` of a folder or hub name; ``given``: what ``from_pretrained`` is given besides."""
    from transformers import AutoConfig

    of_hub = {key: value for key, value in given.items() if key in ("trust_remote_code", "revision")}
    return auto_class(AutoConfig.from_pretrained(name, **of_hub))


def is_language_model(config: Any) -> bool:
    """Whether transformers has a decoder for text of this configuration, alone or inside of a model that reads pictures."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = any(_classes(auto, config) for auto in (AutoModelForCausalLM, AutoModelForImageTextToText))
    return known and not getattr(config, "is_encoder_decoder", False)


def model_class(config: Any) -> Any:
    """The class itself, without making a model."""
    found = auto_class(config)._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def reads_pictures(model: Any) -> bool:
    """Whether a model is of a class that reads pictures beside text."""
    from transformers import AutoModelForImageTextToText

    return type(model).__name__ in _classes(AutoModelForImageTextToText, model.config)


def _classes(auto: Any, config: Any) -> set[str]:
    """Names of the classes that an auto class has for a configuration."""
    if type(config) not in auto._model_mapping:
        return set()
    found = auto._model_mapping[type(config)]
    return {each.__name__ for each in (found if isinstance(found, tuple) else (found,))}
