"""Rates, intervals and GSM8K's exact match."""

import math

import pytest
from scipy.stats import binomtest

from warp_ds.evaluation.metrics import accuracy, exact_match, extract_number, rates, wilson


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


def test_accuracy_and_rates():
    assert accuracy(["#### 1", "#### 2", "3"], ["#### 1", "#### 1", "#### 3"]) == pytest.approx(1 / 3)
    assert math.isnan(accuracy([], []))
    with pytest.raises(ValueError, match="1 answers for 2"):
        accuracy(["a"], ["b", "c"])
    counted = rates(["refusal", "refusal", "compliance", "incoherent"])
    assert counted == {"n": 4, "refusal_rate": 0.5, "compliance_rate": 0.25, "incoherent_rate": 0.25}
    assert math.isnan(rates([])["refusal_rate"])
    with pytest.raises(ValueError, match="unknown verdicts \\['safe'\\]"):
        rates(["safe"])
