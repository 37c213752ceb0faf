"""Paired differences and the words that a comparison ends with, on outcomes with planted differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from warp_ds.errors import ConfigError
from warp_ds.evaluation.paired import Items, common, estimates, interval, outcomes, replicates
from warp_ds.flags.comparison import CompareArguments
from warp_ds.report.recommendation import recommend, with_recommendation
from warp_ds.report.tables import comparison_blocks, to_markdown
from warp_ds.report.tradeoff import Comparison, Point, compare_points
from warp_ds.store.files import read_json, write_json

ITEMS = 100
HARD = np.random.default_rng(7).gamma(4.0, 0.1, ITEMS)
"""Nats a token of each task item: what all models find hard or easy alike (deviation 0.2)."""


def model(arm: str, rate: float | None, shift: float, refused: int, draw: Any, seed: int = 1, **more: Any) -> Point:
    """A measured model: every item's loss is the common one, ``shift`` and a little noise of its own."""
    tokens = 20
    nats = tokens * (HARD + shift + 0.03 * draw.standard_normal(ITEMS))
    told = {"refusal": "r" * refused + "c" * (ITEMS - refused), "loss": {"nats": list(nats), "tokens": [tokens] * ITEMS}}
    measured = {"utility_nll": float(nats.sum() / tokens / ITEMS), "refusal_rate": refused / ITEMS, "outcomes": told}
    return Point(arm, rate, seed, measured, **more)


def compared(shift: float, draw: Any, plain_keeps: int = 97) -> list[Point]:
    return [
        model("before", None, 2.0, 99, draw),
        model("layers", 1e-3, 0.0, plain_keeps, draw),
        model("layers", 3e-3, -0.2, 2, draw),
        model("rotated", 1e-3, 0.02, 99, draw),
        model("rotated", 3e-3, shift, 97, draw),
        model("original", 3e-3, -0.1, 30, draw),
    ]


def test_a_planted_difference_is_found_and_put_in_words() -> None:
    draw = np.random.default_rng(0)
    points = compared(-0.02, draw)
    found = recommend(points)
    assert found is not None and found.chosen is not None and found.plain is not None
    assert (found.chosen.arm, found.chosen.rate) == ("rotated", 3e-3)
    assert (found.plain.arm, found.plain.rate) == ("layers", 1e-3), "3e-3 has a lower loss, and does not keep the floor"
    assert list(found.fallen) == ["original"]
    low, high = found.rivals[0].interval
    assert 0 < low < 0.02 < high < 0.04
    assert found.text.startswith(
        "At a floor of 95% of the start model's refusals (94% of the prompts): take rotated at a rate of 0.003. "
    )
    assert "that of tuned plain training (layers at a rate of 0.001: " in found.text
    assert "Below the floor at every rate: original." in found.text
    assert "paired over 100 task items, 100 harmful prompts, 1 seed (" in found.text
    assert "One seed and one start model: " in found.text


def test_what_is_no_difference_is_found_in_few_of_many_tries() -> None:
    said = [recommend(compared(0.0, np.random.default_rng(seed))) for seed in range(60)]
    false = sum(found is not None and found.chosen is not None and found.chosen.arm == "rotated" for found in said)
    # One side of a 95 % interval: 1.5 of 60 are expected; more than 5 come once in a hundred times.
    assert false <= 5
    assert any("no arm differs from tuned plain training (layers at a rate of 0.001" in found.text for found in said if found)


def test_a_model_that_came_apart_is_no_choice_and_no_number(tmp_path: Path) -> None:
    """The first of its arm: a comparison with NaN is false either way."""
    draw = np.random.default_rng(0)
    apart = model("rotated", 1.0, float("nan"), 99, draw)
    for points in ([apart, *compared(-0.02, draw)], [compared(0.0, draw)[0], apart]):
        comparison = with_recommendation(compare_points(points, {"refusal_rate": ITEMS}), 0.95)
        write_json(tmp_path / "report.json", comparison.to_json())
        report = read_json(tmp_path / "report.json", finite=True)
        said = report["recommendation"]["text"]
        assert "Came apart (its task loss is no number): rotated at a rate of 1." in said
        assert ("take rotated at a rate of 0.003" in said) == (len(points) > 2)
        again = Comparison.from_json(report)
        assert again.points[points.index(apart)].measured["utility_nll"] is None
        assert ("task NLL nan" in to_markdown(comparison_blocks(again))) == (len(points) == 2), "no model has a loss"
        again = with_recommendation(compare_points(again.points, again.prompts), 0.95)
        assert again.about["recommendation"]["text"] == said


