"""What launch/submit.py is asked for, and which of the flags go to which phase of a chain."""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from warp_ds.errors import ConfigError
from warp_ds.flags import training_arguments
from warp_ds.flags.checks import check_run_name, refuse_control_characters, refuse_secrets
from warp_ds.flags.comparison import CompareArguments
from warp_ds.flags.groups import SafetyDataArguments
from warp_ds.flags.jobs import SubmitArguments
from warp_ds.flags.parsing import by_one_name, grouped, names_of, parse_phase, refuse_words, unknown_flags
from warp_ds.phases.arms import parse_arms
from warp_ds.registry import CHAINED, IN_A_CHAIN, PHASES


def check_submit(arguments: SubmitArguments, rest: Sequence[str]) -> None:
    """ConfigError for a value that would be more than one value in the batch script, or in the shell that runs it."""
    for name, value in vars(arguments).items():
        refuse_control_characters(f"--{name}", value)
        refuse_secrets(f"--{name}", value)
    refuse_words(rest)
    check_run_name(arguments.run_name)
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("ranks_per_node", 0), ("cpus_per_rank", 0)):
        if getattr(arguments, name) < least:
            raise ConfigError(f"--{name} must be at least {least}, not {getattr(arguments, name)}")
    if not 0 < arguments.hours < 24 * 365:
        raise ConfigError(f"--hours {arguments.hours}: above 0, and less than a year")
    for name in ("partition", "account"):
        value = getattr(arguments, name)
        if value is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.,:@+-]*", value):
            raise ConfigError(f"--{name} {value!r} is no name that Slurm knows: letters, digits and _ . , : @ + -")
    for option in arguments.slurm:
        name = option.lstrip("-").partition("=")[0].replace("_", "-")
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]*", name):
            raise ConfigError(f"--slurm {option!r}: give an option of sbatch as NAME=VALUE or NAME")
        ours = [known for known in _OURS if known.startswith(name)]  # sbatch takes the beginnings of its options, too
        if ours:
            raise ConfigError(f"--slurm {option!r}: the chain itself sets {ours[0]}; it would lose its jobs, or their order")
        if name in _NO_JOB:
            raise ConfigError(f"--slurm {option!r}: with it sbatch submits nothing, or not as a chain waits for it")
    for name, value in (
        ("output_dir", arguments.output_dir),
        ("run_name", arguments.run_name or ""),
        *(("slurm", option) for option in arguments.slurm),
    ):
        # In paths it replaces what follows a %; quotes within quotes it reads in its own way.
        wrong = re.search("['\"\\\\]" if name == "slurm" else "['\"\\\\%]", value)
        if arguments.cluster == "slurm" and wrong:
            raise ConfigError(f"--{name} {value!r}: Slurm reads {wrong[0]} as more than itself; leave it out")
    if arguments.python is not None:
        python_words(arguments.python)


#: Options of sbatch without which a chain does not find its jobs, their output or their order.
_OURS = (
    "array",
    "chdir",
    "comment",
    "dependency",
    "error",
    "input",
    "job-name",
    "kill-on-invalid-dep",
    "nodes",
    "no-requeue",
    "ntasks",
    "open-mode",
    "output",
    "signal",
    "time",
    "wrap",
)
_NO_JOB = ("help", "usage", "version", "parsable", "test-only", "wait", "quiet")


def python_words(text: str) -> str:
    """--python as one command of a shell, each of its words quoted; ConfigError where it is more than that."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--python {text!r}: {error}") from error
    if not words or re.search(r"[;&|<>`$()]", text):
        raise ConfigError(
            f"--python {text!r} is one command and its words, without ; & | < > ` $ ( ): put the rest into --setup"
        )
    return shlex.join(words)


def parse_phases(text: str) -> list[str]:
    """'1,2,evaluate' -> ['phase1', 'phase2', 'evaluate'], in the order of the job."""
    given = [part.strip() for part in text.split(",") if part.strip()]
    names = [part if part in CHAINED else f"phase{part}" for part in given]
    unknown = [part for part, name in zip(given, names, strict=True) if name not in CHAINED]
    if unknown or not names:
        raise ConfigError(f"--phases {text!r}: a comma-separated list of {IN_A_CHAIN}")
    return [phase for phase in CHAINED if phase in names]


def phase_flags(phases: Sequence[str], rest: Sequence[str], directory: Path) -> dict[str, list[str]]:
    """Each phase's flags: those of ``rest`` that it has, and where it reads and writes within ``directory``.

    ``--phase3.batch_size 2`` is for one phase alone. ConfigError for a flag that no phase has.
    """
    groups = grouped(by_one_name(rest, SafetyDataArguments))
    if groups and not groups[0][0].startswith("--"):
        raise ConfigError(f"{groups[0][0]!r} belongs to no flag")
    has = {phase: {f.name for f in dataclasses.fields(PHASES[phase].arguments)} for phase in phases}
    # What one phase has as its own, no other passes on to transformers: phase 0's --learning_rate beside compare.
    passed = set(training_arguments.fields()).difference(*has.values())
    has = {phase: names | passed if PHASES[phase].trains else names for phase, names in has.items()}
    by_phase: dict[str, list[str]] = {phase: [] for phase in phases}
    for name, *values in groups:
        only, _, own = name[2:].replace("-", "_").rpartition(".")
        takers = [phase for phase in phases if own in has[phase] and only in ("", phase, phase.removeprefix("phase"))]
        if not takers and not any(own in names for names in has.values()):
            known = set().union(*has.values(), names_of(SubmitArguments))
            raise unknown_flags([name], {f"{only}.{n}".lstrip(".") for n in known})
        if not takers or own in ("run_name", "log_dir", "resume"):
            raise ConfigError(
                f"{name}: no phase of {', '.join(phases)} has this flag" + (" here: the chain sets it" if takers else "")
            )
        for phase in takers:
            by_phase[phase] += [f"--{own}", *values]
    if "compare" in by_phase:
        words = by_phase.pop("compare")
        seeds = parse_phase(PHASES["compare"], words)[0].seed_list
        by_phase |= {f"compare_seed{seed}": [*words, "--seeds", str(seed)] for seed in seeds}
    for phase, words in by_phase.items():
        words += ["--output_dir", str(directory), "--log_dir", str(directory / "logs"), "--run_name", phase]
        # What a phase before it in the chain makes, it takes.
        if phase == "evaluate" and "phase3" in phases:
            words += ["--model_name", str(directory / "phase3" / "model")]
        elif "phase0" in phases and phase != "phase0":
            words += ["--model_name", str(directory / "phase0" / "model")]
    return by_phase


def kind_of(phase: str) -> str:
    """The phase in PHASES: that of compare_seed1 is compare."""
    return phase.partition("_seed")[0]


def check_flags(flags: dict[str, list[str]]) -> None:
    """What can be known before anything is queued; ConfigError for a value that cannot be."""
    for phase, words in flags.items():
        arguments: Any = parse_phase(PHASES[kind_of(phase)], words)[0]
        if arguments.device == "cuda":
            arguments.device = "auto"  # a login node has no GPU
        arguments.check()
        arguments.check_machine()
        later = list(flags)[list(flags).index(phase) + 1 :]
        if getattr(arguments, "adapter", "none") != "none" and not arguments.merge_adapter:
            if phase == "phase0" and later or phase == "phase3" and "evaluate" in later:
                raise ConfigError(f"{later[0]} of this chain reads the model that {phase} makes: give --merge_adapter too")
        if isinstance(arguments, CompareArguments):
            arguments.rates([arm.name for arm in parse_arms(arguments.arms)])
