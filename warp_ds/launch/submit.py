"""Queues phases one after another: python launch/submit.py --phases 1,2,3 --nodes 4 --gpus_per_node 8 --model_name …

--phases compare --seeds 1,2,3 is a job array, a task a seed (flags of launch/compare.py), at most --parallel at once.
--status RUN shows where a chain is, --cancel RUN ends it. The same command again goes on with an unfinished chain.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from warp_ds.errors import WarpError
from warp_ds.flags.jobs import SubmitArguments
from warp_ds.flags.parsing import FlagParser
from warp_ds.launch.chain import Chain, find_chain
from warp_ds.launch.chain_flags import kind_of
from warp_ds.launch.progress import status
from warp_ds.launch.submission import cancel, submit
from warp_ds.secrets import redact

EPILOG = (
    "Every flag of the phases is taken too, and goes to those that have it; --phase3.batch_size 2 is for one alone. "
    "warp-ds phase1 --help (and so on) lists them."
)
SECONDS = 5.0
"""Between two looks at the queue."""


def main(argv: list[str] | None = None) -> int:
    """The exit status: 2 for wrong input or a queue that does not answer, 1 for a chain that has stopped unfinished."""
    parser = FlagParser(SubmitArguments, prog="warp-ds submit", description=__doc__, epilog=EPILOG)
    try:
        arguments, rest = parser.parse_args_into_dataclasses(argv, look_for_args_file=False, return_remaining_strings=True)
        if arguments.status:
            return follow(Chain.load(Path(arguments.status)))
        if arguments.cancel:
            ended = cancel(Chain.load(Path(arguments.cancel)))
            print(f"ended: {', '.join(ended) or 'nothing was under way'}")
            return 0
        chain = find_chain(arguments, rest)
        print(f"run: {chain.directory}", flush=True)
        submit(chain, arguments)
        Console(markup=False).print(table(chain)[0])
        if chain.cluster == "slurm":
            print(f"follow it: python launch/submit.py --status {chain.directory}")
        say_report(chain)
        return 0
    except WarpError as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return 2


def follow(chain: Chain) -> int:
    """Shows the table until no job is left; once where the output is no terminal."""
    console = Console(markup=False)
    shown, under_way = table(chain)
    if not console.is_terminal:
        console.print(shown)
    else:
        with Live(shown, console=console, auto_refresh=False) as live:
            while under_way:
                time.sleep(SECONDS)
                shown, under_way = table(Chain.load(chain.directory))
                live.update(shown, refresh=True)
    say_report(chain)
    return 0 if under_way or all(map(chain.finished, chain.flags)) else 1


def say_report(chain: Chain) -> None:
    """How all seeds of a comparison become one report."""
    if "compare" in map(kind_of, chain.flags):
        print(f"the seeds as one report, once they have finished: warp-ds report {chain.directory}/compare_seed*")


def table(chain: Chain) -> tuple[Table, bool]:
    """(phase, job, state, progress, last line of log), and whether anything is still under way."""
    lines, under_way = status(chain)
    shown = Table(title=str(chain.directory), title_justify="left")
    for name in ("phase", "job", "state", "progress", "last line of log"):
        shown.add_column(name, overflow="fold")
    for line in lines:
        shown.add_row(line.phase, line.job, line.state, line.progress, line.last_line)
    return shown, under_way
