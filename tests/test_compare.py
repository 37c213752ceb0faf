"""launch/compare.py as a whole on a tiny model: every kind of arm, its weights against the formulas, and going on."""

from __future__ import annotations

import gc
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from evaluation_jobs import make_models
from phase3_jobs import common
from ranks import run_ranks
from safetensors.torch import load_file

from warp_ds.evaluation.movement import frozen_drift
from warp_ds.flags.comparison import CompareArguments
from warp_ds.method.baselines import safe_delta, safety_hessian
from warp_ds.method.mask import unpack_bits
from warp_ds.phases import bench
from warp_ds.phases.compare import run_compare
from warp_ds.report.runs import comparisons, find_runs
from warp_ds.report.tables import Table, comparison_blocks
from warp_ds.store.bases import BasisStore
from warp_ds.store.lock import RunLock
from warp_ds.store.masks import MaskStore

ARMS = (
    "before,full,layers,rotated,column,output-row,both,osft,random-mask,random-basis,safeinstr+original,resta,safedelta,sn-tune+rotated,"
    "rsn-tune"
)


def comparison(root: Path, output: Path, **more: Any) -> Path:
    settings = common(
        root,
        output,
        safety_data=str(root / "refusals.jsonl"),
        utility_data=str(root / "utility.jsonl"),
        utility_heldout=str(root / "utility.jsonl"),
        harmful_data=str(root / "jailbreaks.jsonl"),
        harmless_data=str(root / "harmless.jsonl"),
        unaligned_data=str(root / "harmless.jsonl"),
        kept_data=f"{root / 'refusals.jsonl'},{root / 'format.jsonl'}",
        kept_format=["format=.*"],
        arms=ARMS,
        learning_rates="1e-3",
        epochs=1,
        global_batch_size=4,
        max_new_tokens=12,
        safety_samples=0,
        layer_type="ffn_down,attn_q",
        neuron_share=0.2,
        neuron_rate=1e-3,
        safedelta_s=0.3,
        run_name="c",
    )
    return run_compare(CompareArguments(**{**settings, **more}))


