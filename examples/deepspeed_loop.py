"""A bare DeepSpeed loop under ZeRO-3: deepspeed examples/deepspeed_loop.py, or python examples/deepspeed_loop.py"""

import os

import deepspeed
import tiny
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import warp_ds

for name, alone in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29511").items():
    os.environ.setdefault(name, alone)  # what a launcher sets
deepspeed.init_distributed()
start = tiny.from_command_line("deepspeed_loop")
tokenizer = AutoTokenizer.from_pretrained(start.model)
model = AutoModelForCausalLM.from_pretrained(start.model, dtype=torch.float32)
config = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=config)

protection = warp_ds.protect(engine, None, start.masks)  # before the first step; None: the basis that the masks name

rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
mine = tiny.encode(tokenizer, start.task)[rank::ranks]
for step, batch in enumerate(DataLoader(mine, batch_size=4, collate_fn=DataCollatorForSeq2Seq(tokenizer))):
    loss = engine(**{name: value.to(engine.device) for name, value in batch.items()}).loss
    engine.backward(loss)
    engine.step()
    removed = protection.metrics().grad_norm_removed  # on every rank
    if rank == 0:
        print(f"step {step}: loss {loss.item():.3f}, the mask took {removed:.0%} of the gradient's norm")

with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
    if rank == 0:
        engine.module.save_pretrained(start.out)
        tokenizer.save_pretrained(start.out)
