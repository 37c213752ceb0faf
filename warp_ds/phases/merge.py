"""Model directories made of others, file by file, ranks taking the files in turn: Resta, Safe Delta, a LoRA merged into its
base."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from warp_ds.cluster import consensus, processes
from warp_ds.errors import ArtifactError, ConfigError
from warp_ds.method.baselines import resta, safe_delta, safety_hessian
from warp_ds.method.lora_baselines import safe_lora, wsr
from warp_ds.method.mask import unpack_bits
from warp_ds.method.rotation import Rotation
from warp_ds.models.adapter_directory import AdapterDirectory
from warp_ds.models.directory import ModelDirectory, by_parameter
from warp_ds.models.lora import refuse_parts
from warp_ds.report.card import without_sections
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import read_json, write_json, write_tensors, write_text
from warp_ds.store.fingerprints import SHOWN, fingerprint_model
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import MaskStore
from warp_ds.zero.shared_reading import model_fingerprint

logger = logging.getLogger(__name__)
Formula = Callable[[str, Tensor, Tensor], Tensor]
"""(parameter name, fine-tuned, aligned) -> the merged parameter."""
MARK = "merged.json"


def resta_formula(unaligned: Path, alpha: float) -> Formula:
    """Every parameter of the model: fine-tuned + alpha (aligned - unaligned)."""
    weights = ModelDirectory.of(unaligned)
    return lambda name, tuned, aligned: resta(tuned, aligned, weights.read(name), alpha)


def safe_lora_formula(unaligned: Path, threshold: float) -> Formula:
    """Every matrix that training changed, by Safe LoRA; the rest as trained."""
    weights = ModelDirectory.of(unaligned)

    def merged(name: str, tuned: Tensor, aligned: Tensor) -> Tensor:
        if tuned.ndim != 2 or tuned.equal(aligned):
            return tuned
        return safe_lora(aligned, tuned, weights.read(name), threshold)[0]

    return merged


def wsr_formula(masks_dir: Path, adapter: Path) -> Formula:
    """The masked layers by the start's W and ``adapter``, which is opened when it is first asked for; every other parameter as
    trained."""
    masks = MaskStore(masks_dir)
    basis, layers = masks.find_basis(), {layer.parameter: layer for layer in masks.layers}
    refuse_parts(masks.layers, "--arms lora+wsr")
    opened = cache(lambda: AdapterDirectory.of(adapter))

    def merged(name: str, tuned: Tensor, aligned: Tensor) -> Tensor:
        if (layer := layers.get(name)) is None:
            return tuned
        _, factors = next(opened().of_targets([layer]))
        if factors is None:
            return tuned
        rotation = Rotation(None, layer.n) if basis is None else basis.rotation(layer.name, torch.float64)
        return wsr(aligned, factors.delta(), rotation, unpack_bits(masks.packed(layer.name), layer.n))

    return merged


def safe_delta_formula(basis_dir: Path, s: float) -> Formula:
    """The layers of the basis by Safe Delta; every other parameter stays the aligned one, as in its authors' code."""
    basis = BasisStore(basis_dir)
    layers: dict[str, list[TargetLayer]] = {}
    for layer in basis.layers:
        if layer.expert is not None:
            raise ConfigError(
                f"{layer.name} is one of a mixture's experts, and Safe Delta is of matrices that every token passes: leave "
                "safedelta out of --arms"
            )
        layers.setdefault(layer.parameter, []).append(layer)

    def merged(name: str, tuned: Tensor, aligned: Tensor) -> Tensor:
        result = aligned
        for layer in layers.get(name, ()):
            part = safe_delta(layer.of(aligned), layer.of(tuned), safety_hessian(*basis.columns(layer.name)), s)[0]
            result = layer.replaced(result, part)
        return result

    return merged


