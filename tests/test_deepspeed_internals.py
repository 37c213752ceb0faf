"""Fails loudly when a new DeepSpeed has other private names, or calls them in another order, than the masked step needs."""

from __future__ import annotations

import copyreg
import gc
import inspect
import sys
import weakref
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import safe_get_local_grad
from masked_artefacts import odd_model, read_artefacts, token_batches, write_artefacts
from ranks import run_ranks
from test_masked_step import Case, gathered, make_engine, masters, protect, run_all, train_step

from warp_ds.zero import deepspeed_internals

#: Besides HOOKED: method -> parameters that are passed to it.
CALLED = {
    "_swappable_optimizer_subgroup": ["self", "sub_group_id"],
    "_optimizer_states_and_gradient_swap_in": ["self", "sub_group_id", "timer_names"],
    "_writeback_swap_state": ["self", "sub_group_id", "write_opt_state", "write_gradients"],
    "_constant_buffered_norm2": ["self", "input", "buffer_size"],
    "_get_fp32_grad_state_partition": ["self", "param", "release_swap_buffers"],
    "get_param_id": ["self", "param"],
    "_get_norm_groups": ["self"],
    "_optimizer_step": ["self", "sub_group_id"],
    "_reassign_or_swap_out_partitioned_parameters": ["self", "sub_group_id"],
    "state_dict": ["self"],
    "_restore_from_bit16_weights": ["self"],
    "reset_swap_buffers": ["self"],
}
#: Attributes of the ZeRO-3 optimizer that are read.
READ = (
    "optimizer",
    "fp32_partitioned_groups_flat",
    "fp16_partitioned_groups_flat",
    "fp16_groups",
    "grad_position",
    "sub_group_to_group_id",
    "swap_optimizer",
    "offload_optimizer",
    "parameter_offload",
    "all2all_process_group",
    "zero_hpz_partition_size",
    "use_muon",
    "zenflow",
    "model_parallel_group",
    "torch_autocast_gradscaler",
    "gradient_accumulation_dtype",
    "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition",
)


def unwrapped(method: Any) -> Any:
    """The function inside DeepSpeed's profiling decorator, which hides its signature."""
    inner = [cell.cell_contents for cell in method.__closure__ or () if inspect.isfunction(cell.cell_contents)]
    return unwrapped(inner[0]) if inner else method


def test_the_names_exist_and_take_what_they_are_given() -> None:
    assert DeepSpeedZeroOptimizer_Stage3.__name__ == "DeepSpeedZeroOptimizer_Stage3"
    for name in deepspeed_internals.HOOKED:
        assert callable(getattr(DeepSpeedZeroOptimizer_Stage3, name, None)), f"no {name} in stage3.py"
    for name, parameters in CALLED.items():
        found = list(inspect.signature(unwrapped(getattr(DeepSpeedZeroOptimizer_Stage3, name))).parameters)
        assert found == parameters, f"{name} takes {found}, not {parameters}"
    loading = inspect.signature(DeepSpeedZeroOptimizer_Stage3.load_state_dict).parameters
    assert "load_optimizer_states" in loading and "checkpoint_folder" in loading


