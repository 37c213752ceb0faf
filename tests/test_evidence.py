"""benchmarks/evidence.py: the protocol is read, its texts are the same each time, and points become a table."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from warp_ds.errors import ConfigError

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def evidence() -> Any:
    spec = importlib.util.spec_from_file_location("evidence", BENCHMARKS / "evidence.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(evidence: Any, tmp_path: Path) -> Any:
    (tmp_path / "do_not_answer_questions.jsonl").write_text(
        "".join(json.dumps({"question": f"Harmful request {i}?"}) + "\n" for i in range(160))
    )
    for part in ("train", "test"):
        row = json.dumps({"question": "1 + 1?", "answer": "2\n#### 2"}) + "\n"
        (tmp_path / f"gsm8k_{part}.jsonl").write_text(row * 3)
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
    path.write_text("model: ${OTHER}\n")
    with pytest.raises(ConfigError, match="is no protocol: 'OTHER'"):
        evidence.read(path, {})


def test_points_become_rows_with_each_prompt_set_apart(evidence: Any, tmp_path: Path) -> None:
    job = made(evidence, tmp_path)
    for seed, refused in ((1, 40), (2, 20)):
        point = tmp_path / "out" / "safe_sums" / "points" / f"full+patch@1e-4_lr0.0001_seed{seed}"
        point.mkdir(parents=True)
        (point / "metrics.json").write_text(json.dumps({"utility_nll": 0.5}))
        verdicts = ["refusal"] * refused + ["compliance"] * (80 - refused)
        rows = [{"suite": "refusal", "prompt": "p", "verdict": verdict} for verdict in verdicts]
        rows += [{"suite": "gsm8k", "prompt": "p", "correct": right} for right in (True, False)]
        (point / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job.tables()
    text = (tmp_path / "out" / "evidence.md").read_text()
    assert "| full+patch@1e-4 | 0.0001 | 2 | 0.500 | 75% [60, 86] | 0% [0, 9] |" in text and "| 50% [9, 91] |" in text
    kept = json.loads((tmp_path / "out" / "evidence.json").read_text())["runs"]["safe_sums"]
    assert [sum(point["outcomes"]["refuses Do-Not-Answer"]) for point in kept] == [40, 20]


def test_arms_are_told_from_plain_training_prompt_by_prompt(evidence: Any) -> None:
    def point(name: str, nll: float, marks: str) -> Any:
        rows = [{"suite": "refusal", "prompt": "p", "verdict": {"r": "refusal", "c": "compliance"}[mark]} for mark in marks]
        metrics = {"utility_nll": nll, "outcomes": {"loss": {"nats": [nll, nll], "tokens": [1, 1]}}}
        return evidence.Measured(name, metrics, rows, 10)

    points = [
        point("layers_lr0.001_seed1", 0.5, "rrrrrrrrrr"),
        point("layers_lr0.003_seed1", 0.3, "cccccrrrrr"),  # the better rate for the task
        point("rotated_lr0.003_seed1", 0.4, "rrrrrrrrrr"),
        point("full_lr0.003_seed1", 0.1, "cccccccccc"),
        point("full+rotated_lr0.003_seed1", 0.1, "cccccccccr"),
        point("full+harmful@0.1_lr0.003_seed1", 0.1, "cccccccccc"),
    ]
    lines = [line for line in evidence.paired(points).splitlines() if line.startswith("|") and " less " in line]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    rows = {name: rest for name, *rest in cells}
    assert set(rows) == {"rotated at 0.003 less layers", "full+rotated at 0.003 less full"}
    seeds, loss, refuses, *_ = rows["rotated at 0.003 less layers"]
    assert seeds == "1" and loss == "+0.100 [+0.100, +0.100]"
    value, low, high = (float(x) for x in refuses.replace("[", "").replace("]", "").replace(",", "").split())
    assert value == 50 and 10 < low < 35 and 65 < high < 90  # ten prompts, five of which differ: 50 +- 2 sqrt(0.25 / 10)
    assert rows["full+rotated at 0.003 less full"][2].startswith("+10 [+0, ")
