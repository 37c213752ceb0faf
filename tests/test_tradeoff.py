"""Arms, their composition, and the comparison at equal utility, on written curves."""

from __future__ import annotations

import json

import pytest

from warp_ds.errors import ConfigError
from warp_ds.evaluation.sets import EvaluationSets
from warp_ds.flags.comparison import CompareArguments
from warp_ds.phases.arms import ARMS, Arm, compose, parse_arms, refuse_placement, with_harm
from warp_ds.phases.comparison_data import ComparisonData, overlaps
from warp_ds.phases.trials import Trial, chain, is_needed, made_from
from warp_ds.report.tables import comparison_blocks, to_markdown
from warp_ds.report.tradeoff import Comparison, Point, at_utility, compare_points, crossing


def point(arm: str, rate: float | None, nll: float, refusal: float, seed: int = 1, from_start: bool = True) -> Point:
    return Point(arm, rate, seed, {"utility_nll": nll, "refusal_rate": refusal}, from_start)


def markdown(comparison: Comparison) -> str:
    return to_markdown(comparison_blocks(comparison))


def test_every_arm_of_the_papers_is_a_few_settings() -> None:
    assert set(ARMS) == {
        "before",
        "full",
        "layers",
        "original",
        "column",
        "rotated",
        "output-row",
        "both",
        "osft",
        "safeinstr",
        "resta",
        "safedelta",
        "sn-tune",
        "rsn-tune",
        "random-mask",
        "random-basis",
        "guardspace",
        "salora",
        "asft",
        "der",
        "constrained",
        "ema",
        "patch",
        "refresh",
        "schedule",
        "harmful",
        "safegrad",
        "lora",
        "safelora",
        "wsr",
    }
    assert ARMS["osft"] == Arm("osft", "target", "weight", "column", "singular_value", left=True)
    assert ARMS["output-row"] == Arm("output-row", "target", "activation", "row", output="activation")
    assert ARMS["both"] == Arm("both", "target", "activation", output="activation")


def test_composition_takes_what_each_part_sets() -> None:
    assert compose("safeinstr+rotated") == Arm("safeinstr+rotated", "target", "activation", safety_share=0.1)
    assert compose("sn-tune+rotated") == Arm("sn-tune+rotated", "target", "activation", start="sn-tune")
    assert compose("full+rotated") == Arm("full+rotated", "all", "activation")
    assert compose("rotated+resta") == Arm("rotated+resta", "target", "activation", merge="resta")
    assert compose("safeinstr+resta").trains == "all"
    assert compose("safedelta@10") == Arm("safedelta@10", merge="safedelta", strengths=(("safedelta", 10.0),))
    assert compose("safeinstr+both") == Arm("safeinstr+both", "target", "activation", output="activation", safety_share=0.1)
    halved = (("resta", 0.5),)
    assert compose("rotated+resta@0.5") == Arm("rotated+resta@0.5", "target", "activation", merge="resta", strengths=halved)
    every = compose("layers+ema@0.8+safedelta@3+patch@1e-4+harmful@0.2")
    assert (every.trains, every.average, every.merge, every.patch, every.harmful_share) == (
        "target",
        True,
        "safedelta",
        True,
        0.2,
    )
    dosed = compose("layers+safeinstr@0.5")
    assert (dosed.trains, dosed.safety_share, compose("safeinstr").safety_share) == ("target", 0.5, 0.1)
    assert [every.strength(part, 7.0) for part in ("ema", "safedelta", "patch", "resta")] == [0.8, 3.0, 1e-4, 7.0]


def test_arms_of_the_outputs_are_refused_where_their_bases_cannot_lie() -> None:
    for placement in ("auto", "owner"):
        refuse_placement(parse_arms("rotated,both"), placement)
    refuse_placement(parse_arms("rotated"), "sharded")
    with pytest.raises(ConfigError, match="--arms both: a basis of the outputs.*--basis_placement sharded.*owner or auto"):
        refuse_placement(parse_arms("rotated,both"), "sharded")


def test_a_model_is_kept_while_a_later_point_is_it_or_merges_it() -> None:
    def trials(text: str, seed: int = 1) -> list[Trial]:
        return [Trial(arm, 1e-3, seed) for arm in parse_arms(text)]

    resta, full = trials("resta,full")
    assert made_from(resta) == full and made_from(full) is None
    assert made_from(trials("original+safedelta@3")[0]) == trials("original")[0]
    assert is_needed(full, [full]) and is_needed(full, [resta]) and is_needed(full, trials("safedelta@3"))
    assert not is_needed(full, trials("full,resta", seed=2)) and not is_needed(full, trials("original,original+resta"))
    assert not is_needed(resta, [full])
    # A patched merge needs the merged model, and the model that was merged.
    both = trials("rotated+safedelta@3+patch@1e-4")[0]
    assert list(chain(both)) == [both, *trials("rotated+safedelta@3,rotated")]
    assert [made.run.partition("_")[0] for made in chain(both)] == ["patch", "merge", "phase3"]


@pytest.mark.parametrize("text, message", [
    ("nonsense", "nonsense: choose from before, full"),
    ("", "--arms is empty"),
    ("full,full", "full twice"),
    ("rotated+original", "two of its parts set the basis"),
    ("sn-tune+rsn-tune", "two of its parts set the start"),
    ("rotated@3", "only resta, safedelta, safelora, asft, der, ema, refresh, patch, harmful, safeinstr take a strength"),
    ("resta@much", "written resta@0.5"),
    ("harmful@-0.5", "finite, not below 0"),
    ("patch@nan", "finite, not below 0"),
    ("ema@1.5", "of ema below 1"),
    ("layers+rotated", "layers trains the target layers without a mask"),
    ("lora+both", "masks are of whole columns or rows"),
    ("both+rotated", "two of its parts set the basis"),
    ("before+patch", "cannot be composed"),
    ("der+constrained", "two of its parts set the objective"),
    ("patch+full+patch@1e-4", "two of its parts set the patch"),
])  # fmt: skip
def test_unusable_arms_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("+", r"\+")):
        parse_arms(text)


