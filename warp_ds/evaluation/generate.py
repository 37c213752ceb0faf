"""Greedy answers and response loss, spread over any number of ranks with the same result on each.

Batches are cut from the whole job's list, before anything is dealt out: batch i belongs to rank i % world_size. So the
composition of a batch, hence its padding and its rounding, does not depend on the world size. Ranks that run out of
batches run a dummy, so that the collectives inside a ZeRO-3 forward are entered equally often by all.
"""

from __future__ import annotations

import logging
import math
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from warp_ds.cluster.dealing import in_turn
from warp_ds.data.collate import empty_sample, pad_batch, pad_token
from warp_ds.data.formats import IGNORE, Tokens, encode, encode_prompt
from warp_ds.data.sample import Sample
from warp_ds.models.context import context_length

logger = logging.getLogger(__name__)

# Every field of transformers' GenerationConfig stands in one of three lists; a test fails when a release adds one.
KEPT = (
    "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id",  # the end of an answer is the model's own
    "use_cache", "max_cache_len", "prefill_chunk_size", "compile_config", "disable_compile", "low_memory",
    "continuous_batching_config",
    "transformers_version", "_from_model_config",
)  # fmt: skip
"""Fields of a model's generation_config.json that stay as they are: they do not change which token is the likeliest."""

OURS = (
    "max_length", "max_new_tokens", "do_sample", "num_beams", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
)  # fmt: skip
"""Fields that the evaluation decides: length, one greedy answer, bare token ids."""

RESET: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((
        "min_new_tokens", "max_time", "stop_strings", "use_mtp", "min_p", "top_h", "bad_words_ids", "renormalize_logits",
        "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
        "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "token_healing", "guidance_scale",
        "watermarking_config", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
        "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
        "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "penalty_alpha",
        "dola_layers", "constraints", "force_words_ids", "early_stopping",
        "cache_implementation", "cache_config",  # a quantised or cut cache gives other logits
    ), (None, False)),
    "min_length": (None, 0), "temperature": (None, 1.0), "top_k": (None, 0, 50), "top_p": (None, 1.0),
    "typical_p": (None, 1.0), "epsilon_cutoff": (None, 0.0), "eta_cutoff": (None, 0.0),
    "repetition_penalty": (None, 1.0), "encoder_repetition_penalty": (None, 1.0), "length_penalty": (None, 1.0),
    "no_repeat_ngram_size": (None, 0), "encoder_no_repeat_ngram_size": (None, 0), "diversity_penalty": (None, 0.0),
    "num_beam_groups": (None, 1),
}  # fmt: skip
"""Fields that change the choice of tokens, each with the values that change nothing (and are not worth a word)."""

Gather = Callable[[Any], list[Any]]
"""Takes this rank's object and returns every rank's, in rank order, on every rank."""


def _gather(value: Any) -> list[Any]:
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _world(rank: int | None, world_size: int | None) -> tuple[int, int]:
    together = dist.is_available() and dist.is_initialized()
    if rank is None:
        rank = dist.get_rank() if together else 0
    if world_size is None:
        world_size = dist.get_world_size() if together else 1
    return rank, world_size


def _deal(n: int, batch_size: int, rank: int, world_size: int) -> list[range]:
    """The index ranges of this rank's batches; equally many on every rank, the last perhaps empty (a dummy)."""
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}: it must be at least 1")
    batches = [range(i, min(i + batch_size, n)) for i in range(0, n, batch_size)]
    return in_turn(batches, world_size, rank, range(0))


def _unwrap(model: Any) -> Any:
    """The transformers model inside a DeepSpeed engine or DDP wrapper."""
    return getattr(model, "module", model)


def _device(inner: Any) -> torch.device:
    return torch.device(next(inner.parameters()).device)


@cache
def _say_reset(fields: tuple[str, ...]) -> None:
    logger.info("greedy: these settings of the model's generation_config.json are not used: %s", ", ".join(fields))


def changes_tokens(config: GenerationConfig) -> list[str]:
    """ "field=value" of everything in a model's generation_config that would make an answer other than greedy."""
    values = {name: value for name, value in vars(config).items() if name not in KEPT and not name.startswith("_")}
    other = {name: value for name, value in values.items() if name not in OURS and value not in RESET.get(name, (None,))}
    if values.get("do_sample"):
        other["do_sample"] = True
    if (values.get("num_beams") or 1) > 1:
        other["num_beams"] = values["num_beams"]
    return [f"{name}={other[name]!r:.60}" for name in sorted(other)]


