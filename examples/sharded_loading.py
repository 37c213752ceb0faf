"""A plain DeepSpeed training that loads and saves in shards: deepspeed examples/sharded_loading.py, or python …

Nothing of it is protected: load_sharded and save_sharded serve any ZeRO-3 program.
"""

import os

import deepspeed
import tiny
import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, DataCollatorForSeq2Seq

import warp_ds

for name, alone in dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29513").items():
    os.environ.setdefault(name, alone)  # what a launcher sets
deepspeed.init_distributed()
start = tiny.from_command_line("sharded_loading")
config = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3},
    "zero_allow_untested_optimizer": True,
}
device = "cuda" if torch.cuda.is_available() else "cpu"
model = warp_ds.load_sharded(start.model, ds_config=config, dtype=torch.float32, device=device)
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3), config=config)

tokenizer = AutoTokenizer.from_pretrained(start.model)
rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
mine = tiny.encode(tokenizer, start.task)[rank::ranks]
for step, batch in enumerate(DataLoader(mine, batch_size=4, collate_fn=DataCollatorForSeq2Seq(tokenizer))):
    loss = engine(**{name: value.to(engine.device) for name, value in batch.items()}).loss
    engine.backward(loss)
    engine.step()
    if rank == 0:
        print(f"step {step}: loss {loss.item():.3f}")

warp_ds.save_sharded(engine, start.out, tokenizer=tokenizer)
