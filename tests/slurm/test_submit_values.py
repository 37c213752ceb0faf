"""What may stand in a batch script: each value is refused by name, or is one word of one line of it."""

from __future__ import annotations

import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from warp_ds.errors import ConfigError
from warp_ds.flags.jobs import SubmitArguments
from warp_ds.flags.parsing import FlagParser
from warp_ds.launch.chain import find_chain
from warp_ds.launch.submission import CPUS_OF_TASKS, submit

#: A program of this name must never run.
EVIL = "touch marker"
REFUSED = [
    ("--run_name", f"x\n{EVIL}"),
    ("--run_name", "../x"),
    ("--run_name", "/tmp/x"),
    ("--run_name", "."),
    ("--run_name", ""),
    ("--run_name", "a' #SBATCH --uid=0"),
    ("--run_name", 'a"b'),
    ("--slurm", "constraint='a"),
    ("--run_name", "50%j"),
    ("--run_name", "a/b"),
    ("--output_dir", f"x\n{EVIL}"),
    ("--output_dir", "x\r"),
    ("--output_dir", "%x"),
    ("--account", f"me\n{EVIL}"),
    ("--account", "me --wrap=x"),
    ("--account", "$(id)"),
    ("--account", ""),
    ("--partition", "gpu\n#SBATCH --uid=0"),
    ("--partition", "gpu;x"),
    ("--partition", "a b"),
    ("--partition", "\x1b[0m"),
    ("--slurm", f"qos=high\n{EVIL}"),
    ("--slurm", f"qos\n{EVIL}=high"),
    ("--slurm", "qos high"),
    ("--slurm", "=x"),
    ("--slurm", "comment=mine"),
    ("--slurm", "--dependency=singleton"),
    ("--slurm", "wrap=id"),
    ("--slurm", "a;id=1"),
    ("--setup", f"module load cuda\n{EVIL}"),
    ("--python", f"python\n{EVIL}"),
    ("--python", f"python; {EVIL}"),
    ("--python", "python $(id)"),
    ("--python", "python 'x"),
    ("--python", ""),
    ("--python", "python > x"),
    ("--slurm", "depend=singleton"),
    ("--slurm", "out=x"),
    ("--slurm", "no-requeue"),
    ("--slurm", "nodes=5"),
    ("--slurm", "test-only"),
    ("--nodes", "0"),
    ("--nodes", "-1"),
    ("--hours", "inf"),
    ("--hours", "nan"),
    ("--hours", "0"),
    ("--gpus_per_node", "-1"),
    ("--ranks_per_node", "-2"),
    ("--cpus_per_rank", "-1"),
    ("--phases", f"1\n{EVIL}"),
    ("--cluster", "slurm\n"),
    ("--model_name", f"m\n{EVIL}"),
    ("--phase1.max_rank", "4\n"),
]
#: Each stays one word: sbatch and the shell see what was given, and nothing of it is run.
TAKEN = [
    ("--run_name", "a b"),
    ("--run_name", "$(touch marker)"),
    ("--run_name", "a;touch marker"),
    ("--run_name", "`touch marker`"),
    ("--output_dir", "out put"),
    ("--output_dir", "out;touch marker"),
    ("--account", "project_1"),
    ("--partition", "gpu,gpu-long"),
    ("--slurm", "constraint=a100|h100"),
    ("--slurm", "qos=$(touch marker)"),
    ("--slurm", "exclusive"),
    ("--python", "apptainer exec --nv 'my image.sif' python"),
    ("--model_name", "$(touch marker)"),
]


def queue(folder: Path, flag: str, value: str) -> None:
    words = ["--phases", "1", "--device", "cpu"]
    words += [] if flag == "--output_dir" else ["--output_dir", "out"]
    arguments, rest = FlagParser(SubmitArguments).parse_args_into_dataclasses(
        [*words, f"{flag}={value}"], look_for_args_file=False, return_remaining_strings=True
    )
    submit(find_chain(arguments, rest), arguments)


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An sbatch that keeps the script, in a Slurm without jobs."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, line in {
        "sbatch": 'cp "${@: -1}" "$KEEP/script"; echo "Submitted batch job 7"',
        "squeue": "true",
        "srun": "true",
        "scontrol": "exit 1",
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{line}\n")
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("KEEP", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("flag", "value"), REFUSED)
def test_is_refused_by_name_and_queues_nothing(cluster: Path, flag: str, value: str) -> None:
    with pytest.raises(ConfigError) as refused:
        queue(cluster, flag, value)
    message = str(refused.value)
    assert (flag in message or flag[2:] in message) and "\n" not in message, message
    assert [path.name for path in cluster.iterdir()] == ["tools"]


@pytest.mark.parametrize(("flag", "value"), TAKEN)
def test_stays_one_word_of_the_script(cluster: Path, flag: str, value: str) -> None:
    queue(cluster, flag, value)
    script = (cluster / "script").read_text()
    lines = script.splitlines()
    options = {
        line.partition("=")[0].removeprefix("#SBATCH --"): line.partition("=")[2]
        for line in lines
        if line.startswith("#SBATCH")
    }
    expected = {
        "array",
        "comment",
        "job-name",
        "nodes",
        "ntasks-per-node",
        "open-mode",
        "output",
        "requeue",
        "signal",
        "time",
        "wckey",
    }
    given = value.partition("=")[0] if flag == "--slurm" else flag[2:] if flag in ("--account", "--partition") else ""
    assert options.keys() - {given} <= expected, options
    assert all(len(shlex.split(option)) <= 1 for option in options.values()), options
    if given and "=" in value:
        assert shlex.split(options[given]) == [value.partition("=")[2]]
    elif flag in ("--account", "--partition"):
        assert options[given] == value
    command = [line for line in lines if line and not line.startswith(("#", "export ")) and line != CPUS_OF_TASKS]
    assert len(command) == 1 and shlex.split(command[0])[:2] == ["srun", "--unbuffered"]
    assert shlex.split(command[0])[-1] == str((next(cluster.rglob("submitit"))).resolve())
    if flag == "--python":
        assert "apptainer exec --nv 'my image.sif' python -u -m submitit.core._submit" in command[0]
    subprocess.run(["bash", str(cluster / "script")], check=True, capture_output=True)
    assert not list(cluster.rglob("marker"))
