"""What runs took, in seconds and memory, and that against training without a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from warp_ds.report.tables import Block, Table
from warp_ds.store.files import read_json, read_lines
from warp_ds.store.runs import run_config
from warp_ds.store.state import STATE

CAPTION = (
    "Seconds: wall time of the launch that finished the run. Peak memory: of the rank that held most, from the run's start on; "
    "what its process held before is in it (the phases of a comparison share one). Where the system cannot count anew it is "
    "the process's so far, marked *. × plain: over the median of the training runs without a mask that lie beside the run and "
    "have its start model and number of ranks, of the same parameters (for other phases: of all) and data where there are any; "
    "not for runs that were stopped and went on, of which the last launch alone is counted. Tokens (without padding), their "
    "speed and FLOPs are of the whole run, resumed or not: 6 N a token, N the parameters that a token is multiplied with; MFU "
    "is that over the bf16 peak of the GPUs; rotating: rank 0's time in the masked step's own work."
)
MEASURES = {"seconds": ("seconds", 1.0), "host": ("peak GB", 1e9), "gpu": ("GPU peak GB", 1e9)}


def table(runs: Sequence[Path], name: Callable[[Path], str]) -> Table:
    """Of the finished ones of ``runs``; columns that would stay empty are left out."""
    measured = {run: _measured(run) for run in runs if (run / "finished.json").is_file()}
    configs = {run: run_config(run) for run in measured}
    rows: list[dict[str, str]] = []
    for run, own in measured.items():
        config = configs[run]
        row = {"run": name(run), "phase": str(config.get("phase", "")), "ranks": str(config.get("world_size", ""))}
        whole = not _went_on(run)
        plain = [measured[other] for other in _plain(run, configs) if not _went_on(other)] if whole else []
        for measure, (title, unit) in MEASURES.items():
            value, beside = own.get(measure), [p[measure] for p in plain if p.get(measure)]
            star = "*" if measure == "host" and own.get("of_process") else ""
            row[title] = "" if value is None else f"{value / unit:.{1 if unit == 1 else 2}f}{star}"
            row[f"{title} × plain"] = f"{value / median(beside):.2f}" if value and beside else ""
        rows.append(row | _steps(run, whole))
    head = [column for column in (rows[0] if rows else ()) if any(row[column] for row in rows)]
    return Table(head, [[row[column] for column in head] for row in rows])


def blocks(runs: Sequence[Path], name: Callable[[Path], str]) -> list[Block]:
    """The same with its caption; nothing where no run has finished."""
    spent = table(runs, name)
    return ["What each phase took:", spent, CAPTION] if spent.rows else []


def _measured(run: Path) -> dict[str, Any]:
    finished = read_json(run / "finished.json")
    return {"seconds": float(finished["seconds"]), **finished.get("peak_memory", {})}


def _plain(run: Path, configs: Mapping[Path, dict[str, Any]]) -> list[Path]:
    """The training runs without a mask that ``run`` is held against."""

    def start(config: dict[str, Any]) -> tuple[Any, ...]:
        return config.get("inputs", {}).get("model"), config.get("world_size")

    def scope(config: dict[str, Any]) -> Any:
        return config.get("settings", {}).get("train_scope", "all")

    def data(config: dict[str, Any]) -> Any:
        return config.get("inputs", {}).get("data")

    own = configs[run]
    beside = {
        other: config
        for other, config in configs.items()
        if other.parent == run.parent
        and start(config) == start(own)
        and config.get("phase") == "phase3"
        and "masks" not in config.get("inputs", {})
    }
    for like in (scope, data):
        beside = {other: config for other, config in beside.items() if like(config) == like(own)} or beside
    return list(beside)


def _went_on(run: Path) -> bool:
    """Whether a later launch finished what another had begun: what it measured is not the whole run's."""
    state = run / STATE
    return state.is_file() and any(line.get("event") == "restarted" for line in read_lines(state))


def _steps(run: Path, whole: bool) -> dict[str, str]:
    """How many steps a training run took, and, where one launch took all of them, the seconds of one; and its speed."""
    lines = read_lines(run / "metrics.jsonl") if (run / "metrics.jsonl").is_file() else []
    steps = max((int(line["step"]) for line in lines), default=0)
    runtime = next((line["train_runtime"] for line in lines if "train_runtime" in line), None)
    trained = read_json(run / "finished.json").get("training", {})

    def mean(name: str, how: str) -> str:
        values = [float(line[name]) for line in lines if "loss" in line and name in line]
        return format(sum(values) / len(values), how) if values else ""

    def total(name: str, how: str) -> str:
        return format(float(trained[name]), how) if name in trained else ""

    return {
        "steps": str(steps or ""),
        "seconds a step": f"{runtime / steps:.3f}" if runtime and steps and whole else "",
        "of it rotating": mean("rotate_seconds", ".3f"),
        "rotating, share": mean("rotate_share", ".1%"),
        "tokens": total("num_tokens", ",.0f"),
        "tokens/s": total("tokens_per_second", ",.0f"),
        "tokens/s a rank": total("tokens_per_second_per_rank", ",.0f"),
        "padding": total("padding_share", ".1%"),
        "MFU": total("mfu", ".1%"),
        "FLOPs": total("total_flos", ".2e"),
    }
