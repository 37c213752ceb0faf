"""SafeGrad: the task's gradient without what points against the safety samples' (method/objectives.py, zero/surgery.py)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerControl, TrainerState, TrainingArguments

from warp_ds.cluster import processes
from warp_ds.data.collate import EMPTY
from warp_ds.method.objectives import divergence
from warp_ds.phases.replay import Replayed
from warp_ds.phases.start_model import predicting
from warp_ds.zero.batches import Samples
from warp_ds.zero.surgery import GradientSurgery


class SafeGrad(Replayed):
    """The task's loss alone is minimised. Before a step's micro-batches go its safety samples: the gradient of their mean
    divergence from the start model, over response tokens, is what the task's may not point against."""

    objective = "safegrad"

    def __init__(self, samples: Sequence[Any], arguments: Any, tokenizer: Any, directory: Path):
        super().__init__(samples, arguments, tokenizer, directory, arguments.batch_size)
        self.surgery: GradientSurgery | None = None
        self.rows: Samples | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Collective."""
        super().on_train_begin(args, state, control, **kwargs)
        self.surgery = GradientSurgery(self.trainer.deepspeed)

    def open(self, samples: Samples) -> None:
        self.rows = samples

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Collective."""
        assert self.surgery is not None and self.rows is not None
        self.surgery.begin()
        for indices in self.of_step(state.global_step):
            batch = self.rows.batch(indices)
            logits = self.trainer.model_wrapped(**batch.inputs, use_cache=False).logits
            self.surgery.backward(self._divergence(logits, batch.labels, indices))
        self.surgery.put_aside()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """``safegrad_removed``: c of the last step, 0 where nothing pointed against the safety gradient."""
        if self.surgery is not None and logs is not None and "loss" in logs:
            logs["safegrad_removed"] = self.surgery.removed

    def _divergence(self, logits: Tensor, labels: Tensor, indices: Sequence[int]) -> Tensor:
        """This rank's part of the mean, for a mean over ranks; ``logits`` [B, L, V], ``labels`` [B, L]."""
        # In every rank's graph, also where it has no sample: ZeRO-3's backward passes must run through the same modules.
        total = logits[:1, :1, :1].float().sum() * 0.0
        for row, index in enumerate(indices):
            if index != EMPTY:
                start = self.start_logits(index, logits.device)
                total = total + divergence(predicting(logits[row], labels[row]), start).sum()
        return total * processes.world_size() / self.tokens
