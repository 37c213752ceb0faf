"""Only the rows of new tokens train, of embedding and head (tied too), in one process or under ZeRO-3:

python examples/freeze_new_tokens.py, or torchrun --nproc_per_node 2 …
"""

import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

import warp_ds

start = tiny.from_command_line("freeze_new_tokens")
tokenizer = AutoTokenizer.from_pretrained(start.model)
model = AutoModelForCausalLM.from_pretrained(start.model, dtype=torch.float32)
tokenizer.add_tokens(["<tool>", "</tool>"])
new = tokenizer.convert_tokens_to_ids(["<tool>", "</tool>"])
set_seed(0)  # new rows are drawn at random: on every rank the same
model.resize_token_embeddings(len(tokenizer))

model.requires_grad_(False)
words = {
    "model.embed_tokens.weight": model.get_input_embeddings().weight,
    "lm_head.weight": model.get_output_embeddings().weight,
}
for weight in words.values():  # tied: one parameter with two names
    weight.requires_grad_(True)
before = {name: weight.detach().clone() for name, weight in words.items()}

zero3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
}
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
        deepspeed=zero3 if tiny.world_size() > 1 else None,
    ),
)
warp_ds.freeze(trainer, dict.fromkeys(words, warp_ds.AllBut(new)))
trainer.train()
trainer.save_model()  # gathers on every rank; rank 0 writes

if trainer.is_world_process_zero():
    after = load_file(start.out / "model.safetensors")
    for name in words.keys() & after.keys():
        moved = (after[name] != before[name]).any(dim=1)
        assert moved[new].all() and moved.sum() == len(new)
    print(f"rows {new} of {', '.join(words)} were trained; all else is as it was, to the bit")
