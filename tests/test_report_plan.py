"""warp-ds plan: from the config alone, consistent with itself, and as far off as its record says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from transformers import LlamaConfig

from warp_ds.errors import ConfigError
from warp_ds.launch import plan
from warp_ds.launch.cli import main
from warp_ds.launch.planning.fit import USABLE, estimate_phases, make_plan
from warp_ds.launch.planning.job import SHARDINGS, Job, Sharding, read_shape
from warp_ds.zero.placement_costs import GPU

SIZES = {
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
    "405b": dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128),
}


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("configs")
    for name, sizes in SIZES.items():
        LlamaConfig(vocab_size=128256, num_key_value_heads=8, dtype="bfloat16", **sizes).save_pretrained(root / name)
    return root


def test_from_a_config_alone(configs: Path) -> None:
    """Nothing but config.json is there, and nothing of 810 GB is allocated."""
    made = make_plan(str(configs / "405b" / "config.json"), nodes=32, max_rank=512)
    assert made.shape.parameters == 405_853_388_800
    assert made.ds_config == "zero3_70b.json"
    assert all(phase.gpu_total > made.shape.parameters * 2 / made.job.ranks for phase in made.phases)


def test_figures_that_are_exact(configs: Path) -> None:
    shape = read_shape(str(configs / "70b"), "ffn_down,attn_q,attn_k,attn_v", "all")
    assert shape.parameters == 70_553_706_496 and len(shape.targets) == 320
    for world_size in (8, 16, 24, 64, 512):
        job = Job(nodes=world_size // 8, tokens=128, max_rank=1024, layer_type="ffn_down,attn_q,attn_k,attn_v")
        _, basis, importance, training = estimate_phases(shape, job, SHARDINGS[1])
        # Every byte of the checkpoint is read once, and the shards hold every element once and their padding.
        assert world_size * basis.read == 2 * 70_553_706_496
        assert 0 <= world_size * shape.shard(world_size) - 70_553_706_496 < world_size * 723
        # One basis of 1,024 columns a shared input; one bit a coefficient.
        assert basis.disk == 80 * 4 * (28672 + 8192 + 2) * 1024
        assert importance.disk == 80 * (8192 * 28672 + 8192 * 8192 + 2 * 1024 * 8192) // 8
        # The model alone is what a finished run leaves of phase 3's files.
        assert training.disk - training.checkpoint >= 2 * 70_553_706_496


@pytest.mark.parametrize("sharding", SHARDINGS, ids=lambda sharding: sharding.config)
def test_settings_of_the_shipped_configs(sharding: Sharding) -> None:
    """As DeepSpeed itself reads them, its defaults among them ('auto' is transformers')."""
    path = Path(__file__).parent.parent / "ds_configs" / sharding.config
    zero = DeepSpeedZeroConfig(**json.loads(path.read_text())["zero_optimization"])
    names = ("reduce_bucket_size", "max_live_parameters", "prefetch_bucket_size", "sub_group_size")
    assert [getattr(sharding, name) for name in names] == [getattr(zero, name) for name in names]


def test_what_is_fetched_together_arrives_as_one_tensor(configs: Path) -> None:
    """Of 16-bit weights no more than DeepSpeed's prefetch bucket; one rank has all of them already."""
    shape = read_shape(str(configs / "70b"), "ffn_down", "all")
    for ranks, size in ((1, 0), (8, 2 * 50_000_000)):
        job = Job(gpus_per_node=ranks, adapter="lora", gradient_checkpointing=True)
        assert estimate_phases(shape, job, SHARDINGS[1])[3].gpu["being fetched"] == size


def test_the_walks_trial_holds_what_deepspeed_keeps_gathered(configs: Path) -> None:
    """A plain pass comes before the walk: where little else is held it is what phase 1 needs most for."""
    shape = read_shape(str(configs / "8b"), "ffn_down", "all")
    job = Job(gpus_per_node=8, tokens=8, basis_samples=8, max_rank=8)
    gpu = estimate_phases(shape, job, SHARDINGS[1])[1].gpu
    held = sum(gpu.values()) - gpu["weights"] - gpu["context"]
    assert gpu["trying the walk"] > 0 and held == 2 * (1_000_000_000 + max(shape.blocks))
    large = estimate_phases(shape, replace(job, tokens=512, basis_samples=1000), SHARDINGS[1])[1].gpu
    assert large["trying the walk"] == 0


def test_what_is_kept_of_the_start_model_is_counted(configs: Path) -> None:
    shape = read_shape(str(configs / "70b"), "ffn_down", "all")
    phases = {
        objective: estimate_phases(
            shape, Job(objective=objective, tokens=100, basis_samples=7, utility_samples=30), SHARDINGS[1]
        )
        for objective in ("task", "der", "constrained")
    }
    for name, size in (("der", 7 * 100 * 128256 * 2), ("constrained", 30 * 100 * 4)):
        for plain, other in zip(phases["task"], phases[name], strict=True):
            more = size if plain.phase == "phase 3" else 0
            assert other.disk - plain.disk == other.written - plain.written == more


def test_hidden_states_take_a_quarter_of_what_is_free(configs: Path) -> None:
    """Of a GPU of 100 GB beside 17.6 GB of weights, a gathered block or embedding, and the context; the rest is host memory."""
    shape = read_shape(str(configs / "70b"), "ffn_down", "all")
    found = {}
    for samples in (100, 100_000):
        job = Job(nodes=1, gpus_per_node=8, gpu_memory=100e9, tokens=512, basis_samples=samples, max_rank=64)
        found[samples] = estimate_phases(shape, job, SHARDINGS[0])[1]
    small, large = found[100], found[100_000]
    assert small.gpu["hidden states"] == 13 * 512 * 8192 * 2 and small.host["hidden states"] == 0
    before = sum(large.gpu[part] for part in ("weights", "context", "gathered"))
    assert large.gpu["hidden states"] == pytest.approx((100e9 - before) / 4)
    assert large.gpu["hidden states"] + large.host["hidden states"] == 12_500 * 512 * 8192 * 2
    on_cpu = estimate_phases(shape, replace(job, on_gpu=False), SHARDINGS[0])[1]
    assert "hidden states" not in on_cpu.gpu and on_cpu.host["hidden states"] == 12_500 * 512 * 8192 * 2


@pytest.mark.parametrize("offload", ["none", "optimizer", "all"])
def test_smallest_machine(configs: Path, offload: str) -> None:
    """Fits as said, and on fewer nodes does not."""
    settings = dict(max_rank=256, tokens=256, gradient_checkpointing=True, offload=offload, gpu_memory=80e9)
    made = make_plan(str(configs / "70b"), nodes=1, **settings)
    least = made.smallest[offload]
    assert least is not None
    nodes, config = least
    fitting = make_plan(str(configs / "70b"), nodes=nodes, **settings)
    assert fitting.fits and fitting.ds_config == config
    assert all(phase.gpu_total <= USABLE * 80e9 for phase in fitting.phases)
    if nodes > 1:
        assert not make_plan(str(configs / "70b"), nodes=nodes - 1, **settings).fits


def test_what_does_not_fit_is_named_with_a_cure(configs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everywhere = ["--basis_placement", "replicated"]
    status = main(["plan", "--model_name", str(configs / "70b"), "--nodes", "2", *everywhere])
    printed = " ".join(capsys.readouterr().out.split())
    assert status == 1
    assert "does not fit: phase 3" in printed and "lower --max_rank" in printed
    assert "smallest with offload" in printed
    small = ["--max_rank", "256", "--gradient_checkpointing", "--max_length", "128", "--batch_size", "1"]
    status = main(["plan", "--model_name", str(configs / "70b"), "--nodes", "8", *small])
    assert status == 0 and "off by" in capsys.readouterr().out


def test_memory_falls_with_more_ranks(configs: Path) -> None:
    shape = read_shape(str(configs / "70b"), "ffn_down", "all")
    before: list[float] | None = None
    for nodes in (1, 2, 4, 16, 64):
        found = [phase.gpu_total for phase in estimate_phases(shape, Job(nodes=nodes), SHARDINGS[1])]
        assert before is None or all(now <= then for now, then in zip(found, before, strict=True))
        before = found


def test_full_bases_of_70b_fit_at_their_owners(configs: Path) -> None:
    """On every rank they take 263 GB; at owners, two layers' at most on 64 ranks, and 80 / N rounded up on any."""
    shape = read_shape(str(configs / "70b"), "ffn_down", "all")
    basis = 4.0 * 28672**2
    for placement, nodes, at_most in (("replicated", 8, 80), ("owner", 8, 2), ("owner", 3, 4), ("auto", 8, 2)):
        job = Job(nodes=nodes, basis_placement=placement)
        training = estimate_phases(shape, job, SHARDINGS[1])[3]
        assert training.gpu["bases"] == at_most * basis


def test_wrong_questions() -> None:
    with pytest.raises(ConfigError, match="--offload"):
        make_plan("anything", offload="nvme")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/x/nomodel", "--model_name /x/nomodel: no such directory on "),
        ("nobody/has-this-model", "--model_name nobody/has-this-model: no such directory here"),
    ],
)
def test_a_model_that_is_not_there(
    name: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(["plan", "--model_name", name]) == 2
    assert message in capsys.readouterr().err


def test_the_record_of_runs() -> None:
    """plan_checked.json, which benchmarks/plan_check.py writes: every figure of every phase, and none far off.

    The bar is wide where data decides: a basis has at most as many columns as tokens, and repeated ones make it fewer.
    """
    checked = json.loads(plan.CHECKED.read_text())
    assert sorted(checked) == ["phase 0", "phase 1", "phase 2", "phase 3"]
    for phase in checked.values():
        assert phase.pop("where")
        assert sorted(phase) == ["disk", "memory", "read", "sent", "written"]
        assert all(0.9 <= ratio <= 1.4 for ratio in phase.values()), phase


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_lora_of_70b(configs: Path, nodes: int) -> None:
    """An adapter on every layer type, all phases on one node; phase 3, and phase 2's scores, against arithmetic by hand."""
    kinds = "ffn_down,ffn_up,ffn_gate,attn_q,attn_k,attn_v,attn_o"
    settings = dict(layer_type=kinds, tokens=512, gradient_checkpointing=True, gpu_memory=80e9, adapter="lora", lora_r=16)
    made = make_plan(str(configs / "70b"), nodes=nodes, **settings)
    training, ranks = made.phases[3], 8 * nodes
    assert training.gpu_total < USABLE * 80e9
    # A and B of q, o (8,192 in and out), k, v (1,024 out), gate, up and down, of 80 blocks.
    trained = 80 * 16 * (2 * 2 * 8192 + 2 * (8192 + 1024) + 3 * (8192 + 28672))
    assert trained == 207_093_760
    assert training.gpu["adapters"] == 2 * trained / ranks
    assert training.gpu["masters and moments"] == 12 * trained / ranks
    assert training.gpu["weights"] * ranks == pytest.approx(2 * 70_553_706_496, rel=1e-6)
    # [U_F, complement] of a tenth of the columns as reflectors, two matrices of n x |F| and their signs, dealt to owners.
    bases = 80 * 4 * (6 * (2 * 8192 + 1) * 819 + (2 * 28672 + 1) * 2867)
    assert bases / ranks <= training.gpu["bases"] < 1.2 * bases / ranks  # an owner has whole ones
    # Only A and B are checkpointed, with masters, moments and rotated coefficients, and only they are written at the end.
    assert training.checkpoint == 18 * trained and training.written == 2 * trained + training.checkpoint
    assert made.fits and made.smallest["none"] == (1, "zero3_70b.json")
    # One walk over the blocks shows all batches: rows of one block are held, of whole bases; of masks of entries all rows.
    of_block = 4 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 2 * 28672 * 8192 + 8192 * 28672)
    assert made.phases[2].gpu["scores"] == of_block / ranks
    in_steps = 80 if nodes == 1 else 1  # 32 samples a step; 64 and 128 take all 50 at once
    for more, blocks in (
        ({"adapter": "none"}, 80),
        ({"adapter": "none", "mask_unit": "row"}, 1),
        ({"gradient_checkpointing": False}, in_steps),
        ({"host_memory": 8e9}, in_steps),
    ):
        found = make_plan(str(configs / "70b"), nodes=nodes, **{**settings, **more}).phases[2].gpu["scores"]
        assert found == blocks * of_block / ranks, more
    full = make_plan(str(configs / "70b"), nodes=nodes, **{**settings, "adapter": "none"}).phases[3]
    assert full.gpu_total > training.gpu_total and training.sent < full.sent


