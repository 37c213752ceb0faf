"""One reading of what a model can read: plain, renamed and composite configurations, and everything that asks for it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import SIZES, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    PreTrainedConfig,
)

from warp_ds.data.collate import pad_token
from warp_ds.evaluation.generate import generate_after
from warp_ds.models.context import context_length, embedding_rows

CONFIGS = {
    "plain": (LlamaConfig(**SIZES), 64, 131),
    "by another name": (GPT2Config(n_positions=48, vocab_size=99), 48, 99),
    "without a limit": (BloomConfig(vocab_size=99), None, 99),
    "composite": (Gemma3Config(text_config={**SIZES, "head_dim": 10}), 64, 131),
    "composite of another family": (
        LlavaConfig(text_config=MistralConfig(**{**SIZES, "max_position_embeddings": 32})),
        32,
        131,
    ),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_of_the_text_decoder(case: str) -> None:
    config, context, rows = CONFIGS[case]
    assert (context_length(config), embedding_rows(config)) == (context, rows)
    # A context that the whole configuration states for itself is not the decoder's.
    if isinstance(config, (Gemma3Config, LlavaConfig)):
        assert getattr(config, "max_position_embeddings", None) is None


def test_without_a_configuration_of_parts() -> None:
    class Bare:
        max_position_embeddings = 7

    assert context_length(Bare()) == 7 and context_length(object()) is None
    assert context_length(PreTrainedConfig()) is None


def test_a_multimodal_model_is_asked_no_more_than_it_can_read() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**SIZES, "head_dim": 10},
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=1,
        image_token_index=90,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match="61 tokens: with 4 new ones it exceeds the model's context of 64"):
        generate_after(model, tiny_tokenizer(), [[5] * 61], max_new_tokens=4)


def test_padding_is_the_tokenizers_own_or_its_end_of_text() -> None:
    tokenizer = tiny_tokenizer()
    assert pad_token(tokenizer) == 0
    tokenizer.pad_token = None
    assert pad_token(tokenizer) == tokenizer.eos_token_id == 2
