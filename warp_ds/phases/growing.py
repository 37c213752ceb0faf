"""Masks that grow during phase 3: scores of the model as it is then, by phase 2's own passes, and more of it frozen.

What was frozen stays so to the bit. Each time the masks are written as phase 2 writes them, in RUN/masks_step<N>: a run that
goes on from a checkpoint takes those of its step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from warp_ds.cluster import consensus, processes
from warp_ds.data.datasets import load_samples
from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import ImportanceArguments, TrainArguments
from warp_ds.flags.flag import handed_on
from warp_ds.method.mask import unpack_bits
from warp_ds.phases.importance import freeze, importance_scores
from warp_ds.phases.texts import tokenise
from warp_ds.protection import WarpCallback
from warp_ds.store.fingerprints import fingerprint_rows
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore
from warp_ds.store.metadata import AT_STEP
from warp_ds.store.runs import find_artifact
from warp_ds.zero.deepspeed_internals import without_engine_hooks
from warp_ds.zero.growing import freeze_more, refuse_growing
from warp_ds.zero.scores import Rows

logger = logging.getLogger(__name__)


class Growing(TrainerCallback):
    """The growing masks of one training. ``first``: the masks that it starts with."""

    speed: Any = None
    """Of the Trainer: what this takes is no training."""
    warp: WarpCallback

    def __init__(self, arguments: TrainArguments, first: MaskStore, samples: Sequence[Any]):
        self.arguments, self.first, self.samples = arguments, first, samples
        self.schedule = {step: share for step, share in arguments.schedule.items() if step}
        self.fingerprint = fingerprint_rows(list(samples))
        self.run = Path()
        self.held: Path = first.directory
        """The masks in force."""
        self._rows: Any = None

    @classmethod
    def read(cls, arguments: TrainArguments, passed: Mapping[str, Any]) -> Growing | None:
        """None where masks stay as they are. Raises ConfigError for what does not go together, DataError."""
        if not arguments.grows:
            return None
        if passed.get("load_best_model_at_end"):
            raise ConfigError("masks that grow are those of the last step: leave --load_best_model_at_end out")
        first = MaskStore(find_artifact(arguments.masks_dir, "masks", arguments.output_dir))
        keep_ratio, shares = first.metadata.keep_ratio, arguments.schedule
        if first.metadata.unit == "neuron":
            raise ConfigError(f"the masks in {first.directory} are of neurons, which phase 2 does not score: they cannot grow")
        if shares.pop(0, keep_ratio) != keep_ratio or any(share <= keep_ratio for share in shares.values()):
            raise ConfigError(
                f"--keep_ratio_schedule {arguments.keep_ratio_schedule}: the masks in {first.directory} freeze {keep_ratio:g} "
                "from the start, and later shares are larger; --keep_ratio of phase 2 is the share at step 0"
            )
        options: dict[str, Any] = {"prompt_column": arguments.prompt_column, "response_column": arguments.response_column}
        samples = arguments.refresh_samples
        return cls(arguments, first, load_samples(str(arguments.refresh_data), samples=samples, **options))

    def share(self, step: int) -> float | None:
        """The share that is frozen from ``step`` on, where the masks grow after it: the schedule's, or 1 - (1 - rho)^(k + 1) of
        masks of the share rho at their k-th refresh."""
        if not self.arguments.refresh_steps:
            return self.schedule.get(step)
        count, left = divmod(step, self.arguments.refresh_steps)
        return None if left or not count else 1.0 - (1.0 - self.first.metadata.keep_ratio) ** (count + 1)

    def begin(self, warp: WarpCallback) -> None:
        """``warp`` holds the masks in force. DataError for samples that are too long. Collective."""
        self.warp, self._rows = warp, tokenise(self.samples, self.arguments)

    def masks_of(self, run: Path, checkpoint: Path | None) -> Path:
        """The masks in force where ``run`` begins, or goes on from ``checkpoint``. ArtifactError where they are not there."""
        self.run = run
        step = 0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1])
        last = next((at for at in range(step, 0, -1) if self.share(at) is not None), None)
        if last is not None and last == step and not (self._place(last) / "metadata.json").is_file():
            # Nothing grows after the last step.
            last = next((at for at in range(step - 1, 0, -1) if self.share(at) is not None), None)
        if last is not None:
            self.held = MaskStore(self._place(last)).directory
        return self.held

    def _place(self, step: int) -> Path:
        return self.run / f"masks_step{step}"

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.warp.protection is not None
        refuse_growing(self.warp.protection)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        share = self.share(state.global_step)
        if share is not None and state.global_step < state.max_steps:
            with self.speed.paused():
                self._grow(kwargs["model"], kwargs["processing_class"], state.global_step, share)

    def _grow(self, model: Any, tokenizer: Any, step: int, share: float) -> None:
        """Collective."""
        protection, held = self.warp.protection, MaskStore(self.held)
        assert protection is not None
        driver, meta, place, basis = (
            refuse_growing(protection),
            held.metadata,
            self._place(step),
            self.first.find_basis(self.warp.basis_dir),
        )
        settings = {"keep_ratio": share, "mask_unit": meta.unit, "mask_scope": meta.scope}
        arguments = ImportanceArguments(**{**handed_on(self.arguments, ImportanceArguments), **settings})
        notes = [f"found after optimizer step {step}, for what was free then, and frozen from there on"]
        scored = held.layers, self._rows, basis, arguments, notes, place, None
        with without_engine_hooks(driver.zero):
            values = importance_scores(model, tokenizer, *scored)
        with consensus.on_every_rank_or_none("reading the masks in force"):
            for layer in held.layers:
                values[layer.name] = frozen_first(values[layer.name], held, layer)
        score, data = f"{AT_STEP}{step}", self.fingerprint
        found = replace(meta, keep_ratio=share, score=score, data_fingerprint=data, notes=notes, layers={}, frozen=0, entries=0)
        freeze(held.layers, values, arguments, place, found, scores=False)
        freeze_more(protection, MaskStore(place))
        self.held = place
        logger.info("from step %d on %.2f %% of the coefficients are frozen: %s", step, 100 * protection.masked_fraction, place)


def frozen_first(values: Tensor, masks: MaskStore, layer: TargetLayer) -> Tensor:
    """This rank's unit scores of a layer over all its columns, with those of what ``masks`` freeze above any other."""
    unit = masks.metadata.unit
    if unit == "column":
        frozen = unpack_bits(masks.columns(layer.name), layer.n)[: len(values)]
    else:
        rows = Rows(layer.m, processes.world_size(), processes.rank()).block
        frozen = unpack_bits(masks.packed(layer.name, rows.start, rows.stop), layer.n)
    if unit == "row":
        frozen = frozen.any(dim=1, keepdim=True)
    else:
        values = functional.pad(values, (0, layer.n - values.shape[1]))
    return values.masked_fill(frozen.to(values.device), torch.finfo(torch.float32).max)
