"""Digests of what every rank must know, each byte read by one rank: the parts are dealt out by their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from warp_ds.cluster import consensus, processes
from warp_ds.cluster.dealing import LeastLoaded
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.store import digests
from warp_ds.store.digests import Digest, FileState, Part
from warp_ds.store.fingerprints import Contents, fingerprint_model, model_contents

ROUND_BYTES = 8 << 30
"""What a rank reads between two meetings: at 20 MB/s, 7 of the 30 minutes that a rank waits for another."""


def model_fingerprint(directory: Path) -> str:
    """``store.fingerprints.fingerprint_model`` on every rank; each byte is read by one. Collective. Raises ArtifactError."""
    read_together(lambda: [model_contents(directory)], "reading the model")
    return consensus.on_rank_0(lambda: fingerprint_model(directory), "reading the model")


def read_together(covered: Callable[[], Iterable[Contents]], what: str) -> None:
    """Lets every rank know the digests of what ``covered`` yields, so that fingerprints of it need no reading. Collective.

    Rank 0 alone calls ``covered``; what that refuses is left to the check that follows, on the ranks that it is for. A
    rank takes over only what it sees itself in the same state (on a shared file system, all), and reads the rest when
    it is asked for it. Raises ArtifactError where a file cannot be read to its end.
    """
    parts, states = consensus.on_rank_0(lambda: _wanted(covered), what)
    known = processes.broadcast_object(digests.recall(parts, states) if processes.rank() == 0 else {})
    digests.learn(known, states)
    hands = deal([part for part in parts if part not in known], processes.world_size())
    for turn in range(max(map(len, hands))):
        fresh: dict[Part, Digest] = {}
        with consensus.on_every_rank_or_none(what):
            mine = hands[processes.rank()][turn] if turn < len(hands[processes.rank()]) else []
            try:
                fresh = digests.read([part for part in mine if FileState.of(part.path) == states[part.path]])
            except OSError as error:
                raise ArtifactError(f"{error}: it was removed or changed while it was read; try again") from error
        fresh = {part: digest for of_rank in processes.all_gather_object(fresh) for part, digest in of_rank.items()}
        digests.learn(fresh, states)
        if processes.rank() == 0:
            digests.store(fresh, states)  # a run that is started again goes on from here


def deal(parts: Iterable[Part], ranks: int) -> list[list[list[Part]]]:
    """For each rank its turns of parts, about ROUND_BYTES each; ranks read about as many bytes, at most a part more."""
    hands: list[list[list[Part]]] = [[] for _ in range(ranks)]
    readers = LeastLoaded(ranks)
    for part in sorted(set(parts), key=lambda part: (-part.nbytes, part.path, part.begin)):
        turns = hands[readers.next(part.nbytes)]
        if not turns or sum(p.nbytes for p in turns[-1]) + part.nbytes > ROUND_BYTES:
            turns.append([])
        turns[-1].append(part)
    return hands


def _wanted(covered: Callable[[], Iterable[Contents]]) -> tuple[list[Part], dict[str, FileState]]:
    parts: dict[Part, None] = {}
    try:
        for contents in covered():
            parts.update(dict.fromkeys(contents.parts.values()))
        return list(parts), {path: FileState.of(path) for path in {part.path for part in parts}}
    except (ArtifactError, ConfigError, OSError):
        return [], {}
