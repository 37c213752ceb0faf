"""Tokens, passwords and keys: refused where they are given, and struck out of whatever is written."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

STRUCK = "[secret]"
_SHAPES = re.compile(
    r"""
    \b(?:hf|api_org)_[A-Za-z0-9]{28,} | \bgh[pousr]_[A-Za-z0-9]{30,} | \bgithub_pat_[A-Za-z0-9_]{30,}
  | \bglpat-[A-Za-z0-9_-]{20,} | \bnpm_[A-Za-z0-9]{36} | \bpypi-[A-Za-z0-9_-]{50,} | \bxox[abeoprs]-[A-Za-z0-9-]{20,}
  | \b[srp]k[_-](?=[A-Za-z_-]{0,40}\d)(?=[a-z0-9_-]{0,40}[A-Z])[A-Za-z0-9_-]{24,}
  | \bgsk_[A-Za-z0-9]{16,} | \bAIza[A-Za-z0-9_-]{30,} | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b
  | \beyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*
  | (?<=://)[^\s/@:]*:[^\s/@]+(?=@)
  | (?<=-----BEGIN\ )[A-Z ]*PRIVATE\ KEY-----[^-]*
""",
    re.VERBOSE,
)
"""What the tokens of Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS, Google and others look like, and user:password@. By
their own lengths, so that names such as hf-llama2safetytuning stay names."""
_NAME = (
    r"(?:(?:[a-z0-9_.-]{0,40}[_.-])?(?:secret|password|passwd|passphrase|credentials?|(?:api|access|private)[_-]?key)"
    r"|(?:[a-z0-9_.-]{0,40}[_.-])?(?:hub|hf|huggingface|access|auth|api|bearer|refresh|session|git|github|gitlab|wandb)[_-]token)"
)
_NAMED = re.compile(rf"{_NAME}|token", re.IGNORECASE)
_GIVEN = re.compile(rf"(?<![A-Za-z0-9])((?:--)?(?:{_NAME}|(?<=[?&])token)\s*[=:]\s*|--{_NAME}\s+)([^\s,;&'\"]+)", re.IGNORECASE)
"""token=…, API_KEY: … within a text."""


def redact(value: Any, name: str = "") -> Any:
    """``value`` with every secret in it struck out: by its look, or by the name that it is given (``name``, the keys of a
    mapping, the flag before a word in a list, NAME=VALUE in a text). Anything but strings and what holds them stays."""
    if isinstance(value, str):
        if value.lower() not in ("", "none", "null", "false") and _NAMED.fullmatch(name.lstrip("-").replace("-", "_")):
            return STRUCK
        return _SHAPES.sub(STRUCK, _GIVEN.sub(rf"\1{STRUCK}", value))
    if isinstance(value, Mapping):
        return {redact(key): redact(part, str(key)) for key, part in value.items()}
    if isinstance(value, list | tuple):
        parts, flag = [], name
        for part in value:
            parts.append(redact(part, flag))
            flag = part if isinstance(part, str) and part.startswith("--") and "=" not in part else name
        return type(value)(parts) if type(value) in (list, tuple) else parts
    return value


def holds_secret(value: Any, name: str = "") -> bool:
    """Whether ``redact`` strikes something out."""
    return isinstance(value, str | Mapping | list | tuple) and bool(redact(value, name) != value)


class Redacting(logging.Filter):
    """Strikes secrets out of what a handler writes."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redact(record.getMessage()), None
        return True
