"""Scores of the importance batches that are done, saved so that a run that was stopped goes on with the rest."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from warp_ds.cluster.consensus import on_every_rank_or_none, on_rank_0
from warp_ds.cluster.preemption import leave_if_asked
from warp_ds.cluster.processes import broadcast_object, rank, world_size
from warp_ds.errors import ArtifactError
from warp_ds.store.files import read_json, remove_own, write_json, write_tensors
from warp_ds.store.sealed import contents, difference
from warp_ds.zero.scores import Rows, RowScores

_AGAIN = "remove {}, and phase 2 begins its scores anew"


class SavedScores:
    """Scores of the importance batches that are done, so that a run that was stopped goes on with the rest.

    ``directory``/progress.json names the files that belong together: it is written when all ranks' are whole.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self.progress = directory / "progress.json"

    def load(self, scores: RowScores) -> int:
        """Fills ``scores`` with what was saved, by any number of ranks; returns the importance batches in it."""
        saved = on_rank_0(self._whole, "reading saved scores")
        if saved is None:
            return 0
        batches, ranks = saved
        with on_every_rank_or_none("reading saved scores"):
            for other in range(ranks):
                path = self._file(batches, other)
                try:
                    self._add(path, scores, ranks, other)
                except (SafetensorError, OSError, RuntimeError, IndexError) as error:
                    raise ArtifactError(f"{path} cannot be read ({error}): {_AGAIN.format(self.directory)}") from error
        return batches

    def _whole(self) -> tuple[int, int] | None:
        """(importance batches that are done, ranks that saved them); None for none. ArtifactError where a file was changed."""
        if not self.progress.is_file():
            return None
        saved = read_json(self.progress)
        batches, ranks = (saved.get(name) if isinstance(saved, dict) else None for name in ("batches", "ranks"))
        if type(batches) is not int or type(ranks) is not int or min(batches, ranks) < 1:
            raise ArtifactError(f"{self.progress} is not what this program writes: {_AGAIN.format(self.directory)}")
        # A process that was killed may have left files of the batches before, or after.
        if changed := difference(self.directory, self.progress.name, saved.get("files"), added=False):
            raise ArtifactError(f"{self.directory} is not as this program left it: {changed}; {_AGAIN.format(self.directory)}")
        return batches, ranks

    def _add(self, path: Path, scores: RowScores, ranks: int, other: int) -> None:
        """Puts the rows of ``scores`` that rank ``other`` of ``ranks`` saved where they belong."""
        with safe_open(str(path), framework="pt") as file:
            for name, rows in scores.rows.items():
                theirs, own = Rows(rows.m, ranks, other).block, rows.block
                first, last = max(theirs.start, own.start), min(theirs.stop, own.stop)
                if first < last:
                    part = file.get_slice(name)[first - theirs.start : last - theirs.start]
                    mine = scores.of(name)[first - own.start : last - own.start]
                    if part.shape != mine.shape or part.dtype != mine.dtype:
                        raise RuntimeError(f"{name} is {list(part.shape)} in {part.dtype}, not {list(mine.shape)}")
                    mine.copy_(part)

    def save(self, scores: RowScores, batches: int) -> None:
        """Saves the scores of the first ``batches`` importance batches. Collective."""
        with on_every_rank_or_none("saving scores"):
            write_tensors(self._file(batches, rank()), {name: scores.of(name) for name in scores.rows})

        def mark() -> None:
            of_others = [path.name for path in self.directory.glob("*.safetensors") if not path.name.startswith(f"{batches}_")]
            files = contents(self.directory, self.progress.name)
            write_json(
                self.progress,
                {
                    "batches": batches,
                    "ranks": world_size(),
                    "files": {name: what for name, what in files.items() if name not in of_others},
                },
            )
            remove_own(self.directory, rf"(?!{batches}_)\d+_rank_\d+\.safetensors")

        on_rank_0(mark, "saving scores")

    def save_in_time(self, scores: RowScores, batches: int, last: float, seconds: float) -> float:
        """``save`` where the last time (``time.monotonic``) was ``seconds`` ago, and where this job is to leave, which it then
        does; when it last did. Collective."""
        if broadcast_object(time.monotonic() - last > seconds):
            self.save(scores, batches)
            last = time.monotonic()
        leave_if_asked(partial(self.save, scores, batches))
        return last

    def remove(self) -> None:
        """Forgets what was saved. Collective."""
        on_rank_0(lambda: remove_own(self.directory, r"progress\.json|\d+_rank_\d+\.safetensors"), "removing saved scores")

    def _file(self, batches: int, other: int) -> Path:
        return self.directory / f"{batches}_rank_{other}.safetensors"
