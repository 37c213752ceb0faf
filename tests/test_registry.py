"""Phases and flags are said once: what is derived from the registry and from flags' natures is what it was."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from warp_ds.flags.flag import dataclass_fields, nature
from warp_ds.flags.groups import RunArguments
from warp_ds.flags.identity import identity_settings, natures, reading
from warp_ds.registry import CHAIN_ENTRY, PHASES, maker_of, phase_of
from warp_ds.store.written import digest_of

ROOT = Path(__file__).parents[1]

#: Of every phase's defaults, written down when flags were lists: a run of an earlier version is still found again.
IDENTITIES = {
    "phase0": "77cfd4ed51b841f6",
    "phase1": "9568ca15a0b032bf",
    "phase2": "080f9e9f87f2c4d0",
    "phase3": "04d400af345ed99b",
    "evaluate": "c3e373e7bbf38caf",
    "compare": "5aaa196295e587d1",
    "sweep": "0ddf3c78949f0611",
    "demo": "5caf75e292f9573c",
}


def test_identities_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {name: digest_of(identity_settings(phase.arguments())) for name, phase in PHASES.items()} == IDENTITIES


@pytest.mark.parametrize("name", PHASES)
def test_a_phase_is_whole(name: str) -> None:
    phase = PHASES[name]
    arguments = phase.arguments()
    assert isinstance(arguments, RunArguments) and phase_of(arguments) is phase
    assert len(inspect.signature(phase.function).parameters) == 1 + phase.trains
    assert not phase.reads or hasattr(arguments, f"{phase.reads}_dir")
    launcher = ROOT / "launch" / f"{name}.py"
    assert name == "demo" or f'main("{name}")' in launcher.read_text()
    assert (ROOT / "slurm" / f"{name}.sbatch").is_file() is bool(phase.hours)


def test_makers_and_entries_of_a_chain() -> None:
    assert (maker_of("basis").name, maker_of("masks").name) == ("phase1", "phase2")
    entries = ("phase0", "phase3", "evaluate", "compare", "compare_seed12", "phase4", "sweep", "demo", "phase3_seed1")
    assert [bool(CHAIN_ENTRY.fullmatch(entry)) for entry in entries] == [True] * 5 + [False] * 4


def test_a_flag_has_one_nature() -> None:
    kinds: list[Any] = [phase.arguments for phase in PHASES.values()]
    for kind in kinds:
        for name, field in dataclass_fields(kind).items():
            found = nature(field)
            known = natures().get(name)
            assert known == found, f"--{name} of {kind.__name__}"
    assert reading("model", "judge") == ["model_name", "reference_model", "judge_model", "unaligned_model"]
    assert reading("basis", "masks") == ["basis_dir", "masks_dir"]
    assert set(reading("data", "files", "text")) == {
        "safety_data",
        "utility_data",
        "utility_heldout",
        "harmful_data",
        "harmless_data",
        "mix_file",
        "unaligned_data",
        "foundation_data",
        "prompt_file",
        "refusal_file",
    }
