"""A model's card: sections that are replaced, cards that are not ours, and what stands in the table."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from warp_ds.report.card import code, eval_results, evaluation, made, new_card, plain, without_sections, write_section

CARD = "# m, fine-tuned on task\n\nTrained by [warp_ds](https://x) phase 3 without a mask.\n"


def test_a_section_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(CARD)
    write_section(tmp_path, "made", "facts")
    write_section(tmp_path, "evaluate", "first | table")
    write_section(tmp_path, "evaluate", "second | table")
    card.write_text(card.read_text() + "\nA user's own words.\n")
    write_section(tmp_path, "made", "other facts")
    text = card.read_text()
    assert text.startswith(CARD.rstrip()) and "second | table" in text and "A user's own words." in text
    assert "first" not in text and text.count("facts") == 1 and "other facts" in text
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert "table" not in without_sections(text) and "A user's own words." in without_sections(text)


@pytest.mark.parametrize("text", ["# Llama\n\nA model card.\n", "# m\n\nNot Trained by warp_ds.\n"])
def test_a_card_of_somebody_else_is_left(tmp_path: Path, text: str) -> None:
    (tmp_path / "README.md").write_text(text)
    write_section(tmp_path, "evaluate", "table")
    assert (tmp_path / "README.md").read_text() == text


def test_no_card_is_made_and_a_broken_one_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_section(tmp_path, "evaluate", "table")
    write_section(tmp_path / "removed", "evaluate", "table")
    assert not list(tmp_path.iterdir()) and made(tmp_path / "model") == ""
    (tmp_path / "README.md").write_bytes(CARD.encode() + b"\xff\xfe")
    logging.getLogger("warp_ds").propagate = True
    write_section(tmp_path, "evaluate", "table")
    assert "is left as it is" in caplog.text and b"table" not in (tmp_path / "README.md").read_bytes()


def test_the_table_has_what_was_measured_and_says_what_it_does_not_show() -> None:
    text = evaluation(
        "By hand.",
        {
            "before training": {"refusal_rate": 1.0, "refusal_interval": [0.965, 1.0]},
            "this model": {
                "refusal_rate": 0.5,
                "refusal_interval": [0.404, 0.596],
                "utility_nll": 0.31,
                "movement": 0.2,
                "attack_jailbreaks_refusal_rate": 0.25,
                "attack_jailbreaks_attack_success_rate": 0.75,
                "lm_eval": {"arc": {"acc,none": 0.25, "alias": "arc"}},
                "overlap": {"harmful in x.jsonl": 7},
            },
        },
    )
    assert "| model | refuses | complies | task NLL | moved |\n|---|---|---|---|---|\n" in text
    assert "| before training | 100% [96, 100] |  |  |  |" in text
    assert "| this model | 50% [40, 60] |  | 0.310 | 0.200 |" in text
    assert "| this model, jailbreaks | 25% | 75% |  |  |" in text
    assert "- arc, acc,none: 0.25\n" in text and "7 stood in a fitting set (harmful in x.jsonl)" in text
    assert "What this does not show" in text


def test_the_hub_reads_what_was_measured_and_a_merge_leaves_it_out(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(new_card("m", "Trained by warp_ds phase 3 without a mask.", "org/base", str(tmp_path)))
    data = {"harmful": "LibrAI/do-not-answer", "task": str(tmp_path / "held.jsonl")}
    for refusals in (0.25, 0.5):  # measured twice: the newer counts
        results = eval_results({"refusal_rate": refusals, "utility_nll": 1.5, "movement": 0.1}, data)
        write_section(tmp_path, "evaluate", "text", results)
    metadata = ModelCard(card.read_text()).data
    assert metadata.base_model == "org/base" and metadata.datasets is None, "a path is no data set of the hub"
    shown = {result.metric_type: (result.metric_value, result.dataset_name) for result in metadata.eval_results}
    assert shown == {"refusal_rate": (0.5, "LibrAI/do-not-answer"), "utility_nll": (1.5, "held.jsonl")}
    assert str(tmp_path) not in card.read_text()
    merged = without_sections(card.read_text())
    assert ModelCard(merged).data.base_model == "org/base" and "model-index" not in merged and "refusal_rate" not in merged


def test_what_users_wrote_is_text() -> None:
    evil = "a`b\n# [x](javascript:y) <script> *z* |"
    assert code(evil) == "`` a`b # [x](javascript:y) <script> *z* | ``"
    assert plain(evil) == "a\\`b # \\[x\\](javascript:y) \\<script\\> \\*z\\* |"
    text = evaluation("By hand.", {"this model": {"refusal_rate": 1.0, f"attack_{evil}_refusal_rate": 1.0}})
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and rows[3].endswith("\\*z\\* \\| | 100% |"), "one more cell, or line, would be the user's"
    metadata = ModelCard(new_card(plain(evil), "x", evil, "data: {x}\n---\n")).data
    assert metadata.base_model is None and metadata.datasets is None
