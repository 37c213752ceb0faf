"""What every launch/*.py and ``warp-ds PHASE`` does."""

from __future__ import annotations

import sys
from typing import NoReturn

from warp_ds.registry import PHASES


def main(name: str, argv: list[str] | None = None) -> NoReturn:
    """Runs a phase on this rank, with the flags of ``argv`` (the command line's by default). Ends the process."""
    phase, words = PHASES[name], sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(words):  # answered before torch is there
        from warp_ds.flags.parsing import parse_phase

        sys.argv[0] = f"warp-ds {name}"
        parse_phase(phase, words)
    from warp_ds.launch.job import run

    run(phase, words)
