"""TRL's SFTTrainer with a LoRA adapter, kept out of the frozen directions by one callback: python examples/lora_trl.py

pip install trl peft. The masks are of whole columns (phase 2 with --mask_unit column). Then, on the adapter alone:
warp-ds verify --before MODEL --adapter checkpoints/tiny/lora_trl --masks_dir checkpoints/tiny/phase2_columns/masks
"""

import tiny
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from warp_ds import WarpCallback

start = tiny.from_command_line("lora_trl", masks="phase2_columns")
rows = [{"prompt": row["prompt"] + "\n", "completion": row["response"]} for row in start.task]
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(start.model),
    train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(start.model),
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=["down_proj", "q_proj"]),  # the masked layers
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
trainer.save_model()  # an ordinary adapter directory