@contextmanager
def greedy(inner: Any) -> Iterator[None]:
    """While it holds, ``inner.generate`` takes from its generation_config the fields of KEPT alone; said once."""
    own = inner.generation_config
    changed = changes_tokens(own)
    if changed and _world(None, None)[0] == 0:
        _say_reset(tuple(changed))
    # generate() fills what its caller leaves out, or gives as None, from the model's own: so that is what must be clean.
    inner.generation_config = GenerationConfig(
        **{name: value for name in KEPT if not name.startswith("_") and (value := getattr(own, name, None)) is not None}
    )
    try:
        yield
    finally:
        inner.generation_config = own


def generate_greedy(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | Sample], **options: Any
) -> list[str]:
    """Greedy answers to all prompts, each in the tokenizer's prompt format; options as for `generate_after`."""
    return generate_after(model, tokenizer, [encode_prompt(prompt, tokenizer) for prompt in prompts], **options)


@torch.no_grad()
def generate_after(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 8,
    rank: int | None = None,
    world_size: int | None = None,
    gather: Gather = _gather,
    synced: bool = False,
    done: Sequence[str] = (),
    save: Callable[[list[str]], None] | None = None,
    save_every: int = 8,
    desc: str = "generating",
) -> list[str]:
    """The greedy continuation of each list of token ids, in their order, on every rank; all ranks call it together.

    Greedy whatever the model's generation_config.json says: see `RESET`. `synced` is transformers' `synced_gpus`: True
    under ZeRO-3, where every rank must run as many forwards as the longest answer needs. `rank` and `world_size` default
    to torch.distributed's. Answers are decoded without special tokens and stripped. `save`, called on every rank after
    each `save_every` batches a rank, gets the answers since the last call; given back as `done`, they are not generated
    again, and the others come out as if nothing had happened.
    """
    rank, world_size = _world(rank, world_size)
    inner = _unwrap(model)
    _check_sizes(inner, encoded, max_new_tokens, batch_size)
    answers = list(done[: len(done) // batch_size * batch_size])  # whole batches: the others keep their padding
    if len(done) >= len(encoded):
        answers = list(done[: len(encoded)])
    bar_options: dict[str, Any] = {"unit": "prompt", "disable": rank != 0, "dynamic_ncols": True}
    with _evaluating(inner), greedy(inner), tqdm(total=len(encoded), initial=len(answers), desc=desc, **bar_options) as bar:
        while len(answers) < len(encoded):
            first = len(answers)
            part = encoded[first : first + save_every * batch_size * world_size]
            mine: list[tuple[int, str]] = []
            for indices in _deal(len(part), batch_size, rank, world_size):
                batch = [part[i] for i in indices]
                texts = _continue(inner, tokenizer, batch, max_new_tokens, synced and world_size > 1)
                mine += zip(indices, texts, strict=False)  # a dummy has no index
                bar.update(min(len(indices) * world_size, len(encoded) - bar.n))
            fresh = [text for _, text in sorted(pair for one in gather(mine) for pair in one)]
            if save is not None:
                save(fresh)
            answers += fresh
    return answers


def _check_sizes(inner: Any, encoded: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int) -> None:
    context = context_length(inner.config)
    longest = max(map(len, encoded), default=0)
    if context is not None and longest + max_new_tokens > context:
        raise ValueError(
            f"the longest prompt has {longest} tokens: with {max_new_tokens} new ones it exceeds the model's context "
            f"of {context}: lower the number of new tokens or leave the prompt out"
        )
    if batch_size < 1:
        raise ValueError(f"the batch size is {batch_size}: it must be at least 1")


@contextmanager
def _evaluating(inner: Any) -> Iterator[None]:
    """Dropout is off while it holds."""
    was_training = inner.training
    inner.eval()
    try:
        yield
    finally:
        inner.train(was_training)


def _continue(
    inner: Any, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], max_new_tokens: int, synced: bool
) -> list[str]:
    """The continuations of one batch; of a dummy, one token long, where it is empty: the other ranks run theirs."""
    pad, device = pad_token(tokenizer), _device(inner)
    samples: list[Any] = [{"input_ids": ids} for ids in prompts] or [empty_sample(pad)]
    batch = pad_batch(samples, pad, side="left")
    output = inner.generate(
        input_ids=batch["input_ids"].to(device),
        attention_mask=batch["attention_mask"].to(device),
        max_new_tokens=max_new_tokens if prompts else 1,
        do_sample=False,
        num_beams=1,
        pad_token_id=pad,
        synced_gpus=synced,
    )
    new = output[:, batch["input_ids"].shape[1] :].tolist()
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in new]


def token_losses(model: Any, encoded: Sequence[Tokens], **options: Any) -> list[list[float]]:
    """Cross-entropy in nats of every response token of every sample; see `token_scores`."""
    return [[loss for loss, _ in sample] for sample in token_scores(model, encoded, **options)]


