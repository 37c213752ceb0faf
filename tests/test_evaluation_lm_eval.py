"""lm-evaluation-harness on our models, and our GSM8K score against its own. Skipped without the extra [eval]."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks

pytest.importorskip("lm_eval")

TASK = """task: local_gsm8k
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: "Question: {{{{prompt}}}}\\nAnswer:"
{rest}
"""
GENERATE = """doc_to_target: "{{response}}"
generation_kwargs:
  until: ["Question:", "</s>", "<|im_end|>"]
  do_sample: false
  max_gen_toks: 80
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
    regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]
filter_list:
  - name: strict-match
    filter:
      - {function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}
      - {function: take_first}
  - name: flexible-extract
    filter:
      - {function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"}
      - {function: take_first}
"""
CHOICE = """doc_to_choice: ["#### 3", "#### 4"]
doc_to_target: 0
target_delimiter: " "
metric_list:
  - metric: acc
"""


def make_task_model(root: Path) -> None:
    """A model that has learnt to write numbers, some of them right; items; and two task files."""
    import torch
    from tokenizers.processors import TemplateProcessing

    from warp_ds.data.formats import encode
    from warp_ds.data.synthetic import demo_data
    from warp_ds.data.tiny_model import tiny_llama, train_tokenizer

    data = demo_data(3, n_fit=10, n_heldout=7, n_sums=1, n_utility=24)["utility_train"]
    tokenizer = train_tokenizer([text for row in data for text in row.values()], vocab_size=400)
    # As real tokenizers do: special tokens are added where they are asked for, and lm-eval asks.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(root / "sums")
    model = tiny_llama(tokenizer, hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    samples = [encode(**row, tokenizer=tokenizer) for row in data[:12]]
    for step in range(240):
        sample = samples[step % 12]
        ids, labels = torch.tensor([sample["input_ids"]]), torch.tensor([sample["labels"]])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root / "sums")
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    tasks = root / "tasks"
    tasks.mkdir()
    for name, kind, rest in (("local_gsm8k", "generate_until", GENERATE), ("local_choice", "multiple_choice", CHOICE)):
        text = TASK.format(file=root / "sums.jsonl", kind=kind, rest=rest).replace("local_gsm8k", name)
        (tasks / f"{name}.yaml").write_text(text)


def ours(root: Path, output: Path) -> dict[str, Any]:
    from phase3_jobs import common

    from warp_ds.flags.arguments import EvaluateArguments
    from warp_ds.phases.evaluate import run_evaluation

    run = run_evaluation(
        EvaluateArguments(
            **{
                **common(root, output),
                "model_name": str(root / "sums"),
                "batch_size": 4,
                "suite": "gsm8k,local_gsm8k,local_choice",
                "utility_data": str(root / "sums.jsonl"),
                "utility_samples": 0,
                "max_new_tokens": 80,
                "lm_eval_include": str(root / "tasks"),
            }
        )
    )
    return json.loads((run / "metrics.json").read_text())


def theirs(root: Path) -> dict[str, Any]:
    """lm-eval's own model class and harness on the exported directory, none of our code."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(root / "sums"), "dtype": "float32", "device": "cpu", "add_bos_token": True},
        tasks=["local_gsm8k", "local_choice"],
        batch_size=4,
        task_manager=TaskManager(include_path=str(root / "tasks")),
        bootstrap_iters=0,
    )
    return {"results": found["results"], "answers": [s["resps"][0][0] for s in found["samples"]["local_gsm8k"][:24]]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("harness")
    make_task_model(path)
    return path


def test_exact_match_equals_the_harness(root: Path) -> None:
    reference = run_ranks(1, theirs, root)[0]["results"]
    for world in (1, 2):
        found = run_ranks(world, ours, root, root / f"world{world}")[0]
        strict, flexible = (reference["local_gsm8k"][f"exact_match,{name}"] for name in ("strict-match", "flexible-extract"))
        assert found["utility_accuracy_strict"] == pytest.approx(strict) and 0 < strict < 1
        assert found["utility_accuracy"] >= found["utility_accuracy_strict"]  # by value: 18.00 is 18
        assert found["utility_accuracy_flexible"] == pytest.approx(flexible)
        # And the harness on our ZeRO-3 shards scores what it scores on its own model.
        assert found["lm_eval"]["local_gsm8k"]["exact_match,strict-match"] == pytest.approx(strict)
        assert found["lm_eval"]["local_choice"]["acc,none"] == pytest.approx(reference["local_choice"]["acc,none"])


def test_an_unknown_task_is_named(root: Path) -> None:
    from warp_ds.errors import ConfigError
    from warp_ds.evaluation.lm_eval_tasks import check_tasks

    with pytest.raises(ConfigError, match="nonsense: no such task"):
        check_tasks(["nonsense"], str(root / "tasks"))
