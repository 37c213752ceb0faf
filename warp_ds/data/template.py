"""The text that a model's own chat template writes around a prompt and its answer.

Of the template itself nothing is guessed: a tokenizer's is rendered as it is, but for today's date, which is fixed. How it
opens and ends an answer is found once a tokenizer, by rendering it with two known words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from warp_ds.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from warp_ds.data.sample import Message

CUT = "\ufdd0"
"""A noncharacter: where text that somebody typed must not be read as a control token, its tokens are cut here."""
DEFAULT_DATE = "2024-07-26"
"""Written where a template writes today's date: the one that Llama 3's own falls back to."""
THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("◁think▷", "◁/think▷"),
)
"""How models open and close what they think before they answer."""
_WORDS = r"think|thought|reason|analysis|scratchpad|reflect|rationale|monologue|deliberat|\bcot|思考"
_OTHER_THOUGHT = re.compile(
    rf"([<‹][^<>‹›/]*(?:{_WORDS})[^<>‹›]*[>›]|\[[^\[\]\s/]*(?:{_WORDS})[^\[\]]*\]"
    r"|<\|channel\|?>\s*(?:analysis|thought|commentary)|<unused\d+>\s*thought)"
    r"[^<\[]*(?:<\|message\|>)?\s*$",
    re.IGNORECASE,
)
_USER, _REPLY = "somebodyasks", "somebodyanswers"
_fixed = {"date": DEFAULT_DATE}


def is_date(date: str) -> bool:
    """Whether `date` is a day as YYYY-MM-DD."""
    try:
        return datetime.strptime(date, "%Y-%m-%d").strftime("%Y-%m-%d") == date
    except ValueError:
        return False


def fix_date(date: str) -> None:
    """Makes `date` (YYYY-MM-DD) the day that templates of this process write."""
    if not is_date(date):
        raise ValueError(f"{date!r} is no day as YYYY-MM-DD")
    _fixed["date"] = date


def fixed_date() -> str:
    """The day that templates of this process write."""
    return _fixed["date"]


def writes_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template writes today's date."""
    return bool(tokenizer.chat_template) and "strftime_now" in _template(tokenizer)


@dataclass(frozen=True)
class Style:
    """How one chat template writes an answer."""

    options: dict[str, Any] = field(default_factory=dict)
    """Variables of the template that turn its thinking off, where its generation prompt would open a thought."""
    parts: bool = False
    """A turn's content is a list of parts rather than a text."""
    begin: str = ""
    """What follows the template's generation prompt before the answer: the end of an opened thought, or the opening of a
    turn where the template knows no generation prompt."""
    opening: str = ""
    """What the template writes between that and a finished answer, such as an empty thought."""
    end: str = ""
    """What the template writes after an answer."""
    thinks: bool = False
    """What stands before the answer holds a thought, opened and closed."""


def render(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, **options: Any) -> str:
    """The chat template's text, on the fixed date. Raises `DataError` where the template fails."""
    try:
        return str(
            tokenizer.apply_chat_template(list(turns), chat_template=dated_template(tokenizer), tokenize=False, **options)
        )
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001  (a template is somebody's program)
        roles = ", ".join(str(turn["role"]) for turn in turns)
        raise DataError(
            f"the tokenizer's chat template cannot write the turns {roles}: {type(error).__name__}: {error}; "
            "repair its chat_template"
        ) from error


def chat_text(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] = ()) -> str:
    """Turns up to where the next answer begins, any thought closed."""
    style = style_of(tokenizer)
    options = style.options | ({"tools": list(tools)} if tools else {})
    return render(_turns(turns, style.parts), tokenizer, add_generation_prompt=True, **options) + style.begin


