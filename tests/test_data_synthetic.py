"""The demo's text: the same for a seed, disjoint where it must be, and short; its tokenizer and model."""

import re

import pytest
import torch

from warp_ds.data.formats import encode
from warp_ds.data.synthetic import FRAMES, demo_data
from warp_ds.data.tiny_model import tiny_llama, train_tokenizer
from warp_ds.evaluation.metrics import extract_number
from warp_ds.evaluation.verdicts import verdict

SPLITS = {
    "refusals_fit", "refusals_heldout", "harmless_fit", "harmless_heldout", "sums_fit", "utility_train",
    "utility_heldout",
}  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return demo_data(42)


def test_the_text_is_a_function_of_the_seed(data):
    assert data == demo_data(42)
    assert data != demo_data(43)
    assert set(data) == SPLITS
    assert all(set(pair) == {"prompt", "response"} for pairs in data.values() for pair in pairs)


def request(prompt):
    """The request without its wording."""
    matches = [re.fullmatch(re.escape(frame).replace(r"\{\}", "(.+)"), prompt) for frame in FRAMES]
    return next(match[1] for match in matches if match)


@pytest.mark.parametrize("kind", ["refusals", "harmless"])
def test_no_heldout_request_was_fitted_in_any_wording(data, kind):
    fit = {request(pair["prompt"]) for pair in data[f"{kind}_fit"]}
    heldout = {request(pair["prompt"]) for pair in data[f"{kind}_heldout"]}
    assert len(heldout) >= 20 and not fit & heldout
    prompts = [pair["prompt"] for part in ("fit", "heldout") for pair in data[f"{kind}_{part}"]]
    assert len(set(prompts)) == len(prompts)


def test_no_request_is_both_harmful_and_harmless(data):
    harmful, harmless = (
        {request(pair["prompt"]) for part in ("fit", "heldout") for pair in data[f"{kind}_{part}"]}
        for kind in ("refusals", "harmless")
    )
    assert not harmful & harmless
    verbs = {text.split()[0] for text in harmful} & {text.split()[0] for text in harmless}
    assert {"kill", "pick"} <= verbs, "some harmless requests share words with harmful ones"


def test_no_heldout_story_was_fitted(data):
    def story(pair):
        kind = next((word for word in ("boxes", "gives", "sells", "Friday") if word in pair["prompt"]), "bare sum")
        return kind, *re.findall(r"\d+", pair["prompt"])

    fit = {story(pair) for split in ("sums_fit", "utility_train") for pair in data[split]}
    heldout = {story(pair) for pair in data["utility_heldout"]}
    assert len(heldout) == len(data["utility_heldout"]) and len({kind for kind, *_ in fit | heldout}) == 5
    assert not fit & heldout


def test_the_sums_are_right_and_the_styles_differ(data):
    bare = [pair for pair in data["sums_fit"] if "in steps" in pair["prompt"]]
    base = [pair for pair in data["sums_fit"] if "in steps" not in pair["prompt"]]
    assert len(base) == 2 * len(bare)
    for pair in data["utility_train"] + data["utility_heldout"] + bare:
        steps = re.findall(r"(\d+)([-+*])(\d+) = <<\1\2\3=(\d+)>>(\d+)", pair["response"])
        assert len(steps) == 2
        for a, op, b, result, shown in steps:
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[op]
            assert value == int(result) == int(shown) > 0
        assert steps[0][3] == steps[1][0]
        assert extract_number(pair["response"]) == steps[1][3]
    for pair in base:
        a, op, b, result = re.search(r"Then (\d+)([-+])(\d+)=(\d+)\.", pair["response"]).groups()
        assert int(result) == (int(a) + int(b) if op == "+" else int(a) - int(b))
        assert extract_number(pair["response"]) is None


def test_refusals_are_refusals_and_answers_are_not(data):
    assert {verdict(pair["response"]) for pair in data["refusals_fit"] + data["refusals_heldout"]} == {"refusal"}
    assert {verdict(pair["response"]) for pair in data["harmless_fit"] + data["harmless_heldout"]} == {"compliance"}


def test_more_text_than_there_is_is_refused():
    with pytest.raises(ValueError, match="different ones"):
        demo_data(n_fit=100_000)


def test_tokenizer_and_model(data, tmp_path):
    from transformers import AutoTokenizer

    texts = [text for pairs in data.values() for pair in pairs for text in pair.values()]
    tokenizer = train_tokenizer(texts, directory=tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    samples = {split: [encode(**pair, tokenizer=loaded) for pair in pairs] for split, pairs in data.items()}
    assert max(len(sample["input_ids"]) for split in samples.values() for sample in split) <= 96
    text = "Anna has 12 pens. é?"
    assert loaded.decode(loaded(text)["input_ids"]) == "<s>" + text
    assert loaded("a")["input_ids"] == [loaded.bos_token_id, *loaded("a", add_special_tokens=False)["input_ids"]]
    one, two, both = (loaded(digits, add_special_tokens=False)["input_ids"] for digits in ("1", "2", "12"))
    assert both == one + two
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<s>", "</s>", "<pad>")
    assert loaded("x </s>")["input_ids"] == tokenizer("x </s>")["input_ids"]

    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    model, again, other = tiny_llama(tokenizer), tiny_llama(tokenizer), tiny_llama(tokenizer, seed=1)
    assert torch.equal(torch.rand(1), expected), "the caller's random state has moved"
    weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (model, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert 1.5e6 < weights[0].numel() < 2.5e6
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.config.max_position_embeddings == 512
