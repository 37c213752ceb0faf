"""Which tokens of a conversation are trained, on public models' own templates."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from warp_ds.data.formats import IGNORE, encode, encode_prompt, encode_sample
from warp_ds.data.inspect import shown
from warp_ds.data.lengths import encode_dataset
from warp_ds.data.sample import Sample
from warp_ds.data.tiny_model import train_tokenizer
from warp_ds.errors import DataError
from warp_ds.zero.batches import Samples

TEXTS = ["Question: How do I bake bread?\nAnswer: To bake bread, get flour. user assistant system"] * 5
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MASKED = CHATML.replace(
    "\n{{ m.content }}<|im_end|>\n",
    "\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}\n",
)
# Of Mistral's shape: roles alternate, no generation prompt, the end of text after each answer.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
TURNS = [
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "Second."},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a town",
            "parameters": {"type": "object", "properties": {"town": {"type": "string", "description": "its name"}}},
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Bonn"}}}
WITH_TOOLS = Sample(
    [
        {"role": "user", "content": "Rain?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "name": "weather", "content": "none"},
        {"role": "assistant", "content": "No."},
    ],
    TOOLS,
)


def make(template: str | None) -> Any:
    """A tokenizer with a template and its control tokens."""
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    names = sorted(set(re.findall(r"<\|[a-z_]+\|>|<(?:start|end)_of_turn>|</?think>|\[/?INST\]", template or "")))
    tokenizer.add_tokens([AddedToken(name, special="think" not in name, normalized=False) for name in names])
    tokenizer.chat_template = template
    return tokenizer


def published(name: str) -> Any:
    """A tokenizer with the template of a public model, as TRL's package has it; SmolLM2's own where it is there."""
    if name == "smollm2":
        home = os.environ.get("SMOLLM2", "")
        if not home:
            pytest.skip("SMOLLM2 names no model")
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(home)
    trl = pytest.importorskip("trl")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja"
    if not path.is_file():
        pytest.skip(f"this TRL has no {name}")
    return make(path.read_text())


def trained(sample: Sample, tokenizer: Any, train_on: str = "assistant") -> list[str]:
    """The runs of trained tokens as texts; what is generated after is what was trained after."""
    tokens, _ = encode_sample(sample, tokenizer, train_on)
    prompt = encode_prompt(sample, tokenizer)
    assert tokens["input_ids"][: len(prompt)] == prompt
    assert all(label in (IGNORE, i) for i, label in zip(tokens["input_ids"], tokens["labels"], strict=True))
    return re.findall("⟦(.*?)⟧", shown(tokens, tokenizer, 10_000), flags=re.DOTALL)


LLAMA = ["First.<|eot_id|>", "Second.<|eot_id|></s>"]
IM = ["First.<|im_end|>", "Second.<|im_end|></s>"]
GPT = ["<|channel|>final<|message|>First.<|end|>", "<|channel|>final<|message|>Second.<|return|></s>"]
PUBLISHED = {
    "llama3": LLAMA,
    "llama3_1": LLAMA,
    "llama3_2": LLAMA,
    "qwen2_5": IM,
    "qwen3": ["First.<|im_end|>", "<think>\n\n</think>\n\nSecond.<|im_end|></s>"],  # it writes history without thoughts
    "gemma3": ["First.<end_of_turn>", "Second.<end_of_turn></s>"],
    "phi3": ["First.<|end|>", "Second.<|end|>\n</s>"],
    "phi3_5": ["First.<|end|>", "Second.<|end|>\n</s>"],
    "gptoss": GPT,
    "smollm2": ["First.<|im_end|>", "Second.<|im_end|>"],
    # With {% generation %} blocks: earlier turns are what those say, a generation prompt or a line's end among it or not.
    "llama3_training": LLAMA,
    "qwen2_5_training": ["\nFirst.<|im_end|>\n", "Second.<|im_end|></s>"],
    "qwen3_training": ["<think>\n\n</think>\n\nFirst.<|im_end|>\n", "<think>\n\n</think>\n\nSecond.<|im_end|></s>"],
    "gemma3_training": ["First.<end_of_turn>\n", "Second.<end_of_turn></s>"],
    "phi3_training": ["First.<|end|>\n", "Second.<|end|>\n</s>"],
    "gptoss_training": ["<|start|>assistant" + GPT[0], GPT[1]],
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_answer_is_trained_on_public_templates(name: str) -> None:
    tokenizer = published(name)
    assert trained(Sample(TURNS), tokenizer) == PUBLISHED[name]
    assert trained(Sample(TURNS), tokenizer, "last") == PUBLISHED[name][1:]
    system = Sample([{"role": "system", "content": "Be kind."}, *TURNS])
    assert trained(system, tokenizer) == PUBLISHED[name]
    assert "Be kind." in tokenizer.decode(encode_prompt(system, tokenizer))


@pytest.mark.parametrize("name", ["llama3_1", "llama3_2", "qwen2_5", "qwen3", "qwen3_training", "gptoss"])
def test_tool_calls_are_trained_and_their_results_are_not(name: str) -> None:
    first, last = trained(WITH_TOOLS, published(name))
    assert "weather" in first and '{"town": "Bonn"}' in first and "none" not in first + last and "No." in last


def test_calls_and_tools_that_a_template_leaves_out_are_refused_where_their_names_stand_elsewhere() -> None:
    """As a prompt that describes its tools has them; and a name that is one letter stands in every text."""
    tokenizer = make(CHATML)
    said = [{"role": "system", "content": "Call weather for a town."}, *WITH_TOOLS.messages]
    for train_on in ("assistant", "last"):
        with pytest.raises(DataError, match="does not write every tool call of turn 2: take one that does"):
            encode_sample(Sample(said), tokenizer, train_on)
    for content in ("", "I ask weather."):
        with pytest.raises(DataError, match="does not write the thought or the tool calls of an answer"):
            encode_sample(Sample([*said[:2], {**said[2], "content": content}]), tokenizer)
    with pytest.raises(DataError, match="does not write definitions of tools"):
        encode_sample(Sample([said[0], said[1], said[4]], TOOLS), tokenizer)


@pytest.mark.parametrize("name", ["llama3", "phi3", "gemma3"])
def test_tools_that_a_template_leaves_out_are_refused(name: str) -> None:
    with pytest.raises(DataError, match="chat template (does not|cannot) write"):
        encode_sample(WITH_TOOLS, published(name))


@pytest.mark.parametrize(
    ("template", "runs"),
    [
        (CHATML, IM),
        (MASKED, IM),
        (BRACKETS, [" First.</s>", " Second.</s>"]),
        (None, [" First.", " Second.</s>"]),  # no template: an answer within has no end
    ],
)
def test_every_answer_is_trained(template: str | None, runs: list[str]) -> None:
    tokenizer = make(template)
    assert trained(Sample(TURNS), tokenizer) == runs
    assert trained(Sample(TURNS, untrained=frozenset({1})), tokenizer) == runs[1:]
    whole = trained(Sample(TURNS), tokenizer, "all")
    assert len(whole) == 1 and all(run in whole[0] for run in [*runs, "One?", "Two?"])
    marked = trained(Sample(TURNS, untrained=frozenset({1})), tokenizer, "all")
    assert len(marked) == 2 and whole[0] == runs[0].join(marked)  # all but what the data mark as not to be trained on
    # A question is never trained but with all tokens, and then a mark on it would be passed over.
    asked = Sample(TURNS, untrained=frozenset({2}))
    assert trained(asked, tokenizer) == runs
    with pytest.raises(DataError, match="turn 2, of the role user, is marked .* --train_on all trains all but answers"):
        encode_sample(asked, tokenizer, "all")


def test_a_template_that_writes_a_turn_anew_once_others_follow_is_refused() -> None:
    # The number of turns stands at the head, so that no rendering of fewer turns begins another.
    anew = "{{ messages | length }}" + CHATML.replace("{{ m.content }}", "{{ m.content }}{{ messages[0].content | length }}")
    other = anew.replace("{% for", "{{ messages[1].content if messages | length > 1 else '' }}{% for")
    tokenizer = make(other)
    with pytest.raises(DataError, match="answer of turn 1 in another way once other turns follow.*--train_on last"):
        encode_sample(Sample(TURNS), tokenizer)
    assert len(trained(Sample(TURNS), tokenizer, "last")) == 1


def test_one_prompt_and_its_response_are_as_they_were() -> None:
    for template in (None, CHATML, MASKED, BRACKETS):
        tokenizer = make(template)
        for train_on in ("assistant", "last"):
            assert encode_sample(Sample.pair("How?", "So."), tokenizer, train_on)[0] == encode("How?", "So.", tokenizer)


def test_a_token_across_the_beginning_of_an_earlier_answer_is_trained() -> None:
    """ " First" is one token there, though the generation prompt ends in a space."""
    tokenizer = make(CHATML.replace("\n{{ m.content }}", " {{ m.content }}").replace("assistant\n{%", "assistant {%"))
    tokenizer.add_tokens(" First")
    assert trained(Sample(TURNS), tokenizer) == [" First.<|im_end|>", "Second.<|im_end|></s>"]


def test_control_tokens_that_somebody_typed_are_text_in_every_turn() -> None:
    tokenizer = make(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    typed = [{**turn, "content": f"{turn['content']}<|im_end|>"} for turn in TURNS]
    count = encode_sample(Sample(TURNS), tokenizer)[0]["input_ids"].count(end)
    assert encode_sample(Sample(typed), tokenizer)[0]["input_ids"].count(end) == count


def test_a_bare_text_is_trained_whole_and_ends() -> None:
    tokenizer = make(CHATML)
    tokens, before = encode_sample(Sample(text="To bake bread"), tokenizer)
    assert tokenizer.decode(tokens["input_ids"]) == "<s>To bake bread</s>"
    assert tokens["labels"] == tokens["input_ids"] and before == 0
    with pytest.raises(DataError, match="a bare text has no prompt"):
        encode_prompt(Sample(text="x"), tokenizer)


def test_phases_1_and_2_count_several_turns() -> None:
    """Σ over all tokens, the trained ones, or what stands before the last answer; gradients of what is trained."""
    tokenizer = make(CHATML)
    samples = [Sample(TURNS), Sample.pair("One?", "First.")]
    encoded = encode_dataset(samples, tokenizer, 100)
    whole = [encode_sample(sample, tokenizer)[0] for sample in samples]
    every, answers = Samples(encoded, tokenizer, "cpu"), Samples(encoded, tokenizer, "cpu", "response")
    ends = [sum(label != IGNORE for label in tokens["labels"]) for tokens in whole]
    assert [answers.counts(i) for i in range(2)] == [every.responses(i) for i in range(2)] == ends
    assert ends[0] > len(whole[0]["input_ids"]) - len(encode_prompt(samples[0], tokenizer))  # the first answer, too
    assert [every.counts(i) for i in range(2)] == [len(tokens["input_ids"]) for tokens in whole]
    alone = encode_dataset(samples, tokenizer, 100, prompt_only=True)
    assert list(alone["input_ids"]) == [encode_prompt(sample, tokenizer) for sample in samples]
