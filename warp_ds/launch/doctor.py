"""``warp-ds doctor``: whether a machine can do a job, with a cure for each line that fails."""

from __future__ import annotations

import socket
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from warp_ds.flags.jobs import DoctorArguments
from warp_ds.launch import machine


def show(argv: list[str], arguments: DoctorArguments, ignored: list[str]) -> int:
    """Prints what was found; exit status 1 where something would keep the job from running."""
    findings = list(examine(arguments, {word.split("=")[0] for word in argv}))
    table = Table(title=f"{socket.gethostname()}", title_justify="left")
    for name in ("", "checked", "found", "cure"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        mark = "ok" if not finding.cure else "FAILS" if finding.fatal else "note"
        table.add_row(mark, finding.name, finding.found, finding.cure)
    Console(markup=False).print(table)
    if ignored:
        print(f"not looked at: {' '.join(ignored)}")
    return int(any(finding.cure and finding.fatal for finding in findings))


def examine(arguments: DoctorArguments, given: set[str]) -> Iterator[machine.Finding]:
    """What one machine can tell, without ranks. ``given``: the flags on the command line."""
    import torch

    from warp_ds.launch.resources import check_resources  # with transformers' models

    yield machine.packages()
    yield machine.devices(arguments)
    yield machine.compiler()
    for name in ("output_dir", "log_dir"):
        yield machine.writable(name, getattr(arguments, name))
    yield machine.network()
    yield machine.queue()
    model, local = machine.model(arguments.model_name)
    yield model
    for name in ("safety_data", "utility_data"):
        if f"--{name}" in given:
            yield machine.data(name, getattr(arguments, name), arguments.refusal_file if name == "safety_data" else None)
    if local is not None:
        yield from check_resources(
            arguments, local, arguments.nodes, arguments.gpus_per_node or max(1, torch.cuda.device_count())
        )
