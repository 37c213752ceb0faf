"""``warp-ds doctor``: whether a machine can do a job, with a cure for each line that fails."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from warp_ds.flags.arguments import LayerArguments, SafetyDataArguments, TrainingFlags, UtilityDataArguments, flag
from warp_ds.flags.parsing import FlagParser
from warp_ds.launch import machine


@dataclass
class DoctorArguments(UtilityDataArguments, SafetyDataArguments, LayerArguments, TrainingFlags):
    """The flags that decide what a job needs of its machines; those of the phases, and the machines themselves."""

    nodes: int = flag(1, "nodes of the job that is planned")
    gpus_per_node: int = flag(0, "their GPUs; 0 = as many as there are here")


def main(argv: list[str]) -> int:
    """``warp-ds doctor [flags of the phases]``; exit status 1 where something would keep the job from running.

    ConfigError for a flag's value that cannot be read.
    """
    parser = FlagParser(
        DoctorArguments,
        prog="warp-ds doctor",
        description=(
            "Whether this machine can do the job that the flags name: packages, GPUs, compiler, directories, network, Slurm, "
            "model, data, and what warp-ds plan counts against what is free. A cure for each line that fails; exit status 1 "
            "where one would keep the job from running. Takes the phases' flags, so that a command can be checked as it stands."
        ),
    )
    arguments, ignored = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
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
    found, local = machine.model(arguments.model_name)
    yield found
    for name in ("safety_data", "utility_data"):
        if f"--{name}" in given:
            yield machine.data(name, getattr(arguments, name))
    if local is not None:
        yield from check_resources(
            arguments, local, arguments.nodes, arguments.gpus_per_node or max(1, torch.cuda.device_count())
        )
