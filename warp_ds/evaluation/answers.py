"""A model's greedy answers to the held-out prompts, written as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import count, takewhile
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from warp_ds.cluster import consensus, processes
from warp_ds.cluster.preemption import leave_if_asked
from warp_ds.data.sample import Sample
from warp_ds.evaluation.generate import generate_greedy
from warp_ds.evaluation.kept import PREFIX
from warp_ds.evaluation.sets import SUITES, EvaluationSets
from warp_ds.store.files import read_lines

Row = dict[str, Any]
"""suite, prompt, answer, and verdict or gold and correct: one answer, for a person to read."""


class AnswerLog:
    """Answers as they come, so that an interrupted evaluation goes on where it was; rank 0's file."""

    def __init__(self, path: Path | None = None):
        self.path = path

    def done(self, suite: str) -> list[str]:
        """The answers to the first prompts of ``suite``, on every rank."""
        return consensus.on_rank_0(lambda: self._read(suite), "reading the answers so far")

    def _read(self, suite: str) -> list[str]:
        by_number: dict[int, str] = {}
        if self.path is not None and self.path.is_file():
            for row in read_lines(self.path):  # without the line that was being written when the job died
                if row.get("suite") == suite and type(row.get("number")) is int and isinstance(row.get("answer"), str):
                    by_number.setdefault(row["number"], row["answer"])
        # A later answer than the first one missing is no use: its prompt would be another's.
        return [by_number[i] for i in takewhile(by_number.__contains__, count())]

    def append(self, suite: str, first: int, answers: Sequence[str]) -> None:
        if self.path is not None and processes.rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a+b") as file:
                # A line that was cut off must not spoil the next one.
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                cut = file.read(1) not in (b"", b"\n")
                file.write(b"\n" * cut)
                for number, answer in enumerate(answers, first):
                    row = {"suite": suite, "number": number, "answer": answer}
                    file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def collect_answers(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    sets: EvaluationSets,
    *,
    batch_size: int,
    max_new_tokens: int,
    suites: Sequence[str] = SUITES,
    log: AnswerLog | None = None,
) -> list[Row]:
    """Every prompt of ``suites`` with its greedy answer, without verdicts. Collective; the same on every rank."""
    log = log or AnswerLog()
    rows: list[Row] = []
    for suite, texts in sets.generated(suites).items():
        done = log.done(suite)
        done = done if len(done) == len(texts) else done[: len(done) // batch_size * batch_size]
        written = [len(done)]

        def save(fresh: list[str], suite: str = suite, written: list[int] = written) -> None:
            log.append(suite, written[0], fresh)
            written[0] += len(fresh)
            leave_if_asked()  # every rank saves after the same batches

        answers = generate_greedy(
            model,
            tokenizer,
            texts,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            synced=processes.world_size() > 1,
            done=done,
            save=save,
            desc=suite,
        )
        rows += [_answered(suite, sample, answer) for sample, answer in zip(texts, answers, strict=True)]
    golds = [item.response for item in sets.utility]
    for row, gold in zip((row for row in rows if row["suite"] == "gsm8k"), golds, strict=False):
        row["gold"] = gold
    for name, examples in sets.kept.items():
        mine = (row for row in rows if row["suite"] == f"{PREFIX}{name}")
        for row, example in zip(mine, examples, strict=True):
            row["gold"] = example.response
    return rows


def _answered(suite: str, prompt: Sample, answer: str) -> Row:
    """A row of answers.jsonl; what is more than one user turn stands in it whole, too."""
    return {"suite": suite, "prompt": prompt.prompt, "answer": answer} | ({} if prompt.plain else prompt.as_row())


def prompt_of(row: Row) -> Sample:
    """The prompt of a row of answers.jsonl."""
    return Sample.of(row if "messages" in row else row["prompt"])