def test_what_shares_no_seed_with_plain_training_has_no_interval(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    points = [
        model("before", None, 2.0, 99, draw),
        model("layers", 1e-3, 0.0, 97, draw),
        model("rotated", 1e-3, -0.1, 99, draw, 2),
    ]
    found = recommend(points)
    assert found is not None and not found.rivals and found.chosen is found.plain
    json.dumps(found.to_json(), allow_nan=False)


def test_pairing_is_used() -> None:
    """What prompts share is no uncertainty: unpaired, the same difference drowns."""
    draw = np.random.default_rng(0)
    plain, other = (Items.of(model("a", 1.0, shift, 9, draw).measured, "loss") for shift in (0.0, -0.02))
    assert plain is not None and other is not None
    paired = replicates([{("", 1): plain}, {("", 1): other}])
    apart = [replicates([{("", 1): items}], seed=n)[:, 0] for n, items in enumerate((plain, other))]
    assert interval(paired[:, 0] - paired[:, 1])[0] > 0
    assert interval(apart[0] - apart[1])[0] < -0.01


def test_intervals_are_those_of_scipys_paired_bootstrap() -> None:
    draw = np.random.default_rng(3)
    weights = draw.integers(5, 40, ITEMS).astype(float)
    a, b = (Items(weights * draw.gamma(2.0, 0.3, ITEMS), weights) for _ in range(2))
    mine = replicates([{("", 1): a}, {("", 1): b}], count=20000)

    def difference(x: Any, y: Any, w: Any, axis: int = -1) -> Any:
        return (x.sum(axis) - y.sum(axis)) / w.sum(axis)

    theirs = stats.bootstrap(
        (a.top, b.top, weights), difference, paired=True, method="percentile", n_resamples=20000, rng=np.random.default_rng(1)
    ).confidence_interval
    # Quantiles of 20,000 resamples have an error of about a fortieth of the deviation.
    assert interval(mine[:, 0] - mine[:, 1]) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_start_models_and_seeds_are_drawn_too() -> None:
    """Two start models that disagree leave the mean in doubt, however many prompts there are."""
    n = 5000
    ones = np.ones(n)

    def refuses(share: float) -> Items:
        return Items((np.arange(n) < share * n).astype(float), ones)

    cells = {("a", 1): refuses(0.9), ("b", 1): refuses(0.5)}
    assert estimates([cells])[0] == pytest.approx(0.7)
    assert interval(replicates([cells])[:, 0]) == pytest.approx((0.5, 0.9), abs=0.02)
    # Seeds likewise; drawn twice or not at all, each mean of two seeds has a quarter, a half, a quarter of the draws.
    seeds = {("a", 1): refuses(0.9), ("a", 2): refuses(0.5)}
    drawn = replicates([seeds])[:, 0]
    assert [np.mean(np.abs(drawn - at) < 0.05) for at in (0.5, 0.7, 0.9)] == pytest.approx([0.25, 0.5, 0.25], abs=0.04)


def test_only_what_both_have_is_compared() -> None:
    one, other = Items(np.ones(3), np.ones(3)), Items(np.ones(2), np.ones(2))
    left, right = common([{("", 1): one, ("", 2): one, ("", 3): one}, {("", 2): one, ("", 3): other}])
    assert list(left) == list(right) == [("", 2)]


def test_what_was_not_judged_stands_in_no_rate() -> None:
    items = Items.of({"outcomes": {"refusal": "rr-ci"}}, "refusal")
    assert items is not None and estimates([{("", 1): items}])[0] == pytest.approx(0.5)


def test_no_plain_training_keeps_the_floor() -> None:
    found = recommend(compared(0.0, np.random.default_rng(0), plain_keeps=60))
    assert found is not None and found.plain is None
    assert "plain training keeps it at none of its rates; take rotated at a rate of 0.003" in found.text
    nobody = recommend([*compared(0.0, np.random.default_rng(0))[:1], model("layers", 1e-3, 0.0, 2, np.random.default_rng(1))])
    assert nobody is not None and "no arm keeps it at any of its rates" in nobody.text


def test_a_floor_that_the_interval_crosses_is_said() -> None:
    points = compared(-0.02, np.random.default_rng(0))
    found, sure = recommend(points, 0.97), recommend(points, 0.5)
    assert found is not None and "the interval reaches below the floor, so measure more prompts" in found.text
    assert sure is not None and "reaches below" not in sure.text


def test_the_table_ends_with_it_and_a_file_keeps_it() -> None:
    comparison = with_recommendation(compare_points(compared(-0.02, np.random.default_rng(0)), {"refusal_rate": ITEMS}), 0.9)
    assert (
        comparison.about["recommendation"]["chosen"]["arm"] == "layers"
        or "rotated" in comparison.about["recommendation"]["text"]
    )
    read = Comparison.from_json(comparison.to_json())
    assert to_markdown(comparison_blocks(read)).rstrip().endswith(read.about["recommendation"]["text"])
    assert "Recommendation. At a floor of 90%" in to_markdown(comparison_blocks(read))


def test_points_without_outcomes_are_named() -> None:
    points = compared(0.0, np.random.default_rng(0))
    old = Point("osft", 1e-3, 1, {"utility_nll": 0.1, "refusal_rate": 1.0})
    found = recommend([*points, old])
    assert found is not None and "osft was measured without the outcome of every prompt" in found.text
    assert recommend(points[1:]) is None, "without the start model there is no floor"


def test_outcomes_are_one_letter_a_prompt() -> None:
    rows: list[dict[str, Any]] = [{"suite": "refusal", "verdict": v} for v in ("refusal", "compliance", "not_judged")]
    rows += [{"suite": "gsm8k", "correct": right} for right in (True, False)]
    told = outcomes(rows, [[0.5, 0.25], [1.0]])
    assert told == {"refusal": "rc-", "gsm8k": "10", "loss": {"nats": [0.75, 1.0], "tokens": [2, 1]}}


def test_a_floor_is_a_share() -> None:
    with pytest.raises(ConfigError, match="--floor is the share"):
        CompareArguments(floor=95).check()
