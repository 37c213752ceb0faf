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
from phase3_jobs import SAMPLES, TRAINER, common, losses, make_model, phase3, phase12
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_controls import entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from warp_ds.cluster import preemption, processes
from warp_ds.errors import ArtifactError, ConfigError, UnsupportedSetting
from warp_ds.evaluation.adapter_certificate import certify_adapter
from warp_ds.evaluation.certificate import certify
from warp_ds.flags.arguments import ImportanceArguments, SafetyTuningArguments
from warp_ds.launch.cli import main
from warp_ds.models.adapter_directory import AdapterDirectory
from warp_ds.phases import adapters, merge, training
from warp_ds.phases.importance import run_importance
from warp_ds.phases.trainer import MetricsFile
from warp_ds.protection import WarpCallback
from warp_ds.store.masks import MaskStore

LORA: dict[str, Any] = {"adapter": "lora", "lora_r": 5, "lora_alpha": 10, "lora_dropout": 0.0}
SEED = 42


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    make_model(path)
    run_ranks(1, column_masks, path)
    return path


def column_masks(root: Path) -> None:
    phase12(root, root / "artefacts", mask_unit="column")


def masks_of(root: Path) -> Path:
    return root / "artefacts" / "phase2_latest" / "masks"


def stray_bits(callback: WarpCallback) -> int:
    found = 0
    assert callback.protection is not None
    for layer in callback.protection.layers:
        c = callback.protection.driver.coefficients(layer)
        found += sum(int((c.view(torch.int32)[piece][frozen] != 0).sum()) for piece, frozen in layer.frozen_pieces(c.device))
    return found


def job(root: Path, output: Path, stop_at: int | None = None, **more: Any) -> dict[str, Any] | None:
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
        run = phase3(root, root / "artefacts", output, None, **{**LORA, **more})
    except preemption.Preempted:
        processes.barrier()
        return None
    finally:
        WarpCallback.on_train_begin, MetricsFile.on_step_end = on_train_end, on_step_end  # type: ignore[method-assign]
        preemption._asked = None
    return {"run": str(run), "losses": losses(run), "stray": [bits for _, bits in seen]}


def jobs(root: Path, output: Path) -> dict[str, Any]:
    """A whole run; on one rank one with activations computed again; on two one that is stopped at step 2 and goes on."""
    whole = job(root, output / "whole", merge_adapter=True)
    assert whole is not None
    if processes.world_size() == 1:
        again = job(root, output / "checkpointing", gradient_checkpointing=True)
        assert again is not None
        assert again["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    if processes.world_size() == 2:
        assert job(root, output / "same", stop_at=2) is None
        if processes.rank() == 0:
            for other in ("1", "3"):
                shutil.copytree(output / "same", output / other, symlinks=True)
        processes.barrier()
        resumed = job(root, output / "same")
        assert resumed is not None
        return {**whole, "resumed": resumed}
    return whole


def go_on(root: Path, output: Path) -> dict[str, Any]:
    found = job(root, output)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[int, dict[str, Any]]:
    return {world: run_ranks(world, jobs, root, root / f"world{world}")[0] for world in (1, 2, 3)}


@pytest.fixture(scope="module")
def reference(root: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Five full-batch clipped AdamW steps of A and B in fp64, A's part in U_F taken out by hand."""
    masks = json.loads((masks_of(root) / "metadata.json").read_text())["layers"]
    basis = (root / "artefacts" / "phase1_latest" / "basis").resolve()
    files = json.loads((basis / "metadata.json").read_text())["layers"]
    model = AutoModelForCausalLM.from_pretrained(root / "m")
    torch.manual_seed(SEED)
    config = LoraConfig(task_type="CAUSAL_LM", r=5, lora_alpha=10, target_modules=list(masks))
    adapted = get_peft_model(model, config).double()
    named = {k: p.detach().clone() for k, p in adapted.named_parameters() if p.requires_grad}
    bases, frozen = {}, {}
    for layer, entry in masks.items():
        bits = np.unpackbits(load_file(masks_of(root) / entry["file"])["frozen"].numpy(), axis=1)[0, : entry["shape"][1]]
        name = f"base_model.model.{layer}.lora_A.default.weight"
        columns = torch.from_numpy(bits.astype(bool))
        bases[name] = u = complete_basis(load_file(basis / files[layer]["file"])["U"])[:, columns]
        named[name] = named[name] - named[name] @ u @ u.T
        frozen[name] = (torch.arange(len(u)) < u.shape[1]).expand(5, -1)
    optimizer = DenseAdamW(named, bases, frozen, lr=2e-3, eps=1e-4, decay=dict.fromkeys(named, 0.1), clip=0.5)
    loss = task_loss(root, AutoTokenizer.from_pretrained(root / "m"))
    return train(adapted, list(named), [torch.zeros(0)] * 5, optimizer, loss), optimizer.weights()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_equals_the_dense_reference(runs: Any, reference: Any, world: int) -> None:
    losses, weights = reference
    assert runs[world]["losses"] == pytest.approx(losses, abs=1e-6)
    assert runs[world]["stray"] == [0] * 6
    saved = load_file(Path(runs[world]["run"]) / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == {name.replace(".default", "") for name in weights}
    for name, value in weights.items():
        assert (saved[name.replace(".default", "")].double() - value).abs().max() < 1e-5, name
    assert max(float(value.abs().max()) for name, value in weights.items() if "lora_B" in name) > 5e-3


def test_a_stopped_run_goes_on(runs: Any) -> None:
    whole, resumed = runs[2], runs[2]["resumed"]
    assert resumed["losses"] == whole["losses"] and resumed["stray"] == [0] * 4
    files = [load_file(Path(each["run"]) / "adapter" / "adapter_model.safetensors") for each in (whole, resumed)]
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_stopped_run_goes_on_on_another_number_of_ranks(root: Path, runs: Any, world: int) -> None:
    found = run_ranks(world, go_on, root, root / "world2" / str(world))[0]
    assert found["stray"] == [0] * 4
    assert found["losses"] == pytest.approx(runs[2]["losses"], abs=1e-6)


def test_the_adapter_is_pefts_and_the_merged_model_is_its_merge(root: Path, runs: Any) -> None:
    run = Path(runs[2]["run"])
    assert "adapter: LoRA, r 5" in (run / "adapter" / "README.md").read_text()
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
        main(["merge", "--model_name", str(root / "m"), "--adapter", str(run / "adapter"), "--output", str(root / "by cli")])
        == 0
    )
    again, files = load_file(root / "by cli" / "model.safetensors"), load_file(run / "model" / "model.safetensors")
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
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=5, lora_alpha=10, target_modules=adapter.layers)
    ).double()
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
