"""A list of neurons stays as it is: their rows of up and gate, their columns of down: python examples/freeze_neurons.py

torch alone, one process; with an engine of DeepSpeed's it would be warp_ds.freeze(engine, masks).
"""

import tiny
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import warp_ds

start = tiny.from_command_line("freeze_neurons")
tokenizer = AutoTokenizer.from_pretrained(start.model)
model = AutoModelForCausalLM.from_pretrained(start.model, dtype=torch.float32)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)

neurons = {0: [3, 17, 40], 1: [0, 95]}  # block -> numbers of its feed-forward neurons
masks = {}
for block, numbers in neurons.items():
    masks[f"model.layers.{block}.mlp.up_proj.weight"] = numbers  # rows
    masks[f"model.layers.{block}.mlp.gate_proj.weight"] = numbers
    masks[f"model.layers.{block}.mlp.down_proj.weight"] = (slice(None), numbers)  # columns
before = {name: model.get_parameter(name).detach().clone() for name in masks}

step = warp_ds.freeze_optimizer(model, optimizer, masks)
step.max_grad_norm = 1.0  # clipping by the masked norm: leave clip_grad_norm_ out of the loop

torch.manual_seed(0)
samples = tiny.encode(tokenizer, start.task)
for batch in DataLoader(samples, batch_size=4, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer)):
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
step.release()

for name, mask in masks.items():
    after = model.get_parameter(name).detach()
    assert torch.equal(after[mask], before[name][mask]) and not torch.equal(after, before[name])
model.save_pretrained(start.out)
tokenizer.save_pretrained(start.out)
