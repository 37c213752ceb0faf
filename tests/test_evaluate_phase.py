"""launch/evaluate.py as a whole: every measurement, on 1, 2 and 3 ranks, killed and resumed, and noise called noise."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_jobs import everything, killed_and_resumed, make_models
from masked_artefacts import odd_model, write_artefacts
from phase3_jobs import flattened
from ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

from warp_ds.data.formats import encode
from warp_ds.phases import fitting
from warp_ds.phases.fitting import fitting_sets
from warp_ds.store.files import write_json
from warp_ds.store.masks import MaskStore

WORLDS = (1, 2, 3)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation")
    make_models(path)
    return path


@pytest.fixture(scope="module")
def results(root: Path) -> dict[int, dict[str, Any]]:
    return {world: run_ranks(world, everything, root, root / f"world{world}")[0] for world in WORLDS}


def test_a_model_that_prints_random_words_is_incoherent_and_never_safe(results: Any) -> None:
    metrics = results[1]["words"]["metrics"]
    assert metrics["refusal_rate"] == 0.0 and metrics["incoherent_rate"] == 1.0 and metrics["attack_success_rate"] == 0.0
    assert metrics["harmless_incoherent_rate"] == 1.0
    assert all(len(row["answer"].split()) >= 6 for row in results[1]["words"]["answers"])
    assert results[1]["m"]["metrics"]["refusal_rate"] == 1.0


def test_any_number_of_ranks_gives_the_same_answers_and_verdicts(results: Any) -> None:
    for world in WORLDS[1:]:
        for model, found in results[1].items():
            other = results[world][model]
            for row, same in zip(found["answers"], other["answers"], strict=True):
                assert row["judge"] == pytest.approx(same["judge"], abs=1e-5) if "judge" in row else True
                assert {k: v for k, v in row.items() if k != "judge"} == {k: v for k, v in same.items() if k != "judge"}
            for name, value in flattened(found["metrics"]).items():
                # fp32 losses; and bases of other world sizes, equal within rounding. What is not finite is null in the file.
                same = value if value is None or isinstance(value, str) else pytest.approx(value, rel=1e-4)
                assert flattened(other["metrics"])[name] == same, (world, model, name)


def test_rates_add_up_and_pairs_are_counted(results: Any) -> None:
    metrics, words = results[1]["m"]["metrics"], results[1]["words"]["metrics"]
    assert metrics["refusal_rate"] + metrics["incoherent_rate"] + metrics["attack_success_rate"] == pytest.approx(1.0)
    assert (metrics["refusal_lost_against_before"], metrics["refusal_p_against_before"]) == (0, 1.0)
    # 7 of 7 refusals lost: two-sided, 2 / 2^7.
    assert (words["refusal_lost_against_before"], words["refusal_p_against_before"]) == (7, pytest.approx(2 / 128))
    assert set(metrics) >= {
        "attack_jailbreaks_refusal_rate",
        "attack_jailbreaks_attack_success_rate",
        "attack_jailbreaks_refusal_interval",
    }
    assert metrics["judge_n"] == 7 and 0 <= metrics["judge_agreement"] <= 1


def test_prompts_that_the_basis_was_fitted_on_are_counted(root: Path, results: Any) -> None:
    assert results[1]["moved"]["metrics"]["overlap"] == {f"harmful in {root / 'refusals.jsonl'}": 7}
    assert "overlap" not in results[1]["words"]["metrics"]  # no basis is given, and no run made the model


def test_a_models_run_leads_to_all_that_it_was_fitted_on(tmp_path: Path) -> None:
    """Phase 3's data, and through its masks, their basis and its start model those of phases 2, 1 and 0."""
    artefacts = write_artefacts(tmp_path, odd_model())
    shutil.copytree(artefacts.masks, tmp_path / "phase2" / "masks")
    metadata = json.loads((artefacts.masks / "metadata.json").read_text())
    write_json(tmp_path / "phase2" / "masks" / "metadata.json", metadata | {"basis_dir": str(tmp_path / "phase1" / "basis")})
    for phase, kind, more in (
        ("phase0", "safety", {"model_name": "hub/base"}),
        ("phase1", "safety", {}),
        ("phase2", "safety", {"basis_dir": None}),
        ("phase3", "utility", {"masks_dir": None}),
    ):
        data = tmp_path / f"{phase}.jsonl"
        data.write_text(json.dumps({"prompt": f"of {phase}", "response": "x"}) + "\n")
        write_json(
            tmp_path / phase / "config.json",
            {
                "phase": phase,
                "inputs": {"masks": MaskStore(tmp_path / "phase2" / "masks").fingerprint()},
                "settings": {
                    "model_name": str(tmp_path / "phase0" / "model"),
                    f"{kind}_data": str(data),
                    f"{kind}_split": "train",
                    f"{kind}_samples": 0,
                    **more,
                },
            },
        )
    write_json(tmp_path / "phase2" / "finished.json", {})
    found = fitting_sets([tmp_path / "phase3"])
    assert found == {str(tmp_path / f"phase{i}.jsonl"): [f"of phase{i}"] for i in (3, 0, 2, 1)}
    (tmp_path / "phase0.jsonl").unlink()
    assert len(fitting_sets([tmp_path / "phase3"])) == 3
    assert fitting_sets([tmp_path]) == {}


