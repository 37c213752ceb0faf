"""Samples as the model will see them, for people: tokens, which of them are trained, lengths, duplicates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from warp_ds.data.formats import IGNORE, encode_sample
from warp_ds.data.sample import Sample
from warp_ds.data.table import few
from warp_ds.errors import DataError

OPEN, CLOSE = "⟦", "⟧"
"""Around what is trained."""


def shown(tokens: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, most: int = 400) -> str:
    """A tokenised sample in words: special tokens as they are, OPEN and CLOSE around what is trained, the middle left out
    beyond `most` tokens."""
    ids, labels = tokens["input_ids"], tokens["labels"]
    ranges = [(0, len(ids))] if len(ids) <= most else [(0, most // 2), (len(ids) - most // 2, len(ids))]
    return f" … ({len(ids) - most} tokens) … ".join(_marked(ids[a:b], labels[a:b], tokenizer) for a, b in ranges)


def _marked(ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text, start = "", 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or (labels[i] == IGNORE) != (labels[start] == IGNORE):
            piece = str(tokenizer.decode(list(ids[start:i])))
            text += piece if labels[start] == IGNORE else f"{OPEN}{piece}{CLOSE}"
            start = i
    return text


def first_samples(encoded: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lines that show the first samples of a tokenised data set."""
    lines = []
    for number, tokens in enumerate(encoded):
        trained = sum(label != IGNORE for label in tokens["labels"])
        lines.append(
            f"sample {number}: {len(tokens['input_ids'])} tokens, {trained} trained ({OPEN}so{CLOSE}): "
            f"{shown(tokens, tokenizer)!r}"
        )
    return lines


def examine(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, max_length: int, train_on: str) -> list[str]:
    """Lines for people: the first two samples, what cannot be written, lengths, what is too long, duplicates."""
    lengths: list[int] = []
    trained: list[int] = []
    wrong: list[str] = []
    late: list[int] = []
    first: list[Mapping[str, Any]] = []
    for row, sample in enumerate(samples):
        try:
            tokens, before = encode_sample(sample, tokenizer, train_on)
        except DataError as error:
            wrong.append(f"row {row}: {error}")
            continue
        first += [tokens] if len(first) < 2 else []
        lengths.append(len(tokens["input_ids"]))
        trained.append(sum(label != IGNORE for label in tokens["labels"]))
        late += [row] if before >= max_length else []
    lines = first_samples(first, tokenizer)
    lines += [f"cannot be written: {len(wrong)} of {len(samples)} samples: {few(wrong)}"] if wrong else []
    if lengths:
        order = sorted(lengths)
        points = {"least": 0, "half": len(order) // 2, "95 %": int(len(order) * 0.95), "most": len(order) - 1}
        lines.append(
            f"{len(samples)} samples, {sum(lengths)} tokens, {sum(trained)} trained; tokens a sample: "
            + ", ".join(f"{name} {order[min(at, len(order) - 1)]}" for name, at in points.items())
        )
    long = sum(length > max_length for length in lengths)
    lines.append(
        f"--max_length {max_length}: {long} samples are longer"
        + (
            f"; of {len(late)} nothing trained would be left (rows {few(late)}), of {long - len(late)} the end is cut: "
            "--long_samples error refuses the former, truncate cuts all, drop drops all"
            if long
            else ""
        )
    )
    lines.append(_duplicates(samples))
    return lines


def _duplicates(samples: Sequence[Sample]) -> str:
    whole = Counter(repr(sample.as_row()) for sample in samples)
    prompts = Counter(sample.prompt for sample in samples if sample.messages)
    return (
        f"duplicates: {sum(n - 1 for n in whole.values())} samples are there already, "
        f"{sum(n - 1 for n in prompts.values())} prompts are"
    )
