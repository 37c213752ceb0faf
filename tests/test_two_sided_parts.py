"""--output_basis where a layer is some rows of a parameter: fused projections and experts, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_training import complete_basis
from masked_artefacts import odd_model, write_artefacts
from phase3_jobs import common, make_model, phase3
from ranks import run_ranks
from test_experts_reference import mixtral
from test_rows_reference import neox
from transformers import AutoModelForCausalLM

from warp_ds.errors import ArtifactError
from warp_ds.evaluation.certificate import certify
from warp_ds.flags.arguments import BasisArguments, ImportanceArguments
from warp_ds.method.mask import unpack_bits
from warp_ds.phases.basis import run_basis
from warp_ds.phases.importance import run_importance
from warp_ds.store.bases import BasisStore
from warp_ds.store.files import read_json, write_json
from warp_ds.store.fingerprints import fingerprint_model
from warp_ds.store.masks import MaskStore

#: Family -> its model, the layers that are masked, and their output basis.
CASES = {
    "neox": (neox, "attn_q,attn_v,ffn_down", "activation"),
    "mixtral": (mixtral, "experts_down,experts_gate", "activation"),
    "mixtral, gradients": (mixtral, "experts_down,experts_gate", "gradient"),
}


def job(roots: dict[str, Path]) -> dict[str, tuple[Path, Path, Path]]:
    found = {}
    for name, root in roots.items():
        _, layers, output = CASES[name]
        shared = common(root, root / "out", layer_type=layers, safety_data=str(root / "refusals_fit.jsonl"), safety_samples=0)
        basis = run_basis(BasisArguments(**shared, output_basis=output)) / "basis"
        masks = run_importance(ImportanceArguments(**shared, keep_ratio=0.2, importance_batch_size=3)) / "masks"
        found[name] = basis, masks, phase3(root, root / "out", root / "out") / "model"
    return found


@pytest.mark.slow
def test_layers_that_are_rows_of_a_parameter_have_an_output_basis_each(tmp_path: Path) -> None:
    roots = {name: tmp_path / str(number) for number, name in enumerate(CASES)}
    for name, root in roots.items():
        make_model(root, CASES[name][0])
    for name, (basis, masks, trained) in run_ranks(2, job, roots)[0].items():
        start, after = (
            dict(AutoModelForCausalLM.from_pretrained(of).named_parameters()) for of in (roots[name] / "m", trained)
        )
        store, frozen_of = BasisStore(basis), MaskStore(masks)
        for layer in store.layers:
            v, u = (complete_basis(side[0]) for side in (store.output_columns(layer.name), store.columns(layer.name)))
            frozen = unpack_bits(frozen_of.packed(layer.name), layer.n)
            old, new = (layer.of(side[layer.parameter].detach()).double() for side in (start, after))
            change = v.T @ (new - old) @ u
            assert not frozen.any() or change[frozen].abs().max() < 1e-6, layer.name
            assert change[~frozen].abs().max() > 1e-3, layer.name
            if CASES[name][2] == "activation":
                w, sigma = old.numpy(), covariance(store, layer.name)
                values, columns = store.output_columns(layer.name)[1].double().numpy(), v.numpy()
                wanted = w @ sigma @ w.T
                made = (columns[:, : len(values)] * values) @ columns[:, : len(values)].T
                assert np.abs(made - wanted).max() < 1e-4 * np.abs(wanted).max(), layer.name
        told = certify(roots[name] / "m", trained, masks)
        assert told.kept, told.problems


def covariance(store: BasisStore, name: str) -> Any:
    """Σ = U Λ Uᵀ of a layer's inputs, from their stored basis."""
    u, s = store.columns(name)
    return ((u.double() * s.double()) @ u.double().T).numpy()


def test_an_output_basis_that_the_metadata_do_not_fit_is_refused(tmp_path: Path) -> None:
    artefacts = write_artefacts(tmp_path, odd_model(), outputs=0.5)
    store = BasisStore(artefacts.basis)
    assert store.two_sided and torch.equal(
        store.output_columns("model.layers.0.mlp.down_proj")[0], artefacts.outputs["model.layers.0.mlp.down_proj.weight"]
    )
    whole = read_json(artefacts.basis / "metadata.json")
    name, other = list(whole["layers"])[:2]

    def told(change: Any) -> str:
        values = read_json(artefacts.basis / "metadata.json")
        change(values)
        write_json(artefacts.basis / "metadata.json", values)
        try:
            with pytest.raises(ArtifactError) as error:
                read = BasisStore(artefacts.basis)
                read.output_columns(name)
            return str(error.value)
        finally:
            write_json(artefacts.basis / "metadata.json", whole)

    first = whole["layers"][name]["output"]
    assert "are not those of 'bases'" in told(lambda v: v["layers"][name].pop("output"))
    assert "outputs, but" in told(lambda v: v["bases"][first].update(n=16))
    assert "not every layer has" in told(lambda v: (v["layers"][name].pop("output"), v["bases"].pop(first)))
    assert "not every layer has" in told(
        lambda v: (v["layers"][other].update(output=first), v["bases"].pop(whole["layers"][other]["output"]))
    )
    assert "outputs and rank" in told(lambda v: v["bases"][first].update(rank=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_honest_pairs_are_kept_in_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    """Free coefficients moved by half their size, weights rounded once: neither bf16 nor fp32 makes that a broken promise."""
    model = odd_model(dtype)
    model.save_pretrained(tmp_path / "before")
    before = fingerprint_model(tmp_path / "before")
    artefacts = write_artefacts(tmp_path, model, outputs=0.8, model_fingerprint=before)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, frozen in artefacts.frozen.items():
            param, v, u = (
                model.get_parameter(name),
                complete_basis(artefacts.outputs[name]),
                complete_basis(artefacts.bases[name]),
            )
            c = v.T @ param.double() @ u
            free = c * (1 + torch.randn(c.shape, generator=generator, dtype=torch.float64) / 2)
            param.copy_(v @ torch.where(frozen, c, free) @ u.T)
    model.save_pretrained(tmp_path / "after")
    told = certify(tmp_path / "before", tmp_path / "after", artefacts.masks)
    assert told.kept, (told.problems, told.reasons)
