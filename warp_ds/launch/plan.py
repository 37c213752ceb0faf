"""What a job will need, from the model's config alone: memory, bytes moved and disk for each phase, before it is queued.

Every figure is a sum of named parts, and each part is what the code of that phase allocates, sends or writes; what it
does not know (fragmentation, workspaces) shows in ``plan_checked.json``, where ``benchmarks/plan_check.py`` has
recorded predicted over measured.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from warp_ds.errors import ConfigError
from warp_ds.flags.jobs import PlanArguments
from warp_ds.launch.planning.estimate import gb
from warp_ds.launch.planning.fit import MOST_NODES, Plan, make_plan
from warp_ds.launch.planning.job import Job
from warp_ds.launch.planning.said import of_model

CHECKED = Path(__file__).with_name("plan_checked.json")


def run(arguments: PlanArguments) -> int:
    """``warp-ds plan``; exit status 1 where the job does not fit."""
    arguments.check_adapter()
    if arguments.lora_layers is not None:
        raise ConfigError("plan counts an adapter on each layer of --layer_type: give the types there, without --lora_layers")
    known = {f.name for f in fields(Job)}
    given = {name: value for name, value in vars(arguments).items() if name in known and name != "batch_size"}
    given.update(
        gpu_memory=arguments.gpu_memory * 1e9,
        host_memory=None if arguments.host_memory is None else arguments.host_memory * 1e9,
        tokens=arguments.max_length,
    )
    if arguments.safety_samples is not None:
        given.update(basis_samples=arguments.safety_samples, importance_samples=arguments.safety_samples)
    if arguments.batch_size is not None:
        given.update(batch_size=arguments.batch_size, train_batch_size=arguments.batch_size)
    made = make_plan(arguments.model_name, **given)
    print_plan(made)
    return 0 if made.fits else 1


def print_plan(made: Plan) -> None:
    """The table, what does not fit, and the smallest machine."""
    from rich.console import Console
    from rich.table import Table

    console, job, checked = Console(markup=False), made.job, _checked()
    title = (
        f"{made.shape.name}: {made.shape.parameters / 1e9:.2f} B parameters, {job.dtype}, {job.nodes} x "
        f"{job.gpus_per_node} GPUs of {gb(job.gpu_memory)} GB, offload {job.offload}, {made.ds_config}"
    )
    table = Table(title=title, caption=_caption(checked))
    for column in ("GB", "GPU, a rank", "host, a rank", "read, a rank", "sent, a rank", "written, all", "disk, all"):
        table.add_column(column, justify="left" if column == "GB" else "right")
    for phase in made.phases:
        figures = [phase.gpu_total, phase.host_total, phase.read, phase.sent, phase.written, phase.disk]
        table.add_row(phase.phase, *(gb(figure) for figure in figures))
        ratios = checked.get(phase.phase, {})
        if ratios:
            of_memory = _percent(ratios.get("memory"))
            rest = (_percent(ratios.get(name)) for name in ("read", "sent", "written", "disk"))
            table.add_row("  off by", of_memory, "(with GPU)", *rest, style="dim")
    console.print(table)
    for words in of_model(made.shape, job):
        console.print(words, highlight=False)
    for phase in made.phases:
        for place, parts in (("GPU", phase.gpu), ("host", phase.host)):
            named = ", ".join(f"{name} {gb(size)}" for name, size in sorted(parts.items(), key=lambda p: -p[1]) if size)
            console.print(f"{phase.phase} {place}: {named}", style="dim", highlight=False)
    masked = made.phases[-1]
    console.print(f"{masked.phase}: rotating takes about {masked.rotating:.2g} s a step (by arithmetic)", highlight=False)
    for text in made.too_big:
        console.print(f"does not fit: {text}", style="bold", highlight=False)
    for offload, least in made.smallest.items():
        needed = f"none up to {MOST_NODES} nodes" if least is None else f"{least[0]} nodes, {least[1]}"
        console.print(f"smallest with offload {offload}: {needed}", highlight=False)


def _checked() -> dict[str, Any]:
    return json.loads(CHECKED.read_text()) if CHECKED.exists() else {}


def _caption(checked: dict[str, Any]) -> str:
    if not checked:
        return "not checked against a run"
    where = dict.fromkeys(str(phase["where"]) for phase in checked.values())
    return f"off by: predicted against measured with {'; '.join(where)}"


def _percent(ratio: float | None) -> str:
    return "not measured" if ratio is None else f"{100 * (ratio - 1):+.0f} %"
