"""Phases and flags are said once: what is derived from the registry and from flags' natures is what it was."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from warp_ds.errors import ConfigError
from warp_ds.flags.flag import dataclass_fields, nature
from warp_ds.flags.groups import RunArguments
from warp_ds.flags.identity import identity_settings, natures, reading
from warp_ds.launch.cli import main
from warp_ds.registry import CHAIN_ENTRY, PHASES, maker_of, phase_of
from warp_ds.zero.settings import zero3_config

ROOT = Path(__file__).parents[1]

#: Two runs that differ in these alone are one run. A flag that comes into the list, or leaves it, parts runs from their own
#: continuation.
NO_DIFFERENCE = """
    output_dir log_dir run_name resume debug device timeout local_rank deepspeed save_minutes max_requeues arms learning_rates
    arm_rates seeds at_utility floor harmful_ratio keep_models batch_size eval_batch_size gradient_checkpointing
    basis_placement collect svd_placement packing tokens_per_batch streaming num_proc push_to_hub hub_private_repo
    start_models
"""


def test_identities_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {name for name, its in natures().items() if not its.identity} == set(NO_DIFFERENCE.split())
    for phase in PHASES.values():
        own = dataclass_fields(phase.arguments)
        assert own.keys() - identity_settings(phase.arguments()).keys() == own.keys() & set(NO_DIFFERENCE.split())


@pytest.mark.parametrize("name", PHASES)
def test_a_phase_is_whole(name: str) -> None:
    phase = PHASES[name]
    arguments = phase.arguments()
    assert isinstance(arguments, RunArguments) and phase_of(arguments) is phase
    assert ("passed" in inspect.signature(phase.function).parameters) is phase.trains
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
    assert set(reading("model", "judge")) == {"model_name", "reference_model", "judge_model", "unaligned_model"}
    assert set(reading("basis", "masks")) == {"basis_dir", "masks_dir", "task_basis_dir"}
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
        "kept_data",
        "refusal_file",
        "eval_data",
        "eval_safety",
        "replay_data",
        "refresh_data",
        "harmful_mix",
        "patch_data",
    }


def test_what_comes_along_is_what_lies_at_the_top(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`warp-ds init` writes the files of the top level; what is there already stays."""
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "phase1.sbatch").write_text("mine")
    assert main(["init", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"left as it is: {tmp_path / 'slurm' / 'phase1.sbatch'}" in shown and shown.count("written: ") == 12
    assert (tmp_path / "slurm" / "phase1.sbatch").read_text() == "mine"
    (tmp_path / "slurm" / "phase1.sbatch").unlink()
    main(["init", str(tmp_path)])
    for folder in ("ds_configs", "slurm"):
        written, ours = ({p.name: p.read_text() for p in (top / folder).iterdir()} for top in (tmp_path, ROOT))
        assert written == ours, f"{folder}/ differs from warp_ds/cluster: change both (warp-ds init . writes what is missing)"


def test_a_configuration_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    by_name, by_path = (
        zero3_config(RunArguments(device="cpu", deepspeed=given))
        for given in ("zero3_cpu", f"{ROOT}/ds_configs/zero3_cpu.json")
    )
    assert by_name == by_path
    with pytest.raises(ConfigError, match="--deepspeed zero3_7b: no such file.*zero3_70b"):
        zero3_config(RunArguments(deepspeed="zero3_7b"))
    Path("zero3_cpu").write_text('{"zero_optimization": {"stage": 2}}')
    with pytest.raises(ConfigError, match="ZeRO stage 2"):  # a file of that name comes first
        zero3_config(RunArguments(deepspeed="zero3_cpu"))
    Path("zero3_cpu").unlink()
    Path("zero3_cpu").mkdir()  # a directory is no configuration
    assert zero3_config(RunArguments(device="cpu", deepspeed="zero3_cpu")) == by_path


HELP = [[], *([name] for name in (*PHASES, "submit", "plan", "doctor", "verify", "report", "init", "shrink"))]


@pytest.mark.parametrize("words", HELP, ids=lambda words: " ".join(words) or "alone")
def test_help_imports_no_torch(words: list[str]) -> None:
    """It takes seconds."""
    program = (
        "import sys\nfrom warp_ds.launch.cli import main\n"
        f"try: main({[*words, '--help']})\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'transformers', 'deepspeed', 'datasets', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    here = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=here)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr
