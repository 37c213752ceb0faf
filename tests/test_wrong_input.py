"""Wrong input: each case one message with cause and cure, on every rank, before any work is done."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from phase3_jobs import common, make_model
from ranks import run_ranks

from warp_ds.errors import ConfigError
from warp_ds.flags.arguments import BasisArguments, EvaluateArguments, ImportanceArguments, TrainArguments
from warp_ds.flags.comparison import CompareArguments
from warp_ds.flags.parsing import parse_arguments, parse_training
from warp_ds.launch.inputs import on_one_machine
from warp_ds.launch.job import _tell_torchrun

REPOSITORY = Path(__file__).parents[1]


def _prepare(root: Path) -> None:
    """A finished phase 1 and 2 on one layer, and a second model of the same shapes."""
    from warp_ds.cluster import processes
    from warp_ds.phases.basis import run_basis
    from warp_ds.phases.importance import run_importance

    shared = common(root, root / "out", target_layers="last", safety_data=str(root / "refusals_fit.jsonl"))
    run_basis(BasisArguments(**shared))
    run_importance(ImportanceArguments(**shared))
    if processes.rank() == 0:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model = AutoModelForCausalLM.from_pretrained(root / "m")
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1.5)
        model.save_pretrained(root / "other")
        AutoTokenizer.from_pretrained(root / "m").save_pretrained(root / "other")
        (root / "empty.jsonl").write_text("")
        (root / "blank.jsonl").write_text(json.dumps({"prompt": "", "response": "x"}) + "\n")
        (root / "columns.jsonl").write_text(json.dumps({"a": "x", "b": "y"}) + "\n")
        (root / "prompts.jsonl").write_text(json.dumps({"prompt": "x"}) + "\n")
        (root / "long.jsonl").write_text(
            "".join(json.dumps({"prompt": "word " * many, "response": "y"}) + "\n" for many in (1, 300, 400))
        )
        (root / "csv.jsonl").write_text("prompt,response\nx,y\n")
        (root / "lines.csv").write_text("just text\nwithout a header\n")
        (root / "list.jsonl").write_text("[1, 2]\n")
        (root / "stage2.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    processes.barrier()


def _cases(root: Path) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Case -> (what its message must say, what runs into it)."""
    from warp_ds.flags.comparison import SweepArguments
    from warp_ds.phases.basis import run_basis
    from warp_ds.phases.compare import run_compare
    from warp_ds.phases.evaluate import run_evaluation
    from warp_ds.phases.importance import run_importance
    from warp_ds.phases.sweep import run_sweep
    from warp_ds.phases.training import run_training

    def basis(**more: Any) -> Callable[[], Any]:
        return lambda: run_basis(
            _checked(
                BasisArguments(**common(root, root / "wrong", **{"safety_data": str(root / "refusals_fit.jsonl"), **more}))
            )
        )

    def importance(**more: Any) -> Callable[[], Any]:
        return lambda: run_importance(
            _checked(
                ImportanceArguments(
                    **{**common(root, root / "out", safety_data=str(root / "refusals_fit.jsonl"), target_layers="last"), **more}
                )
            )
        )

    def train(**more: Any) -> Callable[[], Any]:
        return lambda: run_training(
            _checked(TrainArguments(**{**common(root, root / "out", utility_data=str(root / "utility_train.jsonl")), **more}))
        )

    def evaluate(**more: Any) -> Callable[[], Any]:
        return lambda: run_evaluation(
            _checked(EvaluateArguments(**{**common(root, root / "out", harmful_data=str(root / "refusals_fit.jsonl")), **more}))
        )

    def compare(**more: Any) -> Callable[[], Any]:
        return lambda: run_compare(
            _checked(
                CompareArguments(
                    **{
                        **common(
                            root,
                            root / "out",
                            safety_data=str(root / "refusals_fit.jsonl"),
                            harmful_data=str(root / "refusals_fit.jsonl"),
                            utility_data=str(root / "utility_train.jsonl"),
                            utility_heldout=str(root / "utility_train.jsonl"),
                        ),
                        **more,
                    }
                )
            )
        )

    def sweep(**more: Any) -> Callable[[], Any]:
        return lambda: run_sweep(
            _checked(
                SweepArguments(
                    **{
                        **common(
                            root,
                            root / "out",
                            safety_data=str(root / "refusals_fit.jsonl"),
                            harmful_data=str(root / "refusals_fit.jsonl"),
                            utility_data=str(root / "utility_train.jsonl"),
                            utility_heldout=str(root / "utility_train.jsonl"),
                        ),
                        **more,
                    }
                )
            )
        )

    missing = "nowhere/at/all"
    return {
        "no such model": ("--model_name .*no such directory", basis(model_name=missing)),
        "a directory without a model": ("config.json", basis(model_name=str(root))),
        "no such data file": ("no such file|not found|neither", basis(safety_data=str(root / "missing.jsonl"))),
        "no such column": ("--prompt_column.*(a, b|columns)|a, b", basis(safety_data=str(root / "columns.jsonl"))),
        "a column that is not there": (
            "no column 'question', which --prompt_column names; its columns are [^:]*$",
            basis(prompt_column="question"),
        ),
        "no responses": ("--refusal_file", basis(safety_data=str(root / "prompts.jsonl"))),
        "empty data set": ("no rows|empty", basis(safety_data=str(root / "empty.jsonl"))),
        "empty prompt": ("empty", basis(safety_data=str(root / "blank.jsonl"))),
        "a prompt longer than max_length": (
            "2 of 3 prompts .row 1: [0-9]+ tokens, row 2: .*--max_length",
            unloaded(basis(safety_data=str(root / "long.jsonl"))),
        ),
        "such a prompt, without its answer": (
            "2 of 3 prompts .*do not fit.*--max_length",
            unloaded(basis(safety_data=str(root / "long.jsonl"), token_scope="prompt")),
        ),
        "such a prompt in phase 2": ("2 of 3 prompts .row 1: ", unloaded(importance(safety_data=str(root / "long.jsonl")))),
        "such a prompt in phase 3": (
            "2 of 3 prompts .row 1: ",
            unloaded(train(utility_data=str(root / "long.jsonl"), masks_dir="none")),
        ),
        "such a prompt in an evaluation": (
            "refusal: 2 of 3 prompts .row 1: .* exceed .* 256 tokens: leave",
            unloaded(evaluate(suite="refusal", harmful_data=str(root / "long.jsonl"), max_new_tokens=8)),
        ),
        "new tokens beyond the context": (
            "refusal: 7 of 7 prompts .*--max_new_tokens 250 exceed .* 256 tokens: lower it to [0-9]+ or",
            unloaded(evaluate(suite="refusal", max_new_tokens=250)),
        ),
        "items too long for their loss": (
            "loss: 2 of 3 prompts .row 1: ",
            unloaded(evaluate(suite="loss", utility_data=str(root / "long.jsonl"))),
        ),
        "such a prompt in a comparison": (
            "refusal: 2 of 3 .*safety: 2 of 3 ",
            unloaded(compare(safety_data=str(root / "long.jsonl"), harmful_data=str(root / "long.jsonl"), max_new_tokens=8)),
        ),
        "max_length beyond the context": ("context of 256", basis(max_length=300)),
        "no such layer range": ("--target_layers .5-9.*0-1", basis(target_layers="5-9")),
        "no such layer type": ("--layer_type.*ffn_down", basis(layer_type="ffn")),
        "batch size 0": ("--batch_size must be at least 1", basis(batch_size=0)),
        "not ZeRO-3": ("stage 2", basis(deepspeed=str(root / "stage2.json"))),
        "no such DeepSpeed file": ("--deepspeed", basis(deepspeed=str(root / "missing.json"))),
        "float16 on a CPU": ("float16 needs a GPU", basis(dtype="float16")),
        "output that cannot be written": ("--output_dir .* cannot be written", basis(output_dir="/proc/nowhere")),
        "keep_ratio above 1": ("--keep_ratio .* from 0 to 1, not 1.5", importance(keep_ratio=1.5)),
        "keep_ratio below 0": ("--keep_ratio", importance(keep_ratio=-0.1)),
        "no basis": ("launch/phase1.py", importance(output_dir=str(root / "none"))),
        "no such basis": ("--basis_dir", importance(basis_dir=missing)),
        "a basis of another model": ("belong.* to the model .*other", importance(model_name=str(root / "other"))),
        "a basis of other layers": ("has no layer|no layer", importance(target_layers="all")),
        "no masks": ("launch/phase2.py", train(output_dir=str(root / "none"))),
        "masks of another model": ("belong to the model", train(model_name=str(root / "other"))),
        "learning rate 0": ("--learning_rate", train(learning_rate=0.0)),
        "global batch 0": ("--global_batch_size", train(global_batch_size=0)),
        "unknown suite": ("--suite nonsense: choose from", evaluate(suite="nonsense")),
        "empty attack prompts": ("empty.jsonl is empty", evaluate(suite="", prompt_file=str(root / "empty.jsonl"))),
        "an empty evaluation set": ("empty.jsonl is empty", evaluate(harmful_data=str(root / "empty.jsonl"))),
        "csv called jsonl": ("csv.jsonl cannot be read as json", evaluate(harmful_data=str(root / "csv.jsonl"))),
        "text called csv": ("lines.csv.*--prompt_column", evaluate(suite="", prompt_file=str(root / "lines.csv"))),
        "json that is no rows": ("list.jsonl", evaluate(suite="", prompt_file=str(root / "list.jsonl"))),
        "no suite at all": ("--suite is empty: choose from", evaluate(suite="")),
        "task items without numbers": (
            "'#### N'.*gsm8k cannot score",
            evaluate(suite="gsm8k", utility_data=str(root / "refusals_fit.jsonl")),
        ),
        "no such judge": ("--judge_model .*no such directory", evaluate(judge_model=missing)),
        "movement from nothing": ("--reference_model: give it too", evaluate(basis_dir=missing)),
        "unknown arm": ("--arms nonsense: choose from", compare(arms="before,nonsense")),
        "contradictory arms": ("two of its parts set the basis", compare(arms="rotated+osft")),
        "no arm at all": ("--arms is empty: choose from", compare(arms=",")),
        "rates of an arm that is not compared": ("give ARM=RATE:RATE", compare(arms="before,full", arm_rates="osft=1e-3")),
        "a rate that is no number": ("--learning_rates 'fast'", compare(learning_rates="fast")),
        "an empty comparison set": ("empty.jsonl is empty", compare(harmful_data=str(root / "empty.jsonl"))),
        "examples to mix in without columns": ("a, b", compare(mix_file=str(root / "columns.jsonl"))),
        "an unknown axis value": ("--bases nonsense: choose from", sweep(bases="nonsense")),
        "resta without an unaligned model": ("--unaligned_data", compare(arms="resta")),
        "a comparison on items without numbers": ("'#### N'", compare(utility_heldout=str(root / "refusals_fit.jsonl"))),
        "unknown resume": ("--resume", basis(resume="yesterday")),
    }


