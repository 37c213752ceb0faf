"""What no flag may be: secrets, control characters, numbers that are none."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from warp_ds.errors import ConfigError
from warp_ds.names import control_character, problem_of_name
from warp_ds.secrets import holds_secret, redact


def refuse_secrets(what: str, value: Any) -> None:
    """ConfigError where ``value`` (of the flag ``what``) holds what looks like a token, a password or a key."""
    if not str(value).startswith("--") and holds_secret(value, what.removeprefix("--")):
        raise ConfigError(
            f"{redact(what)} holds what looks like a token, a password or a key: the command line is seen by "
            "every user of the machine, and stored with the run. Leave it out, and give it in the environment "
            "(HF_TOKEN, say, or `hf auth login`), which jobs inherit"
        )


def refuse_control_characters(what: str, value: Any) -> None:
    """ConfigError where ``value`` (of the flag ``what``), or anything in it, holds a line end or another control character."""
    if character := control_character(value):
        raise ConfigError(
            f"{what} holds the character {character}, a line end or another control character, which no value of "
            f"this program has: {ascii(value)[:120]}"
        )


def check_run_name(name: str | None) -> None:
    """ConfigError for a --run_name that is no plain name of a directory."""
    if name is not None and (problem := problem_of_name(name)):
        raise ConfigError(f"--run_name {ascii(name)[:120]}: {problem}; --output_dir says where runs lie")


def check_keep_ratio(keep_ratio: float) -> None:
    if not 0.0 <= keep_ratio <= 1.0:
        raise ConfigError(f"--keep_ratio is the share of coefficients to freeze, from 0 to 1, not {keep_ratio}")


FLOOR = 0.95
"""Share of the start model's refusals that a recommended arm must keep, where --floor does not say."""


def check_floor(floor: float) -> None:
    if not 0.0 <= floor <= 1.0:
        raise ConfigError(f"--floor is the share of the start model's refusals that must stay, from 0 to 1, not {floor}")


def at_least(arguments: Any, name: str, least: int) -> None:
    if getattr(arguments, name) < least:
        raise ConfigError(f"--{name} must be at least {least}, not {getattr(arguments, name)}")


def check_numbers(arguments: Any) -> None:
    """No number that a flag takes is negative, NaN or infinite."""
    for name, value in vars(arguments).items():
        if type(value) in (int, float) and name != "local_rank" and not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"--{name} {value}: a finite number, not below 0")


def check_rank(arguments: Any) -> None:
    at_least(arguments, "max_rank", 0)
    if not 0.0 < arguments.energy <= 1.0:
        raise ConfigError(f"--energy is a share above 0 and at most 1, not {arguments.energy}")


def check_training(arguments: Any) -> None:
    for name in ("global_batch_size", "max_new_tokens"):
        at_least(arguments, name, 1)
    arguments.check_adapter()
    for name in ("epochs", "learning_rate"):
        if not getattr(arguments, name) > 0:
            raise ConfigError(f"--{name} must be above 0, not {getattr(arguments, name)}")


def output_file(flag: str, given: str) -> Path:
    """The path of a file to be written. ConfigError, before any work, where none can be written there."""
    path = Path(given)
    if path.is_dir():
        raise ConfigError(f"{flag} {given} is a directory: name a file")
    _check_above(flag, path)
    return path


def output_directory(flag: str, given: str) -> Path:
    """As ``output_file``, of a directory."""
    path = Path(given)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{flag} {given} is a file: name a new directory")
    _check_above(flag, path)
    return path


def _check_above(flag: str, path: Path) -> None:
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"{flag} {path}: {above} is no directory that this user may write into")


def check_writable(name: str, directory: str) -> None:
    import tempfile

    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(f"--{name} {directory} cannot be written: {error.strerror or error}") from error