@pytest.mark.parametrize(
    "chooser, chosen", [({}, False), ({"early_stopping_patience": 2}, True), ({"load_best_model_at_end": True}, True)]
)
def test_a_model_is_fitted_on_what_chose_it(tmp_path: Path, chooser: dict[str, Any], chosen: bool) -> None:
    for name in ("task", "held", "asked"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": f"of {name}", "response": "x"}) + "\n")
    settings = {
        "model_name": "hub/base",
        "masks_dir": "none",
        **{"utility_data": str(tmp_path / "task.jsonl"), "utility_split": "train", "utility_samples": 0},
        **{"eval_data": str(tmp_path / "held.jsonl"), "eval_split": "test", "eval_samples": 200},
        **{"eval_safety": str(tmp_path / "asked.jsonl"), "eval_safety_samples": 20, **chooser},
    }
    write_json(tmp_path / "phase3" / "config.json", {"phase": "phase3", "settings": settings})
    found = fitting_sets([tmp_path / "phase3"])
    names = ("task", "held", "asked") if chosen else ("task",)
    assert found == {str(tmp_path / f"{name}.jsonl"): [f"of {name}"] for name in names}


def test_a_model_is_fitted_on_what_it_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read as the run read it: --streaming too."""
    for name in ("task", "replayed"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"q": f"of {name}", "a": "x"}) + "\n")
    settings = {
        "model_name": "hub/base",
        "masks_dir": "none",
        **{"utility_data": str(tmp_path / "task.jsonl"), "utility_split": "train", "utility_samples": 0},
        **{"replay_data": str(tmp_path / "replayed.jsonl"), "objective": "der", "streaming": True},
        **{"prompt_column": "q", "response_column": "a"},
    }
    write_json(tmp_path / "phase3" / "config.json", {"phase": "phase3", "settings": settings})
    read, streamed = fitting.load_samples, []

    def watched(*args: Any, **options: Any) -> Any:
        streamed.append(options.get("streaming"))
        return read(*args, **options)

    monkeypatch.setattr(fitting, "load_samples", watched)
    found = fitting_sets([tmp_path / "phase3"])
    assert found == {str(tmp_path / f"{name}.jsonl"): [f"of {name}"] for name in ("task", "replayed")}
    assert streamed == [True, True]


def test_relative_names_of_a_run_start_where_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "fitted.jsonl").write_text(json.dumps({"prompt": "p", "response": "x"}) + "\n")
    write_json(
        tmp_path / "phase1" / "config.json",
        {
            "phase": "phase1",
            "working_directory": str(tmp_path),
            "settings": {"model_name": "hub/base", "safety_data": "fitted.jsonl", "safety_split": "train", "safety_samples": 0},
        },
    )
    assert fitting_sets([tmp_path / "phase1"]) == {"fitted.jsonl": ["p"]}


def test_a_card_of_ours_gets_the_table_and_no_other_does(root: Path, results: Any) -> None:
    card, metrics = (root / "moved" / "README.md").read_text(), results[3]["moved"]["metrics"]
    assert card.count("## What was measured") == 1, "once for every world"
    for who, prefix in (("this model", ""), ("this model, jailbreaks", "attack_jailbreaks_")):
        low, high = metrics[f"{prefix}refusal_interval"]
        assert f"| {who} | {metrics[f'{prefix}refusal_rate']:.0%} [{100 * low:.0f}, {100 * high:.0f}] |" in card
    assert "| before training | 100% [" in card and "7 stood in a fitting set" in card
    assert not (root / "words" / "README.md").exists()


def test_it_ends_in_one_table_on_rank_0(results: Any) -> None:
    for world in WORLDS:
        lines = results[world]["moved"]["printed"].splitlines()
        cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines if line[0] in "│┃"]
        assert [row[0] for row in cells] == [
            *("model", "before training", "before training, jailbreaks", "this model", "this model, jailbreaks")
        ]
        assert cells[0][1] == "refuses" and cells[1][1].startswith("100% [")
        assert "refusals lost and" in "".join(lines) and lines[-1].endswith("metrics.json")


def test_movement_is_what_the_outputs_do_on_the_safety_tokens(root: Path, results: Any) -> None:
    assert results[1]["m"]["metrics"]["movement"] == 0.0
    found = results[1]["moved"]["metrics"]["movement_by_layer"]
    name = "model.layers.1.mlp.down_proj"
    assert {layer for layer, value in found.items() if value} == {name}
    # Independent: run the model before training on every safety sample, and apply both weights to what the layer sees.
    before, after = (AutoModelForCausalLM.from_pretrained(root / which).double() for which in ("m", "moved"))
    tokenizer = AutoTokenizer.from_pretrained(root / "m")
    seen = []
    before.get_submodule(name).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    for line in (root / "refusals.jsonl").read_text().splitlines():
        before(torch.tensor([encode(**json.loads(line), tokenizer=tokenizer)["input_ids"]]))
    x = torch.cat(seen)
    w, moved = (model.get_submodule(name).weight for model in (before, after))
    expected = ((x @ (moved - w).T).square().sum() / (x @ w.T).square().sum()).sqrt().item()
    assert found[name] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_evaluation_goes_on_where_it_was(root: Path, world: int) -> None:
    found = run_ranks(world, killed_and_resumed, root, root / f"killed{world}")[0]
    assert found["left"], "nothing was kept"
    assert found["written"] == ["answers.jsonl", "metrics.json"], "what was measured waits for the movement"
    assert found["resumed"]["answers"] == found["whole"]["answers"]
    assert found["resumed"]["metrics"] == found["whole"]["metrics"]
    assert not list(Path(found["resumed"]["run"]).glob("*partial*"))
    # 8 batches over the ranks; those of the reference and each rank's first two are not made again.
    assert found["calls"] == 8 // world - 2
