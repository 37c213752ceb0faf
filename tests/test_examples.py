"""Every example runs on the tiny model that examples/tiny.py makes; what was trained keeps what its masks freeze."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import free_port, run_ranks
from safetensors.torch import load_file, save_file

from warp_ds.launch.cli import main as warp_ds

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name: str, directory: str, *more: str) -> None:
    """As a script of its own would: in a fresh process, its directory first on the path."""
    sys.path.insert(0, str(EXAMPLES))
    sys.argv = [name, directory] if name == "tiny.py" else [name, "--directory", directory, *more]
    if name in ("trainer.py", "trl_sft.py", "lora_trl.py", "freeze_new_tokens.py", "resume_other_world.py"):
        os.environ["ACCELERATE_USE_CPU"] = "true"
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("examples")
    run_ranks(1, run_example, "tiny.py", str(found))
    return found


def kept(directory: Path, model: str, masks: str) -> int:
    found = ["--before", directory / "model", "--after", directory / model, "--masks_dir", directory / masks]
    return warp_ds(["verify", *map(str, found), "--output", str(directory / f"{model}.json")])


@pytest.mark.parametrize("name", ["trainer", "trl_sft", "torch_loop", "deepspeed_loop"])
def test_training_keeps_what_is_frozen(directory: Path, name: str) -> None:
    if name == "trl_sft" and importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed")
    run_ranks(1, run_example, f"{name}.py", str(directory))
    assert kept(directory, name, "phase2/masks") == 0
    certificate = json.loads((directory / f"{name}.json").read_text())
    assert certificate["outcome"] == "kept"


def test_an_adapter_keeps_what_is_frozen(directory: Path) -> None:
    pytest.importorskip("trl")
    run_ranks(1, run_example, "lora_trl.py", str(directory))
    words = [
        "--before",
        directory / "model",
        "--adapter",
        directory / "lora_trl",
        "--masks_dir",
        directory / "phase2_columns/masks",
    ]
    assert warp_ds(["verify", *map(str, words), "--output", str(directory / "lora_trl.json")]) == 0


def tied_model(model: Path) -> Path:
    """A copy whose head is its embedding."""
    made = shutil.copytree(model, model.parent / "tied_model", dirs_exist_ok=True)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    weights = load_file(made / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k != "lm_head.weight"}, made / "model.safetensors", {"format": "pt"})
    return made


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("ranks", [1, 2])
def test_only_new_tokens_train(directory: Path, ranks: int, tied: bool) -> None:
    """In one process without DeepSpeed, and on two ranks under ZeRO-3, once as torchrun starts them. The example asserts that
    the new rows moved; here its files are compared with those that it began with."""
    model = tied_model(directory / "model") if tied else directory / "model"
    out = directory / "freeze_new_tokens"
    shutil.rmtree(out, ignore_errors=True)
    if ranks == 2 and tied:
        torchrun(ranks, "freeze_new_tokens.py", "--directory", str(directory), "--model_name", str(model))
    else:
        run_ranks(ranks, run_example, "freeze_new_tokens.py", str(directory), "--model_name", str(model))
    before, after = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys() and ("lm_head.weight" in after) != tied
    for name, old in before.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert len(after[name]) == len(old) + 2 and after[name][len(old) :].abs().sum(dim=1).all()
        assert torch.equal(old, after[name][: len(old)]), name


def torchrun(ranks: int, name: str, *words: str) -> None:
    """As in a shell."""
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port()))
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(EXAMPLES.parent), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [*command, str(EXAMPLES / name), *words], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("name", "ranks"), [("freeze_neurons", 1), ("freeze_pruned", 2), ("freeze_rows", 2), ("sharded_loading", 2)]
)
def test_what_is_frozen_or_loaded_in_shards(directory: Path, name: str, ranks: int) -> None:
    run_ranks(ranks, run_example, f"{name}.py", str(directory))
    before, after = load_file(directory / "model" / "model.safetensors"), load_file(directory / name / "model.safetensors")
    assert before.keys() == after.keys() and all(before[k].shape == after[k].shape for k in before)
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_a_training_goes_on_on_another_number_of_ranks(directory: Path) -> None:
    """The example asserts that it goes on where the start before it ended; the checkpoint of 2 ranks is taken up by 1."""
    for ranks, step in ((2, 3), (1, 6)):
        run_ranks(ranks, run_example, "resume_other_world.py", str(directory))
        state = json.loads((directory / "resume_other_world" / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["global_step"] == step


def test_artefacts_of_ones_own(directory: Path) -> None:
    """custom_mask.py asserts that its frozen entries stayed; phase 2 took custom_basis.py's basis."""
    run_ranks(1, run_example, "custom_mask.py", str(directory))
    run_ranks(1, run_example, "custom_basis.py", str(directory))
    masks = json.loads((directory / "custom_basis" / "phase2" / "masks" / "metadata.json").read_text())
    assert masks["frozen"] == round(0.1 * masks["entries"]) and Path(masks["basis_dir"]).parent.name == "custom_basis"


def test_the_notebook_reads_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads((EXAMPLES / "read_report.ipynb").read_text())["cells"]
    names: dict[str, object] = {"__file__": str(EXAMPLES / "read_report.ipynb")}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "read_report.ipynb", "exec"), names)
    printed = capsys.readouterr().out
    assert "rotated" in printed and "99 %" in printed
