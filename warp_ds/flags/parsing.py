"""From the command line and a YAML file (``--config``) to a phase's arguments; the command line wins."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from copy import copy
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from warp_ds.errors import ConfigError
from warp_ds.flags import training_arguments
from warp_ds.flags.checks import refuse_control_characters, refuse_secrets
from warp_ds.flags.flag import aliases, dataclass_fields
from warp_ds.flags.groups import RunArguments, WatchingFlags
from warp_ds.names import control_character
from warp_ds.registry import Phase

Arguments = TypeVar("Arguments", bound="RunArguments")


def _hf_argument_parser() -> Any:
    """transformers' HfArgumentParser, from its own file, which needs nothing of the package: importing that takes seconds."""
    package = find_spec("transformers")
    path = Path(package.origin if package and package.origin else "").with_name("hf_argparser.py")
    if not path.is_file():
        from transformers import HfArgumentParser

        return HfArgumentParser
    spec = spec_from_file_location("warp_ds.flags.hf_argparser", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.HfArgumentParser


HfArgumentParser: Any = _hf_argument_parser()


class FlagParser(HfArgumentParser):
    """Dataclasses to flags, whole names only; what is wrong with a flag is a ConfigError."""

    def __init__(self, kinds: Any, **more: Any):
        super().__init__(kinds, allow_abbrev=False, **more)

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: Any) -> None:
        shown = copy(field)
        shown.metadata = {name: value for name, value in field.metadata.items() if name != "nature"}
        HfArgumentParser._parse_dataclass_field(parser, shown)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        refuse_words(words)
        return super().parse_known_args(words, namespace)


def refuse_words(words: Sequence[str]) -> None:
    """ConfigError, naming the flag, for a word of a command line that holds a control character or a secret."""
    flag = "the command line"
    for word in words:
        if word.startswith("--"):
            flag = word.split("=")[0] if not control_character(word.split("=")[0]) else "a flag"
        refuse_control_characters(flag, word)
        refuse_secrets(flag, word.removeprefix(f"{flag}="))


CONFIG_HELP = "--config FILE reads flags from a YAML file, such as 'keep_ratio: 0.1'; those on the command line win."
PASSED_HELP = (
    "Flags of transformers' TrainingArguments are taken too, such as --lr_scheduler_type cosine --warmup_steps 50 "
    f"--report_to tensorboard wandb: {', '.join(sorted(training_arguments.WORKS))}."
)


def parse_arguments(kind: type[Arguments], argv: list[str] | None = None) -> Arguments:
    """The flags of one phase; ConfigError for one that it does not have."""
    arguments, rest = _parse(kind, argv, trains=False)
    if rest:
        raise unknown_flags(rest, names_of(kind))
    return arguments


def parse_training(kind: type[Arguments], argv: list[str] | None = None) -> tuple[Arguments, dict[str, Any]]:
    """The flags of a phase that trains, and what else of transformers' TrainingArguments was given (name -> value)."""
    arguments, rest = _parse(kind, argv, trains=True)
    return arguments, _passed(rest, kind)


def parse_phase(phase: Phase, argv: list[str] | None = None) -> tuple[Any, dict[str, Any]]:
    """The flags of a phase, and what it passes on to transformers."""
    return parse_training(phase.arguments, argv) if phase.trains else (parse_arguments(phase.arguments, argv), {})


def by_one_name(words: Sequence[str], kind: Any) -> list[str]:
    """A command line on which flags have their first name. ConfigError where one is given by both."""
    other, named, given = aliases(kind), [], dict[str, str]()
    for word in words:
        head, equals, value = word.partition("=")
        name = head[2:].replace("-", "_") if head.startswith("--") else ""
        only, dot, own = name.rpartition(".")  # of one phase alone, in a chain
        first = only + dot + other.get(own, own)
        if first.rpartition(".")[2] in other.values():
            if given.setdefault(first, name) != name:
                raise ConfigError(f"--{given[first]} and --{name} are two names of one flag: give one of them")
            word = f"--{first}{equals}{value}"
        named.append(word)
    return named


