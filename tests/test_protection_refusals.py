"""What the masked step is not exact under is refused by name, before the first step, on every rank; so are artefacts of
another model. Where a setting cannot start on a CPU, the real optimizer object is given the attribute that shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed.fsdp
from masked_artefacts import Artefacts, nano_model, odd_model, read_artefacts, write_artefacts
from ranks import run_ranks
from test_masked_step import Case, make_engine, masters, protect, run_all
from torch import nn

import warp_ds
from warp_ds.cluster import processes
from warp_ds.errors import ArtifactError, UnsupportedSetting
from warp_ds.store.bases import BasisStore
from warp_ds.zero import deepspeed_internals
from warp_ds.zero.masked_parameters import MaskedParameter
from warp_ds.zero.masked_step import weight_decay_kind


def refused(what: Callable[[], Any], *words: str, error: type[Exception] = UnsupportedSetting) -> None:
    with pytest.raises(error) as caught:
        what()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in {str(caught.value)!r}"


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
BF16_MASTERS = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
#: name -> (configuration, optimizer, words of the refusal); the engine is the real one.
SETTINGS: dict[str, tuple[dict[str, Any], str, tuple[str, ...]]] = {
    "no ZeRO": ({"zero_optimization": {"stage": 0}}, "adamw", ("without ZeRO",)),
    "no ZeRO, bf16": (
        {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
        "adamw",
        ("16-bit training without ZeRO",),
    ),
    "ZeRO-1": ({"zero_optimization": {"stage": 1}}, "adamw", ("ZeRO stage 1 or 2",)),
    "ZeRO-2": ({"zero_optimization": {"stage": 2}}, "adamw", ("ZeRO stage 1 or 2",)),
    "ZeRO-2, offloaded": ({"zero_optimization": {"stage": 2, **OFFLOAD}}, "adamw", ("ZeRO stage 1 or 2",)),
    "hpZ": ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}, "adamw", ("hpZ", "zero_hpz_partition_size")),
    "quantized gradients": (
        {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
        "adamw",
        ("zero_quantized_gradients",),
    ),
    "ZenFlow": (
        {
            "zero_optimization": {
                "stage": 3,
                **OFFLOAD,
                "zenflow": {"select_strategy": "step", "select_interval": 2, "update_interval": 2},
            }
        },
        "adamw",
        ("ZenFlow",),
    ),
    "Muon": (
        {
            "zero_optimization": {"stage": 3, "reduce_scatter": False},
            "optimizer": {"type": "Muon", "params": {"lr": 1e-3, "torch_adam": True}},
        },
        "by DeepSpeed",
        ("does not support Muon",),
    ),
    "bf16 masters": (
        {"zero_optimization": {"stage": 3, **OFFLOAD}, **BF16_MASTERS},
        "cpu adam",
        ("bf16_master_weights_and_grads",),
    ),
    # Last, as these two stay on for every later engine of a process.
    "fp16 autocast": ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, "adamw", ("torch_autocast", "bfloat16")),
    "tensor parallelism": (
        {"zero_optimization": {"stage": 3}, "tensor_parallel": {"autotp_size": 2}},
        "adamw",
        ("tensor_parallel",),
    ),
}


def refuse_setting(config: dict[str, Any], optimizer: str, words: tuple[str, ...], artefacts: Artefacts) -> None:
    dtype = torch.bfloat16 if config.get("bf16") else torch.float32
    if optimizer == "by DeepSpeed":
        model = odd_model(dtype)
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=model.parameters(), config={"train_micro_batch_size_per_gpu": 1, **config}
        )
    else:
        engine = make_engine(Case("refused", optimizer=optimizer, clip=0.0), dtype, **config)
    refused(lambda: warp_ds.protect(engine, artefacts.basis, artefacts.masks), *words)
    refused(
        lambda: (
            warp_ds.protect_optimizer(engine.module, engine.optimizer, None, artefacts.masks)
            if not isinstance(engine.optimizer, torch.optim.Optimizer)
            else warp_ds.protect(engine, None, artefacts.masks)
        ),
        *words,
    )
    engine.destroy()


def refuse_attributes(artefacts: Artefacts) -> None:
    """Settings that need a GPU or async I/O (quantized weights, fp16, NVMe, SuperOffload), or another DeepSpeed, to start."""
    engine = make_engine(Case("refused"))
    optimizer = engine.optimizer
    param = optimizer.fp16_groups[0][0]
    for target, name, value, words in [
        (optimizer.parameter_offload, "zero_quantized_weights", True, ("quantized weights",)),
        (param.ds_tensor, "ds_quant_scale", torch.ones(1), ("quantized weights",)),
        (optimizer, "fp16_partitioned_groups_flat", [None], ("NVMe parameter offload",)),
    ]:
        had = name in vars(target)
        before = getattr(target, name, None)
        setattr(target, name, value)
        refused(lambda: protect(engine, artefacts), *words)
        if had:
            setattr(target, name, before)
        else:
            delattr(target, name)
    # Masters of 16 bits, and masters that are the model's own weights.
    masters_flat = optimizer.fp32_partitioned_groups_flat
    optimizer.fp32_partitioned_groups_flat = [flat.half() for flat in masters_flat]
    refused(lambda: protect(engine, artefacts), "fp16_master_weights_and_grads")
    optimizer.fp32_partitioned_groups_flat = optimizer.fp16_partitioned_groups_flat
    refused(lambda: protect(engine, artefacts), "torch_autocast")
    optimizer.fp32_partitioned_groups_flat = masters_flat
    # Sub-classes are other optimizers, whatever they are called; and none of this has left a trace.
    for name, word in [("MiCS_Optimizer", "MiCS"), ("SuperOffloadOptimizer_Stage3", "SuperOffload"), ("New", "not on New")]:
        cls = type(optimizer)
        optimizer.__class__ = type(name, (cls,), {})
        refused(lambda: protect(engine, artefacts), word, "ZeRO stage 3")
        optimizer.__class__ = cls
    protection = protect(engine, artefacts)
    before_second = masters(protection)
    refused(lambda: protect(engine, artefacts), "protected already")
    assert all(torch.equal(x, y) for x, y in zip(before_second, masters(protection), strict=True))
    protection.release()
    protect(engine, artefacts)
    engine.destroy()


def refuse_checkpoints_of_partial_offload(artefacts: Artefacts, folder: Path) -> None:
    """On a GPU, offload_optimizer.ratio below 1 leaves sub-groups there; their moments are in no checkpoint."""
    engine = make_engine(
        Case(
            "partial", optimizer="cpu adam", zero={"offload_optimizer": {"device": "cpu", "ratio": 0.5}, "sub_group_size": 100}
        )
    )
    protect(engine, artefacts)
    engine.save_checkpoint(folder, "all on the CPU")
    engine.optimizer.subgroup_to_device[0] = "cuda"
    refused(lambda: engine.save_checkpoint(folder, "here"), "ratio below 1", "whole optimizer to the CPU")
    refused(lambda: engine.load_checkpoint(folder, "all on the CPU"), "ratio below 1")
    engine.destroy()


def refuse_fsdp(artefacts: Artefacts) -> None:
    model = odd_model()
    torch.distributed.fsdp.fully_shard(model)
    refused(
        lambda: warp_ds.protect_optimizer(model, torch.optim.AdamW(model.parameters()), None, artefacts.masks),
        "sharded",
        "FSDP",
    )


def refuse_optimizers(artefacts: Artefacts) -> None:
    for kind in (torch.optim.Adafactor, torch.optim.Adagrad, torch.optim.RMSprop, torch.optim.NAdam, torch.optim.ASGD):
        model = odd_model()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=kind(model.parameters(), lr=1e-2),
            config={
                "train_micro_batch_size_per_gpu": 1,
                "zero_optimization": {"stage": 3},
                "zero_allow_untested_optimizer": True,
            },
        )
        refused(lambda engine=engine: protect(engine, artefacts), kind.__name__, "entry by entry", "use one of Adam")
        engine.destroy()


def refuse_artefacts(root: Path) -> None:
    these, other = read_artefacts(root / "these"), read_artefacts(root / "other")
    engine = make_engine(Case("refused"))
    refused(
        lambda: warp_ds.protect(engine, other.basis, these.masks),
        "were made with the basis",
        "--basis_dir",
        error=ArtifactError,
    )
    refused(lambda: warp_ds.protect(engine, None, root / "nowhere"), "no masks in", error=ArtifactError)
    refused(
        lambda: warp_ds.protect(engine, None, these.masks, model_dir=str(root / "model")),
        "belong to the model tiny",
        error=ArtifactError,
    )
    engine.module.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    refused(lambda: protect(engine, these), "does not train", "requires_grad", error=ArtifactError)
    engine.module.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    refused(lambda: protect(engine, these, products="fast"), "one of auto, exact, split, tf32", error=ValueError)
    engine.destroy()
    engine = make_engine(Case("refused", model="nano"))
    refused(lambda: protect(engine, these), "(15, 21)", "(3, 3)", "another model", error=ArtifactError)
    engine.module.model.layers = engine.module.model.layers[:1]
    refused(lambda: protect(engine, read_artefacts(root / "nano")), "model.layers.1", "does not have", error=ArtifactError)
    engine.destroy()
    # One rank alone that cannot read its masks takes the others with it.
    engine = make_engine(Case("refused"))
    if processes.rank() == 1:
        file = next((root / "broken" / "masks").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-40])
    processes.barrier()
    with pytest.raises(Exception, match="layer_"):
        protect(engine, Artefacts(root / "broken", {}, {}))
    engine.destroy()


def test_refused_by_name(tmp_path: Path) -> None:
    these = write_artefacts(tmp_path / "these", odd_model())
    write_artefacts(tmp_path / "broken", odd_model())
    write_artefacts(tmp_path / "other", odd_model(), seed=2)
    write_artefacts(tmp_path / "nano", nano_model(), {"ffn_down": 1, "attn_q": 2})
    odd_model().save_pretrained(tmp_path / "model")
    jobs: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("attributes", refuse_attributes, (these,)),
        ("optimizers", refuse_optimizers, (these,)),
        ("partial offload", refuse_checkpoints_of_partial_offload, (these, tmp_path / "partial")),
        ("FSDP", refuse_fsdp, (these,)),
        ("artefacts", refuse_artefacts, (tmp_path,)),
    ]
    jobs += [(name, refuse_setting, (*setting, these)) for name, setting in SETTINGS.items()]
    assert list(run_ranks(2, run_all, jobs)[0]) == [name for name, _, _ in jobs]


def test_settings_are_refused_without_ranks() -> None:
    """What the callback hands over: the optimizers that accelerate wraps, and models that others shard."""

    class AdamW(torch.optim.AdamW):
        pass

    param = nn.Parameter(torch.ones(2, 2))
    for optimizer in (AdamW([param]), torch.optim.Muon([param]), torch.optim.SparseAdam([param])):
        with pytest.raises(UnsupportedSetting, match=type(optimizer).__name__):
            weight_decay_kind(optimizer, optimizer.param_groups[0])
    with pytest.raises(UnsupportedSetting, match="without ZeRO"):
        deepspeed_internals.refuse_unsupported(torch.optim.AdamW([param]))
    with pytest.raises(UnsupportedSetting, match="not on NoneType"):
        deepspeed_internals.refuse_unsupported(None)


def test_a_sharded_model_with_a_plain_optimizer_is_refused(tmp_path: Path) -> None:
    artefacts = write_artefacts(tmp_path, odd_model())
    model = odd_model()
    model.model.layers[0].mlp.down_proj.weight.ds_id = 3
    with pytest.raises(UnsupportedSetting, match="sharded"):
        warp_ds.protect_optimizer(model, torch.optim.AdamW(model.parameters()), None, artefacts.masks)


def test_the_callback_wants_masks() -> None:
    with pytest.raises(ArtifactError, match="masks_dir"):
        warp_ds.WarpCallback(basis_dir="somewhere")


@pytest.mark.parametrize(
    "message, falls_back",
    [("CUSOLVER_STATUS_ALLOC_FAILED", True), ("out of memory", True), ("CUSOLVER_STATUS_INTERNAL_ERROR", False)],
)
def test_a_basis_is_completed_on_the_cpu_where_a_gpu_has_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str, falls_back: bool
) -> None:
    write_artefacts(tmp_path / "artefacts", odd_model())
    store = BasisStore(read_artefacts(tmp_path / "artefacts").basis)
    target, made = store.layers[0], BasisStore.rotation

    def full(self: BasisStore, name: str, dtype: torch.dtype = torch.float32, device: Any = None) -> Any:
        if device is not None:
            raise torch.OutOfMemoryError(message) if message == "out of memory" else RuntimeError(message)
        return made(self, name, dtype)

    monkeypatch.setattr(BasisStore, "rotation", full)
    masked = MaskedParameter(target, torch.nn.Parameter(torch.zeros(target.shape)))
    if not falls_back:
        refused(lambda: masked.rotation(store, torch.device("cpu")), message, error=RuntimeError)
        return
    w = torch.randn(3, target.n, generator=torch.Generator().manual_seed(0))
    found = masked.rotation(store, torch.device("cpu"))
    torch.testing.assert_close(found.rotate(w), made(store, target.name).polished().rotate(w), rtol=0, atol=0)
