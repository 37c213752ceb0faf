"""Weight-space baselines on model directories: Resta and Safe Delta, file by file, ranks taking the files in turn."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from warp_ds.cluster import consensus, processes
from warp_ds.errors import ArtifactError
from warp_ds.method.baselines import resta, safe_delta, safety_hessian
from warp_ds.report.card import without_sections
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import read_json, write_json, write_tensors, write_text

logger = logging.getLogger(__name__)
Formula = Callable[[str, Tensor, Tensor], Tensor]
"""(parameter name, fine-tuned, aligned) -> the merged parameter."""
MARK = "merged.json"


class Weights:
    """Tensors of a model directory by name, whatever file they lie in."""

    def __init__(self, directory: Path):
        index = directory / "model.safetensors.index.json"
        if index.is_file():
            listed = read_json(index)
            files = listed.get("weight_map") if isinstance(listed, dict) else None
            if not isinstance(files, dict) or not all(
                isinstance(file, str) and Path(file).name == file for file in files.values()
            ):
                raise ArtifactError(f"{index} is no index of a model's files")
            self.files: dict[str, str] = files
        elif (directory / "model.safetensors").is_file():
            with safe_open(str(directory / "model.safetensors"), framework="pt") as file:
                self.files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise ArtifactError(f"{directory} holds no safetensors model")
        self.directory = directory

    def get(self, name: str) -> Tensor:
        if name not in self.files:
            raise ArtifactError(f"{self.directory} has no parameter {name}: it is another kind of model")
        with safe_open(str(self.directory / self.files[name]), framework="pt") as file:
            return file.get_tensor(name)


def resta_formula(unaligned: Path, alpha: float) -> Formula:
    """Every parameter of the model: fine-tuned + alpha (aligned - unaligned)."""
    weights = Weights(unaligned)
    return lambda name, tuned, aligned: resta(tuned, aligned, weights.get(name), alpha)


def safe_delta_formula(basis_dir: Path, s: float) -> Formula:
    """The layers of the basis by Safe Delta; every other parameter stays the aligned one, as in its authors' code."""
    basis = BasisStore(basis_dir)
    layers = {f"{layer.name}.weight": layer.name for layer in basis.layers}

    def merged(name: str, tuned: Tensor, aligned: Tensor) -> Tensor:
        if name not in layers:
            return aligned
        hessian = safety_hessian(*basis.columns(layers[name]))
        return safe_delta(aligned, tuned, hessian, s)[0]

    return merged


def merge(fine_tuned: Path, aligned: Path, output: Path, formula: Formula) -> None:
    """Writes the model directory ``output``, in the files and dtypes of ``fine_tuned``. Collective; each file is made once.

    Raises ArtifactError where the models do not have the same parameters.
    """
    if consensus.on_rank_0(lambda: (output / MARK).is_file(), "looking for a merged model"):
        return
    with consensus.on_every_rank_or_none("opening the models"):
        source, before = Weights(fine_tuned), Weights(aligned)
        files = sorted(set(source.files.values()))
    # A file is written aside and renamed: one that is there is whole.
    left = consensus.on_rank_0(lambda: [file for file in files if not (output / file).is_file()], "looking for merged files")
    world = processes.world_size()
    for first in tqdm(range(0, len(left), world), desc="merging", disable=processes.rank() != 0):
        # The ranks meet after every file: none waits for another longer than one takes.
        with consensus.on_every_rank_or_none("merging the models"):
            output.mkdir(parents=True, exist_ok=True)
            for file in left[first : first + world][processes.rank() : processes.rank() + 1]:
                tensors = {}
                for name in (name for name, where in source.files.items() if where == file):
                    tuned = source.get(name)
                    tensors[name] = formula(name, tuned, before.get(name)).to(tuned.dtype)
                write_tensors(output / file, tensors, {"format": "pt"})

    def rest() -> None:
        for path in fine_tuned.iterdir():
            if path.name == "README.md":
                # What was measured was measured on the model before merging.
                write_text(output / path.name, without_sections(path.read_text(encoding="utf-8")))
            elif path.is_file() and path.name not in files:
                shutil.copyfile(path, output / path.name)
        write_json(output / MARK, {"fine_tuned": str(fine_tuned), "aligned": str(aligned)})

    consensus.on_rank_0(rest, "writing the merged model's other files")