def test_harmful_mixes_are_an_axis_of_the_arms_that_train() -> None:
    arms = with_harm(parse_arms("before,full,rotated+patch"), [0.0, 0.05])
    assert [arm.name for arm in arms] == ["before", "full", "full+harmful@0.05", "rotated+patch", "rotated+patch+harmful@0.05"]
    assert [arm.harmful_share for arm in arms] == [0.0, 0.0, 0.05, 0.0, 0.05]
    with pytest.raises(ConfigError, match="a harmful mix of its own"):
        with_harm(parse_arms("full+harmful"), [0.1])
    with pytest.raises(ConfigError, match="give a file of them with --harmful_mix"):
        CompareArguments(harmful_ratio="0,0.1").check()


def test_grids_of_single_arms() -> None:
    arguments = CompareArguments(learning_rates="1e-3,1e-4", arm_rates="osft=1e-2:3e-2", seeds="3,1")
    assert arguments.rates(["full", "osft"]) == {"full": [1e-4, 1e-3], "osft": [1e-2, 3e-2]}
    assert arguments.seed_list == [1, 3]
    with pytest.raises(ConfigError, match="ARM=RATE"):
        CompareArguments(arm_rates="nonsense=1").rates(["full"])
    with pytest.raises(ConfigError, match="--learning_rates 'fast'"):
        CompareArguments(learning_rates="fast").rates(["full"])
    with pytest.raises(ConfigError, match="each value once"):
        CompareArguments(learning_rates="1,1").rates(["full"])


def test_the_first_crossing_from_above_counts() -> None:
    assert crossing([3.0, 1.0, 2.0, 0.5], 1.5) == (0, 0.75)
    assert crossing([3.0, 2.0], 1.0) is None
    assert crossing([1.0, 0.5], 2.0) is None
    assert crossing([2.0, 2.0], 2.0) == (0, 0.0)


def test_values_are_linear_between_neighbours() -> None:
    curve = [point("a", 0.0, 3.0, 1.0), point("a", 1e-4, 1.0, 0.6), point("a", 1e-3, 0.5, 0.1)]
    # A quarter of the way from (1.0, 0.6) to (0.5, 0.1).
    read = at_utility(curve, 0.875)
    assert read is not None and read[1] == [1e-4, 1e-3]
    assert read[0] == pytest.approx({"utility_nll": 0.875, "refusal_rate": 0.475})
    assert at_utility(curve, 0.4) is None
    exact = at_utility(curve, 0.5)
    assert exact is not None and exact[1] == [1e-3]


def test_arms_meet_where_the_rotated_arm_is_best() -> None:
    points = [
        point("before", None, 3.0, 1.0),
        *(
            point("full", rate, nll, refusal + 0.1 * seed, seed)
            for seed in (0, 1)
            for rate, nll, refusal in ((1e-4, 1.0, 0.8), (1e-3, 0.2, 0.0))
        ),
        point("rotated", 1e-4, 1.4, 0.95),
        point("rotated", 1e-3, 0.6, 0.9),
        point("osft", 1e-4, 2.0, 1.0),
        point("resta", 1e-4, 1.0, 0.9, from_start=False),
        point("resta", 1e-3, 0.4, 0.3, from_start=False),
    ]
    comparison = compare_points(points, {"refusal_rate": 100})
    assert comparison.at_utility == 0.6
    rows = {row["arm"]: row for row in comparison.to_json()["equal_utility"]}
    # full: half way from (1.0, 0.85) to (0.2, 0.05), seeds averaged; each seed by itself 0.4 and 0.5.
    assert rows["full"]["refusal_rate"] == pytest.approx(0.45)
    assert rows["full"]["seeds_range"] == pytest.approx([0.4, 0.5])
    assert rows["full"]["refusal_rate_interval"][0] < 0.45 < rows["full"]["refusal_rate_interval"][1]
    assert rows["rotated"]["refusal_rate"] == 0.9
    assert "refusal_rate" not in rows["osft"] and rows["osft"]["best_utility"] == 2.0
    assert rows["resta"]["refusal_rate"] == pytest.approx(0.9 - 2 / 3 * 0.6)
    assert compare_points(points, {}, wanted=1.0).at_utility == 1.0
    as_written = json.loads(json.dumps(comparison.to_json()))
    assert Comparison.from_json(as_written).to_json() == as_written and as_written["points"][-1]["from_start"] is False
    text = markdown(comparison)
    assert markdown(Comparison.from_json(as_written)) == text
    assert "the start model" not in text
    assert "read between the start model and its first point" in markdown(compare_points(points, {}, wanted=1.2))
    assert "| osft | does not cross it (its best is 2.000) |" in text and "45% [36, 55]" in text


def test_evaluation_prompts_in_fitting_sets_are_found() -> None:
    rows = [{"prompt": "How do I  bake?", "response": "x"}, {"prompt": "b", "response": "y"}]
    sets = EvaluationSets(["how do I bake?", "c"], ["d"], [{"prompt": "b", "response": "#### 1"}])
    assert overlaps(ComparisonData(rows, rows[1:], sets, unaligned=rows[:1])) == {
        ("the safety set", "harmful"): 1,
        ("the safety set", "task"): 1,
        ("the task set", "task"): 1,
        ("--unaligned_data", "harmful"): 1,
    }
