"""``plan`` and ``doctor`` for mixtures of experts, hybrids, fused and multimodal models, against arithmetic by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from families import FAMILIES
from transformers import LlamaConfig, Qwen3MoeConfig

from warp_ds.errors import ConfigError
from warp_ds.flags.jobs import DoctorArguments
from warp_ds.launch.cli import main
from warp_ds.launch.planning.estimate import experts_bases
from warp_ds.launch.planning.fit import estimate_phases
from warp_ds.launch.planning.job import SHARDINGS, Job, Shape, read_shape
from warp_ds.launch.planning.said import of_model
from warp_ds.launch.resources import check_resources
from warp_ds.models.flops import active_parameters, routing
from warp_ds.models.targets import check_targets

H, INNER, E, K, DEPTH, V = 2048, 768, 128, 8, 48, 151936  # Qwen3-30B-A3B
ATTENTION = 2 * H * 4096 + 2 * H * 512 + 2 * 128  # q, o, k, v, and the norms of queries and keys
PARAMETERS = DEPTH * (3 * E * H * INNER + E * H + ATTENTION + 2 * H) + 2 * V * H + H
EXPERTS = "experts_down,experts_up,experts_gate"


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("qwen3")
    sizes = dict(hidden_size=H, intermediate_size=6144, moe_intermediate_size=INNER, num_experts=E, num_experts_per_tok=K)
    heads = dict(num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_hidden_layers=DEPTH)
    Qwen3MoeConfig(vocab_size=V, tie_word_embeddings=False, dtype="bfloat16", **sizes, **heads).save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def shape(qwen3: Path) -> Shape:
    return read_shape(str(qwen3), EXPERTS, "all")


def test_memory_is_by_all_parameters_and_operations_by_active_ones(shape: Shape) -> None:
    assert shape.parameters == PARAMETERS == 30_532_122_624
    assert shape.active == PARAMETERS - DEPTH * 3 * (E - K) * H * INNER - V * H  # the input embedding is looked up
    job = Job(nodes=4, tokens=512, batch_size=1, train_batch_size=1)
    _, basis, _, training = estimate_phases(shape, job, SHARDINGS[0])
    assert training.gpu["weights"] * 32 == pytest.approx(2 * PARAMETERS, rel=1e-5)
    assert training.gpu["masters and moments"] * 32 == 12 * DEPTH * 3 * E * H * INNER
    assert basis.read * 32 == 2 * PARAMETERS
    # Of a token a block keeps: inputs, gates, ups and their products of its eight experts, its copies for them and what they
    # make of it (bf16), eight vectors of the hidden size, and two norms in fp32.
    assert training.gpu["activations"] == DEPTH * 512 * (2 * 4 * K * INNER + 2 * 2 * K * H + 2 * 8 * H + 2 * 8 * H)


def test_bases_of_experts(shape: Shape) -> None:
    """One each for down projections, one a block for gates and ups; each of the tokens that it is given."""
    many, few = (Job(nodes=4, tokens=512, basis_samples=samples) for samples in (1000, 10))
    shared = 4 * (H + 1)
    assert experts_bases(shape, many) == (DEPTH * (E + 1), DEPTH * (E * 4 * (INNER + 1) * INNER + shared * H))
    assert experts_bases(shape, few) == (DEPTH * (E + 1), DEPTH * (E * 4 * (INNER + 1) * 320 + shared * H))  # 5,120 x 8 / 128
    for job in (many, few):
        _, basis, importance, _ = estimate_phases(shape, job, SHARDINGS[0])
        assert basis.disk == experts_bases(shape, job)[1]
        assert importance.disk == DEPTH * 3 * E * H * INNER // 8
    # A block's inputs on a rank: Σ, or the tokens, of what its gates and ups share; eight experts' worth of each token.
    own = -(-1000 // 32) * 512
    given = -(-own * K // E)
    assert estimate_phases(shape, many, SHARDINGS[0])[1].gpu["inputs"] == 4 * H * H + E * given * INNER * 2
    assert "use more --safety_samples" in " ".join(of_model(shape, few))
    assert "use more --safety_samples" not in " ".join(of_model(shape, many))


def test_gradients_go_where_their_tokens_do(shape: Shape) -> None:
    """Phase 2 sends eight experts' gradients of each token, not those of all."""
    job = Job(nodes=4, tokens=512)
    routed, everywhere = (estimate_phases(of, job, SHARDINGS[0])[2].sent for of in (shape, replace(shape, routed=E)))
    none = estimate_phases(replace(shape, routed=0), job, SHARDINGS[0])[2].sent
    assert (routed - none) / (everywhere - none) == pytest.approx(K / E)


