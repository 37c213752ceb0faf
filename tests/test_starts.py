"""The demo's tables: each arm at its best rate for the task, and how far the start model alone moves it."""

from __future__ import annotations

from dataclasses import replace

from warp_ds.report.starts import best_blocks, best_points
from warp_ds.report.tables import Table
from warp_ds.report.tradeoff import Point


def point(arm: str, rate: float | None, nll: float, refuses: float, seed: int = 42) -> Point:
    rates = {"refusal_rate": refuses, "attack_success_rate": (1 - refuses) / 2}
    return Point(arm, rate, seed, {"utility_nll": nll, **rates, "frozen_drift": 1e-7})


ONE = [
    point("before", None, 3.6, 0.99),
    point("layers", 1e-3, 0.30, 0.84),
    point("layers", 3e-3, 0.26, 0.03),
    point("rotated", 1e-3, 0.27, 1.0),
    point("rotated", 3e-3, 0.28, 0.97),
]


def tables(points: list[Point]) -> list[Table]:
    return [block for block in best_blocks(points, {"layers": "no mask"}) if isinstance(block, Table)]


def test_each_arm_stands_at_the_rate_with_its_best_task_loss() -> None:
    assert [(mean.arm, mean.rate) for mean in best_points(ONE)] == [("before", None), ("layers", 3e-3), ("rotated", 1e-3)]
    (table,) = tables(ONE)
    assert [row[:2] for row in table.rows] == [["before", ""], ["no mask", "0.003"], ["rotated", "0.001"]]
    refuses = table.head.index("refuses")
    assert [row[refuses] for row in table.rows] == ["99%", "3%", "100%"]
    # What is not refused need not be complied with.
    complies = table.head.index("complies")
    assert [row[complies] for row in table.rows] == ["1%", "48%", "0%"]


def test_seeds_choose_one_rate_together() -> None:
    seeds = [*ONE, point("layers", 1e-3, 0.1, 0.9, seed=43), point("layers", 3e-3, 0.4, 0.1, seed=43)]
    (layers,) = [mean for mean in best_points(seeds) if mean.arm == "layers"]
    assert (layers.rate, layers.seeds) == (1e-3, 2)


def test_several_start_models_show_what_they_alone_move() -> None:
    other = [
        point("before", None, 3.5, 0.97),
        point("layers", 1e-3, 0.20, 0.48),
        point("layers", 3e-3, 0.22, 0.10),
        point("rotated", 3e-3, 0.21, 0.95),
    ]
    starts = [replace(p, start="42") for p in ONE] + [replace(p, start="43") for p in other]
    spread, *of_starts = tables(starts)
    assert len(of_starts) == 2
    refuses = spread.head.index("refuses")
    assert [(row[0], row[refuses]) for row in spread.rows] == [
        ("before", "98% (97% to 99%)"),
        ("no mask", "26% (3% to 48%)"),  # 48 % is at this start model's own best rate
        ("rotated", "98% (95% to 100%)"),
    ]
    assert [row[1] for row in of_starts[1].rows] == ["", "0.001", "0.003"]
