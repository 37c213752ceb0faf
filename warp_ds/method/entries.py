"""Which entries of a parameter are frozen, in all the forms that a user may say it in: booleans, rows, columns, slices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from warp_ds.errors import ConfigError

FORMS = (
    "a boolean tensor of the parameter's shape (1 in a dimension that it is repeated along), row numbers (a list, range or "
    "integer tensor), a slice of rows, a tuple of these as torch indexes ((slice(None), [0, 5]) are columns 0 and 5), True, "
    "or AllBut of any of them"
)


@dataclass(frozen=True)
class AllBut:
    """Everything is frozen but what ``mask`` names: ``AllBut([5, 7])`` trains rows 5 and 7 alone."""

    mask: Any


def frozen_entries(mask: Any, shape: tuple[int, ...]) -> Tensor:
    """bool of ``shape``, True = frozen; may be a view that repeats its memory, so it is to be read alone.

    ``mask`` is one of ``FORMS``. Raises ConfigError for anything else, another shape, or a number out of range.
    """
    return _unexpanded(mask, shape).expand(shape)


def _unexpanded(mask: Any, shape: tuple[int, ...]) -> Tensor:
    if isinstance(mask, AllBut):
        return ~_unexpanded(mask.mask, shape)
    if isinstance(mask, bool):
        return torch.full([1] * len(shape), mask)
    given = mask if isinstance(mask, Tensor) else None
    if given is None and hasattr(mask, "__array__"):
        given = torch.as_tensor(mask)
    if given is not None and given.dtype == torch.bool:
        if given.dim() != len(shape) or any(own not in (1, size) for own, size in zip(given.shape, shape, strict=True)):
            raise ConfigError(
                f"a boolean mask of shape {tuple(given.shape)} does not fit a parameter of shape {shape}: give it that shape, "
                "or 1 in a dimension that it is repeated along (rows[:, None] for whole rows)"
            )
        return given.detach()
    key = _index(mask if given is None else given)
    if not shape:
        raise ConfigError(f"a parameter without dimensions has no rows: a mask is True or a boolean tensor, not {mask!r:.80}")
    by_rows = not isinstance(key, tuple)
    found = torch.zeros(shape[:1] if by_rows else shape, dtype=torch.bool)
    try:
        found[key] = True
    except (IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"a mask does not fit a parameter of shape {shape}: {error}") from error
    return found.view(-1, *[1] * (len(shape) - 1)) if by_rows else found


def _index(key: Any) -> Any:
    """``key`` as torch indexes with it; ConfigError where it is none of ``FORMS``."""
    if isinstance(key, tuple):
        return tuple(_index(part) for part in key)
    if isinstance(key, slice):
        return key
    if isinstance(key, int) and not isinstance(key, bool):
        return torch.tensor([key])
    if isinstance(key, list | range | set | frozenset):
        numbers = sorted(key) if isinstance(key, set | frozenset) else list(key)
        if all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
            return torch.tensor(numbers, dtype=torch.long)
    if isinstance(key, Tensor) and key.dtype in (torch.int64, torch.int32, torch.int16) and key.dim() <= 1:
        return key.detach().long().cpu().view(-1)
    if isinstance(key, Tensor) and key.dtype == torch.bool and key.dim() == 1:
        return key.detach().cpu()
    what = f"a tensor of {key.dtype}, shape {tuple(key.shape)}" if isinstance(key, Tensor) else f"{key!r:.80}"
    raise ConfigError(f"{what} is no mask: give {FORMS}")
