"""Tables on terminals of any width, and what an evaluation prints."""

from __future__ import annotations

from typing import Any

import pytest

from warp_ds.report.tables import Table, evaluation_blocks, to_markdown, to_terminal

ARMS = ["target layers, original-space mask", "safeinstr+rotated+resta@0.5", "before"]
HEAD = ["arm", "refuses", "in part", "incoherent", "over-refuses", "task accuracy", "task NLL", "refuses, by seed"]
CELLS = [
    "98% [91, 99]",
    "3% [1, 8]",
    "0% [0, 5]",
    "12% [6, 20]",
    "93% [86, 97]",
    "0.123",
    "40% to 50% (of 2; 1 more do not get there)",
]


def printed(capsys: Any, monkeypatch: pytest.MonkeyPatch, width: int | None, table: Table) -> str:
    monkeypatch.delenv("COLUMNS", raising=False)
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
    to_terminal([table])
    out: str = capsys.readouterr().out
    return out


@pytest.mark.parametrize("terminal", ["xterm", "dumb"])
@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_no_name_and_no_number_is_cut(width: int, terminal: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", terminal)
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal == "dumb" else "0")
    out = printed(capsys, monkeypatch, width, Table(HEAD, [[arm, *CELLS] for arm in ARMS]))
    assert max(map(len, out.splitlines())) <= width and "…" not in out
    words = [word for text in (*ARMS, *HEAD) for word in text.split()]
    assert [word for word in words if word not in out] == []
    assert [cell for cell in CELLS[:-1] if out.count(cell) != len(ARMS)] == [], "each number once an arm"
    tables = out.count("arm")
    assert tables == {60: 4, 80: 3, 120: 2, 160: 2}[width]
    assert out.count("safeinstr+rotated+resta@0.5") == tables, "each table says whose numbers they are"


def test_a_table_that_fits_is_one_with_its_heads_in_one_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    table = Table(HEAD[:4], [[ARMS[1], *CELLS[:3]], [ARMS[2]]])
    out = printed(capsys, monkeypatch, None, table).splitlines()
    assert len(out) == 6 and len(set(map(len, out))) == 1 and "in part" in out[1]
    # Exactly as wide as the table is, and one less.
    assert printed(capsys, monkeypatch, len(out[0]), table).splitlines() == out
    assert printed(capsys, monkeypatch, len(out[0]) - 1, table).count("arm") == 2


def test_a_name_longer_than_the_terminal_goes_on_in_the_next_line(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = printed(capsys, monkeypatch, 40, Table(["arm", "rate"], [["x" * 100, "1"], ["\u6f22" * 30, "2"]]))
    assert out.count("x") == 100 and out.count("\u6f22") == 30
    assert max(map(len, out.splitlines())) <= 40


def test_an_evaluation_ends_in_a_table_and_a_line_for_each_test() -> None:
    blocks = evaluation_blocks(
        {
            "before training": {"refusal_rate": 1.0, "refusal_interval": [0.9, 1.0]},
            "this model": {
                "not_judged": 0,
                "refusal_rate": 0.5,
                "refusal_interval": [0.404, 0.596],
                "attack_suffix_refusal_rate": 0.25,
                "utility_nll": 0.31,
                "movement": 0.2,
                "movement_by_layer": {"a": {"q": 0.1}},
                "refusal_lost_against_before": 7,
                "refusal_gained_against_before": 1,
                "refusal_p_against_before": 0.0703125,
                "gsm8k_lost_against_before": 0,
                "gsm8k_gained_against_before": 0,
                "gsm8k_p_against_before": 1.0,
                "judge_n": 14,
                "judge_agreement": 0.9286,
                "harmless_judge_n": 5,
                "harmless_judge_agreement": 1.0,
                "lm_eval": {"arc": {"acc,none": 0.25, "alias": "arc"}},
                "overlap": {"harmful in x.jsonl": 3},
            },
        }
    )
    table, *lines = blocks
    assert isinstance(table, Table)
    assert table.head == ["model", "refuses", "task NLL", "moved"]
    assert table.rows == [
        ["before training", "100% [90, 100]", "", ""],
        ["this model", "50% [40, 60]", "0.310", "0.200"],
        ["this model, suffix", "25%", "", ""],
    ]
    assert lines == [
        "refusal: 7 refusals lost and 1 gained, prompt by prompt (McNemar's exact test, p 0.07).",
        "gsm8k: 0 right answers lost and 0 gained, prompt by prompt (McNemar's exact test, p 1).",
        "harmful: the guard model agrees on 93% of 14 answers.",
        "harmless: the guard model agrees on 100% of 5 answers.",
        "arc, acc,none: 0.25",
        "Warning: 3 prompts stood in a fitting set (harmful in x.jsonl): on them the numbers measure memory.",
        "In brackets: 95 % Wilson intervals over the prompts.",
    ]
    assert "movement_by_layer" not in to_markdown(blocks)
