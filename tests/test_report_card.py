"""A model's card: sections that are replaced, cards that are not ours, and what stands in the table."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from warp_ds.report.card import evaluation, made, without_sections, write_section

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
