"""Three reporters at once on two ranks: curves, the run's name, its flags and fingerprints in each. Skipped, by name, where
one is not installed; none of them needs a network."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from phase3_jobs import make_model, phase3, phase12
from ranks import run_ranks

REPORTERS = ("tensorboard", "wandb", "mlflow")
MISSING = [name for name in REPORTERS if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
CURVES = {
    "train/loss",
    "train/tokens_per_second",
    "train/padding_share",
    "train/rotate_share",
    "train/masked_fraction",
    "eval/loss",
    "eval/refusal_rate",
    "eval/refusal_rate_low",
}


def job(root: Path, output: Path) -> str:
    os.environ.update(
        WANDB_MODE="offline",
        WANDB_DIR=str(output),
        WANDB_SILENT="true",
        MLFLOW_TRACKING_URI=f"file:{output / 'mlruns'}",
        MLFLOW_ALLOW_FILE_STORE="true",
    )
    output.mkdir(exist_ok=True)
    run = phase3(
        root,
        root / "artefacts",
        output / "runs",
        {"report_to": list(REPORTERS), "eval_strategy": "steps", "eval_steps": 2},
        run_name="rotated_run",
        eval_data=str(root / "harmless_heldout.jsonl"),
        eval_safety=str(root / "refusals_fit.jsonl"),
        max_new_tokens=4,
    )
    import wandb

    wandb.finish()
    return str(run)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """What the trackers wrote, and the run."""
    root = tmp_path_factory.mktemp("tracked")
    make_model(root)
    run_ranks(1, phase12, root, root / "artefacts")
    return root / "out", Path(run_ranks(2, job, root, root / "out")[0])


def facts(run: Path) -> dict[str, Any]:
    """What each tracker must know of the run."""
    inputs = json.loads((run / "config.json").read_text())["inputs"]
    fingerprints = {f"warp_ds/fingerprint of {name}": value for name, value in inputs.items()}
    return {"warp_ds/keep_ratio": 0.2, "warp_ds/phase": "phase3", "warp_ds/run_name": "rotated_run", **fingerprints}


def test_tensorboard(tracked: tuple[Path, Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run = tracked
    (log,) = {path.parent for path in (run / "tensorboard").rglob("events.*")}
    events = EventAccumulator(str(log))
    events.Reload()
    assert CURVES <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("eval/refusal_rate")] == [2, 4, 5]
    (text,) = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("args/text_summary")]
    assert not [name for name, value in facts(run).items() if f'"{name}": {json.dumps(value)}' not in text]


def records(file: Path) -> Iterator[Any]:
    """What W&B wrote offline: protobuf records in LevelDB's log format, blocks of 32 KiB after 7 bytes of W&B's own."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole, or the last part, of a record
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def test_wandb(tracked: tuple[Path, Path]) -> None:
    output, run = tracked
    (file,) = (output / "wandb").glob("offline-run-*/*.wandb")  # of rank 0 alone
    curves: set[str] = set()
    config: dict[str, str] = {}
    name = ""
    for record in records(file):
        name = record.run.display_name or name
        for item in (*record.run.config.update, *record.config.update):
            config[item.key or "/".join(item.nested_key)] = item.value_json
        curves |= {item.key or "/".join(item.nested_key) for item in record.history.item}
    assert name == "rotated_run" and curves >= CURVES
    assert not [fact for fact, value in facts(run).items() if config.get(fact) != json.dumps(value)]


def test_mlflow(tracked: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    output, run = tracked
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = MlflowClient(tracking_uri=f"file:{output / 'mlruns'}")
    (found,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert found.info.run_name == "rotated_run"
    curves = {name.replace("eval_", "eval/") if name.startswith("eval_") else f"train/{name}" for name in found.data.metrics}
    assert CURVES <= curves
    params = found.data.params
    assert not [name for name, value in facts(run).items() if params.get(name) != str(value)]