def before_answer(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] = ()) -> str:
    """Turns (of `cut_turn`), up to where the next answer begins. Raises `DataError` where the template leaves one out."""
    text = chat_text(turns, tokenizer, tools)
    for number, turn in enumerate(turns):
        for part in _parts_of(turn):
            # Of earlier answers many templates leave out what was thought.
            said = part if turn["role"] != "assistant" else _after_thought(part)
            if said.strip() not in text and said.strip() not in _unquoted(text):
                what = "prompt" if len(turns) == 1 else f"{turn['role']}'s turn {number}"
                raise DataError(
                    f"the tokenizer's chat template does not write the {what} as it is ({said.replace(CUT, '')[:60]!r}): "
                    "repair its chat_template"
                )
        if not _writes_calls(turns, number, tokenizer, tools):
            raise DataError(
                f"the tokenizer's chat template does not write every tool call of turn {number}: take one that does, or leave "
                "such rows out"
            )
    if tools and any(name not in chat_text(turns, tokenizer, _renamed(tools)) for name in _names(_renamed(tools))):
        raise DataError(
            "the tokenizer's chat template does not write definitions of tools: take one that does, or leave them out"
        )
    return text


def _renamed(functions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools or calls under names that stand nowhere else, to see whether a template writes them."""
    return [{**one, "function": {**one["function"], "name": f"somebodystool{i}"}} for i, one in enumerate(functions)]


def _names(functions: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(one["function"]["name"]) for one in functions]


def _writes_calls(
    turns: Sequence[Message], number: int, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]]
) -> bool:
    """Whether the template writes every call of a turn: their own names may stand in a prompt, or be a letter."""
    calls = _renamed(turns[number].get("tool_calls") or ())
    if not calls:
        return True
    known = [*turns[:number], {**turns[number], "tool_calls": calls}, *turns[number + 1 :]]
    style = style_of(tokenizer)
    options = style.options | ({"tools": list(tools)} if tools else {})
    text = render(_turns(known, style.parts), tokenizer, **options)
    return all(name in text for name in _names(calls))


def answer(
    turns: Sequence[Message], reply: Message, before: str, tokenizer: PreTrainedTokenizerBase, tools: Sequence[Any] = ()
) -> str:
    """What follows `before` (of `before_answer`): the reply as the template writes it, and the end of the turn."""
    style = style_of(tokenizer)
    content = str(reply["content"])
    reasons = any(reply.get(key) for key in REASONING)
    thinks = _has_thought(content) or reasons
    if thinks and style.thinks:
        raise DataError(
            f"the response holds a thought of its own ({content[:60]!r}), but the model's prompt opens a thought, "
            "which is closed before what is trained: give the answers alone"
        )
    options = style.options | ({"tools": list(tools)} if tools else {})
    whole = render(_turns([*turns, reply], style.parts), tokenizer, **options)
    twice = thinks and not reasons and _has_thought(style.opening)
    tail = whole[len(before) :]
    calls = bool(reply.get("tool_calls"))
    whole_reply = all(part.strip() in tail for part in _parts_of(reply, thoughts=True))
    whole_reply = whole_reply and (not calls or _writes_calls([*turns, reply], len(turns), tokenizer, tools))
    if whole.startswith(before) and whole_reply and not twice:
        return without_line_end(tail, tokenizer)
    if reasons or calls:
        raise DataError(
            "the tokenizer's chat template does not write the thought or the tool calls of an answer after its generation "
            "prompt: take one that does, or leave them out"
        )
    # A template that opens a finished answer in another way than its generation prompt, or leaves a part of it out: what is
    # generated follows the generation prompt, so that is what is trained.
    return ("" if thinks else style.opening) + content.strip() + style.end


REASONING = ("reasoning_content", "thinking")
"""What a turn calls the thought before its answer, as templates know it."""


def cut_turn(turn: Message, tokenizer: PreTrainedTokenizerBase) -> Message:
    """A turn with `cut_control` over every text in it."""
    reply = turn["role"] == "assistant"

    def cut(value: Any) -> Any:
        if isinstance(value, str):
            return cut_control(value, tokenizer, response=reply)
        if isinstance(value, Mapping):
            return {cut(key): cut(item) for key, item in value.items()}
        return [cut(item) for item in value] if isinstance(value, list) else value

    return {key: value if key == "role" else cut(value) for key, value in turn.items()}


def _parts_of(turn: Message, thoughts: bool = False) -> list[str]:
    """The texts that a rendering of the turn must hold."""
    names = [str(call["function"]["name"]) for call in turn.get("tool_calls") or ()]
    return [str(turn["content"]), *names, *(str(turn[key]) for key in REASONING if thoughts and turn.get(key))]


def _after_thought(text: str) -> str:
    return max((text.rpartition(closes)[2] for _, closes in THOUGHTS if closes in text), key=len, default=text)


def _unquoted(text: str) -> str:
    """A rendering in which tool results stand as JSON texts."""
    return text.replace('\\"', '"').replace("\\n", "\n").replace("\\\\", "\\")


def without_line_end(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of an answer up to its last token: no line ends, and no spaces after an end-of-text token."""
    text = text.rstrip("\n")
    end = tokenizer.eos_token
    return text.rstrip() if end and text.rstrip().endswith(str(end)) else text


def turns_for(turns: Sequence[Message], style: Style) -> list[dict[str, Any]]:
    """The turns with their contents as the template takes them: a text, or a list of parts."""
    return _turns(turns, style.parts)


def _turns(turns: Sequence[Message], parts: bool) -> list[dict[str, Any]]:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} if parts else dict(turn) for turn in turns]


