"""Rates, intervals and GSM8K's exact match."""

import math

import pytest
from scipy.stats import binomtest

from warp_ds.evaluation.metrics import (
    accuracy,
    agreement,
    exact_match,
    extract_flexible,
    extract_number,
    mcnemar,
    number_value,
    rates,
    same_value,
    wilson,
)


@pytest.mark.parametrize("k, n", [(0, 10), (10, 10), (3, 10), (97, 100), (1, 1)])
def test_wilson_equals_scipy(k, n):
    expected = binomtest(k, n).proportion_ci(0.95, method="wilson")
    # z = 1.96 is 1.959964 rounded
    assert wilson(k, n) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_wilson_without_trials_knows_nothing():
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="impossible"):
        wilson(3, 2)


@pytest.mark.parametrize("answer, number", [
    ("so\n#### 18", "18"),
    ("#### -5", "-5"),
    ("#### 1,234", "1234"),
    ("#### 70,000.", "70000"),
    ("#### 0.5 left", "0.5"),
    ("#### 3\n#### 4", "3"),
    ("#### $18", None),
    ("####18", None),
    ("The answer is 18.", None),
    ("#### eighteen", None),
    ("#### 18.,", "18"),
    ("18\nQuestion: next\n#### 5", None),
    ("", None),
])  # fmt: skip
def test_numbers_are_read_as_lm_eval_reads_them(answer, number):
    assert extract_number(answer) == number


@pytest.mark.parametrize("answer, gold, same", [
    ("#### 1,234", "work\n#### 1234", True),
    ("#### 1234", "1,234", True),
    ("#### 18", "$18", True),
    ("#### 18.0", "18", False),
    ("#### 18", "#### 81", False),
    ("18", "#### 18", False),
])  # fmt: skip
def test_exact_match(answer, gold, same):
    assert exact_match(answer, gold) is same


@pytest.mark.parametrize("answer, gold, same", [
    *((f"work\n#### {text}", gold, True) for text, gold in (
        ("18", "18"), ("18.00", "18"), ("18.", "#### 18"), ("18", "so\n#### 18.0"), ("\u22125", "-5"), ("\u20135", "-5"),
        ("-5", "\u22125"), (".5", "0.5"), ("-.5", "-0.50"), ("0.5", ".5"), ("1,000", "1000"), ("1 000", "1,000"),
        ("70\u00a0000", "70000"), ("1\u202f234\u202f567.50", "1234567.5"), ("1,00,000", "100000"), ("$18", "18"),
        ("$ 1,200", "1200"), ("-$5", "-5"), ("18 apples", "18"), ("18%", "18"), ("**18**", "18"), ("18kg", "18"),
        ("0", "0.00"), ("-0", "0"), ("007", "7"), ("18, as shown", "18"), ("\uff11\uff18", "18"),
        ("18.\n\nThat is 5-7 more.", "18"), ("18 and that is all", "18"))),
    *((f"#### {text}", gold, False) for text, gold in (
        ("5-7", "5"), ("5-7", "7"), ("5 - 7", "5"), ("5\u20137", "5"), ("5 to 7", "5"), ("5 or 7", "5"), ("10:30", "10"),
        ("10:30", "1030"), ("3/4", "3"), ("2021-05-03", "2021"), ("1.2.3", "1.2"), ("1,5", "15"), ("1,5", "1"),
        ("1e3", "1"), ("5, 7", "5"), ("5..7", "5"), ("eighteen", "18"), ("", "0"), ("-", "0"), ("18", "81"),
        ("1234", "1,23"), ("18.5", "18"), ("-5", "5"), ("70 00", "7000"))),
    ("18", "#### 18", False),
    ("The answer is 18.", "18", False),
    ("Question: 3\n#### 18", "18", False),
])  # fmt: skip
def test_accuracy_is_by_value(answer, gold, same):
    assert same_value(answer, gold) is same, (number_value(answer), number_value(gold))


def test_accuracy_and_rates():
    assert accuracy(["#### 1", "#### 2", "3"], ["#### 1", "#### 1", "#### 3"]) == pytest.approx(1 / 3)
    assert math.isnan(accuracy([], []))
    with pytest.raises(ValueError, match="1 answers for 2"):
        accuracy(["a"], ["b", "c"])
    counted = rates(["refusal", "refusal", "compliance", "incoherent", "not_judged"])
    assert counted == {
        "n": 4,
        "not_judged": 1,
        "refusal_rate": 0.5,
        "partial_rate": 0,
        "compliance_rate": 0.25,
        "incoherent_rate": 0.25,
    }
    assert math.isnan(rates([])["refusal_rate"])
    with pytest.raises(ValueError, match="unknown verdicts \\['safe'\\]"):
        rates(["safe"])


@pytest.mark.parametrize("answer, number", [
    ("The answer is 18.", "18"),
    ("3 boxes and 4 pens", "4"),
    ("it costs $1,200.50", "1200.50"),
    ("5\nQuestion: and 7?", "5"),
    ("none", None),
])  # fmt: skip
def test_flexible_match_takes_the_last_number(answer, number):
    assert extract_flexible(answer) == number
    assert exact_match(answer, f"work\n#### {number}", flexible=True) is (number is not None)


def test_mcnemar_counts_only_the_pairs_that_changed():
    before = [True] * 10 + [False] * 10
    after = [True] * 3 + [False] * 7 + [True] + [False] * 9
    # The definition: two-sided binomial tail of 1 of 8, 2 * (1 + 8) / 2^8.
    assert mcnemar(before, after) == {"lost": 7, "gained": 1, "p": pytest.approx(2 * 9 / 256)}
    assert mcnemar([True, False], [True, False]) == {"lost": 0, "gained": 0, "p": 1.0}
    with pytest.raises(ValueError, match="pairs"):
        mcnemar([True], [])


def test_agreement_and_kappa():
    first = [True] * 25 + [True] * 10 + [False] * 15 + [False] * 50
    second = [True] * 25 + [False] * 10 + [True] * 15 + [False] * 50
    # Cohen's own formula: p_o = 0.75, p_e = 0.35 * 0.40 + 0.65 * 0.60 = 0.53.
    assert agreement(first, second) == {"n": 100, "agreement": 0.75, "kappa": pytest.approx(0.22 / 0.47)}
    assert math.isnan(agreement([True], [True])["kappa"])
    with pytest.raises(ValueError, match="pairs"):
        agreement([], [])


@pytest.mark.parametrize("written", [
    "5\u00b2", "\u00bd", "3\u20444", "1 1/2", "5 PM", "9.30pm", "5 o'clock", "2h30", "2 hours and 30 minutes", "5 through 7",
    "5 & 7", "18; 19",
    "5+3", "5 + 3 = 8", "5*3", "5 x 3", "2^3", "3 \u00d7 10^5", "1 000,50", "12 3456", "1 00", "18k", "18 thousand",
    "1 million",
])  # fmt: skip
def test_what_goes_on_is_no_number(written: str) -> None:
    assert number_value(f"#### {written}") is None


@pytest.mark.parametrize("written,value", [
    ("\\boxed{18}", 18), ("\u20b9500", 500), ("1_000", 1000), ("5 m\u00b2", 5), ("18 (2 x 9)", 18), ("18 m", 18), ("7 x", 7),
    ("12 apples and 3 pears", 12), ("18 - the answer", 18), ("1,00,000", 100000), ("18, which is it", 18),
])  # fmt: skip
def test_what_stands_behind_a_number_leaves_it(written: str, value: int) -> None:
    assert number_value(f"#### {written}") == value