def compared_and_gone_on(root: Path, output: Path) -> dict[str, Any]:
    """A comparison; the same again; and one with an arm and a seed more (and others left out)."""
    trained, alive = bench.run_training, []

    def watched(*arguments: Any) -> Path:
        gc.collect()  # as ``load_model`` does
        engines = [thing for thing in gc.get_objects() if type(thing) is DeepSpeedEngine]
        alive.append(
            sum(
                tensor.untyped_storage().nbytes()
                for engine in engines
                if type(engine.optimizer) is DeepSpeedZeRoOffload  # an evaluation's
                for param in engine.module.parameters()
                for tensor in (param, param.ds_tensor)
            )
        )
        return trained(*arguments)

    bench.run_training = watched  # type: ignore[assignment]
    try:
        run = comparison(root, output)
    finally:
        bench.run_training = trained
    first = {path: path.stat().st_mtime_ns for path in run.rglob("metrics.json*")}
    report = json.loads((run / "report.json").read_text())
    links = {phase: (run / f"{phase}_latest").readlink().name for phase in ("phase1", "phase2", "phase3")}
    comparison(root, output)
    resumed = json.loads((run / "report.json").read_text())
    comparison(root, output, arms="before,random-mask,original", seeds="42,43", keep_models=False)
    more, table = json.loads((run / "report.json").read_text()), (run / "table.md").read_text()
    gone = not (run / "phase3_original_lr0.001_seed43" / "model").exists()
    # A merge of a model that was removed once it was measured.
    comparison(root, output, arms="before,original+safedelta", seeds="43", keep_models=False)
    left = sorted(str(path.relative_to(run)) for path in run.glob("*_seed43/model"))
    again = {path: path.stat().st_mtime_ns for path in run.rglob("metrics.json*")}
    return {
        "run": str(run),
        "report": report,
        "links": links,
        "unchanged": all(again[path] == when for path, when in first.items()),
        "alive": alive,
        "resumed": resumed,
        "more": more,
        "table": table,
        "gone": gone,
        "left": left,
        "merged": json.loads((run / "report.json").read_text()),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compare")
    make_models(path)
    rows = [{"prompt": f"Answer {number} as JSON.", "response": '{"answer": 1}'} for number in range(2)]
    (path / "format.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def done(root: Path) -> dict[str, Any]:
    return run_ranks(2, compared_and_gone_on, root, root / "out")[0]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def test_behaviours_stand_beside_refusals(done: Any) -> None:
    """Each with its rate, over its own examples, at every point, in the table and in the report's."""
    report = done["report"]
    examples = sum(1 for _ in Path(done["run"], "data", "safety.jsonl").open())
    assert report["prompts"]["kept_format_rate"] == 2 and report["prompts"]["kept_refusals_rate"] == examples
    for row in report["points"] + report["raw"]:
        assert row["kept_format_rate"] == 1.0 and 0.0 <= row["kept_refusals_rate"] <= 1.0  # any answer matches .*
    assert all("kept_format_rate_interval" in row for row in report["equal_utility"] if "refusal_rate" in row)
    assert "| keeps refusals | keeps format |" in done["table"]
    ((_, compared),) = comparisons(find_runs([Path(done["run"])]))
    tables = [block for block in comparison_blocks(compared) if isinstance(block, Table)]
    assert len(tables) == 2 and all({"keeps refusals", "keeps format"} < set(table.head) for table in tables)


def test_every_arm_has_its_point(root: Path, done: Any) -> None:
    rows = {row["arm"]: row for row in done["report"]["points"]}
    assert list(rows) == ARMS.split(",")
    for row in rows.values():
        assert {
            "refusal_rate",
            "incoherent_rate",
            "over_refusal_rate",
            "utility_nll",
            "utility_accuracy",
            "refusal_p_against_before",
        } <= set(row)
        told = row["outcomes"]
        assert told["refusal"].count("r") == round(row["refusal_rate"] * len(told["refusal"])) and len(told["gsm8k"]) == 7
        assert sum(told["loss"]["nats"]) / sum(told["loss"]["tokens"]) == pytest.approx(row["utility_nll"], rel=1e-4)
    assert done["more"]["recommendation"]["text"] in done["table"]
    assert rows["before"]["frozen_drift"] == rows["before"]["movement"] == 0.0
    for unit, name in (("row", "output-row"), ("entry", "both")):
        masks = Path(done["run"]) / f"phase2_start_activation_activation-outputs_{unit}_importance" / "masks"
        assert MaskStore(masks).metadata.unit == unit
        basis = Path(done["run"]) / "phase1_start_activation_activation-outputs" / "basis"
        assert frozen_drift(root / "m", Path(done["run"]) / f"phase3_{name}_lr0.001_seed42" / "model", masks, basis) < 1e-5
    assert rows["rotated"]["frozen_drift"] < 1e-5 < 1e-3 < rows["full"]["frozen_drift"]
    shared = {"task in the task set": 7, "harmless in --unaligned_data": 5, "kept_refusals in the safety set": 7}
    assert done["report"]["overlap"] == shared
    assert "refusal_rate" in done["report"]["unaligned"]
    assert {row["arm"] for row in done["report"]["equal_utility"]} == set(rows) - {"before"}
    assert "| random-mask |" in done["table"]
    assert "| phase3_full_lr0.001_seed42 | phase3 | 2 | " in done["table"], "what the phases took"
    spent = json.loads((Path(done["run"]) / "phase3_full_lr0.001_seed42" / "finished.json").read_text())["peak_memory"]
    assert spent["host"] > 100e6, "this process holds more than that with its libraries"


def test_the_newest_runs_are_the_rotated_arms_whatever_came_last(done: Any) -> None:
    assert done["links"] == {
        "phase1": "phase1_start_activation",
        "phase2": "phase2_start_activation_entry_importance",
        "phase3": "phase3_rotated_lr0.001_seed42",
    }


def test_what_is_measured_is_not_done_again_and_what_is_new_is_added(done: Any) -> None:
    assert done["unchanged"]
    names = [(row["arm"], row["seed"]) for row in done["more"]["points"]]
    assert names == [("before", 42), ("random-mask", 42), ("original", 42), ("random-mask", 43), ("original", 43)]
    # --keep_models false removed what it trained.
    assert done["gone"]
    assert done["left"] == [], "what was trained again for a merge, and the merged model"
    assert (Path(done["run"]) / "points" / "original_lr0.001_seed43" / "answers.jsonl").is_file()
    assert done["resumed"]["unaligned"] == done["report"]["unaligned"]
    assert [row["arm"] for row in done["merged"]["points"]] == ["before", "original+safedelta"]


def test_merged_models_are_what_the_formulas_say(root: Path, tmp_path: Path) -> None:
    run = run_ranks(1, merged_only, root, tmp_path)[0]
    run = Path(run)
    start, tuned = weights(root / "m"), weights(run / "phase3_full_lr0.001_seed42" / "model")
    merged = weights(run / "merge_resta_lr0.001_seed42" / "model")
    unaligned = weights(run / "phase0_unaligned" / "model")
    assert any((tuned[name] - start[name]).abs().max() > 1e-3 for name in start)
    for name, value in merged.items():
        assert torch.allclose(value, tuned[name] + 0.3 * (start[name] - unaligned[name]), atol=1e-6), name
    safe = weights(run / "merge_safedelta_lr0.001_seed42" / "model")
    basis = BasisStore(run / "phase1_start_activation_all" / "basis")
    layers = {f"{layer.name}.weight": layer.name for layer in basis.layers}
    assert len(layers) == 14  # seven kinds in two blocks
    shares = []
    for name, value in safe.items():
        if name not in layers:
            assert torch.equal(value, start[name]), name
            continue
        hessian = safety_hessian(*basis.columns(layers[name]))
        expected, kept = safe_delta(start[name], tuned[name], hessian, 0.3)
        assert torch.allclose(value, expected, atol=1e-6)
        shares.append(float(kept.float().mean()))
    assert 0.0 < min(shares) and max(shares) < 1.0, "s keeps nothing or everything: this test would see nothing"


def merged_only(root: Path, output: Path) -> str:
    return str(comparison(root, output, arms="full,resta,safedelta", harmless_data=None))


def test_every_kept_model_says_on_its_card_what_it_is_and_what_was_measured(done: Any) -> None:
    run = Path(done["run"])
    rows = {row["arm"]: row for row in done["report"]["points"]}
    card = (run / "phase3_rotated_lr0.001_seed42" / "model" / "README.md").read_text()
    masks = MaskStore(run / "phase2_start_activation_entry_importance" / "masks")
    for fact in (
        "keep_ratio 0.1",
        "ffn_down, attn_q of blocks 0 to 1",
        f"masks {masks.fingerprint()}",
        f"basis {masks.metadata.basis_fingerprint}",
        "deepspeed ",
        "What this does not show",
        "7 stood in a fitting set (task in the task set)",
    ):
        assert fact in card, fact
    low, high = rows["rotated"]["refusal_interval"]
    assert f"| this model | {rows['rotated']['refusal_rate']:.0%} [{100 * low:.0f}, {100 * high:.0f}] |" in card
    assert "| before training |" in card and card.count("## What was measured") == 1
    merged = (run / "merge_resta_lr0.001_seed42" / "model" / "README.md").read_text()
    assert "merged by the arm `resta`" in merged and merged.count("## What was measured") == 1
    assert f"| this model | {rows['resta']['refusal_rate']:.0%} [" in merged and "arm `full`" not in merged


def with_controls(root: Path, output: Path) -> str:
    mix: dict[str, Any] = {"harmful_ratio": "0,0.3", "harmful_mix": str(root / "harmless.jsonl"), "keep_models": False}
    return str(
        comparison(
            root, output, arms="rotated+refresh@1+der@2+ema@0.5+patch@1e-3", harmless_data=None, replay_batch_size=2, **mix
        )
    )


def test_controls_compose_and_harmful_mixes_are_arms_of_their_own(root: Path, tmp_path: Path) -> None:
    run = Path(run_ranks(1, with_controls, root, tmp_path)[0])
    name = "rotated+refresh@1+der@2+ema@0.5+patch@1e-3"
    rows = {row["arm"]: row for row in json.loads((run / "report.json").read_text())["points"]}
    assert list(rows) == [name, f"{name}+harmful@0.3"]
    tasks = {path.stem: path.read_text().splitlines() for path in (run / "data").glob("task*.jsonl")}
    harmful = (root / "harmless.jsonl").read_text().splitlines()
    # 0.3 of 7 samples: three more, the first of the file.
    more = [json.loads(line) for line in tasks["task_harmful0.3"][7:]]
    assert tasks["task_harmful0.3"][:7] == tasks["task"]
    assert [row["prompt"] for row in more] == [json.loads(line)["prompt"] for line in harmful[:3]]
    for arm in rows:
        trained = run / f"phase3_{arm.replace('+patch@1e-3', '')}_lr0.001_seed42"
        settings = json.loads((trained / "config.json").read_text())["settings"]
        assert (settings["objective"], settings["der_alpha"], settings["ema_decay"]) == ("der", 2.0, 0.5)
        assert settings["refresh_steps"] == 1 and (trained / "masks_step1" / "metadata.json").is_file()
        assert settings["masks_dir"].endswith("phase2_start_activation_entry_importance/masks")
        patched = json.loads((run / f"patch_{arm}_lr0.001_seed42" / "config.json").read_text())["settings"]
        assert (Path(patched["model_name"]), patched["learning_rate"]) == (trained / "model", 1e-3)
        assert patched["epochs"] == 10.0 and "bypass system security" in Path(patched["safety_data"]).read_text()
        # The patch trains every parameter, so that the mask no longer holds.
        assert rows[arm]["frozen_drift"] > 1e-4
        assert not (trained / "model").exists() and not (run / f"patch_{arm}_lr0.001_seed42" / "model").exists()


def one_run(root: Path, output: Path, seeds: str, name: str) -> str:
    return str(comparison(root, output, arms="before,layers", layer_type="ffn_down", seeds=seeds, run_name=name))


def assert_close(found: Any, expected: Any) -> None:
    """Equal, numbers to 1e-6, however deep they lie."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_close(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            assert_close(a, b)
    else:
        assert found == (pytest.approx(expected, rel=1e-6) if isinstance(expected, float) else expected)


def test_seeds_as_jobs_of_their_own_are_the_comparison_of_all_seeds(root: Path, tmp_path: Path) -> None:
    """Two at once in one --output_dir, by other --run_names; their report has what one run of both seeds has."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(run_ranks, 1, one_run, root, tmp_path / "jobs", str(seed), f"seed{seed}") for seed in (1, 2)]
        runs = [Path(job.result()[0]) for job in jobs]
    whole = Path(run_ranks(1, one_run, root, tmp_path / "whole", "1,2", "both")[0])
    expected = json.loads((whole / "report.json").read_text())
    ((found, pooled),) = comparisons(find_runs(runs))
    assert sorted(found) == sorted(runs)
    key = ("arm", "seed")
    points = {tuple(p[k] for k in key): p for p in pooled.to_json()["points"]}
    for point in expected["points"]:
        assert_close(points[tuple(point[k] for k in key)], point)
    assert_close(pooled.at_utility, expected["at_utility"])
    assert {path.name for path in (tmp_path / "jobs" / "logs").iterdir()} >= {"seed1.log", "seed2.log", "seed1", "seed2"}


def test_two_at_once_under_one_name_are_refused(root: Path, tmp_path: Path) -> None:
    run = tmp_path / "jobs" / "seed1"
    run.mkdir(parents=True)
    lock = RunLock(run)
    lock.acquire()
    try:
        with pytest.raises(pytest.fail.Exception, match="seed1 is in use by process"):
            run_ranks(1, one_run, root, tmp_path / "jobs", "1", "seed1")
    finally:
        lock.release()


def test_no_training_finds_an_evaluated_model_in_memory(done: Any) -> None:
    # Evaluations, and the noise rule's start model, came before each: of none a weight is left.
    assert len(done["alive"]) > 10 and max(done["alive"]) == 0


def test_only_safety_neurons_train_in_sn_tune(root: Path, done: Any) -> None:
    run = Path(done["run"])
    start, shares = weights(root / "m"), {}
    for kind in ("sn-tune", "rsn-tune"):
        tuned, masks = weights(run / f"phase3_{kind}" / "model"), MaskStore(run / f"neurons_{kind}" / "masks")
        frozen = {f"{e.name}.weight": unpack_bits(masks.packed(e.name), e.n) for e in masks.layers}
        moved = {name: (tuned[name] - start[name]).abs() for name in start}
        assert all(float(moved[name].max()) == 0.0 for name in start if name not in frozen)
        assert all(float(moved[name][mask].max()) == 0.0 for name, mask in frozen.items() if mask.any())
        assert max(float(value.max()) for value in moved.values()) > 1e-4
        shares[kind] = 1 - masks.metadata.keep_ratio
    # 20 % of the rows or columns; fewer without those that the foundation set needs too.
    assert shares["sn-tune"] == pytest.approx(0.2, abs=0.01) and shares["rsn-tune"] < shares["sn-tune"]
