"""Answers and losses do not depend on the number of ranks, the batch or the padding."""

import os
import socket
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from warp_ds.data.formats import encode, encode_prompt
from warp_ds.data.synthetic import demo_data
from warp_ds.data.tiny_model import tiny_llama, train_tokenizer
from warp_ds.evaluation.generate import (
    KEPT,
    OURS,
    RESET,
    answer_surprise,
    changes_tokens,
    generate_greedy,
    loss_per_token,
    noise_threshold,
    token_losses,
)
from warp_ds.evaluation.verdicts import verdict

PAIRS = demo_data(1, n_fit=40, n_heldout=7, n_sums=1, n_utility=1)["refusals_fit"][:7]
PROMPTS = [pair["prompt"] for pair in PAIRS]


def build():
    """A small model with weights large enough for answers to differ from prompt to prompt."""
    tokenizer = train_tokenizer([text for pair in PAIRS for text in pair.values()], vocab_size=400)
    model = tiny_llama(tokenizer, hidden_size=32, intermediate_size=64, layers=2, heads=4, kv_heads=2)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(8)
    return model.eval(), tokenizer


def zero3(model):
    """The model in real ZeRO-3 shards, as an engine without optimizer."""
    import deepspeed

    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    return deepspeed.initialize(model=model, config=config)[0]


def everything(batch_size, shard=False):
    model, tokenizer = build()
    if shard:
        model = zero3(model)
    encoded = [encode(**pair, tokenizer=tokenizer) for pair in PAIRS]
    answers = generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=batch_size, synced=shard)
    loss = loss_per_token(model, encoded, pad_token_id=tokenizer.pad_token_id, batch_size=batch_size)
    surprise = answer_surprise(model, tokenizer, PROMPTS, answers, batch_size=batch_size)
    return answers, loss, surprise


def _rank(rank, world, port, batch_size, shard, queue):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    queue.put((rank, everything(batch_size, shard)))
    dist.barrier()
    dist.destroy_process_group()


def on_ranks(world, batch_size, shard=False):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(r, world, port, batch_size, shard, queue)) for r in range(world)]
    for process in processes:
        process.start()
    try:
        results = dict(queue.get(timeout=300) for _ in range(world))
    finally:
        for process in processes:
            process.join(timeout=60)
            if process.is_alive():
                process.kill()
    return [results[r] for r in range(world)]


@pytest.fixture(scope="module")
def alone():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks: sums split over threads round differently
    yield everything(2)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_gets_what_one_process_gets(alone, world):
    """7 prompts in batches of 2: 4 batches, so a rank of 3 runs dummies, and the last batch is short."""
    for answers, loss, surprise in on_ranks(world, 2):
        assert answers == alone[0]
        assert loss == alone[1]
        assert surprise == alone[2]


def test_zero3_shards_give_the_same_answers(alone):
    """Every forward of generation gathers parameters: a rank that ran fewer of them would leave the others waiting.
    7 prompts in batches of 3: 3 batches, so rank 1 runs a dummy of one token while rank 0 generates 12."""
    expected = everything(3)
    for answers, loss, surprise in on_ranks(2, 3, shard=True):
        assert answers == expected[0]
        # the same matrices, gathered to other memory: kernels may round differently
        assert loss == pytest.approx(expected[1], rel=1e-6)
        assert surprise == pytest.approx(expected[2], rel=1e-5)


def test_padding_does_not_change_answers_or_losses(alone):
    singly = everything(1)
    together = everything(7)
    assert singly[0] == alone[0] == together[0]
    assert len(set(singly[0])) > 3, "the model answers everything alike: this test would see nothing"
    # fp32, matrix products of different shapes round differently
    assert singly[1] == pytest.approx(together[1], rel=1e-5)
    assert singly[2] == pytest.approx(together[2], rel=1e-4)


def test_greedy_answers_are_the_argmax_of_plain_forwards(alone):
    model, tokenizer = build()
    for prompt, answer in zip(PROMPTS[:3], alone[0], strict=False):
        ids = encode_prompt(prompt, tokenizer)
        start = len(ids)
        with torch.no_grad():
            while len(ids) < start + 12 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


NOT_GREEDY = {
    "do_sample": True, "temperature": 0.01, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "min_new_tokens": 12,
    "suppress_tokens": list(range(5, 60)), "begin_suppress_tokens": list(range(60, 90)), "num_beams": 3,
    "sequence_bias": [[[70], 90.0]], "bad_words_ids": [[i] for i in range(90, 120)],
    "exponential_decay_length_penalty": (1, 9.0), "prompt_lookup_num_tokens": 3, "forced_eos_token_id": 7,
    "stop_strings": ["e"], "a_field_of_remote_code": 3,
}  # fmt: skip


