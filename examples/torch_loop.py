"""torch alone, one process: python examples/torch_loop.py"""

import tiny
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import warp_ds

start = tiny.from_command_line("torch_loop")
tokenizer = AutoTokenizer.from_pretrained(start.model)
model = AutoModelForCausalLM.from_pretrained(start.model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

protection = warp_ds.protect_optimizer(model, optimizer, None, start.masks)  # None: the basis that the masks name
protection.max_grad_norm = 1.0  # clipping by the masked norm: leave clip_grad_norm_ out of the loop

torch.manual_seed(0)
samples = tiny.encode(tokenizer, start.task)
batches = DataLoader(samples, batch_size=4, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
for step, batch in enumerate(batches):
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    removed = protection.metrics().grad_norm_removed
    print(f"step {step}: loss {loss.item():.3f}, the mask took {removed:.0%} of the gradient's norm")

protection.release()
model.save_pretrained(start.out)
tokenizer.save_pretrained(start.out)