def merge_adapter(base: Path, adapter: Path, output: Path) -> None:
    """Writes the model directory ``output``: ``base`` with W + s B A in place of each W that ``adapter`` has a pair for, added
    in fp32 and rounded once to the dtype of W. A rank holds one file of the base. Collective.

    Raises ArtifactError for an adapter that is no plain LoRA, holds more than A and B, or is of another model.
    """
    fingerprint = model_fingerprint(base)
    with consensus.on_every_rank_or_none("opening the adapter"):
        opened = AdapterDirectory.of(adapter)
        if "quantization_config" in read_json(base / "config.json"):
            raise ArtifactError(
                f"{base} is quantised (quantization_config), and W + s B A is no weight of it: merge into the model "
                "that it was made from"
            )
        if opened.others:
            raise ArtifactError(
                f"{adapter} holds {len(opened.others)} weights beside A and B ({opened.others[0]}), which are not merged here: "
                "merge it with PEFT (merge_and_unload)"
            )
        source = ModelDirectory.of(base)
        if not all(f"{layer}.weight" in source.tensors for layer in opened.layers):
            source = by_parameter(source)
        for layer in opened.layers:
            location = source.tensors.get(f"{layer}.weight")
            if location is None or location.shape != opened.shape(layer):
                raise ArtifactError(
                    f"{adapter} changes {layer} of {opened.shape(layer)}, which {base} has not"
                    + ("" if location is None else f" (but of {location.shape})")
                    + ": it is of another model"
                )
        _check_base(opened, base, fingerprint)
        if output.exists() and not (output / MARK).is_file() and (not output.is_dir() or any(output.iterdir())):
            raise ConfigError(f"{output} is there already: give a new directory")
        mark = {"base": str(base), "adapter": str(adapter)}
        if (output / MARK).is_file() and read_json(output / MARK) != mark:
            raise ConfigError(f"{output} holds the merge of another base or adapter (its {MARK}): give a new directory")
        if not opened.layers:
            raise ArtifactError(f"{adapter} holds no pair of A and B: there is nothing to merge")
    stored = {source.tensors[f"{layer}.weight"].name: layer for layer in opened.layers}

    def merged(name: str, w: Tensor, _: Tensor) -> Tensor:
        if name not in stored:
            return w
        whole = w.float() + opened.factors(stored[name]).delta()
        if not whole.to(w.dtype).isfinite().all():
            raise ArtifactError(f"{adapter}: merged, {name} is not finite")
        return whole

    merge(base, base, output, merged, mark=mark)


def _check_base(adapter: AdapterDirectory, base: Path, fingerprint: str) -> None:
    """ArtifactError where ``base``, of this fingerprint, is not the model that the adapter was trained on, which shapes do not
    tell; a warning where nothing does."""
    named = Path(adapter.base_name)
    trained_on = adapter.base_fingerprint
    if trained_on is None and adapter.base_name and (named / "config.json").is_file():
        trained_on = fingerprint if named.resolve() == base.resolve() else fingerprint_model(named)
    if trained_on is None:
        if not adapter.base_name or f"models--{adapter.base_name.replace('/', '--')}" not in str(base):
            logger.warning(
                "%s names %s as its base: nothing here says whether %s is that model",
                *(adapter.directory, adapter.base_name or "no model", base),
            )
    elif trained_on != fingerprint:
        raise ArtifactError(
            f"{adapter.directory} was trained on {adapter.base_name or 'a model'} (fingerprint {trained_on[:SHOWN]}), and "
            f"{base} is another model ({fingerprint[:SHOWN]}): give the base that it was trained on"
        )


def merge(
    fine_tuned: Path,
    aligned: Path,
    output: Path,
    formula: Formula,
    mark: dict[str, str] | None = None,
    layers: Sequence[TargetLayer] = (),
) -> None:
    """Writes the model directory ``output``, in the files and dtypes of ``fine_tuned``. Collective; each file is made once.

    ``formula`` is given the stored names, or, where ``layers`` are stored under other names than their parameters', those.

    Raises ArtifactError where the models do not have the same parameters.
    """
    if consensus.on_rank_0(lambda: (output / MARK).is_file(), "looking for a merged model"):
        return
    with consensus.on_every_rank_or_none("opening the models"):
        source, before = ModelDirectory.of(fine_tuned, layers), ModelDirectory.of(aligned, layers)
        if source.tensors.keys() != before.tensors.keys():
            source, before = by_parameter(source), by_parameter(before)
        places = {name: Path(location.path).name for name, location in source.tensors.items()}
        files = sorted(set(places.values()))
    # A file is written aside and renamed: one that is there is whole.
    left = consensus.on_rank_0(lambda: [file for file in files if not (output / file).is_file()], "looking for merged files")
    world = processes.world_size()
    for first in tqdm(range(0, len(left), world), desc="merging", disable=processes.rank() != 0):
        # The ranks meet after every file: none waits for another longer than one takes.
        with consensus.on_every_rank_or_none("merging the models"):
            output.mkdir(parents=True, exist_ok=True)
            for file in left[first : first + world][processes.rank() : processes.rank() + 1]:
                tensors = {}
                for name in (name for name, where in places.items() if where == file):
                    tuned = source.read(name)
                    other = tuned if aligned == fine_tuned else before.read(name)
                    tensors[source.tensors[name].name] = formula(name, tuned, other).to(tuned.dtype)
                write_tensors(output / file, tensors, {"format": "pt"})

    def rest() -> None:
        for path in fine_tuned.iterdir():
            if path.name == "README.md":
                # What was measured was measured on the model before merging.
                write_text(output / path.name, without_sections(path.read_text(encoding="utf-8")))
            elif path.is_file() and path.name not in files:
                shutil.copyfile(path, output / path.name)
        write_json(output / MARK, mark or {"fine_tuned": str(fine_tuned), "aligned": str(aligned)})

    consensus.on_rank_0(rest, "writing the merged model's other files")