def _passed(rest: list[str], kind: type[Arguments]) -> dict[str, Any]:
    """The TrainingArguments in ``rest``; ConfigError for what is unknown, refused, or has no effect here."""
    if not rest:
        return {}
    kept: list[str] = []
    unknown: list[str] = []
    problems: list[str] = []
    for words in grouped(rest):
        name = words[0].lstrip("-").replace("-", "_")
        field = name if name in training_arguments.fields() else name.removeprefix("no_")
        value = words[1:] if field == name else ["false"]
        if hasattr(kind, "arms") and (instead := DECIDED_BY_ARMS.get(name)):
            problems.append(f"--{name} is decided by {instead}")
        elif not words[0].startswith("--") or field not in training_arguments.fields():
            unknown += words
        elif field in training_arguments.WORKS:
            kept += words
        elif reason := training_arguments.why_refused(field, value):
            problems.append(reason)
    if unknown:
        raise unknown_flags(unknown, [*names_of(kind), *training_arguments.WORKS])
    if problems:
        raise ConfigError("; ".join(problems))
    from transformers import TrainingArguments

    passed = FlagParser(TrainingArguments)
    training_arguments.several_words(passed)
    for action in passed._actions:
        action.default, action.required = argparse.SUPPRESS, False
    known, more = passed.parse_known_args(kept)
    if more:
        raise unknown_flags(more, names_of(kind))
    try:
        return training_arguments.settle(vars(known))
    except ValueError as error:
        raise ConfigError(str(error)) from error


#: Flags of the phases that a comparison and a sweep do not take, and what decides them there.
DECIDED_BY_ARMS = {
    "basis": "--arms (original, osft, random-basis), and --bases of a sweep",
    "output_basis": "--arms (output-row, both)",
    "mask_unit": "--arms (column), and --units of a sweep",
    "score": "--arms (osft, random-mask)",
    "adapter": "--arms (lora, lora+column)",
    "lora_method": "--arms (lora+guardspace, lora+salora, lora+asft)",
    "task_basis_dir": "--arms (lora+salora starts in the outputs of the task)",
    "lora_layers": "--layer_type",
    "merge_adapter": "the comparison, which measures merged models",
    "objective": "--arms (der, safegrad, constrained)",
    "left_projection": "--arms (osft)",
    "replay_data": "the comparison, which replays its safety samples",
    **dict.fromkeys(("refresh_data", "refresh_samples"), "the comparison, which scores by its safety samples"),
    "basis_dir": "the comparison, which makes its own bases",
    "masks_dir": "the comparison, which makes its own masks",
    **dict.fromkeys(
        (training_arguments.EVALUATES | dataclass_fields(WatchingFlags).keys()) - {"max_new_tokens"},
        "the comparison, which measures every model when it is trained",
    ),
}


