"""The console command ``warp-ds``: what needs no ranks of its own."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from warp_ds import __version__
from warp_ds.names import control_character


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; the exit status is the program's."""
    parser = argparse.ArgumentParser(prog="warp-ds", description="Fine-tune a model without losing its safety.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="the whole job on a small model made on the spot")
    demo.add_argument("--ranks", type=int, default=2, help="local processes (default 2)")
    demo.set_defaults(run=_demo)

    verify = commands.add_parser(
        "verify",
        help="from two model directories, whether every frozen coefficient stayed where it was",
        description="Exit status: 0 kept, 1 broken, 3 cannot tell (what was kept does not show in these files), 2 wrong input.",
    )
    verify.add_argument("--before", required=True, help="model directory before training")
    verify.add_argument("--after", required=True, help="model directory after training")
    verify.add_argument("--masks_dir", required=True, help="masks/ of phase 2")
    verify.add_argument("--basis_dir", help="basis/ of phase 1, where it is not the one that the masks name")
    verify.add_argument(
        "--output", help="where the certificate is written; certificate.json in the run of --after, or here where it is in none"
    )
    verify.set_defaults(run=_verify)

    shrink = commands.add_parser(
        "shrink", help="a smaller basis for masks at hand: cheaper steps, other coordinates for what trains freely"
    )
    shrink.add_argument("--masks_dir", required=True, help="masks/ of phase 2")
    shrink.add_argument("--basis_dir", help="basis/ of phase 1, where it is not the one that the masks name")
    shrink.add_argument("--output", required=True, help="directory for the new basis/ and masks/")
    shrink.set_defaults(run=_shrink)

    plan = commands.add_parser(
        "plan",
        help="memory, traffic and disk of every phase, from the model's config alone",
        description="What each "
        "phase will need in memory, traffic and disk, and the fewest nodes that will do, from the model's "
        "config alone: no weight is read. Exit status 1 where the job does not fit.",
    )
    if "plan" in (sys.argv[1:2] if argv is None else argv[:1]):
        from warp_ds.launch import plan as planning

        planning.add_arguments(plan)
        plan.set_defaults(run=planning.run)

    commands.add_parser(
        "doctor", help="whether this machine can do the job that the flags name; a cure for each failing line", add_help=False
    ).set_defaults(run=_doctor)
    data = commands.add_parser("data", help="samples as the model will see them: what is trained, lengths, what would be cut")
    data.add_argument("sources", metavar="FILE", help="a file, folder, hub name, or several: NAME,NAME@WEIGHT")
    data.add_argument("--model_name", required=True, help="directory or hub name; its weights are not read")
    data.set_defaults(run=_data)
    report = commands.add_parser("report", help="one self-contained HTML file from run directories")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directory: a comparison, phases, an evaluation")
    report.add_argument("--output", default="report.html", help="the file; its pictures go beside it")
    report.set_defaults(run=_report)

    for word in sys.argv[1:] if argv is None else argv:
        if found := control_character(word):
            parser.error(
                f"{ascii(word)[:120]} holds the character {found}, a line end or another control character, which no "
                "value of this program has"
            )
    arguments, rest = parser.parse_known_args(underscored(sys.argv[1:] if argv is None else argv))
    if rest and arguments.command not in ("demo", "doctor", "data"):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    arguments.rest = rest
    return int(arguments.run(arguments))


def underscored(words: Sequence[str]) -> list[str]:
    """Flags in the phases' spelling: --gpus-per-node is --gpus_per_node."""
    return [
        name.replace("-", "_").replace("__", "--", 1) + mark + value if word.startswith("--") else word
        for word in words
        for name, mark, value in [word.partition("=")]
    ]


def _demo(arguments: argparse.Namespace) -> int:
    """Starts the demo's ranks with DeepSpeed's own launcher."""
    threads = max(1, (os.cpu_count() or 1) // arguments.ranks)
    environment = {"OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false", **os.environ}
    # The venv's ninja, for DeepSpeed's one compiled operator, without activating the venv.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    command = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--num_gpus",
        str(arguments.ranks),
        "--master_port",
        str(_free_port()),
        "--module",
        "warp_ds.launch.demo",
        *arguments.rest,
    ]
    return subprocess.run(command, env=environment, check=False).returncode


def _doctor(arguments: argparse.Namespace) -> int:
    from warp_ds.errors import ConfigError
    from warp_ds.launch.doctor import main as doctor

    try:
        return doctor(arguments.rest)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _free_port() -> int:
    from warp_ds.cluster.processes import free_port

    return free_port()


def _verify(arguments: argparse.Namespace) -> int:
    from warp_ds.errors import ArtifactError
    from warp_ds.evaluation.certificate import EXIT, certificate_path, certify, print_certificate, write_certificate

    try:
        certificate = certify(arguments.before, arguments.after, arguments.masks_dir, arguments.basis_dir)
    except ArtifactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_certificate(certificate)
    output = Path(arguments.output) if arguments.output else certificate_path(Path(arguments.after))
    write_certificate(certificate, output)
    print(f"certificate: {output}")
    return EXIT[certificate["outcome"]]


def _shrink(arguments: argparse.Namespace) -> int:
    from warp_ds.errors import ArtifactError
    from warp_ds.phases.shrink import print_shrunk, shrink

    try:
        print_shrunk(shrink(arguments.masks_dir, arguments.basis_dir, Path(arguments.output)))
    except ArtifactError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"train with --masks_dir {Path(arguments.output) / 'masks'}")
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from warp_ds.launch.samples import show_samples

    return show_samples(arguments)


def _report(arguments: argparse.Namespace) -> int:
    from warp_ds.errors import ConfigError

    try:
        from warp_ds.report.page import run_report
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return run_report(arguments)


if __name__ == "__main__":
    sys.exit(main())
