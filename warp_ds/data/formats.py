"""From (prompt, response) to token ids and labels.

With a chat template, the prompt is one user turn followed by the template's generation prompt, and the response is what
the template puts after that (data/template.py). Without one, the text is `Question: {prompt}\\nAnswer: {response}`, begun
as the tokenizer itself begins a text (a beginning-of-sequence token where it adds one) and closed by its end-of-text token.

No token crosses the boundary between prompt and response: the ids of `encode_prompt` are always a
prefix of the ids of `encode`, and what is generated after a prompt is what was trained after it. A control token that
somebody typed into a prompt or response is text.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, TypedDict

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from warp_ds.data.template import CUT, answer, before_answer, cut_control
from warp_ds.errors import DataError

logger = logging.getLogger(__name__)
IGNORE = -100
"""The label that the loss skips (PyTorch's and transformers' convention)."""

PLAIN_PROMPT = "Question: {}\nAnswer:"


class Sample(TypedDict):
    """One sample: three lists of one length. `labels` are -100 except on response tokens, end-of-text included."""

    input_ids: list[int]
    attention_mask: list[int]
    labels: list[int]


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tokenizer itself puts before a text: its beginning-of-sequence token, or nothing."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    return next((whole[:i] for i in range(len(whole)) if whole[i : i + len(bare)] == bare), [])


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, goes_on: bool = False) -> list[int]:
    """Ids of `text` without special tokens, and with no token across a CUT; `goes_on`: other text stands before it."""
    ids: list[int] = []
    for piece in text.split(CUT):
        ids += _ids_after(piece, tokenizer) if goes_on else list(tokenizer(piece, add_special_tokens=False)["input_ids"])
        goes_on = True
    return ids


def _ids_after(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a text that goes on: sentencepiece tokenizers put a space before any text of its own, but for a line's."""
    line = list(tokenizer("\n", add_special_tokens=False)["input_ids"])
    ids = list(tokenizer("\n" + text, add_special_tokens=False)["input_ids"])
    return ids[len(line) :] if ids[: len(line)] == line else list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-text token, so a response could never end: set eos_token in its tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def _before(prompt: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """The ids that stand before the text, and the text up to where the answer begins (with CUTs)."""
    if tokenizer.chat_template:
        # The template writes the BOS itself where the model wants one: no special tokens here, or it stands twice.
        return [], before_answer(prompt, tokenizer)
    return opening_ids(tokenizer), PLAIN_PROMPT.format(cut_control(prompt, tokenizer))


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt up to where the answer begins, ready for generation."""
    opening, text = _before(prompt, tokenizer)
    return opening + _ids(text, tokenizer)


def _encode_both(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of the prompt, and of the response closed by the end of the turn (chat template) or the end-of-text token."""
    eos = _eos_id(tokenizer)
    opening, text = _before(prompt, tokenizer)
    if tokenizer.chat_template:
        tail = answer(prompt, response, text, tokenizer)
    else:
        tail = " " + cut_control(response.strip(), tokenizer, response=True)
    before, joint = _ids(text, tokenizer), _ids(text + tail, tokenizer)
    # Taken from the joint text; where a token would cross the boundary, the tail is tokenised by itself.
    after = joint[len(before) :] if joint[: len(before)] == before else _ids(tail, tokenizer, goes_on=True)
    return opening + before, after if after[-1:] == [eos] else after + [eos]


def encode(prompt: str, response: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Sample:
    """Token ids, attention mask and labels of one pair.

    Longer than `max_length` tokens, the response is cut from the right (and then has no end-of-text token to learn).
    Raises `DataError` when the prompt alone leaves no room for a response token.
    """
    before, after = _encode_both(prompt, response, tokenizer)
    if max_length is not None:
        if len(before) >= max_length:
            raise DataError(
                f"a prompt of {len(before)} tokens leaves no room for a response in --max_length {max_length}: raise "
                f"--max_length or leave the sample out. It begins: {prompt[:80]!r}"
            )
        after = after[: max_length - len(before)]
    return _sample(before, after)


def _sample(before: list[int], after: list[int]) -> Sample:
    return {
        "input_ids": before + after,
        "attention_mask": [1] * (len(before) + len(after)),
        "labels": [IGNORE] * len(before) + after,
    }


def encode_prompt_sample(prompt: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Sample:
    """The prompt alone (`--token_scope prompt`): no label is trained on. Longer than `max_length`: `DataError`."""
    ids = encode_prompt(prompt, tokenizer)
    if max_length is not None and len(ids) > max_length:
        raise DataError(
            f"a prompt of {len(ids)} tokens does not fit in --max_length {max_length}: raise --max_length or leave "
            f"the sample out. It begins: {prompt[:80]!r}"
        )
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORE] * len(ids)}


def response_mask(labels: Sequence[int]) -> list[bool]:
    """True on the response tokens, end-of-text included (`--token_scope response`)."""
    return [label != IGNORE for label in labels]


def check_length(max_length: int, model_context: int | None) -> None:
    """Raises `DataError` if `max_length` tokens are no length that the model can read."""
    if max_length < 2:
        raise DataError(f"--max_length {max_length} is too short: a prompt token and a response token need 2")
    if model_context is not None and max_length > model_context:
        raise DataError(
            f"--max_length {max_length} exceeds the model's context of {model_context} tokens "
            f"(max_position_embeddings): use --max_length {model_context} or less"
        )


def encode_dataset(
    pairs: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    model_context: int | None = None,
    *,
    prompt_only: bool = False,
) -> Dataset:
    """`encode` over a data set of `prompt` and `response`, in order, with a progress bar.

    Columns of the result: `input_ids`, `attention_mask`, `labels`. `prompt_only` is `--token_scope prompt`. Raises one
    `DataError` that names all prompts that are too long, by row; warns of the responses that are cut, by row.
    """
    check_length(max_length, model_context)
    lengths: list[tuple[int, int]] = []

    def one(row: dict[str, Any], number: int) -> dict[str, Any]:
        try:
            both = (
                (encode_prompt(row["prompt"], tokenizer), [])
                if prompt_only
                else _encode_both(row["prompt"], row["response"], tokenizer)
            )
        except DataError as error:
            raise DataError(f"row {number}: {error}") from error
        lengths.append((len(both[0]), len(both[0]) + len(both[1])))
        sample = _sample(*both)
        return {key: values[:max_length] for key, values in sample.items()}  # type: ignore[index]

    # Nothing is cached: a fingerprint of the closure would have to hash the tokenizer on every rank.
    encoded = pairs.map(
        one,
        with_indices=True,
        remove_columns=pairs.column_names,
        desc="tokenising",
        load_from_cache_file=False,
        keep_in_memory=True,
    )
    most = max_length if prompt_only else max_length - 1
    wrong = {row: prompt for row, (prompt, _) in enumerate(lengths) if prompt > most}
    if wrong:
        begins = str(pairs[next(iter(wrong))]["prompt"])[:80]
        least = max(wrong.values()) + (not prompt_only)
        raise DataError(
            f"{too_long(wrong, len(pairs))} {'do not fit' if prompt_only else 'leave no room for a response'} in "
            f"--max_length {max_length}: raise --max_length to {least} or more, or leave these rows out. The first "
            f"begins: {begins!r}"
        )
    cut = {row: whole for row, (_, whole) in enumerate(lengths) if whole > max_length}
    if cut:
        logger.warning(
            "%d of %d responses are cut at --max_length %d, and their end is not learned (rows %s): the longest "
            "sample has %d tokens",
            len(cut),
            len(pairs),
            max_length,
            _first(list(cut)),
            max(cut.values()),
        )
    return encoded


def too_long(lengths: dict[int, int], of: int) -> str:
    """'2 of 9 prompts (row 3: 512 tokens, row 5: 730 tokens)': rows and their tokens, the first few."""
    shown = _first([f"row {row}: {tokens} tokens" for row, tokens in lengths.items()])
    return f"{len(lengths)} of {of} prompts ({shown})"


def _first(items: Sequence[Any], most: int = 10) -> str:
    return ", ".join(map(str, items[:most])) + (f", … {len(items) - most} more" if len(items) > most else "")