def grouped(words: Sequence[str]) -> list[list[str]]:
    """Each flag with its values: ['--a=1', '--b', '2', '3'] -> [['--a', '1'], ['--b', '2', '3']]. Words before the first flag
    are groups by themselves."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") and word != "--":
            groups.append(word.split("=", 1))
        elif groups and groups[-1][0].startswith("--"):
            groups[-1].append(word)
        else:
            groups.append([word])
    return groups


def _parse(kind: type[Arguments], argv: list[str] | None, trains: bool) -> tuple[Arguments, list[str]]:
    """The flags of ``kind``, and the words that belong to none of them."""
    epilog = f"{CONFIG_HELP} {PASSED_HELP}" if trains else CONFIG_HELP
    parser = FlagParser(kind, usage="%(prog)s [--flag value ...]", description=kind.__doc__, epilog=epilog)
    arguments, rest = parser.parse_args_into_dataclasses(
        args=_with_config_file(argv, kind, trains), look_for_args_file=False, return_remaining_strings=True
    )
    return arguments, rest


def names_of(kind: Any) -> list[str]:
    """The flags of a dataclass, without dashes; and --config."""
    return [*dataclass_fields(kind), *aliases(kind), "config"]


def unknown_flags(words: Sequence[str], known: Iterable[str]) -> ConfigError:
    """The error that names the flags in ``words``, each with the nearest of ``known``."""
    known = list(known)
    unknown = []
    for name in (word.split("=")[0] for word in words if word.startswith("-")):
        near = difflib.get_close_matches(name.lstrip("-").replace("-", "_").lower(), known, n=1)
        unknown.append(f"unknown flag {name}: " + (f"did you mean --{near[0]}?" if near else "--help lists all"))
    return ConfigError("; ".join(unknown) or f"{words[0]!r} belongs to no flag: --help lists all")


def _with_config_file(argv: list[str] | None, kind: Any, trains: bool) -> list[str]:
    """Puts the flags of ``--config FILE`` (YAML mapping of names to values) before the others. It may have those of
    TrainingArguments where the phase ``trains``."""
    parser = FlagParser([], add_help=False)
    parser.add_argument("--config", metavar="FILE")
    known, argv = parser.parse_known_args(argv)
    argv = by_one_name(argv or [], kind)
    if known.config is None:
        return argv
    path = Path(known.config)
    try:
        # Composed and not loaded: every value stays as it is written, where YAML would make 34 of 042 and a day of 2021-05-03.
        top = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(top, yaml.MappingNode):
        raise ConfigError(f"--config {path} must be a mapping of flag names to values, such as 'keep_ratio: 0.1'")
    fields = {**(training_arguments.fields() if trains else {}), **dataclass_fields(kind)}
    flags: list[str] = []
    lines: dict[str, int] = {}
    for key, value in top.value:
        where = f"--config {path}, line {key.start_mark.line + 1}"
        name = _yaml_text(key, where).replace("-", "_")
        if name.startswith("_"):
            raise ConfigError(f"{where}: {key.value!r}: write names without dashes before them, such as 'keep_ratio: 0.1'")
        if isinstance(value, yaml.MappingNode):
            _yaml_text(value, f"{where}: {name}")
        name = aliases(kind).get(name, name)
        if name in lines:
            raise ConfigError(f"{where}: {name} stands there twice (line {lines[name]}, too): keep one of them")
        if name not in fields:
            raise ConfigError(f"{where}: {unknown_flags(['--' + name], fields)}")
        lines[name] = key.start_mark.line + 1
        flags += _flags_of(name, value, fields[name], where)
    return flags + argv


_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "timestamp", "value")}


def _yaml_text(node: Any, where: str) -> str:
    """A scalar as it is written."""
    if isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN:
        return str(node.value)
    what = {"MappingNode": "a nested mapping", "SequenceNode": "a list"}.get(type(node).__name__, f"a {node.tag}")
    raise ConfigError(
        f"{where}: {what} where one value belongs: flags are one name and one value a line, without groups; a "
        "flag that takes JSON has it in quotes"
    )


def _flags_of(name: str, node: Any, field: Any, where: str) -> list[str]:
    """The words of one flag of a configuration file; none for null, which means that it is not given."""
    if isinstance(node, yaml.SequenceNode):
        items = [_yaml_text(item, f"{where}: {name}") for item in node.value]
        if any(item.tag.endswith(":null") for item in node.value) or not items:
            raise ConfigError(f"{where}: {name} is an empty list, or has an empty item: give its values, or leave it out")
        if "comma-separated" in str(field.metadata.get("help")):
            return [f"--{name}={','.join(items)}"]
        if "list" not in str(field.type):
            raise ConfigError(f"{where}: {name} takes one value, not a list")
        dashed = [item for item in items if item.startswith("-")]
        if dashed:
            raise ConfigError(f"{where}: {name} holds {dashed[0]!r}, which would be another flag")
        return [f"--{name}", *items]
    text = _yaml_text(node, f"{where}: {name}")
    if node.tag.endswith(":null"):
        return []
    if node.tag.endswith(":bool") and "bool" in str(field.type):
        text = {"on": "true", "off": "false"}.get(text.lower(), text)
    return [f"--{name}={text}"]
