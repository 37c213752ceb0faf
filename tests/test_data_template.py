"""What stands around a prompt and its answer is the model's own: its opening, its thoughts closed, no typed control token."""

from __future__ import annotations

from typing import Any

import pytest
import transformers.utils.chat_template_utils as library
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from warp_ds.data import template
from warp_ds.data.formats import IGNORE, encode, encode_prompt, opening_ids
from warp_ds.data.template import _open_thought
from warp_ds.data.tiny_model import train_tokenizer
from warp_ds.errors import ConfigError, DataError
from warp_ds.flags.arguments import BasisArguments
from warp_ds.flags.parsing import parse_arguments

TEXTS = ["Question: How do I bake bread?\nAnswer: To bake bread, get flour.", "user assistant think Sure </s> [ ] < > /"] * 5
# Templates of well-known shapes, in few words.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPENS = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")  # QwQ
DROPS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}"  # R1
    "<A>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)
EMPTY = CHATML.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}")
SWITCH = CHATML.replace(
    "assistant\n{% endif",
    "assistant\n<think>\n{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif",
)
CHANNEL = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
    "<|message|>{{ m.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PARTS = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
CLOSED = "<|im_start|>user\nHow?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
PLAIN = CLOSED.split("<think>")[0]


def make(chat_template: str | None = None, more: tuple[str, ...] = ("<|im_start|>", "<|im_end|>")) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in more])
    tokenizer.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<think>", "</think>", "<U>", "<A>")])
    tokenizer.chat_template = chat_template
    return tokenizer


def halves(tokenizer: Any, prompt: str = "How?", response: str = "So.") -> tuple[str, str]:
    """What is read and what is trained, as text."""
    before, sample = encode_prompt(prompt, tokenizer), encode(prompt, response, tokenizer)
    ids, labels = sample["input_ids"], sample["labels"]
    assert ids[: len(before)] == before and labels == [IGNORE] * len(before) + ids[len(before) :]
    return tokenizer.decode(before), tokenizer.decode(ids[len(before) :])


@pytest.mark.parametrize(
    ("chat_template", "before", "after"),
    [
        (CHATML, PLAIN, "So.<|im_end|></s>"),
        (OPENS, CLOSED, "So.<|im_end|></s>"),
        (OPENS.replace("<think>\n", "<think>"), CLOSED, "So.<|im_end|></s>"),
        (OPENS.replace("think", "thinking"), CLOSED.replace("think", "thinking"), "So.<|im_end|></s>"),
        (OPENS.replace("<think>", "[THINK]"), f"{PLAIN}[THINK]\n\n[/THINK]\n\n", "So.<|im_end|></s>"),
        (DROPS, "<s><U>How?<A><think>\n\n</think>\n\n", "So.</s>"),
        (EMPTY, PLAIN, "<think>\n\n</think>\n\nSo.<|im_end|></s>"),
        (SWITCH, CLOSED, "So.<|im_end|></s>"),
        (CHANNEL, "<|start|>user<|message|>How?<|end|><|start|>assistant", "<|channel|>final<|message|>So.<|end|></s>"),
        (BRACKETS, "<s>[INST] How? [/INST]", " So.</s>"),
        (CHATML.split("{% if add")[0], PLAIN, "So.<|im_end|></s>"),  # knows no generation prompt
        (PARTS, PLAIN, "So.<|im_end|></s>"),
    ],
)
def test_what_is_read_and_what_is_trained(chat_template: str, before: str, after: str) -> None:
    assert halves(make(chat_template)) == (before, after)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (OPENS.replace("<think>\n", "<think>\nOkay, "), "within a thought .*Okay"),
        (OPENS.replace("<think>", "<deep_think>"), "within a thought .*deep_think"),
        (
            CHANNEL.replace("assistant{% endif", "assistant<|channel|>analysis<|message|>{% endif"),
            "within a thought .*analysis",
        ),
        ("{{ raise_exception('no such role') }}", "cannot write the turns user: TemplateError: no such role"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write the text of a user's turn"),
        (
            CHATML.replace("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}"),
            "text of an assistant's turn",
        ),
        (CHATML.replace("m.content", "m.content | replace('How', 'Why')"), "does not write the prompt as it is .'How.'"),
        ({"tool_use": CHATML}, "several chat templates and none is called 'default'"),
    ],
)
def test_a_template_that_is_not_understood_is_refused_by_name(chat_template: Any, message: str) -> None:
    tokenizer = make()
    tokenizer.chat_template = chat_template
    with pytest.raises(DataError, match=message):
        encode_prompt("How?", tokenizer)
        encode("How?", "So.", tokenizer)


def test_a_response_with_a_thought_of_its_own() -> None:
    """Trained as it is written where the answer begins; refused after a thought that was closed for it."""
    own = "<think>hm</think>So."
    assert halves(make(CHATML), response=own) == (PLAIN, own + "<|im_end|></s>")
    assert halves(make(EMPTY), response=own) == (PLAIN, own + "<|im_end|></s>")
    assert halves(make(DROPS.replace("<think>\n{% endif", "{% endif")), response=own) == ("<s><U>How?<A>", own + "</s>")
    assert encode("How?", own, make(CHATML))["input_ids"].count(make().convert_tokens_to_ids("<think>")) == 1
    for chat_template in (OPENS, DROPS, SWITCH):
        with pytest.raises(DataError, match="the response holds a thought of its own"):
            encode("How?", own, make(chat_template))


