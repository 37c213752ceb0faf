"""At 70B, on paper: the partitions of Llama-3-70B's parameters cover every element exactly once."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from warp_ds.zero.partition import RowPartition

LLAMA_3_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    tie_word_embeddings=False,
)


@pytest.fixture(scope="module")
def parameters() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LLAMA_3_70B, dtype=torch.bfloat16)
    return {name: tuple(param.shape) for name, param in model.named_parameters()}


def test_it_is_the_70b(parameters: dict[str, tuple[int, ...]]) -> None:
    assert len(parameters) == 723
    assert sum(torch.Size(shape).numel() for shape in parameters.values()) == 70_553_706_496


@pytest.mark.parametrize("world_size", [8, 16, 24, 32, 48, 64, 96, 128, 200, 256, 384, 512])
def test_partitions_cover_every_element_once(parameters: dict[str, tuple[int, ...]], world_size: int) -> None:
    stored = {}
    # Parameters of one shape have one set of partitions.
    for shape in set(parameters.values()):
        rows, columns = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
        numel, end, kept = rows * columns, 0, 0
        for rank in range(world_size):
            flat = RowPartition(numel, 1, world_size, rank)
            by_rows = RowPartition(rows, columns, world_size, rank)
            # ds_tensor as DeepSpeed cuts it: numel padded to a multiple of the world size, equal pieces.
            piece = (numel + (-numel) % world_size) // world_size
            assert flat.length == by_rows.length == piece
            assert (flat.start, flat.stop) == (by_rows.start, by_rows.stop)
            assert flat.start == end == min(rank * piece, numel)
            end = flat.stop
            kept += flat.stop - flat.start
            # Whole rows and fragments of cut rows make up the piece.
            assert (
                len(by_rows.rows) * columns
                + sum(fragment.columns.stop - fragment.columns.start for fragment in by_rows.fragments)
                == by_rows.stop - by_rows.start
            )
        assert end == numel == kept
        stored[shape] = world_size * piece
    # Padding costs less than one element a rank and parameter.
    padding = sum(stored[shape] for shape in parameters.values()) - 70_553_706_496
    assert 0 <= padding < world_size * len(parameters)
