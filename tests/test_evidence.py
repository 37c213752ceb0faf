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