def unloaded(run: Callable[[], Any]) -> Callable[[], Any]:
    """``run``, which must end before it reads a weight."""

    def checked() -> Any:
        from warp_ds.zero import model

        def load(*_: Any, **__: Any) -> Any:
            raise AssertionError("a model was loaded")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "load_sharded", load)
            return run()

    return checked


def _checked(arguments: Any) -> Any:
    """As the launcher does."""
    from warp_ds.cluster import consensus

    with consensus.on_every_rank_or_none("checking the flags"):
        arguments.check()
        arguments.check_machine()
    return arguments


def wrong_input_job(root: Path) -> dict[str, str]:
    """The message of every case, on this rank."""
    _prepare(root)
    messages = {}
    for name, (_, run) in _cases(root).items():
        try:
            run()
            messages[name] = "nothing was raised"
        except Exception as error:  # noqa: BLE001
            messages[name] = f"{type(error).__name__}: {error}"
    return messages


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    root = tmp_path_factory.mktemp("wrong")
    make_model(root)
    return run_ranks(2, wrong_input_job, root)


@pytest.mark.parametrize("case", list(_cases(Path("x"))))
def test_message_on_every_rank(messages: list[dict[str, str]], case: str) -> None:
    expected = _cases(Path("x"))[case][0]
    for rank, found in enumerate(messages):
        kind = found[case].split(":")[0]
        assert kind in ("ConfigError", "DataError", "ArtifactError", "OtherRankError"), (rank, found[case])
        assert re.search(expected, found[case], re.DOTALL), (rank, found[case])


