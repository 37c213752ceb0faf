"""launch/sweep.py: its settings, its front, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from evaluation_jobs import make_models
from phase3_jobs import common
from ranks import run_ranks

from warp_ds.errors import ConfigError
from warp_ds.flags.comparison import SweepArguments
from warp_ds.phases.sweep import run_sweep, settings
from warp_ds.report.page import write_report
from warp_ds.report.tradeoff import Point, front


def test_one_setting_at_a_time() -> None:
    arguments = SweepArguments(
        keep_ratios="0.1,0.3",
        layer_type_sets="ffn_down;attn_k,attn_q",
        layer_ranges="early,0-1",
        sample_counts="20,0",
        bases="identity",
        units="column",
        scopes="global",
    )
    found = {label: (arm.basis, arm.unit, change) for label, arm, change in settings(arguments)}
    assert found == {
        "middle": ("activation", "entry", {}),
        "keep_ratio 0.3": ("activation", "entry", {"keep_ratio": 0.3}),
        "ffn_down": ("activation", "entry", {"layer_type": "ffn_down"}),
        "attn_k,attn_q": ("activation", "entry", {"layer_type": "attn_q,attn_k"}),
        "layers early": ("activation", "entry", {"target_layers": "early"}),
        "layers 0-1": ("activation", "entry", {"target_layers": "0-1"}),
        "20 samples": ("activation", "entry", {"safety_samples": 20}),
        "all samples": ("activation", "entry", {"safety_samples": 0}),
        "basis identity": ("identity", "entry", {}),
        "unit column": ("activation", "column", {}),
        "scope global": ("activation", "entry", {"mask_scope": "global"}),
    }


@pytest.mark.parametrize("flags, message", [
    ({"keep_ratios": "2"}, "from 0 to 1"), ({"keep_ratios": "many"}, "comma-separated numbers"),
    ({"bases": "nonsense"}, "--bases nonsense: choose from"), ({"layer_type_sets": "ffn"}, "--layer_type"),
])  # fmt: skip
def test_unusable_settings_are_refused(flags: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        list(settings(SweepArguments(**flags)))


def test_the_front_is_what_nothing_beats() -> None:
    def row(arm: str, nll: float, refusal: float) -> Point:
        return Point(arm, 1.0, 1, {"utility_nll": nll, "refusal_rate": refusal})

    points = [row("a", 1.0, 0.5), row("b", 0.5, 0.2), row("worse", 1.1, 0.5), row("c", 2.0, 0.9), row("tied", 0.5, 0.1)]
    assert front(points) == [("b", 1.0), ("a", 1.0), ("c", 1.0)]


def sweep(root: Path) -> str:
    return str(
        run_sweep(
            SweepArguments(
                **common(
                    root,
                    root / "out",
                    safety_data=str(root / "refusals.jsonl"),
                    utility_data=str(root / "utility.jsonl"),
                    utility_heldout=str(root / "utility.jsonl"),
                    harmful_data=str(root / "jailbreaks.jsonl"),
                    learning_rates="1e-3",
                    epochs=1,
                    global_batch_size=4,
                    max_new_tokens=12,
                    safety_samples=0,
                    layer_type="ffn_down",
                    keep_ratios="0.3",
                )
            )
        )
    )


def test_a_small_sweep(tmp_path: Path) -> None:
    make_models(tmp_path)
    run = Path(run_ranks(1, sweep, tmp_path)[0])
    report = json.loads((run / "report.json").read_text())
    assert [row["arm"] for row in report["points"]] == ["before", "middle", "keep_ratio 0.3"]
    assert {arm for arm, _ in report["front"]} <= {row["arm"] for row in report["points"]}
    assert report["at_utility"] == report["points"][1]["utility_nll"]
    assert report["keep_ratio"] == 0.1, "the last setting's, not the middle's"
    text = write_report([run], tmp_path / "report.html").read_text()
    for arm in ("before", "middle", "keep_ratio 0.3"):
        assert f"<dt>{arm}</dt>" in text, "its answers are not found"
    assert "Broad: the points that no other beats" in text and "<!-- the front -->" in text
    # Two steps are too few for a loss to be logged: these stand for what a longer training writes.
    settings = ("middle", "keep_ratio_0.3")
    for setting in settings:
        (log,) = (run / setting).glob("phase3_middle_*/metrics.jsonl")
        log.write_text(log.read_text() + "".join(json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in (1, 2)))
    text = write_report([run], tmp_path / "report.html").read_text()
    for setting in settings:
        assert f"<!-- {setting}/middle_lr0.001_seed42 -->" in text, "its training curve is not drawn"
    frozen = {p.parents[2].name: json.loads(p.read_text())["frozen"] for p in run.glob("*/phase2_*/masks/metadata.json")}
    assert frozen["keep_ratio_0.3"] == pytest.approx(3 * frozen["middle"], abs=5)
