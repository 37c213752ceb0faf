"""Which unfinished run is the same one: what changes a run's result, by content, and nothing else.

Micro-batch, checkpointing, placement, the spelling of paths, saving and logging change no result (``flags.flag.Nature``,
``training_arguments.CHANGES_NO_TRAINING``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.flags import training_arguments
from warp_ds.flags.flag import dataclass_fields, default_of
from warp_ds.flags.groups import RunArguments, WatchingFlags
from warp_ds.flags.identity import identity_settings, in_one_spelling, reading
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import read_json
from warp_ds.store.fingerprints import Contents, fingerprint_model, model_contents
from warp_ds.store.lock import alive
from warp_ds.store.runs import find_artifact, is_run, newest_first, run_config
from warp_ds.store.state import PROGRESS
from warp_ds.store.written import config_problem, digest_of
from warp_ds.zero import settings
from warp_ds.zero.shared_reading import read_together

OTHER_MODELS = [name for name in reading("model", "judge") if name != "model_name"]
NEAR = 3
"""Differences up to which another run is nearly the same one."""


@dataclass
class Identity:
    """What decides a run's result."""

    phase: str
    settings: dict[str, Any]
    """The flags that count, in one spelling each, and the sections of the DeepSpeed configuration that do."""
    inputs: dict[str, str]
    """Fingerprints of what the phase reads, by name."""
    contents: dict[str, str]
    """Digests of what flags name besides, by name."""
    given: dict[str, Any]
    """The flags as they were given, for messages."""
    defaults: dict[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        """Its part of config.json."""
        known = {"phase": self.phase, "inputs": self.inputs, "compared": self.settings, "contents": self.contents}
        return {**known, "identity": digest_of(known)}

    def differences(self, run: Path) -> list[str] | None:
        """What keeps ``run`` apart, one phrase each; None where it is another phase's, or no run."""
        config = run_config(run)
        if not is_run(run) or config["phase"] != self.phase:
            return None
        if problem := config_problem(config):
            return [f"its config.json was damaged or edited ({problem})"]
        if len(str((config.get("inputs") or {}).get("model", ""))) == 16 and len(self.inputs.get("model", "")) == 64:
            return ["it was started with an earlier version of warp_ds, whose fingerprints did not cover every byte"]
        there = config["settings"]
        try:
            before = config.get("compared") or in_one_spelling(there)
        except (TypeError, ValueError, AttributeError) as error:
            return [f"its config.json was damaged or edited ({error})"]
        changed = []
        for name in sorted(self.settings.keys() | before.keys()):
            old, new = (side.get(name, self.defaults.get(name)) for side in (before, self.settings))
            if old != new:
                changed.append(
                    f"--{_shown(name)} was {_shown(there.get(name, old))} and is {_shown(self.given.get(name, new))}"
                )
        for kind, mine in (("inputs", self.inputs), ("contents", self.contents)):
            others = config.get(kind, mine)
            for name in sorted(mine.keys() | others.keys()):
                if others.get(name) != mine.get(name):
                    changed.append(
                        f"the contents of {_of(name)} are others ({_shown(others.get(name, 'none'))} and "
                        f"{mine.get(name, 'none')})"
                    )
        return changed

    def check(self, run: Path) -> None:
        """ConfigError where ``run``, which was named, is not this one, with all that keeps it apart."""
        changed = self.differences(run)
        if changed is None:
            other = run_config(run).get("phase")
            raise ConfigError(f"{run} is a run of {_shown(other)}, not of {self.phase}: use another --run_name or --resume")
        if changed:
            raise ConfigError(
                f"{run} was started with other settings or data: {'; '.join(changed)}. Give them as they were to "
                "go on with it, or another --run_name to start anew"
            )

    def nearest(self, own: Path) -> str:
        """Which unfinished run beside ``own`` is nearly this one, and what keeps it apart, in words; '' for none."""
        near = [
            (len(changed), place, run, changed)
            for place, run in enumerate(unfinished(own.parent))
            if run != own and (changed := self.differences(run)) and len(changed) <= NEAR
        ]
        if not near:
            return ""
        _, _, run, changed = min(near)
        return (
            f"{run}, unfinished{_progress(run)}, is nearly the same run and is not gone on with: {'; '.join(changed)}. Give "
            "them as they were to go on with it"
        )


def identify(phase: str, arguments: RunArguments, inputs: Mapping[str, str], passed: Mapping[str, Any]) -> Identity:
    """The identity of a run of ``arguments``. Reads what they name on the disk: rank 0 alone calls it."""
    chooses = bool(passed.get("load_best_model_at_end") or getattr(arguments, "early_stopping_patience", 0))
    flags = {**identity_settings(arguments), **training_arguments.training_settings(passed, chooses)}
    watched = set() if chooses or not isinstance(arguments, WatchingFlags) else dataclass_fields(WatchingFlags).keys()
    settings = {**{name: value for name, value in flags.items() if name not in watched}, **_sections(arguments)}
    defaults = {f.name: default_of(f) for f in dataclasses.fields(arguments)}
    return Identity(
        phase,
        json.loads(json.dumps(settings, default=str)),
        dict(inputs),
        _contents(arguments, inputs),
        {**dataclasses.asdict(arguments), **passed},
        in_one_spelling(defaults),
    )


def unfinished(root: Path) -> Iterator[Path]:
    """Runs in ``root`` that nobody works on and that are not finished, the newest first."""
    for run in newest_first((path.parent for path in root.glob("*/config.json")), "config.json", "started_at"):
        try:
            if not run.is_symlink() and not (run / "finished.json").is_file() and not alive(run):
                yield run
        except OSError:
            continue  # another user's


def _sections(arguments: RunArguments) -> dict[str, Any]:
    """What of the DeepSpeed configuration changes a training."""
    if not hasattr(arguments, "global_batch_size") or arguments.deepspeed is None:
        return {}
    config = settings.zero3_config(arguments, for_trainer=True)
    return {
        f"deepspeed {key}": config[key]
        for key in ("optimizer", "scheduler", "gradient_clipping")
        if config.get(key, "auto") != "auto"
    }


_TOKENIZER = (
    "tokenizer*.json",
    "*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "generation_config.json",
)


def read_named(arguments: RunArguments, inputs: Mapping[str, str]) -> None:
    """Reads, dealt over the ranks, what ``identify`` will want to know every byte of. Collective. Raises ArtifactError."""

    def covered() -> Iterator[Contents]:
        for flag in OTHER_MODELS:
            given = getattr(arguments, flag, None)
            if given and Path(given).expanduser().is_dir():
                yield model_contents(Path(given).expanduser())
        basis = getattr(arguments, "basis_dir", None)
        if basis and not {"basis", "masks"} & inputs.keys():
            yield BasisStore(find_artifact(basis, "basis", arguments.output_dir)).contents()

    read_together(covered, "reading the other models")


def _contents(arguments: RunArguments, inputs: Mapping[str, str]) -> dict[str, str]:
    """Of models: the tokenizer's files; of what the phase's own ``inputs`` leave out: its weights, or its basis."""
    fingerprints = {}
    for flag in ("model_name", *OTHER_MODELS):
        directory = Path(getattr(arguments, flag, None) or "").expanduser()
        if getattr(arguments, flag, None) and directory.is_dir():
            digest = hashlib.sha256()
            for path in sorted({path for pattern in _TOKENIZER for path in directory.glob(pattern) if path.is_file()}):
                digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
            fingerprints[f"{flag}'s tokenizer"] = digest.hexdigest()[:16]
            if flag != "model_name":
                fingerprints[flag] = fingerprint_model(directory)
    basis = getattr(arguments, "basis_dir", None)
    if basis and not {"basis", "masks"} & inputs.keys():
        fingerprints["basis_dir"] = BasisStore(find_artifact(basis, "basis", arguments.output_dir)).fingerprint()
    return fingerprints


def _of(name: str) -> str:
    name = _shown(name)
    return f"--{name}" if name.startswith(("model_name", "reference_", "judge_", "unaligned_", "basis_dir")) else f"the {name}"


def _shown(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text[:200] if text.isprintable() else ascii(text)[:200]


def _progress(run: Path) -> str:
    try:
        progress = read_json(run / PROGRESS)
        return f" ({progress['done']:g} of {progress['total']:g} {ascii(progress['unit'])[1:-1]})"
    except (ArtifactError, ValueError, KeyError, TypeError, IndexError):
        return ""