def path_job(root: Path) -> list[str]:
    """What is said of a model that rank 0 alone sees, of one that no rank sees, and of one that all do."""
    from warp_ds.cluster import processes
    from warp_ds.launch.start_checks import _check_model_path

    here, messages = os.getcwd(), []
    folder = root / f"of_rank_{processes.rank()}"
    (folder / "both").mkdir(parents=True)
    if processes.rank() == 0:
        (folder / "model").mkdir()
    os.chdir(folder)  # a path from here is another one on the other rank, as on a disk that is not shared
    try:
        for name in ("./model", "./nowhere", "./both"):
            try:
                _check_model_path(name)
                messages.append("")
            except ConfigError as error:
                messages.append(str(error))
    finally:
        os.chdir(here)
    return messages


def test_a_disk_that_is_not_shared_is_told_from_a_wrong_path(tmp_path: Path) -> None:
    for unshared, nowhere, both in run_ranks(2, path_job, tmp_path):
        assert re.fullmatch(
            r"--model_name ./model: no such directory on \S+, though there is on \S+: give a directory on a "
            "file system that all nodes share",
            unshared,
        )
        assert re.fullmatch(r"--model_name ./nowhere: no such directory on \S+", nowhere) and both == ""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, True),
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}, True),  # torchrun
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, False),  # the deepspeed launcher
        ({"RANK": "1", "WORLD_SIZE": "4"}, False),
    ],
)
def test_disks_are_looked_at_early_where_all_ranks_share_them(environment: dict[str, str], expected: bool) -> None:
    assert on_one_machine(environment) is expected


