"""Tasks of lm-evaluation-harness, run by its own code on a model in ZeRO-3 shards (extra ``[eval]``).

The harness asks a model for log-likelihoods and continuations; ``ShardedLM`` answers with ``evaluation.generate``. Every
rank runs the same harness on the same requests and thinks it is alone; the requests are spread inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from warp_ds.cluster import processes
from warp_ds.data.collate import pad_token
from warp_ds.data.formats import IGNORE, Tokens, opening_ids
from warp_ds.data.template import chat_text, render
from warp_ds.errors import ConfigError
from warp_ds.evaluation.generate import generate_after, token_scores
from warp_ds.models.context import context_length

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import handle_stop_sequences
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise ConfigError(f"lm-evaluation-harness is not installed ({error}): pip install 'warp_ds[eval]'") from error


class ShardedLM(TemplateLM):  # type: ignore[misc]
    """A ZeRO-3 engine, or a plain model, as the harness sees it."""

    backend = "causal"

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, batch_size: int, max_new_tokens: int):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        self.context = context_length(getattr(model, "module", model).config) or 2**30

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self.tokenizer.chat_template) if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat_text(chat_history, self.tokenizer) if add_generation_prompt else render(chat_history, self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        ids = list(self.tokenizer(string, add_special_tokens=False)["input_ids"])
        opening = opening_ids(self.tokenizer)
        # A chat template writes the beginning of the text itself.
        return [*opening, *ids] if add_special_tokens is not False and ids[: len(opening)] != opening else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        samples: list[Tokens] = []
        for _, context, continuation in requests:
            ids = [*context, *continuation][-self.context :]
            labels = ([IGNORE] * len(context) + list(continuation))[-self.context :]
            samples.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
        scores = token_scores(self.model, samples, pad_token_id=pad_token(self.tokenizer), batch_size=self.batch_size)
        return [(-sum(loss for loss, _ in score), all(best for _, best in score)) for score in scores]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        sums = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = [ids[i : i + self.context - 1] for i in range(0, len(ids), self.context - 1)]
            scored = self._loglikelihood_tokens([(None, [self.prefix_token_id], window) for window in windows])
            sums.append(sum(score for score, _ in scored))
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        by_length: dict[int, list[int]] = {}
        for i, request in enumerate(requests):
            by_length.setdefault(int(request.args[1].get("max_gen_toks", self.max_new_tokens)), []).append(i)
        for length, which in by_length.items():
            # As the harness's own models do: what the context cannot hold is cut from the left.
            prompts = [self.tok_encode(requests[i].args[0])[-(self.context - length) :] for i in which]
            texts = generate_after(
                self.model,
                self.tokenizer,
                prompts,
                max_new_tokens=length,
                batch_size=self.batch_size,
                synced=processes.world_size() > 1,
                desc="lm-eval",
            )
            for i, text in zip(which, texts, strict=True):
                until = handle_stop_sequences(requests[i].args[1].get("until"), eos=None)
                answers[i] = text[: min((text.find(stop) for stop in until if stop and stop in text), default=len(text))]
        return answers


def known_tasks(include: str | None = None) -> TaskManager:
    """The harness's tasks, and those of the yaml files under ``include``."""
    return TaskManager(include_path=include)


def check_tasks(names: Sequence[str], include: str | None = None) -> None:
    """ConfigError for a name that the harness does not know."""
    unknown = sorted(set(names) - set(known_tasks(include).all_tasks))
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: no such task in lm-evaluation-harness (lm-eval ls tasks lists them; "
            "--lm_eval_include adds a directory of your own yaml files)"
        )


def run_tasks(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    batch_size: int,
    max_new_tokens: int,
    include: str | None = None,
    limit: int = 0,
    fewshot: int | None = None,
) -> dict[str, Any]:
    """The harness's results on ``names``: {'results': …, 'samples': …}. Collective; the same on every rank."""
    evaluated = simple_evaluate(
        model=ShardedLM(model, tokenizer, batch_size, max_new_tokens),
        tasks=list(names),
        num_fewshot=fewshot,
        limit=limit or None,
        task_manager=known_tasks(include),
        bootstrap_iters=0,
        apply_chat_template=bool(tokenizer.chat_template),
    )
    kept = {} if evaluated is None else {"results": evaluated["results"], "samples": evaluated["samples"]}
    return processes.broadcast_object(kept)
