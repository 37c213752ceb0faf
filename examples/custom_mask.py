"""A mask of your own, in the original space: freeze the largest tenth of every down projection.

python examples/custom_mask.py writes masks that every phase, `protect` and `WarpCallback` take.
"""

import re
from pathlib import Path

import tiny
import torch
from transformers import AutoModelForCausalLM

import warp_ds
from warp_ds.method.mask import frozen_count, pack_bits
from warp_ds.store.files import write_json
from warp_ds.store.fingerprints import fingerprint_model
from warp_ds.store.layers import TargetLayer
from warp_ds.store.masks import write_mask
from warp_ds.store.metadata import MasksMetadata, layer_entry, metadata_dict

SHARE = 0.1
start = tiny.from_command_line("custom_mask")
model = AutoModelForCausalLM.from_pretrained(start.model)
metadata = MasksMetadata(
    keep_ratio=SHARE, scope="layer", unit="entry", score="magnitude", basis="identity", basis_dir=None, basis_fingerprint=None,
    model_fingerprint=fingerprint_model(Path(start.model)), data_fingerprint="none", model_name=start.model,
)  # fmt: skip
frozen = {}
for name, weight in model.named_parameters():
    if place := re.fullmatch(r"model\.layers\.(\d+)\.mlp\.down_proj\.weight", name):
        layer = TargetLayer(name.removesuffix(".weight"), int(place[1]), "ffn_down", *weight.shape)
        count = frozen_count(SHARE, weight.numel())
        mask = torch.zeros(weight.numel(), dtype=torch.bool)
        mask[weight.detach().abs().flatten().topk(count).indices] = True
        frozen[name] = mask.view_as(weight)
        write_mask(start.out / "masks", layer, pack_bits(frozen[name]))
        metadata.layers[layer.name] = layer_entry(layer, layer.mask_file, frozen=count, wanted=count, threshold=None)
        metadata.frozen, metadata.entries = metadata.frozen + count, metadata.entries + weight.numel()
write_json(start.out / "masks" / "metadata.json", metadata_dict(metadata))

before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
warp_ds.protect_optimizer(model, optimizer, None, start.out / "masks", model_dir=start.model)
ids = torch.randint(3, model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0))
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
for name, mask in frozen.items():
    still = before[name] == model.get_parameter(name)
    print(f"{name}: {int(mask.sum())} frozen, of which {int((~still & mask).sum())} moved; {int((~still).sum())} moved in all")
    assert still[mask].all() and not still.all()