NUMBERS = {
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=3),
    "ernie4_5_moe": dict(moe_num_experts=4, moe_k=3),
    "deepseek_v3": dict(n_routed_experts=4, num_experts_per_tok=3),
    "hunyuan_v1_moe": dict(num_experts=4, moe_topk=3),
    "gemma4_text": dict(num_experts=4, top_k_experts=3, enable_moe_block=True, moe_intermediate_size=16),
    "longcat_flash": dict(n_routed_experts=4, moe_topk=3),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_what_families_call_the_two_numbers(name: str) -> None:
    from transformers import CONFIG_MAPPING

    assert routing(CONFIG_MAPPING[name](**NUMBERS[name])) == (3, 4)


@pytest.mark.parametrize(
    "name", ["llama", "glm4", "qwen3_next", "mixtral", "glm4_moe", "gpt_oss", "llama4_text", "deepseek_v3"]
)
def test_active_parameters_are_those_that_a_token_meets(name: str) -> None:
    """Each parameter once, but a looked-up embedding; of experts' two of four."""
    model = FAMILIES[name].model(name)
    wanted = 0
    for key, p in model.named_parameters():
        wanted += p.numel() // 2 if ".experts." in key else p.numel()
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert active_parameters(model) == wanted - (0 if tied else model.get_input_embeddings().weight.numel())
    assert routing(model.config)[1] == (1 if name in ("llama", "glm4") else 4)


WORDS = {
    "glm4_moe": (
        "ffn_down,experts_down",
        ["2 of a block's 4", "12 layers with 12 bases", "experts_down is in 3 of 4 blocks (not in 0)"],
    ),
    "mixtral": ("ffn_down", ["2 of a block's 4", "16 layers with 16 bases", "loaded in shards"]),
    "lfm2": ("ffn_down,attn_q", ["attn_q is in 2 of 4 blocks (not in 0,2)", "loaded in shards"]),
    "phi3": ("attn_q,ffn_up", ["loaded in shards"]),
}


@pytest.mark.parametrize("name", WORDS)
def test_plan_and_doctor_say_what_a_model_is_made_of(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds, words = WORDS[name]
    FAMILIES[name].config(name).save_pretrained(tmp_path)
    assert main(["plan", "--model_name", str(tmp_path), "--layer_type", kinds]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    shape = read_shape(str(tmp_path), kinds, "all")
    found = of_model(shape, Job(layer_type=kinds))
    assert all(line in printed for line in found)
    assert all(any(part in line for line in found) for part in words), found
    arguments = DoctorArguments(device="cpu", output_dir=str(tmp_path), layer_type=kinds)
    (layers,) = [f.found for f in check_resources(arguments, tmp_path, 1, 1) if f.name == "layers"]
    assert layers == "; ".join([f"{len(shape.targets)} to rotate", *found])
    assert ("mixture of experts" in printed) == (name in ("glm4_moe", "mixtral"))


@pytest.mark.parametrize("name", ["gpt_oss", "llama4_text"])
def test_experts_that_are_stored_transposed_are_planned_for(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FAMILIES[name].config(name).save_pretrained(tmp_path)
    assert main(["plan", "--model_name", str(tmp_path), "--layer_type", "experts_down"]) == 0
    count = 16 if name == "gpt_oss" else 8
    assert f"{count} layers with {count} bases" in " ".join(capsys.readouterr().out.split())


def test_refused_experts_are_named_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    FAMILIES["jetmoe"].config("jetmoe").save_pretrained(tmp_path)
    assert main(["plan", "--model_name", str(tmp_path), "--layer_type", "experts_down"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "model.layers.0.self_attention.experts, a JetMoeMoA, holds its experts in a way that is not known" in line


def test_bases_are_counted_as_phase_1_makes_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four blocks of four experts: a basis a down projection, and one for gates and ups of a block, or of each expert."""
    FAMILIES["mixtral"].config("mixtral").save_pretrained(tmp_path)
    for given, count in ((["block"], 20), (["expert"], 32)):
        assert main(["plan", "--model_name", str(tmp_path), "--layer_type", EXPERTS, "--expert_basis", *given]) == 0
        assert f"48 layers with {count} bases" in " ".join(capsys.readouterr().out.split())
        arguments = DoctorArguments(device="cpu", output_dir=str(tmp_path), layer_type=EXPERTS, expert_basis=given[0])
        (layers,) = [f.found for f in check_resources(arguments, tmp_path, 1, 1) if f.name == "layers"]
        assert f"48 layers with {count} bases" in layers


def test_expert_bases_of_a_model_without_experts_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2).save_pretrained(tmp_path)
    assert main(["plan", "--model_name", str(tmp_path), "--expert_basis", "expert"]) == 2
    assert "none of the layers is an expert's" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(ConfigError, match="none of the layers is an expert's"):
        check_targets(tmp_path, "all", "attn_q", expert_basis="expert")
