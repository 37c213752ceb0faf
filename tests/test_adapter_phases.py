"""Phase 3 with --adapter lora on 1, 2 and 3 ranks against the dense reference, over stops and other numbers of ranks, to the
certificate and the merged model."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_training import DenseAdamW, complete_basis, encoded, task_loss, train
from peft import LoraConfig, PeftModel, get_peft_model
from phase3_jobs import LAYERS, SAMPLES, TRAINER, common, losses, make_model, phase3, phase12
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_controls import entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from two_sided_reference import BothSidesAdamW

from warp_ds.cluster import preemption, processes
from warp_ds.errors import ArtifactError, ConfigError, UnsupportedSetting
from warp_ds.evaluation.adapter_certificate import certify_adapter
from warp_ds.evaluation.certificate import certify
from warp_ds.flags.arguments import BasisArguments, ImportanceArguments, SafetyTuningArguments
from warp_ds.launch.cli import main
from warp_ds.models.adapter_directory import AdapterDirectory
from warp_ds.phases import adapters, merge, training
from warp_ds.phases.basis import run_basis
from warp_ds.phases.importance import run_importance
from warp_ds.phases.trainer import MetricsFile
from warp_ds.protection import WarpCallback
from warp_ds.store.masks import MaskStore

LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 5, "lora_alpha": 10, "lora_dropout": 0.0, "lora_rslora": True}
"""rsLoRA, s = alpha / √r: training, certificate, merging and resuming know it. The plain scale is test_adapters.py's."""
CONFIG: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 5, "lora_alpha": 10, "use_rslora": True}
SEED = 42


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    make_model(path)
    run_ranks(1, masks_for_adapters, path)
    return path


KINDS = {"columns": "artefacts", "rows": "rows"}
"""Masks of whole columns, which A keeps, and of whole rows with an output basis, which B keeps: where they are."""


def masks_for_adapters(root: Path) -> None:
    phase12(root, root / "artefacts", mask_unit="column")
    shared = common(root, root / "rows", layer_type=LAYERS, safety_data=str(root / "refusals_fit.jsonl"), safety_samples=0)
    run_basis(BasisArguments(**shared, output_basis="activation"))
    run_importance(ImportanceArguments(**shared, keep_ratio=0.2, importance_batch_size=3, mask_unit="row"))


def masks_of(root: Path, kind: str = "columns") -> Path:
    return root / KINDS[kind] / "phase2_latest" / "masks"


def stray_bits(callback: WarpCallback) -> int:
    found = 0
    assert callback.protection is not None
    for layer in callback.protection.layers:
        c = callback.protection.driver.coefficients(layer)
        found += sum(int((c.view(torch.int32)[piece][frozen] != 0).sum()) for piece, frozen in layer.frozen_pieces(c.device))
    return found