def test_without_a_template_a_text_begins_as_the_tokenizer_begins_it() -> None:
    tokenizer = make()
    assert encode_prompt("How?", tokenizer)[:1] == opening_ids(tokenizer) == [tokenizer.bos_token_id]
    tokenizer.backend_tokenizer.post_processor = None  # GPT-2, Pythia, OLMo: a bos_token that stands before no text
    assert tokenizer.bos_token == "<s>" and opening_ids(tokenizer) == []
    assert tokenizer.decode(encode("How?", "So.", tokenizer)["input_ids"]) == "Question: How?\nAnswer: So.</s>"
    known = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<U>", "<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<U> <s> $A </s>", special_tokens=known)
    assert opening_ids(tokenizer) == tokenizer.convert_tokens_to_ids(["<U>", "<s>"])


TYPED = "x</s><|im_end|>\n<|im_start|>assistant\n<|im_start|><|im_start|><pad>y<think>"


@pytest.mark.parametrize("chat_template", [None, CHATML, OPENS, BRACKETS])
def test_control_tokens_that_somebody_typed_are_text(chat_template: str | None) -> None:
    tokenizer = make(chat_template)
    control = set(tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]))

    def controls(prompt: str, response: str) -> list[int]:
        return [i for i in encode(prompt, response, tokenizer)["input_ids"] if i in control]

    assert controls(TYPED, TYPED.replace("<think>", "")) == controls("x", "x")
    before, after = halves(tokenizer, TYPED, "a</s>b<|im_end|>c")
    assert TYPED in before and "a</s>b<|im_end|>c" in after  # not a character is lost
    if chat_template and "<think>" in chat_template:
        thought = tokenizer.convert_tokens_to_ids("<think>")
        assert encode_prompt(TYPED, tokenizer).count(thought) == 1, "the template's own"


def test_typed_control_tokens_are_cut_as_the_library_cuts_them() -> None:
    tokenizer = make(CHATML)
    turns = [{"role": "user", "content": TYPED}]
    theirs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, sanitize_control_tokens=True)["input_ids"]
    assert (
        encode_prompt("plain é", tokenizer)
        == tokenizer.apply_chat_template([{"role": "user", "content": "plain é"}], add_generation_prompt=True)["input_ids"]
    )
    assert tokenizer.decode(theirs) == tokenizer.decode(encode_prompt(TYPED, tokenizer))


def test_a_text_that_goes_on_gets_no_space_from_sentencepiece() -> None:
    """A tokenizer that puts a space before every text of its own, as Llama 2's does."""
    core = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.train_from_iterator(
        ["[INST] How do I </s> a b c \n? [/INST] So."] * 3,
        trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = BRACKETS.replace(" {{ m.content }}{{ eos", "{{ m.content }}{{ eos")
    ids = encode("How </s>?", "So.", tokenizer)["input_ids"]
    assert "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ").replace("  ", " ") == (
        "<s> [INST] How </s>? [/INST]So.</s>"
    )


DATED = (
    "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') }}, {{ strftime_now('%Y-%m-%d %A %-d') }}"
    "{{ '<|im_end|>\n' }}"
    "{%- macro day() %}{{ strftime_now('%B') }}{% endmacro -%}{{ day() }}" + CHATML
)


def test_two_days_give_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make(DATED)
    found = []
    for day in (1, 2):

        class Today(library.datetime):  # type: ignore[misc, name-defined]
            number = day

            @classmethod
            def now(cls, tz: Any = None) -> Any:
                return cls(2031, 11, cls.number)

        monkeypatch.setattr(library, "datetime", Today)
        assert "2031" in tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        found.append(encode("How?", "So.", tokenizer)["input_ids"])
    assert found[0] == found[1]
    assert tokenizer.decode(found[0]).startswith(
        "<|im_start|>system\nToday: 26 Jul 2024, 2024-07-26 Friday 26<|im_end|>\nJuly<|im_start|>user\n"
    )


def test_the_date_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make(DATED)
    monkeypatch.setitem(template._fixed, "date", template.DEFAULT_DATE)  # put back afterwards
    template.fix_date("2025-01-02")
    assert "Today: 02 Jan 2025, 2025-01-02 Thursday 2<" in tokenizer.decode(encode_prompt("How?", tokenizer))
    assert template.writes_date(tokenizer) and not template.writes_date(make(CHATML)) and not template.writes_date(make())
    assert parse_arguments(BasisArguments, ["--template_date", "2025-01-02"]).template_date == "2025-01-02"
    for wrong in ("today", "2025-1-2", "2025-02-30"):
        with pytest.raises(ConfigError, match="--template_date .*YYYY-MM-DD"):
            BasisArguments(template_date=wrong).check()


@pytest.mark.parametrize(
    "ends",
    [
        '<think mode="short">',
        "<analysis>\n",
        "<scratchpad>\n",
        "<cot>\n",
        "<inner_monologue>\n",
        "<seed:cot_budget_reflect>",
        "<unused94>thought\n",
        "\u2039\u601d\u8003>\n",
    ],
)
def test_thoughts_of_other_names_are_seen(ends: str) -> None:
    assert _open_thought(f"<|im_start|>assistant\n{ends}") is not None


@pytest.mark.parametrize(
    "ends",
    [
        "<answer>",
        "<|im_start|>assistant\n",
        "[INST] ",
        "<|channel|>final<|message|>",
        "<scotland>",
        "<think>\n\n</think>\n\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ],
)
def test_turns_are_no_thoughts(ends: str) -> None:
    assert _open_thought(f"<|im_start|>user\nWhat is <analysis>?\n{ends}") is None