def test_greedy_whatever_the_generation_config_says(alone):
    """Each alone, and all together, would give other answers; eos ids, also a second one, stay, and the model's own is back."""
    from transformers import GenerationConfig

    model, tokenizer = build()
    fields = [{name: value} for name, value in NOT_GREEDY.items()]
    for given in [*fields, {k: v for k, v in NOT_GREEDY.items() if k != "suppress_tokens"}]:
        own = GenerationConfig(eos_token_id=tokenizer.eos_token_id, **given)
        model.generation_config = own
        assert {text.split("=")[0] for text in changes_tokens(own)} == set(given)
        assert generate_greedy(model, tokenizer, PROMPTS[:2], max_new_tokens=12, batch_size=2) == alone[0][:2], given
        assert model.generation_config is own
    with torch.no_grad():
        first = int(model(torch.tensor([encode_prompt(PROMPTS[0], tokenizer)])).logits[0, -1].argmax())
    model.generation_config = GenerationConfig(eos_token_id=[tokenizer.eos_token_id, first])
    assert changes_tokens(model.generation_config) == []
    assert len(generate_greedy(model, tokenizer, PROMPTS[:1], max_new_tokens=12)[0]) < len(alone[0][0]), "its second eos id"


def test_every_field_of_a_generation_config_is_known():
    """A release that adds one fails here: put it into KEPT, OURS or RESET, by whether it changes the choice of tokens."""
    from transformers import GenerationConfig

    lists = (set(KEPT), set(OURS), set(RESET))
    installed = {name for name in vars(GenerationConfig()) if not name.startswith("_") or name in KEPT}
    assert installed - set().union(*lists) == set()
    assert sum(map(len, lists)) == len(set().union(*lists)), "a field stands in two lists"


def test_the_loss_is_one_mean_over_all_response_tokens():
    model, tokenizer = build()
    total, count = 0.0, 0
    encoded = [encode(**pair, tokenizer=tokenizer) for pair in PAIRS]
    for sample in encoded:
        labels = torch.tensor(sample["labels"])
        with torch.no_grad():
            logp = model(torch.tensor([sample["input_ids"]])).logits[0].log_softmax(-1)
        for t in range(1, len(labels)):
            if labels[t] >= 0:
                total -= float(logp[t - 1, labels[t]])
                count += 1
    options = {"pad_token_id": tokenizer.pad_token_id, "batch_size": 3}
    assert loss_per_token(model, encoded, **options) == pytest.approx(total / count, rel=1e-5)
    assert [len(losses) for losses in token_losses(model, encoded, **options)] == [
        sum(label >= 0 for label in sample["labels"]) for sample in encoded
    ]


def test_training_mode_is_left_as_it_was_and_dropout_is_off():
    model, tokenizer = build()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    run = partial(loss_per_token, pad_token_id=tokenizer.pad_token_id)
    encoded = [encode(**pair, tokenizer=tokenizer) for pair in PAIRS]
    assert run(model, encoded) == run(model, encoded)
    assert model.training


def test_prompts_that_do_not_fit_are_refused():
    model, tokenizer = build()
    with pytest.raises(ValueError, match="context of 512"):
        generate_greedy(model, tokenizer, PROMPTS, max_new_tokens=500)
    with pytest.raises(ValueError, match="batch size is 0"):
        generate_greedy(model, tokenizer, PROMPTS, batch_size=0)
    assert generate_greedy(model, tokenizer, []) == []


def test_random_words_are_noise_to_a_model_that_knows_the_language():
    """A model trained for a moment on refusals finds them likely, and random words, or a refusal with a tail of them,
    not: 0 % refusal and 100 % incoherent, which the text alone would not show for so few words."""
    tokenizer = train_tokenizer([text for pair in PAIRS for text in pair.values()], vocab_size=400)
    model = tiny_llama(tokenizer, hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2)
    encoded = [encode(**pair, tokenizer=tokenizer) for pair in PAIRS]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(60):
        for sample in encoded:
            ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
            model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    words = sorted({word for pair in PAIRS for word in pair["prompt"].split()})
    generator = torch.Generator().manual_seed(0)
    salad = [" ".join(words[i] for i in torch.randint(len(words), (6,), generator=generator)) for _ in PAIRS]
    mixed = [f"{pair['response']} {noise}" for pair, noise in zip(PAIRS, salad, strict=True)]
    surprise = partial(answer_surprise, model, tokenizer, PROMPTS)
    threshold = noise_threshold(model, tokenizer, PROMPTS, [pair["response"] for pair in PAIRS])

    def verdicts(answers):
        scored = zip(answers, surprise(answers), strict=True)
        return {verdict(text, nll_per_token=nll, nll_threshold=threshold) for text, nll in scored}

    assert verdicts([pair["response"] for pair in PAIRS]) == {"refusal"}
    assert verdicts(salad) == verdicts(mixed) == {"incoherent"}
    with pytest.raises(ValueError, match="cannot tell noise"):
        noise_threshold(build()[0], tokenizer, PROMPTS, ["a a"] * len(PROMPTS))
