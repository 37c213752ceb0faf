"""The console command ``warp-ds``, and ``python -m warp_ds`` under a launcher: phases, and what needs no ranks of its own.

Nothing is imported before it is known to be needed: torch takes seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warp_ds import __version__
from warp_ds.errors import ConfigError, WarpError
from warp_ds.flags.checks import output_directory, output_file
from warp_ds.names import control_character
from warp_ds.registry import PHASES
from warp_ds.secrets import redact


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; the exit status is the program's."""
    words = sys.argv[1:] if argv is None else list(argv)
    while words and words[0].startswith(("--local_rank", "--local-rank")):  # the deepspeed launcher puts it first
        del words[0]
    command = words[0] if words else ""
    try:
        if command in PHASES and command != "demo":
            from warp_ds.launch.launcher import main as launch

            launch(command, words[1:])
        if command in _OWN_FLAGS:
            return _OWN_FLAGS[command](words[1:])
        return _run(words)
    except WarpError as error:
        print(redact(f"error: {error}"), file=sys.stderr)
        return error.exit_status


def _run(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="warp-ds",
        description="Fine-tune a model without losing its safety.",
        epilog="Phases run alone or on every rank: torchrun -m warp_ds phase3 …, deepspeed --module warp_ds phase3 …, srun, "
        "accelerate launch -m.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for phase in PHASES.values():
        if phase.name != "demo":
            commands.add_parser(phase.name, help=phase.title)
    commands.add_parser("submit", help="phases one after another, as jobs of Slurm or here")
    _add_commands(commands)
    for word in words:
        if character := control_character(word):
            parser.error(
                f"{ascii(word)[:120]} holds the character {character}, a line end or another control character, which no "
                "value of this program has"
            )
    arguments, rest = parser.parse_known_args(underscored(words))
    if rest and arguments.command not in ("demo", "data"):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    arguments.rest = rest
    return int(arguments.run(arguments))


def _add_commands(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="the whole job on a small model made on the spot",
        epilog="Takes too: --harmful_data, --utility_data, --utility_heldout, --max_length, --arms, --learning_rates, --seeds, "
        "--output_dir, and others of compare.",
    )
    demo.add_argument("--ranks", type=int, default=2, help="local processes (default 2)")
    demo.set_defaults(run=_demo)
    _add_artefact_commands(commands)
    _add_overlap_and_push(commands)

    commands.add_parser("plan", help="memory, traffic and disk of every phase, from the model's config alone")
    commands.add_parser("doctor", help="whether this machine can do the job that the flags name; a cure for each failing line")
    data = commands.add_parser(
        "data",
        help="samples as the model will see them: what is trained, lengths, what would be cut",
        epilog="Takes too, as the phases do: --max_length, --train_on, --long_samples, --prompt_column, --response_column, "
        "--refusal_file, --data_config, --split, --samples, --template_date.",
    )
    data.add_argument("sources", metavar="FILE", help="a file, folder, hub name, or several: NAME,NAME@WEIGHT")
    data.add_argument("--model_name", required=True, help="directory or hub name; its weights are not read")
    data.set_defaults(run=_data)
    report = commands.add_parser("report", help="one self-contained HTML file from run directories")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run directory: a comparison, phases, an evaluation")
    report.add_argument("--output", default="report.html", help="the file; its pictures go beside it")
    report.add_argument("--picture", help="also the comparison's picture alone, as this .svg or .png")
    report.set_defaults(run=_report)

    init = commands.add_parser(
        "init", help="writes DeepSpeed configurations and Slurm templates into a directory, to edit; overwrites nothing"
    )
    init.add_argument("directory", nargs="?", default=".", help="default: here")
    init.set_defaults(run=_init)


def _add_artefact_commands(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="from two model directories, whether every frozen coefficient stayed where it was",
        description="Exit status: 0 kept, 1 broken, 3 cannot tell (what was kept does not show in these files), 2 wrong input.",
    )
    verify.add_argument("--before", required=True, help="model directory before training")
    after = verify.add_mutually_exclusive_group(required=True)
    after.add_argument("--after", help="model directory after training")
    after.add_argument("--adapter", help="LoRA adapter directory instead: A and B of it are looked at, on the model --before")
    verify.add_argument("--masks_dir", required=True, help="masks/ of phase 2")
    verify.add_argument("--basis_dir", help="basis/ of phase 1, where it is not the one that the masks name")
    verify.add_argument(
        "--output", help="where the certificate is written; else certificate.json in the run of what was certified, or here"
    )
    verify.set_defaults(run=_verify)

    merge = commands.add_parser(
        "merge",
        help="a LoRA adapter merged into its base model: an ordinary model directory",
        description="W + s B A in place of W, file by file. More ranks take the files in turn: torchrun -m warp_ds merge …",
    )
    merge.add_argument("--model_name", required=True, help="directory or hub name of the base model")
    merge.add_argument("--adapter", required=True, help="adapter directory, as PEFT or phase 3 has saved it")
    merge.add_argument("--output", required=True, help="new directory for the merged model")
    merge.set_defaults(run=_merge)

    shrink = commands.add_parser(
        "shrink", help="a smaller basis for masks at hand: cheaper steps, other coordinates for what trains freely"
    )
    shrink.add_argument("--masks_dir", required=True, help="masks/ of phase 2")
    shrink.add_argument("--basis_dir", help="basis/ of phase 1, where it is not the one that the masks name")
    shrink.add_argument("--output", required=True, help="directory for the new basis/ and masks/")
    shrink.set_defaults(run=_shrink)

    convert = commands.add_parser(
        "convert-basis", help="bases and masks of the original Safety-WaRP-LLM (.pt), in this project's formats"
    )
    convert.add_argument("--basis_dir", required=True, help="its basis/, or the run that holds it")
    convert.add_argument("--masks_dir", help="its masks/, made with that basis")
    convert.add_argument("--model_name", required=True, help="the model that they were made for: directory or hub name")
    convert.add_argument("--layer_type", help="of files that lie in no layer type's directory, as its first version wrote them")
    convert.add_argument("--output", required=True, help="directory for the new basis/ and masks/")
    convert.set_defaults(run=_convert)


def _add_overlap_and_push(commands: Any) -> None:
    ready = commands.add_parser(
        "convert-checkpoint", help="a Trainer's ZeRO-3 checkpoint made ready for another number of ranks (resume_any_world)"
    )
    ready.add_argument("checkpoint", metavar="DIR", help="checkpoint-N; the converted one is universal-N beside it")
    ready.add_argument("--world_size", type=int, required=True, help="how many ranks will go on with it")
    ready.set_defaults(run=_convert_checkpoint)

    overlap = commands.add_parser(
        "overlap", help="how much of what masks freeze is the same, layer by layer, beside what chance gives"
    )
    overlap.add_argument("masks", nargs="+", metavar="MASKS", help="masks/ of phase 2, or its run; of other safety sets, say")
    overlap.add_argument("--output", default="overlap.json", help="the same as JSON; warp-ds report of its directory shows it")
    overlap.set_defaults(run=_overlap)

    push = commands.add_parser(
        "push", help="a finished run to the Hugging Face hub: its model or adapter, or its basis or masks as a data set"
    )
    push.add_argument("directory", metavar="RUN", help="run directory, or a model's, adapter/, basis/ or masks/ of one")
    push.add_argument("name", metavar="OWNER/NAME", help="repository; made, private, where there is none")
    push.add_argument("--public", action="store_true", help="a repository that is made is everybody's")
    push.set_defaults(run=_push)


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


def _convert_checkpoint(arguments: argparse.Namespace) -> int:
    from warp_ds.resuming import convert_checkpoint

    if arguments.world_size < 1:
        raise ConfigError(f"--world_size must be at least 1, not {arguments.world_size}")
    print(convert_checkpoint(Path(arguments.checkpoint), arguments.world_size))
    return 0


def _submit(words: list[str]) -> int:
    from warp_ds.launch.submit import main as submit

    return submit(words)


def _plan(words: list[str]) -> int:
    from warp_ds.flags.jobs import PlanArguments
    from warp_ds.flags.parsing import FlagParser, unknown_flags

    parser = FlagParser(
        PlanArguments,
        prog="warp-ds plan",
        description=(
            "What each phase will need in memory, traffic and disk, and the fewest nodes that will do, from the model's "
            "config alone: no weight is read. Exit status 1 where the job does not fit."
        ),
    )
    arguments, rest = parser.parse_args_into_dataclasses(words, look_for_args_file=False, return_remaining_strings=True)
    if rest:
        raise unknown_flags(rest, vars(arguments))
    if not arguments.model_name:
        raise ConfigError("plan needs --model_name: a hub name, a local folder, or a config.json")
    from warp_ds.launch.plan import run

    return run(arguments)


def _doctor(words: list[str]) -> int:
    from warp_ds.flags.jobs import DoctorArguments
    from warp_ds.flags.parsing import FlagParser

    parser = FlagParser(
        DoctorArguments,
        prog="warp-ds doctor",
        description=(
            "Whether this machine can do the job that the flags name: packages, GPUs, compiler, directories, network, Slurm, "
            "model, data, and what warp-ds plan counts against what is free. A cure for each line that fails; exit status 1 "
            "where one would keep the job from running. Takes the phases' flags, so that a command can be checked as it stands."
        ),
    )
    arguments, ignored = parser.parse_args_into_dataclasses(words, look_for_args_file=False, return_remaining_strings=True)
    from warp_ds.launch.doctor import show

    return show(words, arguments, ignored)


_OWN_FLAGS = {"submit": _submit, "plan": _plan, "doctor": _doctor}


def _init(arguments: argparse.Namespace) -> int:
    from warp_ds.cluster.templates import write_templates

    written, kept = write_templates(Path(arguments.directory))
    for path in written:
        print(f"written: {path}")
    for path in kept:
        print(f"there already, left as it is: {path}")
    return 0


def _free_port() -> int:
    from warp_ds.cluster.processes import free_port

    return free_port()


def _verify(arguments: argparse.Namespace) -> int:
    from warp_ds.evaluation.adapter_certificate import certify_adapter
    from warp_ds.evaluation.certificate import EXIT, certify
    from warp_ds.evaluation.certificate_output import certificate_path, print_certificate, write_certificate

    after = arguments.after or arguments.adapter
    output = output_file("--output", arguments.output or str(certificate_path(Path(after))))
    judge = certify if arguments.after else certify_adapter
    certificate = judge(arguments.before, after, arguments.masks_dir, arguments.basis_dir)
    print_certificate(certificate)
    write_certificate(certificate, output)
    print(f"certificate: {output}")
    return EXIT[certificate.outcome]


def _merge(arguments: argparse.Namespace) -> int:
    from warp_ds.cluster import processes
    from warp_ds.phases.merge import merge_adapter
    from warp_ds.zero.model import resolve_model_dir

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        processes.init_distributed("cpu")
    try:
        output = output_directory("--output", arguments.output)
        merge_adapter(resolve_model_dir(arguments.model_name), Path(arguments.adapter), output)
        if processes.rank() == 0:
            print(f"merged: {arguments.output}")
    finally:
        processes.shutdown()
    return 0


def _shrink(arguments: argparse.Namespace) -> int:
    from warp_ds.phases.shrink import print_shrunk, shrink

    output = output_directory("--output", arguments.output)
    print_shrunk(shrink(arguments.masks_dir, arguments.basis_dir, output))
    print(f"train with --masks_dir {output / 'masks'}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from warp_ds.phases.convert import convert
    from warp_ds.zero.model import resolve_model_dir

    output, model_dir = output_directory("--output", arguments.output), resolve_model_dir(arguments.model_name)
    basis, masks = convert(
        arguments.basis_dir, arguments.masks_dir, model_dir, arguments.model_name, output, arguments.layer_type
    )
    print(f"{len(basis.bases)} bases: {output / 'basis'}")
    if masks is not None:
        print(f"{masks.frozen:,} of {masks.entries:,} coefficients frozen: {output / 'masks'}")
    return 0


def _overlap(arguments: argparse.Namespace) -> int:
    from warp_ds.evaluation.overlap import overlap
    from warp_ds.report.overlap_section import overlap_blocks
    from warp_ds.report.tables import to_terminal
    from warp_ds.store.files import write_json

    output = output_file("--output", arguments.output)
    compared = overlap(arguments.masks)
    write_json(output, compared)
    to_terminal(overlap_blocks(compared))
    print(f"overlap: {arguments.output}")
    return 0


def _push(arguments: argparse.Namespace) -> int:
    from warp_ds.phases.publish import push

    print(f"pushed: {push(Path(arguments.directory), arguments.name, private=not arguments.public)}")
    return 0


def _data(arguments: argparse.Namespace) -> int:
    from warp_ds.launch.samples import show_samples

    return show_samples(arguments)


def _report(arguments: argparse.Namespace) -> int:
    from warp_ds.report.page import run_report

    return run_report(arguments)


if __name__ == "__main__":
    sys.exit(main())
