"""A basis of your own: directions that harmful prompts use and harmless ones do not, then phase 2 in it.

python examples/custom_basis.py writes a basis/ that --basis_dir takes, and masks/ made with it.
"""

import json
import re
from pathlib import Path

import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from warp_ds.flags.arguments import ImportanceArguments
from warp_ds.method.covariance import Covariance
from warp_ds.method.eigenbasis import covariance_basis
from warp_ds.phases.importance import run_importance
from warp_ds.store.files import write_json, write_tensors
from warp_ds.store.fingerprints import fingerprint_model, fingerprint_rows
from warp_ds.store.layers import TargetLayer
from warp_ds.store.metadata import BasisMetadata, layer_entry, metadata_dict

LEFT_OUT = 8  # of the harmless prompts' leading directions, in each layer
start = tiny.from_command_line("custom_basis")
tokenizer, model = AutoTokenizer.from_pretrained(start.model), AutoModelForCausalLM.from_pretrained(start.model)
safety_file = start.out.parent / "safety.jsonl"
harmful = [json.loads(row)["prompt"] for row in safety_file.read_text().splitlines()]
modules = {n: m for n, m in model.named_modules() if re.fullmatch(r"model\.layers\.\d+\.mlp\.down_proj", n)}


def covariances(prompts: list[str]) -> dict[str, torch.Tensor]:
    """Of each layer's inputs over all tokens, [n, n]."""
    sums = {name: Covariance(module.in_features) for name, module in modules.items()}
    hooks = [m.register_forward_hook(lambda _, x, y, n=n: sums[n].add(x[0].flatten(0, 1))) for n, m in modules.items()]
    with torch.no_grad():
        for prompt in prompts:
            model(**tokenizer(prompt, return_tensors="pt"))
    for hook in hooks:
        hook.remove()
    return {name: sum_.result() for name, sum_ in sums.items()}


asked, answered = covariances(harmful), covariances([row["prompt"] for row in start.task])
metadata = BasisMetadata(
    "activation", fingerprint_model(Path(start.model)), fingerprint_rows(harmful), "prompt", start.model, 0
)
for name, module in modules.items():
    layer = TargetLayer(name, int(name.split(".")[2]), "ffn_down", module.out_features, module.in_features)
    usual = covariance_basis(answered[name], max_rank=LEFT_OUT).columns.double()
    outside = torch.eye(layer.n, dtype=torch.float64) - usual @ usual.T
    basis = covariance_basis((outside @ asked[name].double() @ outside).float(), max_rank=layer.n - LEFT_OUT)
    file = f"{layer.stem}_svd.safetensors"
    write_tensors(start.out / "basis" / file, {"U": basis.columns, "S": basis.values})
    metadata.layers[name] = layer_entry(layer, file)
    metadata.bases[file] = {"n": layer.n, "rank": basis.rank}
write_json(start.out / "basis" / "metadata.json", metadata_dict(metadata))

run = run_importance(
    ImportanceArguments(
        model_name=start.model, safety_data=str(safety_file), basis_dir=str(start.out / "basis"), dtype="float32", device="cpu",
        layer_type="ffn_down", output_dir=str(start.out), log_dir=str(start.out / "logs"), run_name="phase2", resume="never",
    )
)  # fmt: skip
print(f"train with --masks_dir {run / 'masks'}")
