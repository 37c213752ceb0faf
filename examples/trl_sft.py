"""TRL's SFTTrainer, protected by one callback: python examples/trl_sft.py  (pip install trl)"""

import tiny
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from warp_ds import WarpCallback

start = tiny.from_command_line("trl_sft")
rows = [{"prompt": row["prompt"] + "\n", "completion": row["response"]} for row in start.task]
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(start.model),
    train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(start.model),
    callbacks=[WarpCallback(masks_dir=start.masks)],
    args=SFTConfig(
        output_dir=str(start.out),
        max_steps=6,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        logging_steps=2,
        bf16=False,  # a tiny model in fp32; leave it out for yours
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
    ),
)
trainer.train()
trainer.save_model()
