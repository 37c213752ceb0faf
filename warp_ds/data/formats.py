"""From (prompt, response) to token ids and labels.

With a chat template, the prompt is one user turn followed by the template's generation prompt, and the response is what
the template puts after that. Without one, the text is `Question: {prompt}\\nAnswer: {response}`, after the tokenizer's
beginning-of-sequence token where it has one, and closed by its end-of-text token.

No token crosses the boundary between prompt and response: the ids of `encode_prompt` are always a
prefix of the ids of `encode`, and what is generated after a prompt is what was trained after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from warp_ds.data.datasets import DataError

IGNORE = -100
"""The label that the loss skips (PyTorch's and transformers' convention)."""

PLAIN_PROMPT = "Question: {}\nAnswer:"


class Sample(TypedDict):
    """One sample: three lists of one length. `labels` are -100 except on response tokens, end-of-text included."""

    input_ids: list[int]
    attention_mask: list[int]
    labels: list[int]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _chat_prefix(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    turns = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-text token, so a response could never end: set eos_token in its "
            "tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the prompt up to where the answer begins, ready for generation."""
    if tokenizer.chat_template:
        # The template writes the BOS itself where the model wants one: no special tokens here, or it stands twice.
        return _ids(_chat_prefix(prompt, tokenizer), tokenizer)
    bos = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    return bos + _ids(PLAIN_PROMPT.format(prompt), tokenizer)


def _response_ids(prompt: str, response: str, before: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of the response after `before`, closed by the end of the turn (chat template) or the end-of-text token."""
    eos = _eos_id(tokenizer)
    if tokenizer.chat_template:
        prefix = _chat_prefix(prompt, tokenizer)
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
        whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
        # Some templates open a finished reply differently from the generation prompt (an empty thinking block, say):
        # what is generated follows the generation prompt, so that is what is trained.
        tail = whole[len(prefix) :].rstrip("\n") if whole.startswith(prefix) else response.strip()
    else:
        prefix = PLAIN_PROMPT.format(prompt)
        tail = " " + response.strip()
        bos = len(before) - len(_ids(prefix, tokenizer))
        before = before[bos:]
    joint = _ids(prefix + tail, tokenizer)
    # Sentencepiece tokenizers put a space before any text of its own: taken from the joint text, the tail has none.
    # Where a token would cross the boundary, the tail is tokenised alone.
    ids = joint[len(before) :] if joint[: len(before)] == before else _ids(tail, tokenizer)
    return ids if ids[-1:] == [eos] else ids + [eos]


def encode(
    prompt: str, response: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Sample:
    """Token ids, attention mask and labels of one pair.

    Longer than `max_length` tokens, the response is cut from the right (and then has no end-of-text token to learn).
    Raises `DataError` when the prompt alone leaves no room for a response token.
    """
    before = encode_prompt(prompt, tokenizer)
    after = _response_ids(prompt, response, before, tokenizer)
    if max_length is not None:
        if len(before) >= max_length:
            raise DataError(
                f"a prompt of {len(before)} tokens leaves no room for a response in --max_length {max_length}: raise "
                f"--max_length or leave the sample out. It begins: {prompt[:80]!r}"
            )
        after = after[: max_length - len(before)]
    return {
        "input_ids": before + after,
        "attention_mask": [1] * (len(before) + len(after)),
        "labels": [IGNORE] * len(before) + after,
    }


def encode_prompt_sample(
    prompt: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> Sample:
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

    Columns of the result: `input_ids`, `attention_mask`, `labels`. `prompt_only` is `--token_scope prompt`.
    """
    check_length(max_length, model_context)

    def one(row: dict[str, Any]) -> dict[str, Any]:
        if prompt_only:
            return dict(encode_prompt_sample(row["prompt"], tokenizer, max_length))
        return dict(encode(row["prompt"], row["response"], tokenizer, max_length))

    # Nothing is cached: a fingerprint of the closure would have to hash the tokenizer on every rank.
    return pairs.map(
        one, remove_columns=pairs.column_names, desc="tokenising", load_from_cache_file=False, keep_in_memory=True
    )