@torch.no_grad()
def token_scores(
    model: Any,
    encoded: Sequence[Tokens],
    *,
    pad_token_id: int,
    batch_size: int = 8,
    rank: int | None = None,
    world_size: int | None = None,
    gather: Gather = _gather,
    desc: str = "loss",
) -> list[list[tuple[float, bool]]]:
    """(cross-entropy in nats, whether it is the likeliest token) of every response token of every sample.

    In order, on every rank; no sample twice.

    A token at position 0 has no prediction and is left out. All ranks call it together.
    """
    rank, world_size = _world(rank, world_size)
    inner = _unwrap(model)
    device = _device(inner)
    scored: list[tuple[int, list[tuple[float, bool]]]] = []
    with _evaluating(inner):
        mine = _deal(len(encoded), batch_size, rank, world_size)
        for indices in tqdm(mine, desc=desc, unit="batch", disable=rank != 0, dynamic_ncols=True):
            samples = [encoded[i] for i in indices] or [empty_sample(pad_token_id)]
            batch = {key: value.to(device) for key, value in pad_batch(samples, pad_token_id).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = inner(**batch, use_cache=False).logits[:, :-1]
            losses = F.cross_entropy(
                logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE, reduction="none"
            ).view_as(labels)
            greedy = logits.argmax(-1) == labels
            # zip drops the dummy: it has no index
            scored += [
                (i, list(zip(row[mask].tolist(), best[mask].tolist(), strict=True)))
                for i, row, best, mask in zip(indices, losses, greedy, labels != IGNORE, strict=False)
            ]
    return [scores for _, scores in sorted(pair for part in gather(scored) for pair in part)]


def loss_per_token(model: Any, encoded: Sequence[Tokens], **options: Any) -> float:
    """Nats per response token over all samples: one mean over tokens, not a mean of means; nan without such tokens.

    Options as for `token_scores`.
    """
    return mean_loss(token_losses(model, encoded, **options))


def mean_loss(losses: Sequence[Sequence[float]]) -> float:
    """One mean over all tokens of all samples; nan without any."""
    count = sum(map(len, losses))
    return math.fsum(loss for sample in losses for loss in sample) / count if count else math.nan


def answer_surprise(
    reference: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sample],
    answers: Sequence[str],
    *,
    window: int = 8,
    **options: Any,
) -> list[float]:
    """How unlikely each answer is under `reference` (the model before training), for `verdict(nll_per_token=...)`.

    Nats per token, given the prompt, of the answer's least likely stretch of `window` tokens (of all its tokens where
    it has fewer): a refusal that runs into noise is as surprising as noise alone. 0 for an empty answer. The end of
    the text is not counted, since generation may have been cut. Options as for `token_scores`.
    """
    context = context_length(_unwrap(reference).config)
    encoded: list[Tokens] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        sample = encode(prompt, answer, tokenizer, context)
        keep = len(sample["labels"]) - (sample["labels"][-1] == tokenizer.eos_token_id)
        encoded.append(Tokens(**{key: values[:keep] for key, values in sample.items()}))  # type: ignore
    options = {"pad_token_id": pad_token(tokenizer), "desc": "surprise", **options}
    return [_worst_stretch(losses, window) for losses in token_losses(reference, encoded, **options)]


def noise_threshold(
    reference: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sample],
    answers: Sequence[str],
    *,
    seed: int = 0,
    **options: Any,
) -> float:
    """The `nll_threshold` for `verdict`: what 95 % of scrambled answers exceed under `reference`.

    `answers` are fluent ones to `prompts` (the reference's own, say); their words are shuffled by `seed`. Raises
    `ValueError` where scrambled answers are no less likely than the fluent ones: such a reference tells nothing.
    Options as for `answer_surprise`.
    """
    if not answers:
        raise ValueError("a threshold needs at least one fluent answer")
    rng = random.Random(seed)
    scrambled = [" ".join(rng.sample(words, len(words))) for words in map(str.split, answers)]
    fluent = answer_surprise(reference, tokenizer, prompts, answers, **options)
    noise = sorted(answer_surprise(reference, tokenizer, prompts, scrambled, **options))
    threshold = noise[len(noise) // 20]
    if threshold <= statistics.median(fluent):
        raise ValueError(
            f"the reference finds scrambled answers (5 % quantile {threshold:.2f} nats a token) no less likely than "
            f"whole ones (median {statistics.median(fluent):.2f}): it cannot tell noise; use the model before training"
        )
    return threshold


def _worst_stretch(losses: Sequence[float], window: int) -> float:
    n = min(window, len(losses))
    return max((math.fsum(losses[i : i + n]) / n for i in range(len(losses) - n + 1)), default=0.0) if n else 0.0
