"""A pruned model stays sparse while it is trained under ZeRO-3: deepspeed examples/freeze_pruned.py, or python …"""

import os

import deepspeed
import tiny
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import warp_ds

for name, alone in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29512").items():
    os.environ.setdefault(name, alone)  # what a launcher sets
deepspeed.init_distributed()
start = tiny.from_command_line("freeze_pruned")
tokenizer = AutoTokenizer.from_pretrained(start.model)
model = AutoModelForCausalLM.from_pretrained(start.model, dtype=torch.float32)

zeros = {}
for name, weight in model.named_parameters():
    if name.endswith("_proj.weight"):  # the half that is smallest
        zeros[name] = weight.detach().abs() <= weight.detach().abs().median()
        weight.data.masked_fill_(zeros[name], 0.0)

engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1),
    config={
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
    },
)
step = warp_ds.freeze(engine, zeros)

rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
mine = tiny.encode(tokenizer, start.task)[rank::ranks]
for number, batch in enumerate(DataLoader(mine, batch_size=4, collate_fn=DataCollatorForSeq2Seq(tokenizer))):
    loss = engine(**{name: value.to(engine.device) for name, value in batch.items()}).loss
    engine.backward(loss)
    engine.step()
    if rank == 0:
        print(f"step {number}: loss {loss.item():.3f}, {step.masked_fraction:.1%} of the pruned layers' weights stay 0")

with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
    for name, weight in engine.module.named_parameters():
        assert name not in zeros or torch.equal(weight.detach().cpu() == 0, zeros[name])
    if rank == 0:
        engine.module.save_pretrained(start.out)
        tokenizer.save_pretrained(start.out)