def run_program(folder: Path, *words: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """``launcher`` words…, in ``folder`` and without the hub; an operator that was built would lie in it, too."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "TORCH_EXTENSIONS_DIR": str(folder / "built")}
    (folder / "data.jsonl").write_text(json.dumps({"prompt": "x", "response": "y"}) + "\n")
    return subprocess.run(
        [sys.executable, *launcher, *words], env=environment, capture_output=True, text=True, cwd=folder, timeout=300
    )


WORDS = ("--device", "cpu", "--safety_data", "data.jsonl", "--output_dir", "out", "--log_dir", "logs")


@pytest.mark.parametrize(
    ("script", "words", "message"),
    [
        ("phase1", ("--model_name", "nowhere/at/all"), "--model_name nowhere/at/all: no such directory on "),
        ("phase1", ("--model_name", "/x/nomodel"), "--model_name /x/nomodel: no such directory on "),
        ("phase2", ("--keepratio", "0.1"), "unknown flag --keepratio: did you mean --keep_ratio?"),
        ("phase3", ("--warmup_step", "3"), "unknown flag --warmup_step: did you mean --warmup_steps?"),
        ("submit", ("--phase3.batchsize", "3"), "unknown flag --phase3.batchsize: did you mean --phase3.batch_size?"),
        ("submit", ("--nodes", "two"), "argument --nodes: invalid int value: 'two'"),
        ("phase2", ("--model_name", "."), "--model_name . is a directory without config.json"),
    ],
)
def test_the_program_says_it_without_a_traceback(tmp_path: Path, script: str, words: tuple[str, ...], message: str) -> None:
    done = run_program(tmp_path, str(REPOSITORY / "launch" / f"{script}.py"), *(WORDS if script != "submit" else ()), *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and done.stderr.count("error:") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "built").exists(), "an operator was built first"


def test_ranks_say_it_once_and_before_they_meet(tmp_path: Path) -> None:
    launcher = ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", "29871")
    script = str(REPOSITORY / "launch" / "phase1.py")
    for words, message in ((("--model_name", "/x/nomodel"), "no such directory"), (("--lr", "1"), "unknown flag --lr")):
        done = run_program(tmp_path, script, *WORDS, *words, launcher=launcher)
        assert done.returncode == 2, done.stderr
        assert message in done.stderr and done.stderr.count("error:") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "built").exists()


def test_help_names_what_every_phase_takes() -> None:
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        shown: list[str] = []
        patch.setattr(sys.stdout, "write", lambda text: shown.append(text) or len(text))
        parse_training(TrainArguments, ["--help"])
    assert "--config FILE" in "".join(shown) and "TrainingArguments" in "".join(shown)


def test_flags_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("keep_ratio: 0.3\nbatch_size: 3\n")
    for words in (["--config", f"{tmp_path}/run.yaml"], [f"--config={tmp_path}/run.yaml"]):
        found = parse_arguments(ImportanceArguments, [*words, "--batch_size", "5"])
        assert (found.keep_ratio, found.batch_size) == (0.3, 5)
    (tmp_path / "run.yaml").write_text("keep_ration: 0.3\n")
    with pytest.raises(ConfigError, match="unknown flag --keep_ration: did you mean --keep_ratio"):
        parse_arguments(ImportanceArguments, words)


def test_a_checkout_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job starts, with the checkout's own version; the doctor says what is missing."""
    import importlib.metadata

    import warp_ds
    from warp_ds.launch import machine
    from warp_ds.phases.versions import shown_versions

    found = importlib.metadata.distribution

    def without(name: str) -> importlib.metadata.Distribution:
        if name == "warp_ds":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "distribution", without)
    assert f"warp_ds {warp_ds.__version__}, torch " in shown_versions("warp_ds", "torch")
    finding = machine.packages()
    assert "warp_ds is not installed" in finding.found and "pip install" in finding.cure


def test_the_cause_stands_in_torchruns_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = tmp_path / "error.json"
    _tell_torchrun("error: no file")
    assert not list(tmp_path.iterdir())  # another launcher
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(written))
    try:
        raise ValueError("hf_secret")
    except ValueError:
        _tell_torchrun("error: no file")
    said = json.loads(written.read_text())["message"]
    assert said["message"].endswith("error: no file") and "hf_secret" not in str(said)
