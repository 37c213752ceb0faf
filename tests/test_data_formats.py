"""Token ids and labels: what is trained, where the prompt ends, and lengths."""

import pytest
from datasets import Dataset

from warp_ds.data.formats import IGNORE, encode, encode_prompt
from warp_ds.data.lengths import encode_dataset
from warp_ds.data.tiny_model import train_tokenizer
from warp_ds.errors import DataError

TEXTS = ["Question: How do I bake bread?\nAnswer: To bake bread, get flour.", "[user] hi [bot] I'm sorry </s>"] * 5
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
PAIRS = [
    ("How do I bake bread?", "To bake bread, get flour."),
    ("How", " I'm sorry. "),
    ("line\nbreak ", "#### 18"),
    ("ends in a space ", "é ü 12"),
    ("x", "Answer: nested"),
]


@pytest.fixture(params=["plain", "chat", "no bos"])
def tokenizer(request):
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    if request.param == "chat":
        tokenizer.chat_template = CHAT
    if request.param == "no bos":
        tokenizer.backend_tokenizer.post_processor = None  # a bos_token that the tokenizer puts before no text
    return tokenizer


@pytest.mark.parametrize("prompt, response", PAIRS)
def test_the_prompt_is_a_prefix_and_only_the_response_is_trained(tokenizer, prompt, response):
    before = encode_prompt(prompt, tokenizer)
    sample = encode(prompt, response, tokenizer)
    ids, labels = sample["input_ids"], sample["labels"]
    assert ids[: len(before)] == before
    assert labels[: len(before)] == [IGNORE] * len(before)
    assert labels[len(before) :] == ids[len(before) :]
    assert ids[-1] == tokenizer.eos_token_id == labels[-1]
    assert ids.count(tokenizer.eos_token_id) == 1
    assert sample["attention_mask"] == [1] * len(ids)
    assert tokenizer.decode(ids[len(before) : -1]).strip() == response.strip()
    assert sum(label != IGNORE for label in labels) == len(ids) - len(before)


def test_there_is_one_bos_where_the_tokenizer_puts_one(tokenizer):
    bos = tokenizer.convert_tokens_to_ids("<s>")
    ids = encode("How", "I'm sorry", tokenizer)["input_ids"]
    assert ids.count(bos) == tokenizer("How")["input_ids"].count(bos)


def test_the_whole_text_reads_as_documented():
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    ids = encode("How?", "So.", tokenizer)["input_ids"]
    assert tokenizer.decode(ids) == "<s>Question: How?\nAnswer: So.</s>"
    tokenizer.chat_template = CHAT
    ids = encode("How?", "So.", tokenizer)["input_ids"]
    assert tokenizer.decode(ids) == "<s>[user] How?[assistant] So.</s>"


def test_a_template_that_opens_replies_differently_trains_what_follows_the_generation_prompt():
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    tokenizer.chat_template = CHAT.replace("[assistant] {% endif %}", "[assistant] <think></think>{% endif %}")
    before = encode_prompt("How?", tokenizer)
    ids = encode("How?", "So.", tokenizer)["input_ids"]
    assert ids[: len(before)] == before
    assert tokenizer.decode(ids[len(before) :]) == "So.</s>"


def test_too_long_responses_are_cut_and_too_long_prompts_refused(tokenizer):
    prompt, response = PAIRS[0]
    whole = encode(prompt, response, tokenizer)["input_ids"]
    room = len(encode_prompt(prompt, tokenizer))
    cut = encode(prompt, response, tokenizer, room + 2)
    assert cut["input_ids"] == whole[: room + 2]
    assert sum(label != IGNORE for label in cut["labels"]) == 2
    with pytest.raises(DataError, match="leaves no room.*--max_length"):
        encode(prompt, response, tokenizer, room)
    assert encode_dataset([{"prompt": prompt}], tokenizer, room, prompt_only=True)[0]["input_ids"] == whole[:room]
    with pytest.raises(DataError, match="do not fit.*--max_length"):
        encode_dataset([{"prompt": prompt}], tokenizer, room - 1, prompt_only=True)


def test_a_data_set_is_encoded_in_order(tokenizer):
    pairs = Dataset.from_dict({"prompt": [p for p, _ in PAIRS], "response": [r for _, r in PAIRS]})
    encoded = encode_dataset(pairs, tokenizer, 64, 128)
    assert encoded.column_names == ["input_ids", "attention_mask", "labels"]
    assert [dict(row) for row in encoded] == [encode(p, r, tokenizer, 64) for p, r in PAIRS]
    alone = encode_dataset(pairs, tokenizer, 64, 128, prompt_only=True)
    assert alone["input_ids"][:] == [encode_prompt(p, tokenizer) for p, _ in PAIRS]
    assert all(set(row) == {IGNORE} for row in alone["labels"])


def test_all_rows_that_are_too_long_are_named_at_once_and_cut_responses_are_counted(tokenizer, caplog):
    """Rows 2 and 4 have long prompts; the responses of rows 1 and 3 are cut."""
    prompts = ["How"] * 2 + ["How do I bake bread?" * 9, "How", "How do I bake bread?" * 5]
    pairs = Dataset.from_dict({"prompt": prompts, "response": ["So.", "flour " * 40] * 2 + ["So."]})
    long = {row: len(encode_prompt(prompts[row], tokenizer)) for row in (2, 4)}
    with pytest.raises(DataError) as error:
        encode_dataset(pairs, tokenizer, 30)
    assert f"2 of 5 prompts (row 2: {long[2]} tokens, row 4: {long[4]} tokens) leave no room for a " in str(error.value)
    assert f"raise --max_length to {long[2] + 1} or more" in str(error.value)
    encode_dataset(pairs, tokenizer, long[2] + 1)  # and that is enough
    with pytest.raises(DataError, match=f"2 of 5 prompts .* do not fit in .*raise --max_length to {long[2]} or more"):
        encode_dataset(pairs, tokenizer, 30, prompt_only=True)
    encode_dataset(pairs, tokenizer, long[2], prompt_only=True)
    caplog.clear()
    short = encode_dataset(pairs.select([0, 1, 3]), tokenizer, 30)
    assert [row[-1] == tokenizer.eos_token_id for row in short["input_ids"]] == [True, False, False]
    assert "2 of 3 responses are cut at --max_length 30, and their end is not learned (rows 1, 2)" in caplog.text


@pytest.mark.parametrize("length, words", [(129, "context of 128.*--max_length 128"), (1, "too short")])
def test_a_length_that_the_model_cannot_read_is_refused(length, words):
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    with pytest.raises(DataError, match=words):
        encode_dataset(Dataset.from_dict({"prompt": ["p"], "response": ["r"]}), tokenizer, length, 128)


def test_a_tokenizer_without_end_of_text_is_refused():
    tokenizer = train_tokenizer(TEXTS, vocab_size=400)
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="eos_token"):
        encode("p", "r", tokenizer)
