"""Global batches: the same on any world size, nothing twice, nothing dropped, no rank left waiting."""

from itertools import product

import pytest
import torch
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader

from warp_ds.data.collate import EMPTY, GlobalBatchSampler, WithEmpty, empty_sample, pad_batch
from warp_ds.data.formats import IGNORE

WORLDS = (1, 2, 3, 4)
SHAPES = list(product((1, 7, 16, 23), (1, 4, 6, 8), (1, 2, 3), (False, True)))


def global_batches(sampler):
    """The samples of each optimizer step, put together from what every rank runs."""
    steps = []
    ranks = [list(sampler.rank_batches(r)) for r in range(sampler.world_size)]
    assert len({len(batches) for batches in ranks}) == 1, "ranks run different numbers of micro-batches"
    a = sampler.accumulation_steps
    for start in range(0, len(ranks[0]), a):
        step = [i for batches in ranks for batch in batches[start : start + a] for i in batch]
        steps.append(sorted(i for i in step if i != EMPTY))
    return steps


@pytest.mark.parametrize("n, size, micro, shuffle", SHAPES)
def test_every_world_size_sees_the_same_global_batches_once(n, size, micro, shuffle):
    seen = []
    for world in WORLDS:
        sampler = GlobalBatchSampler(n, size, micro, world, shuffle, seed=3)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert {len(batch) for batch in batches} == {micro}
        assert sampler.accumulation_steps == -(-size // (micro * world))
        steps = global_batches(sampler)
        assert len(steps) == sampler.steps
        assert sorted(i for step in steps for i in step) == list(range(n))
        assert all(len(step) == size for step in steps[:-1])
        seen.append(steps)
    assert all(steps == seen[0] for steps in seen)


def test_the_order_follows_seed_and_epoch():
    def order(seed, epoch):
        sampler = GlobalBatchSampler(40, 8, 4, 2, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert len({str(order(s, e)) for s in (1, 2) for e in (0, 1)}) == 4
    assert [i for batch in GlobalBatchSampler(6, 4, 2) for i in batch if i != EMPTY] == list(range(6))


@pytest.mark.parametrize("n, size, micro, shuffle", [(7, 4, 2, False), (23, 8, 3, True)])
@pytest.mark.parametrize("world", WORLDS)
def test_accelerate_deals_the_same_batches(n, size, micro, shuffle, world):
    """Real accelerate loaders, one per rank in this process; even_batches (its default) must find nothing to repeat."""
    for rank in range(world):
        sampler = GlobalBatchSampler(n, size, micro, world, shuffle)
        data = WithEmpty(list(range(n)), EMPTY, sampler)
        loader = DataLoader(data, batch_sampler=sampler, collate_fn=list)
        loader = prepare_data_loader(loader, num_processes=world, process_index=rank, put_on_device=False)
        for epoch in (0, 1, 2):
            loader.set_epoch(epoch)
            mine = list(loader)
            sampler.set_epoch(epoch)
            assert mine == list(sampler.rank_batches(rank))
            # A resumed job: a fresh sampler (epoch 0), and the loader skips into the epoch.
            sampler.set_epoch(0)
            resumed = skip_first_batches(loader, 1)
            resumed.set_epoch(epoch)
            assert list(resumed) == mine[1:]


def test_the_empty_sample_changes_neither_loss_nor_gradient():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = LlamaForCausalLM(config)
    sample = {"input_ids": [3, 4, 5, 6], "attention_mask": [1] * 4, "labels": [IGNORE, IGNORE, 5, 6]}

    def gradient(samples):
        model.zero_grad()
        loss = model(**pad_batch(samples, 0)).loss
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    alone, with_empty = gradient([sample]), gradient([sample, empty_sample(2)])
    # Batch composition may change the order of fp32 sums, nothing more.
    assert alone[0] == pytest.approx(with_empty[0], rel=1e-6)
    torch.testing.assert_close(alone[1], with_empty[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side):
    samples = [empty_sample(2), {"input_ids": [7, 8, 9], "attention_mask": [1, 1, 1], "labels": [IGNORE, 8, 9]}]
    batch = pad_batch(samples, 5, side)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        key: (torch.long, (2, 3)) for key in ("input_ids", "attention_mask", "labels")
    }
    first = {"right": ([2, 5, 5], [1, 0, 0]), "left": ([5, 5, 2], [0, 0, 1])}[side]
    assert batch["input_ids"].tolist() == [first[0], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [first[1], [1, 1, 1]]
    assert batch["labels"].tolist() == [[IGNORE] * 3, [IGNORE, 8, 9]]


def test_with_empty():
    data = WithEmpty(["a", "b"], "empty")
    assert (len(data), data[0], data[1], data[EMPTY]) == (2, "a", "b", "empty")
    for index in (2, -2):
        with pytest.raises(IndexError):
            data[index]


@pytest.mark.parametrize("numbers, name", [
    ((0, 1, 1, 1), "number of samples"), ((1, 0, 1, 1), "global batch size"),
    ((1, 1, 0, 1), "batch size"), ((1, 1, 1, 0), "world size"),
])  # fmt: skip
def test_numbers_below_one_are_refused(numbers, name):
    with pytest.raises(ValueError, match=f"the {name} is 0"):
        GlobalBatchSampler(*numbers)
    with pytest.raises(ValueError, match="at least one"):
        pad_batch([], 0)
