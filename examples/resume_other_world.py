"""A ZeRO-3 Trainer goes on on another number of ranks than its checkpoint was written by (DeepSpeed issue 5405):

torchrun --nproc_per_node 2 examples/resume_other_world.py, then --nproc_per_node 1. Each start takes three steps.
"""

import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import warp_ds

start = tiny.from_command_line("resume_other_world")
start.out.mkdir(parents=True, exist_ok=True)
last = get_last_checkpoint(str(start.out))
done = int(last.rpartition("-")[2]) if last else 0
ranks = tiny.world_size()
tokenizer = AutoTokenizer.from_pretrained(start.model)
trainer = Trainer(
    model=AutoModelForCausalLM.from_pretrained(start.model, dtype=torch.float32),
    train_dataset=tiny.encode(tokenizer, start.task),
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    processing_class=tokenizer,
    args=TrainingArguments(
        output_dir=str(start.out),
        max_steps=done + 3,
        per_device_train_batch_size=12 // ranks,  # the global batch stays, and with it the samples that come next
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_steps=3,
        report_to="none",
        deepspeed={
            "zero_optimization": {"stage": 3},
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_allow_untested_optimizer": True,
        },
    ),
)
trainer.train(resume_from_checkpoint=warp_ds.resume_any_world(trainer))

losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
assert trainer.state.global_step == len(losses) == done + 3  # those of the starts before are in the checkpoint
if trainer.is_world_process_zero():
    print(f"{ranks} ranks went on after step {done}: losses {losses}")
