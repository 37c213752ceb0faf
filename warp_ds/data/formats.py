"""From a sample to token ids and labels.

With a chat template, the turns before the last answer are followed by the template's generation prompt, and the answer is what
the template puts after that (data/template.py); the answers of earlier turns are found in what stands before (data/spans.py).
Without one, a pair is `Question: {prompt}\\nAnswer: {response}`, begun as the tokenizer itself begins a text (a
beginning-of-sequence token where it adds one) and closed by its end-of-text token.

No token crosses the boundary between prompt and last answer: the ids of `encode_prompt` are always a
prefix of the ids of `encode`, and what is generated after a prompt is what was trained after it. A control token that
somebody typed into a prompt or response is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from transformers import PreTrainedTokenizerBase

from warp_ds.data.sample import Sample
from warp_ds.data.spans import Span, answer_spans
from warp_ds.data.template import CUT, answer, before_answer, cut_control, cut_turn
from warp_ds.errors import DataError

IGNORE = -100
"""The label that the loss skips (PyTorch's and transformers' convention)."""

PLAIN_PROMPT = "Question: {}\nAnswer:"


class Tokens(TypedDict):
    """One sample: three lists of one length. `labels` are -100 except on trained tokens, end-of-text included."""

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


def encode_prompt(prompt: str | Sample, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of the turns before the last answer, up to where that begins, ready for generation."""
    opening, text, _ = _before(Sample.of(prompt), tokenizer, "last")
    return opening + _ids(text, tokenizer)


def _before(sample: Sample, tokenizer: PreTrainedTokenizerBase, train_on: str) -> tuple[list[int], str, list[Span]]:
    """The ids that stand before the text, the text up to where the last answer begins (with CUTs), and in it the spans of the
    earlier answers that are trained, or where all tokens are, of those that are not."""
    if not sample.messages:
        raise DataError("a bare text has no prompt: give prompts, or conversations")
    marked = train_on == "all"
    asides = [i for i, turn in enumerate(sample.messages) if turn["role"] != "assistant" and i in sample.untrained]
    if marked and asides:
        raise DataError(
            f"turn {asides[0]}, of the role {sample.messages[asides[0]]['role']}, is marked as not to be trained on ('train', "
            "'weight'), and --train_on all trains all but answers so marked: use --train_on assistant, or take the mark out"
        )
    answers = [i for i, turn in enumerate(sample.before) if turn["role"] == "assistant" and train_on != "last"]
    wanted = [i for i in answers if (i in sample.untrained) == marked]
    if not tokenizer.chat_template:
        text, spans = _plain_text(sample, tokenizer)
        return opening_ids(tokenizer), text, [span for i, span in spans.items() if i in wanted]
    # The template writes the BOS itself where the model wants one: no special tokens here, or it stands twice.
    turns = [cut_turn(turn, tokenizer) for turn in sample.before]
    text = before_answer(turns, tokenizer, sample.tools)
    return [], text, answer_spans(turns, text, wanted, tokenizer, sample.tools)


def _plain_text(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[str, dict[int, Span]]:
    """The turns before the last answer without a chat template, and where earlier answers stand, by turn."""
    if sample.tools or any(turn.get("tool_calls") or turn["role"] == "tool" for turn in sample.messages):
        raise DataError("tools need a chat template, which the tokenizer lacks: give a model with one")
    text, spans = "", {}
    for i, turn in enumerate(sample.before):
        said = cut_control(turn["content"], tokenizer, response=turn["role"] == "assistant")
        if turn["role"] == "assistant":
            spans[i] = (len(text), len(text) + 1 + len(said.strip()))
            text += f" {said.strip()}"
        else:
            text += "\n\n" * bool(text) + (said if turn["role"] == "system" else PLAIN_PROMPT.format(said))
    return text, spans


def encode_sample(sample: Sample, tokenizer: PreTrainedTokenizerBase, train_on: str = "assistant") -> tuple[Tokens, int]:
    """Token ids, attention mask and labels, uncut, and how many tokens stand before the first that is trained.

    `train_on` is one of data/trained.py's. Raises `DataError` for what the tokenizer's template cannot write.
    """
    eos = _eos_id(tokenizer)
    if sample.text is not None:
        ids = opening_ids(tokenizer) + _ids(cut_control(sample.text, tokenizer, response=True), tokenizer)
        return _tokens(ids if ids[-1:] == [eos] else [*ids, eos], [(0, len(ids) + 1)]), 0
    opening, text, spans = _before(sample, tokenizer, train_on)
    reply = sample.messages[-1]
    if not sample.answered:
        raise DataError("the sample has no answer to train on: give one, or refusals with --refusal_file")
    if tokenizer.chat_template:
        turns = [cut_turn(turn, tokenizer) for turn in sample.before]
        tail = answer(turns, cut_turn(reply, tokenizer), text, tokenizer, sample.tools)
    else:
        tail = " " + cut_control(reply["content"].strip(), tokenizer, response=True)
    before, joint = _ids(text, tokenizer), _ids(text + tail, tokenizer)
    # Taken from the joint text; where a token would cross the boundary, the tail is tokenised by itself.
    after = joint[len(before) :] if joint[: len(before)] == before else _ids(tail, tokenizer, goes_on=True)
    after = after if after[-1:] == [eos] else [*after, eos]
    ids = opening + before + after
    places = [(len(opening) + first, len(opening) + last) for first, last in _token_spans(text, before, spans, tokenizer)]
    if train_on == "all":
        ends = [0, *(end for span in places for end in span), len(ids)]  # of what stands between the marked answers
        places = list(zip(ends[::2], ends[1::2], strict=True))
    else:
        places.append((len(opening) + len(before), len(ids)))
    return _tokens(ids, places), places[0][0]


def _token_spans(text: str, ids: list[int], spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """Spans of characters as spans of `ids` (of `text`): every token that holds one of them, as transformers' masks have it."""
    token_spans = []
    for first, last in spans:
        begin, end = _ids(text[:first], tokenizer), _ids(text[:last], tokenizer)
        known = _common(end, ids)
        token_spans.append((_common(begin, ids), known + (known < len(end))))
    return token_spans


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many of their first entries are the same."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _tokens(ids: list[int], trained: Sequence[Span]) -> Tokens:
    labels = [IGNORE] * len(ids)
    for first, last in trained:
        labels[first:last] = ids[first:last]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def encode(prompt: str | Sample, response: str, tokenizer: PreTrainedTokenizerBase, max_length: int | None = None) -> Tokens:
    """Token ids, attention mask and labels of a prompt and a response, which alone is trained.

    Longer than `max_length` tokens, the response is cut from the right (and then has no end-of-text token to learn).
    Raises `DataError` when the prompt alone leaves no room for a response token.
    """
    asked = Sample.of(prompt)
    sample = Sample([*asked.before, {"role": "assistant", "content": response}], asked.tools)
    tokens, before = encode_sample(sample, tokenizer, "last")
    if max_length is not None:
        if before >= max_length:
            raise DataError(
                f"a prompt of {before} tokens leaves no room for a response in --max_length {max_length}: raise "
                f"--max_length or leave the sample out. It begins: {sample.prompt[:80]!r}"
            )
        tokens = window(tokens, 0, max_length)
    return tokens


def window(tokens: Tokens, first: int, length: int) -> Tokens:
    """`length` of a sample's tokens, from the `first` on."""
    return {key: values[first : first + length] for key, values in tokens.items()}  # type: ignore[return-value, index]


def prompt_tokens(prompt: str | Sample, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The prompt alone (`--token_scope prompt`): no label is trained on."""
    return _tokens(encode_prompt(prompt, tokenizer), [])