def job(root: Path, output: Path, stop_at: int | None = None, kind: str = "columns", **more: Any) -> dict[str, Any] | None:
    """Phase 3, every step of which is looked at; None where it was stopped at the end of step ``stop_at``."""
    preemption.watch()
    on_train_end, on_step_end, seen = WarpCallback.on_train_begin, MetricsFile.on_step_end, []

    def begin(self: WarpCallback, *args: Any, **kwargs: Any) -> None:
        on_train_end(self, *args, **kwargs)
        seen.append((self, stray_bits(self)))

    def step(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_step_end(self, args, state, control, **kwargs)
        seen.append((seen[0][0], stray_bits(seen[0][0])))
        if state.global_step == stop_at and processes.rank() == processes.world_size() - 1:
            os.kill(os.getpid(), signal.SIGUSR2)

    WarpCallback.on_train_begin, MetricsFile.on_step_end = begin, step  # type: ignore[method-assign]
    try:
        run = phase3(root, root / KINDS[kind], output, None, **{**LORA, **more})
    except preemption.Preempted:
        processes.barrier()
        return None
    finally:
        WarpCallback.on_train_begin, MetricsFile.on_step_end = on_train_end, on_step_end  # type: ignore[method-assign]
        preemption._asked = None
    return {"run": str(run), "losses": losses(run), "stray": [bits for _, bits in seen]}


def jobs(root: Path, output: Path) -> dict[str, dict[str, Any]]:
    """A whole run of each kind of masks; on one rank one with activations computed again; on two those that are stopped at step
    2 and go on."""
    found = {}
    for kind in KINDS:
        whole = job(root, output / kind / "whole", kind=kind, merge_adapter=True)
        assert whole is not None
        found[kind] = whole
        if processes.world_size() == 2:
            assert job(root, output / kind / "same", stop_at=2, kind=kind) is None
            if processes.rank() == 0:
                for other in ("1", "3"):
                    shutil.copytree(output / kind / "same", output / kind / other, symlinks=True)
            processes.barrier()
            whole["resumed"] = job(root, output / kind / "same", kind=kind)
            assert whole["resumed"] is not None
    if processes.world_size() == 1:
        again = job(root, output / "checkpointing", gradient_checkpointing=True)
        assert again is not None
        assert again["losses"] == pytest.approx(found["columns"]["losses"], abs=1e-6)
    return found


def go_on(root: Path, output: Path) -> dict[str, dict[str, Any] | None]:
    return {kind: job(root, output / kind / str(processes.world_size()), kind=kind) for kind in KINDS}


@pytest.fixture(scope="module")
def all_runs(root: Path) -> dict[int, dict[str, dict[str, Any]]]:
    return {world: run_ranks(world, jobs, root, root / f"world{world}")[0] for world in (1, 2, 3)}


@pytest.fixture(scope="module")
def runs(all_runs: Any) -> dict[int, dict[str, Any]]:
    """Those with masks of columns."""
    return {world: found["columns"] for world, found in all_runs.items()}


def lora_of(root: Path, layers: list[str]) -> tuple[Any, dict[str, torch.Tensor]]:
    """The fp64 model with new adapters on these layers, and copies of A and B."""
    model = AutoModelForCausalLM.from_pretrained(root / "m")
    torch.manual_seed(SEED)
    adapted = get_peft_model(model, LoraConfig(**CONFIG, target_modules=layers)).double()
    return adapted, {k: p.detach().clone() for k, p in adapted.named_parameters() if p.requires_grad}


def reference(root: Path, kind: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Five full-batch clipped AdamW steps of A and B in fp64, A's part in U_F taken out by hand, or B turned by [V_F, …]."""
    masks = json.loads((masks_of(root, kind) / "metadata.json").read_text())["layers"]
    basis = (root / KINDS[kind] / "phase1_latest" / "basis").resolve()
    files = json.loads((basis / "metadata.json").read_text())["layers"]
    adapted, named = lora_of(root, list(masks))
    settings: dict[str, Any] = {"lr": 2e-3, "eps": 1e-4, "decay": dict.fromkeys(named, 0.1), "clip": 0.5}
    directions, frozen = {}, {}
    for layer, entry in masks.items():
        side, file = ("A", "file") if kind == "columns" else ("B", "output")
        bits = np.unpackbits(load_file(masks_of(root, kind) / entry["file"])["frozen"].numpy(), axis=1)[:, : entry["shape"][1]]
        chosen = torch.from_numpy((bits[0] if side == "A" else bits[:, 0]).astype(bool))
        name = f"base_model.model.{layer}.lora_{side}.default.weight"
        directions[name] = u = complete_basis(load_file(basis / files[layer][file])["U"])[:, chosen]
        first = torch.arange(len(u)) < u.shape[1]
        frozen[name] = (first if side == "A" else first[:, None]).expand(named[name].shape)
        if side == "A":
            named[name] = named[name] - named[name] @ u @ u.T
    if kind == "columns":
        optimizer = DenseAdamW(named, directions, frozen, **settings)
    else:
        optimizer = BothSidesAdamW(named, directions, {}, frozen, **settings)
    loss = task_loss(root, AutoTokenizer.from_pretrained(root / "m"))
    return train(adapted, list(named), [torch.zeros(0)] * 5, optimizer, loss), optimizer.weights()


@pytest.fixture(scope="module")
def references(root: Path) -> dict[str, tuple[list[float], dict[str, torch.Tensor]]]:
    return {kind: reference(root, kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_equals_the_dense_reference(all_runs: Any, references: Any, world: int, kind: str) -> None:
    losses, weights = references[kind]
    found = all_runs[world][kind]
    assert found["losses"] == pytest.approx(losses, abs=1e-6)
    assert found["stray"] == [0] * 6
    saved = load_file(Path(found["run"]) / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == {name.replace(".default", "") for name in weights}
    for name, value in weights.items():
        assert (saved[name.replace(".default", "")].double() - value).abs().max() < 1e-5, name
    assert max(float(value.abs().max()) for name, value in weights.items() if "lora_B" in name) > 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on(all_runs: Any, kind: str) -> None:
    whole = all_runs[2][kind]
    resumed = whole["resumed"]
    assert resumed["losses"] == whole["losses"] and resumed["stray"] == [0] * 4
    files = [load_file(Path(each["run"]) / "adapter" / "adapter_model.safetensors") for each in (whole, resumed)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_stopped_run_goes_on_on_another_number_of_ranks(root: Path, all_runs: Any, world: int) -> None:
    for kind, found in run_ranks(world, go_on, root, root / "world2")[0].items():
        assert found["stray"] == [0] * 4, kind
        assert found["losses"] == pytest.approx(all_runs[2][kind]["losses"], abs=1e-6), kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_pefts_and_the_merged_model_is_its_merge(root: Path, all_runs: Any, tmp_path: Path, kind: str) -> None:
    run = Path(all_runs[2][kind]["run"])
    card = (run / "adapter" / "README.md").read_text()
    assert "adapter: LoRA, r 5" in card and f"unit {kind[:-1]}" in card
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(root / "m"), run / "adapter")
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        unmerged = adapted(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(run / "model")(ids).logits
        theirs = adapted.merge_and_unload()(ids).logits
        start = AutoModelForCausalLM.from_pretrained(root / "m")(ids).logits
    assert (merged - theirs).abs().max() < 1e-5 and (merged - unmerged).abs().max() < 1e-5
    assert (merged - start).abs().max() > 1e-2
    assert (
        main(
            ["merge", "--model_name", str(root / "m"), "--adapter", str(run / "adapter"), "--output", str(tmp_path / "by cli")]
        )
        == 0
    )
    again, files = load_file(tmp_path / "by cli" / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(again[name], files[name]) for name in files)


def tampered(source: Path, target: Path, change: Any) -> Path:
    shutil.copytree(source, target)
    tensors = load_file(source / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, target / "adapter_model.safetensors", {"format": "pt"})
    return target


def test_the_certificate_of_an_adapter(root: Path, runs: Any, tmp_path: Path) -> None:
    adapter, masks = Path(runs[3]["run"]) / "adapter", masks_of(root)
    words = [
        "verify",
        "--before",
        str(root / "m"),
        "--masks_dir",
        str(masks),
        "--output",
        str(tmp_path / "c.json"),
        "--adapter",
    ]
    assert main([*words, str(adapter)]) == 0
    written = json.loads((tmp_path / "c.json").read_text())
    assert written["kept"] and all(layer["free_rms"] > 1e4 * layer["frozen_rms"] > 0 for layer in written["layers"])
    # After merging, the certificate of the models finds the same.
    assert certify(root / "m", Path(runs[2]["run"]) / "model", masks).kept

    name = MaskStore(masks).layers[3].name
    a, b = (f"base_model.model.{name}.lora_{side}.weight" for side in "AB")
    frozen = np.unpackbits(MaskStore(masks).columns(name).numpy(), axis=1)[0]
    basis = MaskStore(masks).find_basis()
    assert basis is not None
    u = complete_basis(basis.columns(name)[0])[:, int(frozen.argmax())].float()

    def one_direction(tensors: dict[str, torch.Tensor]) -> None:
        tensors[a][2] += 1e-5 * u  # a thousandth of a row

    assert main([*words, str(tampered(adapter, tmp_path / "one", one_direction))]) == 1
    problems = json.loads((tmp_path / "c.json").read_text())["problems"]
    assert len(problems) == 1 and problems[0].startswith(f"{name}: ")
    other = certify_adapter(root / "m", tampered(adapter, tmp_path / "nan", lambda t: t[b].fill_(float("nan"))), masks)
    assert other.outcome == "broken" and "NaN" in other.problems[0]
    assert (
        main([*words, str(tampered(adapter, tmp_path / "still", lambda t: [v.zero_() for k, v in t.items() if "_B" in k]))])
        == 3
    )
    # In bf16 its rounding is larger, and the same is seen.
    half = tampered(adapter, tmp_path / "bf16", lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    assert certify_adapter(root / "m", half, masks).kept
    loose = tampered(half, tmp_path / "loose", lambda t: t.update({a: torch.randn_like(t[a].float()).bfloat16()}))
    assert certify_adapter(root / "m", loose, masks).outcome == "broken"


def test_the_certificate_of_an_adapter_that_keeps_rows(root: Path, all_runs: Any, tmp_path: Path) -> None:
    run, masks = Path(all_runs[3]["rows"]["run"]), MaskStore(masks_of(root, "rows"))
    written = certify_adapter(root / "m", run / "adapter", masks.directory)
    assert written.kept and "V_Fᵀ ΔW = s V_Fᵀ B A is 0" in written.claim
    assert sum(layer.frozen for layer in written.layers) == masks.metadata.frozen
    assert all(layer.free_rms > 1e4 * layer.frozen_rms > 0 for layer in written.layers)
    assert certify(root / "m", run / "model", masks.directory).kept, "after merging"
    name = masks.layers[3].name
    basis, a, b = masks.find_basis(), *(f"base_model.model.{name}.lora_{side}.weight" for side in "AB")
    assert basis is not None
    # The figures are those of V_Fᵀ ΔW itself, made without the certificate's transposing.
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    c = complete_basis(basis.output_columns(name)[0]).T @ (10 / 5**0.5 * tensors[b].double() @ tensors[a].double())
    layer = next(each for each in written.layers if each.layer == name)
    rows = masks.rows(name)
    assert layer.free_rms == pytest.approx(float(c[~rows].square().mean().sqrt()), rel=1e-6)
    assert layer.frozen_max == pytest.approx(float(c[rows].abs().max()), rel=0.5)  # of rounding, by other products
    v = complete_basis(basis.output_columns(name)[0])[:, int(rows.int().argmax())].float()

    def one_direction(tensors: dict[str, torch.Tensor]) -> None:
        tensors[b][:, 2] += 1e-5 * v

    broken = certify_adapter(root / "m", tampered(run / "adapter", tmp_path / "one", one_direction), masks.directory)
    assert broken.outcome == "broken" and len(broken.problems) == 1 and broken.problems[0].startswith(f"{name}: ")
    # An adapter that keeps columns keeps no rows, and the other way round.
    assert certify_adapter(root / "m", Path(all_runs[3]["columns"]["run"]) / "adapter", masks.directory).outcome == "broken"
    assert certify_adapter(root / "m", run / "adapter", masks_of(root)).outcome == "broken"


def test_a_merge_that_was_killed_is_made_anew(root: Path, tmp_path: Path) -> None:
    """Between the first of two files and the mark of the whole."""
    model = AutoModelForCausalLM.from_pretrained(root / "m")
    size = sum(p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path / "base", max_shard_size=size * 2)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["down_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "README.md").write_text("a card")
    given = tmp_path / "base", tmp_path / "adapter", tmp_path / "model"
    if (child := os.fork()) == 0:
        write = merge.write_tensors
        merge.write_tensors = lambda *args: (write(*args), os._exit(9))
        adapters.write_merged(*given)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    adapters.write_merged(*given)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, value in adapted.merge_and_unload().state_dict().items():
        assert torch.allclose(merged[name], value, atol=1e-6), name  # fp32, added in another order
    assert (tmp_path / "model" / "README.md").read_text() == "a card"


def test_an_adapter_without_the_constraint_is_broken(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = [layer.name for layer in MaskStore(masks_of(root)).layers]
    model = AutoModelForCausalLM.from_pretrained(root / "m")
    free = get_peft_model(model, LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    free.save_pretrained(tmp_path / "free")
    found = certify_adapter(root / "m", tmp_path / "free", masks_of(root))
    assert found.outcome == "broken" and len(found.problems) == len(names)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_dora": True}, "DoRA scales whole rows"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"something_new": 1}, "something_new is 1"),
        ({"alpha_pattern": [1]}, "no mapping of names to numbers"),
        ({"alpha_pattern": {"q_proj": "8"}}, "has '8' for 'q_proj'"),
        ({"alpha_pattern": {"q_proj(": 8}}, "which is no pattern"),
        ({"lora_alpha": True}, "lora_alpha is True"),
    ],
)
def test_adapters_that_are_not_understood_are_refused(
    root: Path, runs: Any, tmp_path: Path, changes: Any, message: str
) -> None:
    copy = tmp_path / "adapter"
    shutil.copytree(Path(runs[3]["run"]) / "adapter", copy)
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ArtifactError, match=message):
        AdapterDirectory.of(copy)


def test_a_pair_of_rank_0_is_no_adapter(runs: Any, tmp_path: Path) -> None:
    def emptied(tensors: dict[str, torch.Tensor]) -> None:
        a = next(name for name in tensors if "lora_A" in name)
        b = a.replace("lora_A", "lora_B")
        tensors |= {a: tensors[a][:0].clone(), b: tensors[b][:, :0].clone()}

    with pytest.raises(ArtifactError, match=r"no pair \[r, n\] and \[m, r\]"):
        AdapterDirectory.of(tampered(Path(runs[3]["run"]) / "adapter", tmp_path / "empty", emptied))


def test_an_adapter_is_merged_into_its_own_base_alone(
    root: Path, runs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(root / "m")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    shutil.copytree(Path(runs[3]["run"]) / "adapter", ours)
    shutil.copytree(ours, theirs)
    (theirs / "adapter_base.json").unlink()
    for adapter in (ours, theirs):  # by what phase 3 wrote, and by the directory that PEFT names
        with pytest.raises(ArtifactError, match=r"was trained on .*/m \(fingerprint .*other is another model"):
            merge.merge_adapter(tmp_path / "other", adapter, tmp_path / "merged")
    config = json.loads((theirs / "adapter_config.json").read_text())
    (theirs / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "somebody/model"}))
    merge.merge_adapter(tmp_path / "other", theirs, tmp_path / "merged")
    assert "names somebody/model as its base: nothing here says whether" in caplog.text
    (ours / "adapter_base.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is not what this program writes"):
        merge.merge_adapter(root / "m", ours, tmp_path / "merged2")


def of_no_masks(root: Path, output: Path) -> str:
    return str(phase3(root, root / "artefacts", output, masks_dir="none", epochs=1, **LORA))


def test_without_masks_every_type_of_layer_has_an_adapter(root: Path, tmp_path: Path) -> None:
    run = Path(run_ranks(1, of_no_masks, root, tmp_path)[0])
    layers = AdapterDirectory.of(run / "adapter").layers
    assert {layer.rsplit(".", 1)[1] for layer in layers} == {f"{name}_proj" for name in "down up gate q k v o".split()}


def of_phase_0(root: Path, output: Path) -> tuple[list[float], str]:
    shared = common(root, output, safety_data=str(root / "refusals_fit.jsonl"), safety_samples=0, epochs=5, learning_rate=2e-3)
    tuning = SafetyTuningArguments(**shared, global_batch_size=SAMPLES, merge_adapter=True, **LORA)
    run = training.run_safety_tuning(tuning, TRAINER)
    return losses(run), str(run)


def test_phase_0_trains_an_adapter_on_every_type_of_layer(root: Path, tmp_path: Path) -> None:
    """Against plain LoRA in fp64; its merged model is a start model like any other."""
    found, path = run_ranks(2, of_phase_0, root, tmp_path)[0]
    adapter = AdapterDirectory.of(Path(path) / "adapter")
    assert {layer.rsplit(".", 1)[1] for layer in adapter.layers} == {f"{name}_proj" for name in "down up gate q k v o".split()}
    model = AutoModelForCausalLM.from_pretrained(root / "m")
    torch.manual_seed(SEED)
    adapted = get_peft_model(model, LoraConfig(**CONFIG, target_modules=adapter.layers)).double()
    named = {k: p.detach().clone() for k, p in adapted.named_parameters() if p.requires_grad}
    optimizer = DenseAdamW(named, {}, {}, lr=2e-3, eps=1e-4, decay=dict.fromkeys(named, 0.1), clip=0.5)
    safety = encoded(root / "refusals_fit.jsonl", AutoTokenizer.from_pretrained(root / "m"))
    said = train(adapted, list(named), [torch.zeros(0)] * 5, optimizer, lambda model, batch: entropy(model, safety))
    assert found == pytest.approx(said, abs=1e-6)
    for name, value in optimizer.weights().items():
        stored = adapter.read(name.replace(".default", "").removeprefix("base_model.model."))
        assert (stored.double() - value).abs().max() < 1e-5, name
    ids = torch.arange(3, 23)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(Path(path) / "model")(ids).logits
        assert (merged - adapted.float()(ids).logits).abs().max() < 1e-4


def test_masks_of_entries_are_refused_before_a_model_is_loaded(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = common(root, tmp_path, layer_type="ffn_down", safety_data=str(root / "refusals_fit.jsonl"), safety_samples=5)
    run_importance(ImportanceArguments(**shared, basis="identity"))
    monkeypatch.setattr(training, "load_model", None)
    with pytest.raises(UnsupportedSetting, match="freeze single coefficients"):
        phase3(root, tmp_path, tmp_path / "out", **LORA)


def test_a_pair_that_peft_would_not_load_is_certified_for_none(root: Path, runs: Any, tmp_path: Path) -> None:
    """Forged: the honest pair without PEFT's prefix, for who reads it as the layer's, and another one with it."""
    copy = tmp_path / "adapter"
    shutil.copytree(Path(runs[3]["run"]) / "adapter", copy)
    tensors = load_file(copy / "adapter_model.safetensors")
    honest = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    forged = {name: tensor + 0.5 for name, tensor in tensors.items()}
    save_file(honest | forged, copy / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="which PEFT does not load"):
        AdapterDirectory.of(copy)


def test_a_merge_of_something_else_is_no_merge_of_this(root: Path, runs: Any, tmp_path: Path) -> None:
    adapter, other = Path(runs[3]["run"]) / "adapter", tmp_path / "other"
    merge.merge_adapter(root / "m", adapter, tmp_path / "merged")
    merge.merge_adapter(root / "m", adapter, tmp_path / "merged")
    shutil.copytree(adapter, other)
    with pytest.raises(ConfigError, match="holds the merge of another base or adapter"):
        merge.merge_adapter(root / "m", other, tmp_path / "merged")
    tensors = load_file(other / "adapter_model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, other / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match="is not finite"):
        merge.merge_adapter(root / "m", other, tmp_path / "merged_nan")