# ---------------------------------------------------------------- how a template writes an answer

_styles: WeakKeyDictionary[Any, tuple[str, Style]] = WeakKeyDictionary()


def style_of(tokenizer: PreTrainedTokenizerBase) -> Style:
    """Found once a tokenizer and template. Raises `DataError` for a thought that cannot be closed."""
    template = _template(tokenizer)
    known = _styles.get(tokenizer)
    if known is None or known[0] != template:
        _styles[tokenizer] = known = (template, _find_style(tokenizer, template))
    return known[1]


def _find_style(tokenizer: PreTrainedTokenizerBase, template: str) -> Style:
    user = [{"role": "user", "content": _USER}]
    parts = _USER not in render(user, tokenizer, add_generation_prompt=True)
    user = _turns(user, parts)
    options: dict[str, Any] = {}
    if _open_thought(_after_prompt(user, tokenizer, options)):
        # The template's own way to answer without a thought, where it has one.
        off = {name: False for name in ("enable_thinking", "thinking") if re.search(rf"\b{name}\b", template)}
        options = off if off and not _open_thought(_after_prompt(user, tokenizer, off)) else {}
    after = _after_prompt(user, tokenizer, options)
    thought = _open_thought(after)
    begin = _closing(*thought, after) if thought else ""
    before = render(user, tokenizer, add_generation_prompt=True, **options)
    whole = render(user + _turns([{"role": "assistant", "content": _REPLY}], parts), tokenizer, **options)
    if _REPLY not in whole:
        raise DataError("the tokenizer's chat template does not write the text of an assistant's turn: repair it")
    start, _, end = whole.rpartition(_REPLY)
    opening = start[len(before) :] if start.startswith(before) else ""
    if not begin and opening.strip() and before == render(user, tokenizer, add_generation_prompt=False, **options):
        # No generation prompt: what opens the answer belongs to the prompt all the same. A last space goes to the answer's
        # first word, as tokenizers have it.
        begin, opening = opening.rstrip(" "), opening[len(opening.rstrip(" ")) :]
    return Style(options, parts, begin, opening, without_line_end(end, tokenizer), _has_thought(after + begin))


def _has_thought(text: str) -> bool:
    return any(tag in text for pair in THOUGHTS for tag in pair)