@pytest.mark.parametrize("kind", ["activation", "gradient"])
def test_both_sides_of_70b(configs: Path, kind: str) -> None:
    """V of each layer beside one U for q, k and v, by hand: 100 samples of 512 tokens, more than any layer has inputs."""
    kinds, q, kv, h, blocks, ranks = "attn_q,attn_k,attn_v", 8192, 1024, 8192, 80, 8
    shape = read_shape(str(configs / "70b"), kinds, "all")
    job = Job(tokens=512, layer_type=kinds, output_basis=kind)
    plain = estimate_phases(shape, replace(job, output_basis="identity"), SHARDINGS[1])
    both = estimate_phases(shape, job, SHARDINGS[1])
    assert both[0] == plain[0]
    columns = q * q + 2 * kv * kv
    # V [m, m] and its values on disk; the masks are as large as before.
    assert both[1].disk - plain[1].disk == blocks * 4 * (columns + q + 2 * kv)
    assert both[2].disk == plain[2].disk
    # Of each layer W is gathered once; or there are passes that fetch the whole model, some of it twice and more.
    sent = both[1].sent - plain[1].sent
    assert sent == pytest.approx(blocks * (q + 2 * kv) * h * 2 * 7 / 8) if kind == "activation" else sent > shape.parameters * 2
    if kind == "activation":
        held = 4 * (q + 2 * kv) * h
        # W of the three in fp32, and for the largest V: W and W Σ in fp64, Σ in both, and W Σ Wᵀ and what decomposes it.
        assert both[1].gpu["decomposition"] == held + 2 * 8 * q * h + 12 * h * h + 40 * q * q
    else:
        # Of all layers at once: of q a rank's 13 samples, which are less to send than a Σ; Σ of k and v.
        assert both[1].gpu["inputs"] == blocks * (13 * 512 * q * 2 + 2 * 4 * kv * kv)
    # A GPU reads each V once. Gradients turned by V go to the rows' ranks in fp32.
    assert both[2].read - plain[2].read == blocks * 4 * columns
    tokens = 2 * 4 * 512  # of a rank, in two steps
    assert both[2].sent - plain[2].sent == pytest.approx(blocks * tokens * (q + 2 * kv) * 2 * 7 / 8)
    # 240 layers dealt to 8 owners, each of which has U of a block once: V of all, and at most a U for each layer.
    lefts = blocks * 4 * columns
    assert lefts / ranks <= both[3].gpu["bases"] <= (lefts + 3 * blocks * 4 * h * h) / ranks
    assert both[3].rotating > plain[3].rotating > 0


