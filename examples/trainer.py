"""transformers' Trainer, protected by one callback: python examples/trainer.py

Under ZeRO-3 too: torchrun --nproc_per_node 8 examples/trainer.py, with deepspeed=… in TrainingArguments.
"""

import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from warp_ds import WarpCallback

start = tiny.from_command_line("trainer")
tokenizer = AutoTokenizer.from_pretrained(start.model)
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(start.model),
    train_dataset=tiny.encode(tokenizer, start.task),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    callbacks=[WarpCallback(masks_dir=start.masks)],
    args=TrainingArguments(
        output_dir=str(start.out),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=2,
        save_strategy="no",
        report_to="none",
    ),
)
trainer.train()  # each log has masked_fraction, grad_norm_removed, rotate_seconds and rotate_bytes
trainer.save_model()