def _after_prompt(user: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> str:
    """What stands between a prompt and its answer."""
    text = render(user, tokenizer, add_generation_prompt=True, **options)
    if _USER not in text:
        raise DataError("the tokenizer's chat template does not write the text of a user's turn: repair its chat_template")
    return text.rpartition(_USER)[2]


def _open_thought(text: str) -> tuple[str, str] | None:
    """The tags of a thought that `text` opens and does not close; the second one is '' where it is not known."""
    for opens, closes in THOUGHTS:
        at = text.rfind(opens)
        if at >= 0 and closes not in text[at:]:
            return opens, closes
    other = _OTHER_THOUGHT.search(text)
    return (other.group(1), "") if other and other.group(1) not in [tag for pair in THOUGHTS for tag in pair] else None


def _closing(opens: str, closes: str, text: str) -> str:
    """What ends the thought that `text` opens at its end. Raises `DataError` where that is not known."""
    rest = text.rpartition(opens)[2]
    if not closes or rest.strip():
        raise DataError(
            f"the model's chat template begins its answers within a thought ({text[-60:]!r}), and how to close it "
            "is not known here: use a chat_template whose generation prompt opens none"
        )
    return f"{'' if rest else chr(10)}\n{closes}\n\n"


# ---------------------------------------------------------------- control tokens that somebody typed

_controls: WeakKeyDictionary[Any, tuple[tuple[str, str], tuple[re.Pattern[str], re.Pattern[str]]]] = WeakKeyDictionary()


def cut_control(text: str, tokenizer: PreTrainedTokenizerBase, response: bool = False) -> str:
    """`text` with a CUT after the first character of every control token that it spells.

    Control tokens are the tokenizer's special tokens, and in a prompt every added token that the chat template writes. In
    a response the tags of thoughts stay tokens: a model's own thoughts are written with them.
    """
    if CUT in text:
        raise DataError(f"a text holds U+FDD0, which is no character ({text[:60]!r}): remove it")
    template = _template(tokenizer) if tokenizer.chat_template else ""
    key = (template, str(tokenizer.special_tokens_map))
    known = _controls.get(tokenizer)
    if known is None or known[0] != key:
        _controls[tokenizer] = known = (key, _control_patterns(tokenizer, template))
    return known[1][response].sub(lambda token: token.group() + CUT, text)


def _control_patterns(tokenizer: PreTrainedTokenizerBase, template: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Of prompts and of responses: patterns of the first character of each control token."""
    special, written = set(map(str, tokenizer.all_special_tokens)), set[str]()
    for token in tokenizer.added_tokens_decoder.values():
        (special if token.special else written).add(token.content)
    written = {name for name in written if name in template and not name.isspace()}
    thoughts = {tag for pair in THOUGHTS for tag in pair}
    return _first_characters(special | written), _first_characters(special - thoughts)


def _first_characters(names: set[str]) -> re.Pattern[str]:
    begins: dict[str, list[str]] = {}
    for name in sorted(names):
        if len(name) > 1:
            begins.setdefault(name[0], []).append(re.escape(name[1:]))
    groups = [f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in begins.items()]
    return re.compile("|".join(groups) or "(?!)")


# ---------------------------------------------------------------- the date


def dated_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, on the fixed date."""
    return _on(_template(tokenizer), _fixed["date"])


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise DataError(f"the tokenizer has several chat templates and none is called 'default': {error}") from error


@lru_cache(maxsize=64)
def _on(template: str, date: str) -> str:
    """`template` with its `strftime_now` on `date`, at midnight: a macro of that name goes before the library's function."""
    if "strftime_now" not in template:
        return template
    day = datetime.strptime(date, "%Y-%m-%d")
    known = [f"%{dash}{letter}" for dash in ("-", "") for letter in "aAbBcdDeFgGhHIjklmMpPrRSTuUVwWxXyY"]
    replaced = "".join(f" | replace({code!r}, {day.strftime(code)!r})" for code in known)
    # The line break goes with the block before it (trim_blocks), so that the template begins a line as ever.
    return "{%- macro strftime_now(format) -%}{{ format" + replaced + " }}{%- endmacro %}\n" + template