def test_both_sides_are_held_as_the_placement_says(configs: Path) -> None:
    """One rank: every V, and every U once. Two products of each, of m rows with U and n columns with V."""
    shape = read_shape(str(configs / "70b"), "attn_q,attn_k,attn_v", "0")
    job = Job(nodes=1, gpus_per_node=1, tokens=512, output_basis="activation")
    training = estimate_phases(shape, job, SHARDINGS[1])[3]
    assert training.gpu["bases"] == 4 * (8192**2 + 2 * 1024**2 + 8192**2)
    products = 2 * (8192 * 8192**2 + 8192 * 8192**2 + 2 * (1024 * 8192**2 + 8192 * 1024**2))
    assert training.rotating == pytest.approx(products / GPU.multiply_adds)


def test_what_no_output_basis_goes_with(configs: Path) -> None:
    for flag, value, cure in (
        ("adapter", "lora", "masks of whole columns, .* leave --output_basis and --mask_unit row out here"),
        ("basis_placement", "sharded", "give owner or auto"),
    ):
        with pytest.raises(ConfigError, match=f"--{flag} {value}: .*{cure}"):
            make_plan(str(configs / "70b"), output_basis="activation", **{flag: value})
    with pytest.raises(ConfigError, match="masks of whole columns"):
        make_plan(str(configs / "70b"), adapter="lora", mask_unit="row")
