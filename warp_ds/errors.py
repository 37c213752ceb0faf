"""Every error that is told in one line: what is wrong and what to do about it."""

from __future__ import annotations


class ConfigError(ValueError):
    """A flag that cannot be used, with the cause and the cure."""