def recorded_step(root: Path, zero: dict[str, Any]) -> list[str]:
    """The order of calls of one real, protected step, seen by a trace of every function of stage3.py."""
    engine = make_engine(Case("recorded", groups=True, zero=zero))
    optimizer = engine.optimizer
    missing = [name for name in READ if not hasattr(optimizer, name)]
    assert not missing, f"the ZeRO-3 optimizer has no {missing}"
    if optimizer.offload_optimizer:
        assert set(optimizer.subgroup_to_device.values()) == {"cpu"} and hasattr(optimizer, "norm_for_param_grads")
    assert not set(deepspeed_internals.HOOKED) & set(vars(optimizer)), "DeepSpeed itself now replaces a method that is hooked"
    for sub_group, params in enumerate(optimizer.fp16_groups):
        offset = 0
        for param in params:
            assert deepspeed_internals.locate(optimizer, param) == (sub_group, offset, param.ds_tensor.numel())
            offset += param.ds_tensor.numel()
        flat = deepspeed_internals.master(optimizer, sub_group)
        assert flat.numel() == offset and flat.dtype == torch.float32
    saved = optimizer.state_dict()
    assert saved[deepspeed_internals.MASTERS] is optimizer.fp32_partitioned_groups_flat
    assert set(saved[deepspeed_internals.OPTIMIZER_STATE]) >= {"state", "param_groups"}
    protection = protect(engine, read_artefacts(root))
    wanted = {
        "step",
        "has_overflow",
        "_overflow_check_and_loss_scale_update",
        "_get_norm_groups",
        "_prepare_sub_group",
        "unscale_and_clip_grads",
        "_optimizer_step",
        "_reassign_or_swap_out_partitioned_parameters",
        "_release_sub_group",
        "_post_step",
        "rotate_gradients",
        "decay_free",
        "write_weights",
    }
    calls: list[str] = []
    files = (inspect.getsourcefile(DeepSpeedZeroOptimizer_Stage3), inspect.getsourcefile(type(protection)))

    def trace(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename in files and frame.f_code.co_name in wanted:
            calls.append(frame.f_code.co_name)

    batch = token_batches(1)[0]
    loss = engine(input_ids=batch, labels=batch).loss
    engine.backward(loss)
    before, weights = masters(protection), gathered(engine)
    sys.setprofile(trace)
    engine.step()
    sys.setprofile(None)
    assert any(not torch.equal(x, y) for x, y in zip(before, masters(protection), strict=True))
    assert any(not torch.equal(weights[k], v) for k, v in gathered(engine).items())
    # State of a sub-group in the base optimizer's state_dict, as DeepSpeed numbers it.
    base = optimizer.state_dict()[deepspeed_internals.OPTIMIZER_STATE]["state"]
    for sub_group in range(deepspeed_internals.sub_group_count(optimizer)):
        state = base[deepspeed_internals.state_index(optimizer, sub_group)]
        assert (
            state["exp_avg"].data_ptr()
            == optimizer.optimizer.state[deepspeed_internals.master(optimizer, sub_group)]["exp_avg"].data_ptr()
        ), "sub-groups are numbered in another order"
    count = deepspeed_internals.sub_group_count(optimizer)
    engine.destroy()
    return [str(count), *calls]


def held_gradients(config: dict[str, Any], zero: dict[str, Any]) -> tuple[torch.dtype, ...]:
    """What a rank holds of gradients between backward and step, of bf16 weights; and that it is read and written as it is."""
    engine = make_engine(Case("held", zero=zero), torch.bfloat16, **config)
    batch = token_batches(1)[0]
    engine.backward(engine(input_ids=batch, labels=batch).loss)
    dtypes = {deepspeed_internals.gradient_dtype(engine.optimizer)}
    for param in engine.module.parameters():
        held = deepspeed_internals.get_gradient(engine.optimizer, param)
        assert bool(held.any()) and torch.equal(held.float(), safe_get_local_grad(param).flatten())
        given = held.float() * (1 + 2.0**-10)
        deepspeed_internals.set_gradient(engine.optimizer, param, given)
        again = deepspeed_internals.get_gradient(engine.optimizer, param)
        assert torch.equal(again, given.to(held.dtype))
        dtypes |= {held.dtype, again.dtype}
    engine.destroy()
    return tuple(dtypes)


def test_order_of_calls_in_a_step(tmp_path: Path) -> None:
    write_artefacts(tmp_path, odd_model())
    fp32, offload = {"data_types": {"grad_accum_dtype": "fp32"}}, {"offload_optimizer": {"device": "cpu"}}
    held: list[Any] = [("bf16", {}, {}), ("fp32", fp32, {}), ("copied", {}, offload)]
    jobs: list[Any] = [
        ("resident", recorded_step, (tmp_path, {"sub_group_size": 1000})),
        ("offloaded", recorded_step, (tmp_path, {"sub_group_size": 1000, "offload_optimizer": {"device": "cpu"}})),
    ]
    jobs += [(name, held_gradients, given) for name, *given in held]
    found = run_ranks(1, run_all, jobs)[0]
    assert [found.pop(name) for name, *_ in held] == [(torch.bfloat16,), (torch.float32,), (torch.float32,)]
    for name, (count, *calls) in found.items():
        one = [
            "_prepare_sub_group",
            "unscale_and_clip_grads",
            "decay_free",
            "_optimizer_step",
            "_reassign_or_swap_out_partitioned_parameters",
            "write_weights",
            "_release_sub_group",
        ]
        expected = [
            "step",
            "_overflow_check_and_loss_scale_update",
            "rotate_gradients",
            "_get_norm_groups",
            *one * int(count),
            "_post_step",
        ]
        assert int(count) > 2 and calls == expected, (name, calls)


def ended_engine(root: Path) -> list[str]:
    """What is left of an engine that has trained under protection, once it has ended."""
    engine = make_engine(Case("ended"))
    protection = protect(engine, read_artefacts(root))
    for batch in token_batches(2):
        train_step(engine, batch)
    protection.release()
    left = {
        "engine": weakref.ref(engine),
        "module": weakref.ref(engine.module),
        "optimizer": weakref.ref(engine.optimizer),
        "protection": weakref.ref(protection),
    }
    deepspeed_internals.end_engine(engine)
    del engine, protection
    gc.collect()
    return [name for name, ref in left.items() if ref() is not None]


def test_an_ended_engine_leaves_nothing_in_memory(tmp_path: Path) -> None:
    write_artefacts(tmp_path, odd_model())
    assert run_ranks(2, ended_engine, tmp_path) == [[], []]


def test_deepspeed_is_the_version_that_was_checked() -> None:
    """Not a promise about others: a reminder to read stage3.py again when this fails."""
    documented = deepspeed_internals.__doc__ or ""
    assert f"deepspeed {deepspeed.__version__}" in documented, (
        f"deepspeed is {deepspeed.__version__}: read runtime/zero/stage3.py against deepspeed_internals.py, then name it there"
    )


def test_what_deepspeed_was_installed_with() -> None:
    from deepspeed.git_version_info import installed_ops

    assert {"fused_adam", "cpu_adam"} <= installed_ops.keys()
    assert (
        isinstance(deepspeed_internals.is_built("fused_adam"), bool)
        and deepspeed_internals.is_built("no such operator") is False
    )


def test_checkpoints_hold_the_stage_by_value() -> None:
    """Python 3.11.0 to 3.11.3 would write a call of getattr, which no reader of tensors alone may make."""
    import io

    from deepspeed.runtime.zero.config import ZeroStageEnum

    file = io.BytesIO()
    torch.save({"zero_stage": ZeroStageEnum.weights}, file)
    file.seek(0)
    made = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    assert made == ["deepspeed.runtime.zero.config.ZeroStageEnum"], made
    assert copyreg.dispatch_table[ZeroStageEnum](ZeroStageEnum.weights) == (ZeroStageEnum, (3,)), "by this Python's own rule"


def test_module_hooks_are_taken_off_and_put_back() -> None:
    """What ``without_engine_hooks`` calls: ``destroy`` removes the hooks and does no more, one call makes all of them anew."""
    offload = parameter_offload.DeepSpeedZeRoOffload
    assert list(inspect.signature(offload.partition_all_parameters).parameters)[:1] in (["self"], ["args"])
    body = inspect.getsource(offload.destroy).split(":", 1)[1].split()
    assert body == ["self._remove_module_hooks()"]
    made = inspect.getsource(offload.setup_zero_stage3_hooks)
    assert "self.fwd_pre_hook = " in made and "self._register_deepspeed_module(self.module)" in made
    assert "FWD_MODULE_STACK.append(self.module)" in made
