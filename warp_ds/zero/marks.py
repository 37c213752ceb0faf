"""What a checkpoint's parameter groups say of the step that wrote them."""

from __future__ import annotations

from typing import Any

#: Where a checkpoint says who wrote it: in each of the optimizer's parameter groups.
MARK = "warp_ds"
#: Where a mark has the digests of frozen entries, by parameter.
FROZEN = "frozen"


def other_masks(mark: dict[str, Any], digests: dict[str, str]) -> str:
    """Why a checkpoint with ``mark`` was trained with other masks than those of ``digests``, by parameter; empty where not."""
    saved = mark.get(FROZEN)
    if saved is None:
        return (
            "the loaded checkpoint holds rotated coefficients of warp_ds.protect, which freeze does not go on with: start "
            "anew from its weights"
        )
    other = [name for name in {**saved, **digests} if saved.get(name) != digests.get(name)]
    if not other:
        return ""
    first = other[0]
    what = (
        "with another mask of"
        if first in saved and first in digests
        else "with a mask, which is not given now, of"
        if first in saved
        else "without the mask given now of"
    )
    more = f" (and of {len(other) - 1} other parameters)" if len(other) > 1 else ""
    return (
        f"the loaded checkpoint was trained {what} {first}{more}: give the masks it was trained with, or start anew from "
        "its weights"
    )
