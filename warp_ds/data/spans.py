"""Where the answers of earlier turns stand in a conversation's text, for the labels.

By the template's own generation mask where it has one; else by prefix: what the template writes up to a turn, and with it. A
template that writes a turn in another way once others follow (thoughts dropped, another end) is asked with a known word in the
answer's place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from warp_ds.data.sample import Message
from warp_ds.data.template import chat_text, dated_template, render, style_of, turns_for, without_line_end
from warp_ds.errors import DataError

_WORD = "somebodyhadanswered"
_MASK = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]
"""First character, and the one after the last."""


def answer_spans(
    turns: Sequence[Message], text: str, wanted: Sequence[int], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] = ()
) -> list[Span]:
    """The spans in `text` (of `before_answer` over `turns`) that the model itself would have written in the `wanted` turns.

    Raises `DataError` for a turn that cannot be found.
    """
    if not wanted:
        return []
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    masked = _masked(turns, text, tokenizer, tools)
    if masked and (len(masked) == len(answers) or list(wanted) == answers):
        return [masked[answers.index(i)] for i in wanted] if len(masked) == len(answers) else masked
    return [_span(turns, i, text, tokenizer, tools) for i in wanted]


def _masked(turns: Sequence[Message], text: str, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any]) -> list[Span]:
    """What the template's {% generation %} blocks hold; [] where it has none, or writes another text under them."""
    template = dated_template(tokenizer)
    if not _MASK.search(template):
        return []
    style = style_of(tokenizer)
    rendered: Any = render_jinja_template(
        [turns_for(turns, style)],
        tools=list(tools) or None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=True,
        **{**tokenizer.special_tokens_map, **style.options},
    )
    written, spans = rendered
    return [(int(a), int(b)) for a, b in spans[0] if b > a] if text == written[0] + style.begin else []


def _span(turns: Sequence[Message], i: int, text: str, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any]) -> Span:
    """Of one turn, by prefix or by a known word in its place."""
    style = style_of(tokenizer)
    options = style.options | ({"tools": list(tools)} if tools else {})
    start = chat_text(turns[:i], tokenizer, tools) if i else "\0"
    whole = without_line_end(render(turns_for(turns[: i + 1], style), tokenizer, **options), tokenizer)
    if text.startswith(start) and text.startswith(whole) and len(whole) > len(start):
        return len(start), len(whole)
    known = [*turns[:i], {"role": "assistant", "content": _WORD}, *turns[i + 1 :]]
    first, word, rest = chat_text(known, tokenizer, tools).partition(_WORD)
    if word and text.startswith(first) and text.endswith(rest) and len(first) + len(rest) < len(text):
        begins = len(first) - (len(style.opening) if style.opening and first.endswith(style.opening) else 0)
        if text.startswith(start) and len(start) <= len(first):
            begins = len(start)
        return begins, len(text) - len(rest) + _end_of_turn(rest, style.end, tokenizer)
    raise DataError(
        f"the tokenizer's chat template writes the answer of turn {i} in another way once other turns follow, and it cannot "
        "be found there: use --train_on last, or a row for each answer"
    )


def _end_of_turn(rest: str, end: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Characters of what ends a turn: as a last turn ends, or the special token that stands there instead."""
    if end and rest.startswith(end):
        return len(end)
    ends = [token for token in map(str, tokenizer.all_special_tokens) if rest.startswith(token)]
    ends += [str(token) for token in tokenizer.get_added_vocab() if rest.startswith(token)]
    return max(map(len, ends), default=0)
