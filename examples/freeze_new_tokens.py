"""Only the rows of new tokens train, of embedding and head (tied too): python examples/freeze_new_tokens.py

Under ZeRO-3 too: torchrun --nproc_per_node 8 examples/freeze_new_tokens.py, with deepspeed=… in TrainingArguments.
"""

import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import warp_ds

start = tiny.from_command_line("freeze_new_tokens")
tokenizer = AutoTokenizer.from_pretrained(start.model)
model = AutoModelForCausalLM.from_pretrained(start.model, dtype=torch.float32)
tokenizer.add_tokens(["<tool>", "</tool>"])
new = tokenizer.convert_tokens_to_ids(["<tool>", "</tool>"])
model.resize_token_embeddings(len(tokenizer))

model.requires_grad_(False)
words = {
    "model.embed_tokens.weight": model.get_input_embeddings().weight,
    "lm_head.weight": model.get_output_embeddings().weight,
}
for weight in words.values():  # tied: one parameter with two names
    weight.requires_grad_(True)
before = {name: weight.detach().clone() for name, weight in words.items()}

rows = [{**row, "response": f"<tool>{row['response']}</tool>"} for row in start.task]
trainer = Trainer(
    model=model,
    train_dataset=tiny.encode(tokenizer, rows),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    args=TrainingArguments(
        output_dir=str(start.out),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_strategy="no",
        report_to="none",
    ),
)
warp_ds.freeze(trainer, dict.fromkeys(words, warp_ds.AllBut(new)))
trainer.train()
trainer.save_model()

others = torch.ones(len(before["lm_head.weight"]), dtype=torch.bool)
others[new] = False
for name, weight in words.items():
    after = weight.detach().cpu()
    assert torch.equal(after[others], before[name][others]) and not torch.equal(after[new], before[name][new])
print(f"rows {new} of {', '.join(words)} were trained; all else is as it was, to the bit")
