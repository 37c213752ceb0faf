"""Some rows and some entries train under ZeRO-3, all else of their weights stays (DeepSpeed issue 5041):

deepspeed examples/freeze_rows.py, or python …
"""

import os

import deepspeed
import tiny
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import warp_ds

for name, alone in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29514").items():
    os.environ.setdefault(name, alone)  # what a launcher sets
deepspeed.init_distributed()
start = tiny.from_command_line("freeze_rows")
tokenizer = AutoTokenizer.from_pretrained(start.model)
model = AutoModelForCausalLM.from_pretrained(start.model, dtype=torch.float32)

rows, entries = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"
before = {name: weight.detach().clone() for name, weight in model.named_parameters() if name in (rows, entries)}
train = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in before.items()}
train[rows][:7] = True  # a rank's shard may begin in the middle of a row
train[entries] = torch.rand(train[entries].shape, generator=torch.Generator().manual_seed(0)) < 0.1
for name, weight in model.named_parameters():
    weight.requires_grad_(name in train)

engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.1),
    config={
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    },
)
warp_ds.freeze(engine, {name: ~mask for name, mask in train.items()})  # True = frozen

rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
mine = tiny.encode(tokenizer, start.task)[rank::ranks]
for batch in DataLoader(mine, batch_size=4, collate_fn=DataCollatorForSeq2Seq(tokenizer)):
    loss = engine(**{name: value.to(engine.device) for name, value in batch.items()}).loss
    engine.backward(loss)
    engine.step()

with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
    for name, weight in engine.module.named_parameters():
        if name in train:
            moved = weight.detach().cpu() != before[name]
            assert not moved[~train[name]].any() and moved[train[name]].float().mean() > 0.9
    if rank == 0:
        print(f"of {rows} 7 rows were trained, of {entries} a tenth; all else is as it was, to the bit")
        engine.module.save_pretrained(start.out)
